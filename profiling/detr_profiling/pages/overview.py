"""The report around its figures: what was found, on which machine, how to read it, which commands make it again."""

import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from detr_fast.option_groups import flags
from detr_profiling.pages import formats
from detr_profiling.pages import parity as report_parity
from detr_profiling.pages.blocks import BAD, Block, Cell, Facts, Paragraph, Table, cells, code, figures, sentence, words
from detr_profiling.pages.ladder import beside_baselines, by_mode, climb
from detr_profiling.pages.results import LADDER_FILE, PARITY_FILE, RACE_FILE, TRACE_FILE, Results
from detr_profiling.pages.trace import growth, peak_owner, range_fractions, synchronizations
from detr_profiling.workload import WorkloadOptions

FILES = {"ladder": LADDER_FILE, "trace": TRACE_FILE, "parity": PARITY_FILE}
"""Result files of a whole report."""
ALL_FILES = {"race": RACE_FILE, **FILES}
MACHINE_UNITS = {
    "memory_gib": "memory, GiB",
    "gpu_memory_gib": "GPU memory, GiB",
    "power_limit_watts": "power limit, W",
    "capabilities": "instructions",
    "cuda": "CUDA",
    "python": "Python",
}
READING = [
    ("302 (11, 5 runs)", "The median, the interquartile range (IQR), and the number of runs."),
    (
        "Ladder",
        "An incremental ablation: every row adds one technique to the row above it and runs in a process of its own. "
        "“Leave-one-out” is everything on but this technique. The two differ where techniques do the same work. A "
        "technique that does not run, or is not close, is left out of the rows after it.",
    ),
    ("Speedup", "Over the row “reference”: the plain DETR in float32, eager, measured beside the others."),
    (
        "A step",
        "From photographs on the host to the last write. They have 0.6 of their size in the batch and are resized on "
        "the device, for baselines too, whose own data workers would do it. On a GPU a run is several steps launched "
        "back to back, a batch copied one ahead, and its time is that of one step.",
    ),
    (
        "Padding overhead",
        "Pixels of padding in percent of the images' own: 0 where all images of a batch have one size.",
    ),
    (
        "Error, of allowed",
        "The error is the largest difference from the plain reference in float64, of the quantity named beside it; of "
        "gradients it is relative to their norm. Allowed is twice the error of plain eager code in the same precision, "
        "plus an absolute tolerance. “Of allowed” is the error in percent of that: close is at most 100 %, and no NaN.",
    ),
    (
        "Profiler ranges",
        "Named parts of a step. A range's time is the host's, without the ranges within it. A GPU works behind the "
        "host: what it did for a range is under “device”.",
    ),
    (
        "Device synchronisations",
        "Each makes the host wait until the GPU has caught up, and then the GPU until the host has. On a CPU nothing "
        "waits; counted are the reads that would.",
    ),
    (
        "Roofline",
        "No range can be faster than its bytes at the measured memory bandwidth or its FLOP at the rate of the "
        "measured GEMM: “bound” is the larger of the two times, “× bound” how many times it the range takes.",
    ),
    (
        formats.NOT_KNOWN,
        "Does not apply on this machine, or could not be measured; a column of nothing else is left out.",
    ),
]


def heading(results: Results) -> str:
    """Return which model does what."""
    options = workload_options(results)
    if not options:
        return "Profile"
    return f"{options.get('model', 'Profile')}, {options.get('mode', 'step')}"


def findings(results: Results) -> list[tuple[str, Cell]]:
    """Return the report's summary: of what, and what was found."""
    found = [(mode, Cell(beside_baselines(rows))) for mode, rows in by_mode(results.race).items()]
    found += [(f"{mode} ladder", Cell(climb(rows))) for mode, rows in by_mode(results.ladder).items()]
    if results.parity:
        found.append(("parity", report_parity.verdict(results.parity)))
    if results.trace:
        found += trace_findings(results.trace)
    absent = [name for name in FILES if not has(results, name)]
    return [*found, *([("not measured yet", Cell(", ".join(absent)))] if absent else [])]


def trace_findings(trace: Mapping[str, Any]) -> Iterator[tuple[str, Cell]]:
    ranges, fractions = trace["ranges"], range_fractions(trace)
    if problem := trace.get("problem"):
        yield "trace", Cell(f"NOT complete: {problem}", BAD)
    largest = max(range(len(ranges)), key=lambda index: ranges[index]["fraction"] or 0.0, default=None)
    if largest is not None:
        yield "largest profiler range", Cell(f"{ranges[largest]['name']}, {fractions[largest]} % of a step")
    yield "device synchronisations", Cell(synchronizations(trace))
    if memory := trace["memory"]:
        peak = f"{formats.number(memory['peak_mib'])} MiB in {peak_owner(memory)}"
        yield "peak memory", Cell(f"{peak}; {growth(memory)}" if memory["leaking"] else peak, BAD * memory["leaking"])


def has(results: Results, name: str) -> bool:
    return bool(getattr(results, name))


def workload_options(results: Results) -> dict[str, Any]:
    """Return the options of the first part that has them."""
    found = (options_of(results, name) for name in ("trace", "parity", "ladder", "race"))
    return next(filter(None, found), {})


def options_of(results: Results, name: str, mode: str | None = None) -> dict[str, Any]:
    """Return what a part ran, of rows those in `mode` or the first; {} where the part is not there."""
    found = getattr(results, name)
    if not found:
        return {}
    if isinstance(found, Mapping):
        return {key: value for key, value in (found.get("workload") or {}).items() if key not in ("output", "name")}
    first = next(row for row in found if mode in (row.mode, None))
    conditions = dict(first.conditions)
    return {
        "mode": first.mode,
        **{key: conditions[key] for key in ("model", "size", "size_mix", "batch_size", "threads") if key in conditions},
    }


def machine_blocks(results: Results) -> list[Block]:
    origins = {name: origin(results, name) for name in ALL_FILES if has(results, name)}
    blocks: list[Block] = []
    if len({(each.get("device"), each.get("commit")) for each in origins.values()}) > 1:
        parts = [f"{name} on {each.get('device')} at commit {each.get('commit')}" for name, each in origins.items()]
        blocks.append(Paragraph(sentence(["NOT all parts were measured on one machine and commit", *parts])))
    machine = next((origins[name] for name in ("trace", "parity", "ladder", "race") if name in origins), {})
    versions, options = machine.get("versions") or {}, workload_options(results)
    facts = [
        (MACHINE_UNITS.get(name, name.replace("_", " ")), plain(value))
        for name, value in machine.items()
        if name != "versions" and plain(value) != plain(options.get(name))
    ]
    blocks.append(Facts("Machine", facts))
    if versions:
        blocks.append(Facts("Versions", [(name, plain(version)) for name, version in versions.items()]))
    blocks.append(Facts("Workload", [(name.replace("_", " "), plain(value)) for name, value in options.items()]))
    return [block for block in blocks if not (isinstance(block, Facts) and not block.pairs)]


def origin(results: Results, name: str) -> Mapping[str, Any]:
    """Return device, commit and date of a part that is there."""
    found = getattr(results, name)
    return (found.get("machine") or {}) if isinstance(found, Mapping) else dict(found[0].conditions)


def plain(value: Any) -> str:
    """Return an option or a fact as one word."""
    if value is None:
        return formats.NOT_KNOWN
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return formats.number(value)
    return str(value)


def reading_blocks() -> list[Block]:
    return [Facts("", READING, prose=True)]


def command_blocks(results: Results) -> list[Block]:
    """Return the command that makes each part again, and when and at which commit it ran."""
    modes: dict[str, list[str | None]] = {name: [*by_mode(getattr(results, name))] for name in ("race", "ladder")}
    rows = []
    for name in ALL_FILES if results.race else FILES:
        made = origin(results, name) if has(results, name) else {}
        about = [plain(made.get(key)) for key in ("date", "commit")]
        rows += [cells(ALL_FILES[name], command(results, name, mode), *about) for mode in modes.get(name) or [None]]
    rows.append(cells("report.html, report.md", f"python -m detr_profiling report --output {folder(results)}", "", ""))
    columns = [*words("file"), *code("command"), *figures("date", "commit")]
    return [Table("What makes each part", columns, rows)]


def missing(results: Results, name: str) -> Paragraph:
    return Paragraph(f"There is no {FILES[name]} in this folder. It comes from", command=command(results, name))


def folder(results: Results) -> str:
    return shlex.quote(str(results.folder))


def command(results: Results, name: str, mode: str | None = None) -> str:
    """Return the command line of a part that is there, or of one that would go with the others."""
    own, shared = options_of(results, name, mode), WorkloadOptions().to_dict()
    options = own or {key: value for key, value in workload_options(results).items() if key in shared}
    changed = {key: value for key, value in options.items() if str(value) != str(shared.get(key, False))}
    words = ["python -m detr_profiling", name, "--output", folder(results), shlex.join(flags(changed))]
    return " ".join(words).strip()
