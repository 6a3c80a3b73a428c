"""What a report says beside its figures: what was found, on which machine, how to read it, how to get it again."""

import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from detr_profiling.command_line import arguments
from detr_profiling.pages import formats
from detr_profiling.pages import parity as report_parity
from detr_profiling.pages.ladder import by_mode, climb
from detr_profiling.pages.page import BAD, Block, Cell, Facts, Paragraph, Table, cells, code, figures, sentence, words
from detr_profiling.pages.results import LADDER_FILE, PARITY_FILE, TRACE_FILE, Results
from detr_profiling.pages.trace import growth, peak_place, stage_shares, waits
from detr_profiling.workload import WorkloadOptions

FILES = {"ladder": LADDER_FILE, "trace": TRACE_FILE, "parity": PARITY_FILE}
MACHINE_UNITS = {
    "memory_gib": "memory, GiB",
    "gpu_memory_gib": "GPU memory, GiB",
    "power_limit_watts": "power limit, W",
    "capabilities": "instructions",
    "cuda": "CUDA",
    "python": "Python",
}
READING = [
    (
        "302 (11, 5 runs)",
        "The median, the distance between the first and the third quartile, and how many runs there were.",
    ),
    (
        "Ladder",
        "Every row adds one technique to the row above it and runs in a process of its own. What it is worth at the "
        "top stands under “without it”: everything on but this one. The two differ where techniques do the same work. "
        "A technique that does not run, or is not close, is left out of the rows after it.",
    ),
    (
        "A step",
        "From photographs on the host to the last write. They have 0.6 of their size in the batch and are resized on "
        "the device, also for the others, whose own data workers would do it. On a GPU a run is several steps issued "
        "back to back, a batch copied one ahead, and its time is that of one step.",
    ),
    (
        "Padding",
        "Pixels computed for each that is an image's: 1 where all images of a batch have one size.",
    ),
    (
        "Error and allowed",
        "The largest difference from the plain reference in float64, of gradients relative to their norm; and twice "
        "the same of plain eager code in the same precision, plus a floor. Close: no larger than that, and no NaN.",
    ),
    (
        "Stages",
        "A stage's time is the host's, without the stages within it. A GPU works behind the host: what it did for a "
        "stage stands under “device”.",
    ),
    (
        "Host waits",
        "Each makes the host stand still until the GPU has caught up, and then the GPU until the host has. On a CPU "
        "nothing waits; counted are the reads that would.",
    ),
    (
        "Roofline",
        "No stage can be faster than its bytes at the measured copy's speed or its FLOP at the measured product's; "
        "“least ms” is the larger of the two, “times the least” what the stage takes of it.",
    ),
    (formats.NOT_KNOWN, "Does not apply on this machine, or could not be measured."),
]


def heading(results: Results) -> str:
    """Which model doing what."""
    options = workload_options(results)
    if not options:
        return "Profile"
    return f"{options.get('model', 'Profile')}, {options.get('mode', 'step')}"


def findings(results: Results) -> list[tuple[str, Cell]]:
    """The report's summary: of what, and what was found."""
    found = [(mode, Cell(climb(rows))) for mode, rows in by_mode(results.ladder).items()]
    if results.parity:
        found.append(("parity", report_parity.verdict(results.parity)))
    if results.trace:
        found += trace_findings(results.trace)
    absent = [name for name in FILES if not has(results, name)]
    return [*found, *([("not measured yet", Cell(", ".join(absent)))] if absent else [])]


def trace_findings(trace: Mapping[str, Any]) -> Iterator[tuple[str, Cell]]:
    stages, shares = trace["stages"], stage_shares(trace)
    if problem := trace.get("problem"):
        yield "trace", Cell(f"NOT complete: {problem}", BAD)
    largest = max(range(len(stages)), key=lambda index: stages[index]["share"] or 0.0, default=None)
    if largest is not None:
        yield "largest stage", Cell(f"{stages[largest]['name']}, {shares[largest]} % of a step")
    yield "host waits", Cell(waits(trace))
    if memory := trace["memory"]:
        peak = f"{formats.number(memory['peak_mib'])} MiB in {peak_place(memory)}"
        yield "peak memory", Cell(f"{peak}; {growth(memory)}" if memory["leaking"] else peak, BAD * memory["leaking"])


def has(results: Results, name: str) -> bool:
    return bool(getattr(results, name))


def workload_options(results: Results) -> dict[str, Any]:
    """Of the first part that says what ran."""
    for name in ("trace", "parity"):
        if options := options_of(results, name):
            return options
    return options_of(results, "ladder")


def options_of(results: Results, name: str, mode: str | None = None) -> dict[str, Any]:
    """What a part ran, a ladder in `mode` or the first that it has; {} where the part is not there."""
    if not has(results, name):
        return {}
    if name != "ladder":
        options = getattr(results, name).get("workload") or {}
        return {key: value for key, value in options.items() if key not in ("out", "name")}
    first = next(row for row in results.ladder if mode in (row.mode, None))
    place = dict(first.place)
    return {
        "mode": first.mode,
        **{key: place[key] for key in ("model", "size", "sizes", "batch_size", "threads") if key in place},
    }


def machine_blocks(results: Results) -> list[Block]:
    origins = {name: origin(results, name) for name in FILES if has(results, name)}
    blocks: list[Block] = []
    if len({(each.get("device"), each.get("commit")) for each in origins.values()}) > 1:
        said = [f"{name} on {each.get('device')} at commit {each.get('commit')}" for name, each in origins.items()]
        blocks.append(Paragraph(sentence(["NOT all parts were measured on one machine and commit", *said])))
    machine = next((origins[name] for name in ("trace", "parity", "ladder") if name in origins), {})
    versions = machine.get("versions") or {}
    facts = [
        (MACHINE_UNITS.get(name, name.replace("_", " ")), plain(value))
        for name, value in machine.items()
        if name != "versions"
    ]
    blocks.append(Facts("Machine", facts))
    if versions:
        blocks.append(Facts("Versions", [(name, plain(version)) for name, version in versions.items()]))
    options = workload_options(results)
    blocks.append(Facts("Workload", [(name.replace("_", " "), plain(value)) for name, value in options.items()]))
    return [block for block in blocks if not (isinstance(block, Facts) and not block.pairs)]


def origin(results: Results, name: str) -> Mapping[str, Any]:
    """Device, commit and date of a part that is there."""
    if name == "ladder":
        return dict(results.ladder[0].place)
    return getattr(results, name).get("machine") or {}


def plain(value: Any) -> str:
    """An option or a fact as one word."""
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
    """What to type for each part again, and when and where it was typed."""
    modes: list[str | None] = [*by_mode(results.ladder)] or [None]
    runs = [(name, mode) for name in FILES for mode in (modes if name == "ladder" else [None])]
    rows = []
    for name, mode in runs:
        made = origin(results, name) if has(results, name) else {}
        about = [plain(made.get(key)) for key in ("date", "commit")]
        rows.append(cells(FILES[name], command(results, name, mode), *about))
    rows.append(cells("report.html, report.md", f"python -m detr_profiling report --out {folder(results)}", "", ""))
    columns = [*words("file"), *code("command"), *figures("date", "commit")]
    return [Table("What makes each part", columns, rows)]


def missing(results: Results, name: str) -> Paragraph:
    return Paragraph(f"There is no {FILES[name]} in this folder. It comes from", command=command(results, name))


def folder(results: Results) -> str:
    return shlex.quote(str(results.folder))


def command(results: Results, name: str, mode: str | None = None) -> str:
    """The command line of a part that is there, or of one that would go with the others."""
    own, shared = options_of(results, name, mode), WorkloadOptions().to_dict()
    options = own or {key: value for key, value in workload_options(results).items() if key in shared}
    return " ".join(
        ["python -m detr_profiling", name, "--out", folder(results), shlex.join(arguments(options))]
    ).strip()
