"""Sections of the report on a traced step: time by profiler range, synchronisations, operators, memory, roofline."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from detr_profiling.pages import charts, formats
from detr_profiling.pages.blocks import (
    Block,
    Chart,
    Paragraph,
    Section,
    Table,
    cells,
    code,
    figures,
    sentence,
    without_unknown,
    words,
)

Trace = Mapping[str, Any]
TELEMETRY = {
    "utilisation_percent": "utilisation, %",
    "memory_mib": "memory, MiB",
    "power_watts": "power, W",
    "sm_clock_mhz": "SM clock, MHz",
    "temperature_celsius": "temperature, °C",
}
WHOSE_MEMORY = {True: "Memory handed out by the GPU's allocator", False: "Memory of torch's tensors on the CPU"}
LONGEST_TABLE = 12
"""Rows that are shown open; a longer table's rest is folded."""


def trace_sections(trace: Trace) -> Iterator[Section]:
    yield Section("Profiler ranges", range_blocks(trace))
    yield Section("Synchronisations and operators", synchronization_blocks(trace))
    yield Section("Memory", memory_blocks(trace))
    yield Section("Roofline", roofline_blocks(trace))
    yield Section("GPU telemetry", telemetry_blocks(trace))
    yield Section("Backends", backend_blocks(trace))


def workload_text(trace: Trace) -> str:
    """Return what was traced, and where, in one line."""
    machine, workload = trace["machine"], trace["workload"]
    size = workload["size"] if workload["size"] != "auto" else "the recipe's sizes"
    source = f" of {workload['data']}" if workload.get("data") else ""
    compiled = ", compiled" if workload["compile"] else ""
    step = f"{workload['name']} {workload['model']}, {workload['mode']}: {workload['batch_size']} x {size}{source}"
    return f"{step}{compiled}, on {machine['device']}, {machine['threads']} threads"


def on_gpu(trace: Trace) -> bool:
    return trace["idle_fraction"] is not None or bool(trace.get("problem"))


def lacking(trace: Trace) -> list[str]:
    """Tell what a trace is not to be read without: that it has none of the GPU's events."""
    return [f"NOT complete: {trace['problem']}"] if trace.get("problem") else []


def timing(block: Mapping[str, Any], unit: str | None = None) -> str:
    return formats.timing(block["median"], block["q1"], block["q3"], block["runs"], unit)


def range_blocks(trace: Trace) -> list[Block]:
    ranges, fractions = trace["ranges"], range_fractions(trace)
    bars = [charts.Bar(*(row[name] for name in ("name", "median_ms", "q1_ms", "q3_ms", "device_ms"))) for row in ranges]
    description = ", ".join(f"{row['name']} {part} %" for row, part in zip(ranges, fractions, strict=True))
    steps = formats.many(trace["steps"], "profiled step")
    table = Table(
        f"Own time of each profiler range, without the ranges within it; {steps}",
        [*words("range"), *figures("host, ms (IQR, runs)", "of a step, %", "device, ms")],
        [
            cells(row["name"], range_timing(row), part, formats.number(row["device_ms"]))
            for row, part in zip(ranges, fractions, strict=True)
        ],
    )
    chart = Chart("ranges", "Time of each profiler range in one step", description, partial(charts.range_bars, bars))
    return [step_paragraph(trace), *([chart] if ranges else []), without_unknown(table)]


def range_fractions(trace: Trace) -> list[str]:
    """Return the ranges' fractions of a step in percent, adding up to 100 where the fractions add up to 1."""
    return formats.percents([row["fraction"] for row in trace["ranges"]])


def range_timing(row: Mapping[str, Any]) -> str:
    return formats.timing(*(row[name] for name in ("median_ms", "q1_ms", "q3_ms", "runs")))


def step_paragraph(trace: Trace) -> Paragraph:
    profiled, idle = trace.get("profiled_step_ms"), trace["idle_fraction"]
    return Paragraph(
        sentence(
            [
                *lacking(trace),
                f"a step takes {timing(trace['step_ms'], 'ms')}",
                f"in the profiler, where the ranges are timed, {timing(profiled, 'ms')}" if profiled else "",
                "" if idle is None else f"the device is idle for {formats.percent(idle)} % of it",
            ]
        )
    )


def synchronization_blocks(trace: Trace) -> list[Block]:
    table = Table(
        "Device synchronisations by operation and profiler range",
        [*code("operation"), *words("range"), *figures("per step")],
        [
            cells(wait["operation"], wait["range"], formats.count(wait["per_step"]))
            for wait in trace["synchronizations"]
        ],
    )
    launches = f"{formats.count(trace['launches_per_step'])} {trace['launch_kind']} a step"
    blocks: list[Block] = [Paragraph(sentence([f"device synchronisations: {synchronizations(trace)}", launches]))]
    blocks += [table] if trace["synchronizations"] else []
    blocks += usage_tables("operator", trace["operators"])
    if trace["kernels"]:
        blocks += usage_tables("kernel", trace["kernels"])
    else:
        reason = "no GPU" if not on_gpu(trace) else "the trace lacks them" if lacking(trace) else "none ran"
        blocks.append(Paragraph(f"Kernels: n/a, {reason}."))
    return blocks


def synchronizations(trace: Trace) -> str:
    """Tell how many there are. On a CPU what is counted are reads by the host, which wait for nothing there."""
    counted = formats.count(trace["synchronizations_per_step"])
    if lacking(trace):
        return f"{counted} operators a step read on the host; others are not known"
    if on_gpu(trace):
        return f"{counted} a step"
    return f"{formats.many(trace['synchronizations_per_step'], 'read')} a step would wait for a GPU; on a CPU none does"


def usage_tables(kind: str, usages: Sequence[Mapping[str, Any]]) -> Iterator[Table]:
    columns = [*code(kind), *figures("calls per step", "CPU, ms", "device, ms", "of a step, %")]
    rows = [
        cells(
            usage["name"],
            formats.count(usage["calls"]),
            formats.number(usage["cpu_ms"]),
            formats.number(usage["device_ms"]),
            formats.percent(usage["fraction"]),
        )
        for usage in usages
    ]
    title = f"{kind.capitalize()}s by their own time in a step"
    yield without_unknown(Table(title, columns, rows[:LONGEST_TABLE]))
    if rows[LONGEST_TABLE:]:
        yield without_unknown(Table(f"{title}: the rest", columns, rows[LONGEST_TABLE:], folded=True))


def peak_owner(memory: Mapping[str, Any]) -> str:
    operator = memory["peak_operator"]
    return f"{memory['peak_range']} by {operator}" if operator else str(memory["peak_range"])


def memory_blocks(trace: Trace) -> list[Block]:
    memory, process = trace["memory"], trace["process"]
    resident = (
        f"the process has at most {formats.number(process['peak_rss_mib'])} MiB resident and uses "
        f"{formats.number(process['cpu_seconds_per_step'])} s of CPU time a step"
    )
    if not memory:
        return [Paragraph(sentence(["the trace has no allocations", resident]))]
    peak = f"peak {formats.number(memory['peak_mib'])} MiB in {peak_owner(memory)}"
    summary = Paragraph(sentence([peak, growth(memory), resident]))
    curve = [(ms, mib) for ms, mib in memory["curve"]]
    if not curve:
        return [summary]
    draw = partial(charts.memory_curve, curve, peak)
    return [summary, Chart("memory", f"{WHOSE_MEMORY[on_gpu(trace)]}, over the profiled steps", peak, draw)]


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
    peaks, total = found["peaks"], roofline_dot(found["total"])
    ranges = [dot for row in found["ranges"] if (dot := roofline_dot(row))]
    summary = sentence(
        [
            f"measured here: a memory bandwidth of {formats.number(peaks['bandwidth_gb_s'])} GB/s, and "
            f"{formats.number(peaks['gemm_tflop_s'])} TFLOP/s in a {peaks['dtype']} GEMM",
            f"the whole step takes {formats.number(found['total']['times_bound'])} times its roofline bound",
            f"model FLOP utilisation (MFU) {formats.percent(found['total']['mfu'])} %",
        ]
    )
    dots = [dot for dot in (total, *ranges) if dot]
    description = "; ".join(
        f"{dot.name}: {formats.number(dot.flop_per_byte)} FLOP/byte, {formats.number(dot.tflop_s)} TFLOP/s"
        for dot in dots
    )
    draw = partial(charts.roofline, peaks["bandwidth_gb_s"], peaks["gemm_tflop_s"], total, ranges)
    chart = Chart(
        "roofline", "What each profiler range with GEMMs reaches, under the measured limits", description, draw
    )
    return [Paragraph(summary), chart, roofline_table(found)]


def roofline_dot(row: Mapping[str, Any]) -> charts.Dot | None:
    """Return a range's point; None where it has no FLOP, bytes or time."""
    gflop, mib, ms = (row[name] or 0.0 for name in ("gflop", "minimum_mib", "ms"))
    if not (gflop > 0 and mib > 0 and ms > 0):
        return None
    return charts.Dot(row["name"], gflop * 1e9 / (mib * 2**20), gflop / ms)


def roofline_table(found: Mapping[str, Any]) -> Table:
    titles = ("GFLOP", "MiB moved at least", "ms", "bound, ms")
    columns = [*words("range"), *figures(*titles), *words("bound by"), *figures("× bound", "MFU, %")]
    rows = [
        cells(
            row["name"],
            *(formats.number(row[name]) for name in ("gflop", "minimum_mib", "ms", "bound_ms")),
            row["bound_by"] or formats.NOT_KNOWN,
            formats.number(row["times_bound"]),
            formats.percent(row["mfu"]),
        )
        for row in (*found["ranges"], found["total"])
    ]
    return Table("Work, time and roofline bound of each profiler range", columns, rows)


def telemetry_blocks(trace: Trace) -> list[Block]:
    gpu = trace["gpu"]
    if not gpu:
        return [Paragraph("n/a: no GPU.")]
    rows = [
        cells(label, *(formats.number((gpu[name] or {}).get(kind)) for kind in ("mean", "max")))
        for name, label in TELEMETRY.items()
    ]
    throttled = ", ".join(gpu["throttled"])
    summary = sentence(
        [
            f"energy of all timed steps: {formats.number(gpu['energy_joules'])} J",
            f"THROTTLED: {throttled}" if throttled else "not throttled",
        ]
    )
    table = Table("Sampled during the timed steps", [*words("quantity"), *figures("mean", "maximum")], rows)
    return [Paragraph(summary), table]


def backend_blocks(trace: Trace) -> list[Block]:
    rows = [cells(operation, *backend_and_reason(text)) for operation, text in trace["backends"].items()]
    table = Table("Backend of each operation, and why", words("operation", "backend", "reason"), rows)
    return [table if rows else Paragraph("n/a: the model has one backend alone.")]


def backend_and_reason(text: str) -> tuple[str, str]:
    """Split `bf16 (the processor multiplies in it)` in two."""
    backend, opened, reason = text.partition(" (")
    return (backend, reason[:-1]) if opened and reason.endswith(")") else (text, "")
