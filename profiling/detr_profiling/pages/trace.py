"""The report's sections on a traced step: stages, waits, operators, memory, roofline, telemetry, forms."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from detr_fast.stages import STAGES
from detr_profiling.pages import charts, formats
from detr_profiling.pages.page import Block, Key, Paragraph, Picture, Table, cells, code, figures, sentence, words

Trace = Mapping[str, Any]
COLOURED = (*STAGES, "device wait")
TELEMETRY = {
    "utilisation_percent": "utilisation, %",
    "memory_mib": "memory, MiB",
    "power_watts": "power, W",
    "sm_clock_mhz": "SM clock, MHz",
    "temperature_celsius": "temperature, °C",
}
WHAT_HOLDS = {True: "What the GPU's allocator has handed out", False: "What torch's tensors hold on the CPU"}
LONGEST_TABLE = 12
"""Rows that stand open; a longer table's rest is folded."""


def hue(stage: str) -> str:
    """The class of a stage's colour: only names that are known become part of the page's markup."""
    return f"stage-{stage.replace(' ', '-')}" if stage in COLOURED else "stage-other"


def on_gpu(trace: Trace) -> bool:
    return trace["idle_share"] is not None or bool(trace.get("problem"))


def lacking(trace: Trace) -> list[str]:
    """Says what a trace is not to be read without: that it has none of the GPU's events."""
    return [f"NOT complete: {trace['problem']}"] if trace.get("problem") else []


def timing(block: Mapping[str, Any], unit: str | None = None) -> str:
    return formats.timing(block["median"], block["q1"], block["q3"], block["runs"], unit)


def stages_blocks(trace: Trace) -> list[Block]:
    stages, shares = trace["stages"], stage_shares(trace)
    parts = [(stage["name"], stage["share"] or 0.0, hue(stage["name"])) for stage in stages]
    keys = [Key(colour, f"{name} {share} %") for (name, _, colour), share in zip(parts, shares, strict=True)]
    table = Table(
        f"Time in the step's stages, without those within them; {formats.many(trace['steps'], 'profiled step')}",
        [*words("stage"), *figures("host, ms (spread, runs)", "share, %", "device, ms")],
        [
            cells(stage["name"], stage_timing(stage), share, formats.number(stage["device_ms"]))
            for stage, share in zip(stages, shares, strict=True)
        ],
        hues=[colour for *_, colour in parts],
    )
    picture = charts.stacked_bar("stages-bar", "Shares of the stages in a step", parts)
    return [step_paragraph(trace), Picture(picture, "The host's time in one step", keys), table]


def stage_shares(trace: Trace) -> list[str]:
    """In percent, adding up to 100 where the shares add up to 1."""
    return formats.percents([stage["share"] for stage in trace["stages"]])


def stage_timing(stage: Mapping[str, Any]) -> str:
    return formats.timing(*(stage[name] for name in ("median_ms", "q1_ms", "q3_ms", "runs")))


def step_paragraph(trace: Trace) -> Paragraph:
    profiled = trace.get("profiled_step_ms")
    return Paragraph(
        sentence(
            [
                *lacking(trace),
                f"a step takes {timing(trace['step_ms'], 'ms')}",
                f"in the profiler, which the split is of, {timing(profiled, 'ms')}" if profiled else "",
                ""
                if trace["idle_share"] is None
                else f"the device is idle for {formats.percent(trace['idle_share'])} % of it",
            ]
        )
    )


def waits_blocks(trace: Trace) -> list[Block]:
    table = Table(
        "Host waits by operation and stage",
        [*code("operation"), *words("stage"), *figures("per step")],
        [cells(wait["operation"], wait["stage"], formats.count(wait["per_step"])) for wait in trace["host_waits"]],
    )
    said = sentence(
        [
            f"host waits: {waits(trace)}",
            f"{formats.count(trace['launches_per_step'])} {trace['launch_kind']} a step",
        ]
    )
    blocks: list[Block] = [Paragraph(said), *([table] if trace["host_waits"] else [])]
    blocks += usage_tables("operator", trace["operators"])
    if trace["kernels"]:
        blocks += usage_tables("kernel", trace["kernels"])
    else:
        reason = "no GPU" if not on_gpu(trace) else "the trace lacks them" if lacking(trace) else "none ran"
        blocks.append(Paragraph(f"Kernels: n/a, {reason}."))
    return blocks


def waits(trace: Trace) -> str:
    """How many. On a CPU what is counted are reads by the host, which nothing has to wait for there."""
    counted = formats.count(trace["host_waits_per_step"])
    if lacking(trace):
        return f"{counted} operators a step read on the host; other waits are not known"
    return (
        f"{counted} a step" if on_gpu(trace) else f"{counted} reads a step would wait for a GPU; on a CPU nothing does"
    )


def usage_tables(kind: str, usages: Sequence[Mapping[str, Any]]) -> Iterator[Table]:
    columns = [*code(kind), *figures("calls per step", "CPU, ms", "device, ms", "share, %")]
    rows = [
        cells(
            usage["name"],
            formats.count(usage["calls"]),
            formats.number(usage["cpu_ms"]),
            formats.number(usage["device_ms"]),
            formats.percent(usage["share"]),
        )
        for usage in usages
    ]
    title = f"{kind.capitalize()}s by their own time in a step"
    yield Table(title, columns, rows[:LONGEST_TABLE])
    if rows[LONGEST_TABLE:]:
        yield Table(f"{title}: the rest", columns, rows[LONGEST_TABLE:], folded=True)


def peak_place(memory: Mapping[str, Any]) -> str:
    operator = memory["peak_operator"]
    return f"{memory['peak_stage']} by {operator}" if operator else str(memory["peak_stage"])


def memory_blocks(trace: Trace) -> list[Block]:
    memory, process = trace["memory"], trace["process"]
    resident = (
        f"the process has at most {formats.number(process['peak_rss_mib'])} MiB resident and uses "
        f"{formats.number(process['cpu_seconds_per_step'])} s of CPU time a step"
    )
    if not memory:
        return [Paragraph(sentence(["the trace has no allocations", resident]))]
    peak = f"peak {formats.number(memory['peak_mib'])} MiB"
    said = Paragraph(sentence([f"{peak} in {peak_place(memory)}", growth(memory), resident]))
    curve = [(ms, mib) for ms, mib in memory["curve"]]
    if not curve:
        return [said]
    svg = charts.memory_curve("memory-curve", "Memory over the profiled steps", curve, (peak, peak_place(memory)))
    return [said, Picture(svg, WHAT_HOLDS[on_gpu(trace)])]


def growth(memory: Mapping[str, Any]) -> str:
    grows = memory["growth_mib_per_step"]
    if grows is None:
        return "one step does not show whether it grows"
    if memory["leaking"]:
        return f"it GROWS by {formats.number(grows)} MiB with every step: a leak"
    return f"it does not grow from step to step ({formats.number(grows)} MiB)"


def roofline_blocks(trace: Trace) -> list[Block]:
    found = trace["roofline"]
    if not found:
        return [Paragraph("n/a: this trace has none.")]
    peaks, stages = found["peaks"], found["stages"]
    placed = [(stage, place) for stage in stages if (place := roofline_place(stage))]
    dots = [
        charts.Dot(stage["name"], str(mark), *place, hue(stage["name"]))
        for mark, (stage, place) in enumerate(placed, start=1)
    ]
    if place := roofline_place(found["total"]):
        dots.insert(0, charts.Dot(found["total"]["name"], charts.SUM, *place, hue("")))
    said = sentence(
        [
            f"measured here: {formats.number(peaks['copy_gb_s'])} GB/s copied and "
            f"{formats.number(peaks['product_tflop_s'])} TFLOP/s in a {peaks['dtype']} product",
            f"the whole step takes {formats.number(found['total']['distance'])} times what these allow",
            f"model FLOP utilisation {formats.percent(found['total']['mfu'])} %",
        ]
    )
    svg = charts.roofline(
        "roofline-plot", "What each stage reaches of the limits", peaks["copy_gb_s"], peaks["product_tflop_s"], dots
    )
    keys = [Key(dot.hue, dot.name, dot.mark) for dot in dots]
    return [
        Paragraph(said),
        Picture(svg, "What each stage with matrix products reaches, and what the measured limits allow", keys),
        roofline_table(found),
    ]


def roofline_place(stage: Mapping[str, Any]) -> tuple[float, float] | None:
    """FLOP a byte and TFLOP/s; None where one of them is not above 0."""
    gflop, mib, ms = (stage[name] or 0.0 for name in ("gflop", "minimum_mib", "ms"))
    return (gflop * 1e9 / (mib * 2**20), gflop / ms) if gflop > 0 and mib > 0 and ms > 0 else None


def roofline_table(found: Mapping[str, Any]) -> Table:
    titles = ("GFLOP", "MiB at least", "ms", "least ms")
    columns = [*words("stage"), *figures(*titles), *words("bound by"), *figures("times the least", "MFU, %")]
    stages = (*found["stages"], found["total"])
    rows = [
        cells(
            stage["name"],
            *(formats.number(stage[name]) for name in ("gflop", "minimum_mib", "ms", "floor_ms")),
            stage["bound"] or formats.NOT_KNOWN,
            formats.number(stage["distance"]),
            formats.percent(stage["mfu"]),
        )
        for stage in stages
    ]
    return Table("Work, time and limit of each stage", columns, rows, hues=[hue(stage["name"]) for stage in stages])


def telemetry_blocks(trace: Trace) -> list[Block]:
    gpu = trace["gpu"]
    if not gpu:
        return [Paragraph("n/a: no GPU.")]
    rows = [
        cells(label, *(formats.number((gpu[name] or {}).get(kind)) for kind in ("mean", "max")))
        for name, label in TELEMETRY.items()
    ]
    throttled = ", ".join(gpu["throttled"])
    said = sentence(
        [
            f"energy of all timed steps: {formats.number(gpu['energy_joules'])} J",
            f"THROTTLED: {throttled}" if throttled else "not throttled",
        ]
    )
    table = Table("Sampled beside the timed steps", [*words("quantity"), *figures("mean", "most")], rows)
    return [Paragraph(said), table]


def forms_blocks(trace: Trace) -> list[Block]:
    rows = [cells(operation, *form_and_reason(form)) for operation, form in trace["forms"].items()]
    table = Table("What runs as what, and why", words("operation", "form", "because"), rows)
    return [table if rows else Paragraph("n/a: the model has one form alone.")]


def form_and_reason(text: str) -> tuple[str, str]:
    """`bf16 (the processor multiplies in it)` in its two halves."""
    form, opened, reason = text.partition(" (")
    return (form, reason[:-1]) if opened and reason.endswith(")") else (text, "")
