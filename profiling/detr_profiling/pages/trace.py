"""The report's sections on a traced step: stages, synchronisations, operators, memory, roofline, GPU, backends."""

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
    yield Section("Stages", stages_blocks(trace))
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


def stages_blocks(trace: Trace) -> list[Block]:
    stages, fractions = trace["stages"], stage_fractions(trace)
    bars = [
        charts.Bar(*(stage[name] for name in ("name", "median_ms", "q1_ms", "q3_ms", "device_ms"))) for stage in stages
    ]
    description = ", ".join(f"{stage['name']} {part} %" for stage, part in zip(stages, fractions, strict=True))
    table = Table(
        f"Own time of each stage, without the stages within it; {formats.many(trace['steps'], 'profiled step')}",
        [*words("stage"), *figures("host, ms (IQR, runs)", "of a step, %", "device, ms")],
        [
            cells(stage["name"], stage_timing(stage), part, formats.number(stage["device_ms"]))
            for stage, part in zip(stages, fractions, strict=True)
        ],
    )
    chart = Chart("stages", "Time of each stage in one step", description, partial(charts.stage_bars, bars))
    return [step_paragraph(trace), *([chart] if stages else []), without_unknown(table)]


def stage_fractions(trace: Trace) -> list[str]:
    """Return the stages' fractions of a step in percent, adding up to 100 where the fractions add up to 1."""
    return formats.percents([stage["fraction"] for stage in trace["stages"]])


def stage_timing(stage: Mapping[str, Any]) -> str:
    return formats.timing(*(stage[name] for name in ("median_ms", "q1_ms", "q3_ms", "runs")))


def step_paragraph(trace: Trace) -> Paragraph:
    profiled, idle = trace.get("profiled_step_ms"), trace["idle_fraction"]
    return Paragraph(
        sentence(
            [
                *lacking(trace),
                f"a step takes {timing(trace['step_ms'], 'ms')}",
                f"in the profiler, where the stages are timed, {timing(profiled, 'ms')}" if profiled else "",
                "" if idle is None else f"the device is idle for {formats.percent(idle)} % of it",
            ]
        )
    )


def synchronization_blocks(trace: Trace) -> list[Block]:
    table = Table(
        "Device synchronisations by operation and stage",
        [*code("operation"), *words("stage"), *figures("per step")],
        [
            cells(wait["operation"], wait["stage"], formats.count(wait["per_step"]))
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
    return f"{memory['peak_stage']} by {operator}" if operator else str(memory["peak_stage"])


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
    stages = [dot for stage in found["stages"] if (dot := roofline_dot(stage))]
    summary = sentence(
        [
            f"measured here: a memory bandwidth of {formats.number(peaks['bandwidth_gb_s'])} GB/s, and "
            f"{formats.number(peaks['gemm_tflop_s'])} TFLOP/s in a {peaks['dtype']} GEMM",
            f"the whole step takes {formats.number(found['total']['times_bound'])} times its roofline bound",
            f"model FLOP utilisation (MFU) {formats.percent(found['total']['mfu'])} %",
        ]
    )
    dots = [dot for dot in (total, *stages) if dot]
    description = "; ".join(
        f"{dot.name}: {formats.number(dot.flop_per_byte)} FLOP/byte, {formats.number(dot.tflop_s)} TFLOP/s"
        for dot in dots
    )
    draw = partial(charts.roofline, peaks["bandwidth_gb_s"], peaks["gemm_tflop_s"], total, stages)
    chart = Chart("roofline", "What each stage with GEMMs reaches, under the measured limits", description, draw)
    return [Paragraph(summary), chart, roofline_table(found)]


def roofline_dot(stage: Mapping[str, Any]) -> charts.Dot | None:
    """Return a stage's point; None where it has no FLOP, bytes or time."""
    gflop, mib, ms = (stage[name] or 0.0 for name in ("gflop", "minimum_mib", "ms"))
    if not (gflop > 0 and mib > 0 and ms > 0):
        return None
    return charts.Dot(stage["name"], gflop * 1e9 / (mib * 2**20), gflop / ms)


def roofline_table(found: Mapping[str, Any]) -> Table:
    titles = ("GFLOP", "MiB moved at least", "ms", "bound, ms")
    columns = [*words("stage"), *figures(*titles), *words("bound by"), *figures("× bound", "MFU, %")]
    rows = [
        cells(
            stage["name"],
            *(formats.number(stage[name]) for name in ("gflop", "minimum_mib", "ms", "bound_ms")),
            stage["bound_by"] or formats.NOT_KNOWN,
            formats.number(stage["times_bound"]),
            formats.percent(stage["mfu"]),
        )
        for stage in (*found["stages"], found["total"])
    ]
    return Table("Work, time and roofline bound of each stage", columns, rows)


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
