"""A trace's figures as tables for a terminal."""

from collections.abc import Iterator
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.table import Column, Table
from rich.text import Text

from detr_profiling.pages import formats
from detr_profiling.pages.formats import number

SHOWN_ROWS = 12
BAR = 24
MOST_CHARACTERS = 46


def trace_tables(result: dict[str, Any]) -> Iterator[RenderableType]:
    """Of the block that `profile_workload` returns, in the order in which one asks."""
    yield heading(result)
    if problem := result.get("problem"):
        yield Text(f"\nNOT complete: {problem}\n", style="bold")
    yield stage_table(result)
    yield wait_table(result)
    on_gpu = result["idle_share"] is not None
    yield usage_table("Operators", result["operators"], on_gpu)
    if on_gpu:
        yield usage_table("Kernels", result["kernels"], on_gpu)
    if result["roofline"]:
        yield roofline_table(result["roofline"])
    yield Text("\n".join(("", *closing_lines(result))))


def spread(timing: dict[str, Any]) -> str:
    return formats.timing(*(timing[name] for name in ("median", "q1", "q3", "runs")))


def shortened(name: str) -> Text:
    """Kernels' names have hundreds of characters; and none is markup."""
    return Text(name if len(name) <= MOST_CHARACTERS else f"{name[: MOST_CHARACTERS - 1]}…")


def heading(result: dict[str, Any]) -> Text:
    machine, workload = result["machine"], result["workload"]
    size = workload["size"] if workload["size"] != "auto" else "the recipe's sizes"
    source = f" of {workload['data']}" if workload.get("data") else ""
    compiled = ", compiled" if workload["compile"] else ""
    step = f"{workload['name']} {workload['model']}, {workload['mode']}: {workload['batch_size']} x {size}{source}"
    forms = (f"{name:>18}  {form}" for name, form in result["forms"].items())
    return Text("\n".join((f"{step}{compiled}, on {machine['device']}, {machine['threads']} threads", *forms)))


def stage_table(result: dict[str, Any]) -> Table:
    """The split of a step, whose parts add up to it."""
    on_gpu = result["idle_share"] is not None
    figures = ["ms", "spread", "runs", *(["device ms"] if on_gpu else []), "share %"]
    table = plain_table("stage", figures, "Stages in the profiler, each without those within it")
    table.add_column("")
    for row in result["stages"]:
        cells = [number(row["median_ms"]), number(row["q3_ms"] - row["q1_ms"], digits=2), str(row["runs"])]
        cells += [number(row["device_ms"])] if on_gpu else []
        table.add_row(row["name"], *cells, formats.percent(row["share"]), "█" * round(BAR * row["share"]))
    step, profiled = result["step_ms"], result["profiled_step_ms"]
    table.caption = (
        f"spread: between the quartiles\nA step takes {spread(step)} ms,\nin the profiler {spread(profiled)}"
    )
    if on_gpu:
        table.caption += f"\nThe device is idle for {formats.percent(result['idle_share'])} % of it"
    return table


def plain_table(first: str, figures: list[str], title: str) -> Table:
    """A table of one name and several figures a row, for 80 columns."""
    columns = (Column(each, justify="right", no_wrap=True) for each in figures)
    look: dict[str, Any] = {"title_justify": "left", "caption_justify": "left", "title_style": "bold"}
    return Table(first, *columns, title=title, box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True, **look)


def wait_table(result: dict[str, Any]) -> RenderableType:
    on_gpu = result["launch_kind"] == "kernel launches"
    what = ("wait for the device", "waits for the device") if on_gpu else ("read by the host", "reads by the host")
    launches = f"{formats.count(result['launches_per_step'])} {result['launch_kind']} a step"
    if not result["host_waits"]:
        return Text(f"No {what[1]}, {launches}\n")
    title = f"{formats.many(result['host_waits_per_step'], *what)}, {launches}"
    table = plain_table("operation", ["stage", "a step"], title)
    for row in result["host_waits"]:
        table.add_row(shortened(row["operation"]), row["stage"], formats.count(row["per_step"]))
    if not on_gpu and not result.get("problem"):
        table.caption = "On a GPU each would make the host wait"
    return table


def usage_table(title: str, rows: list[dict[str, Any]], on_gpu: bool) -> Table:
    """The first of `rows`; own times, without what is called."""
    times = {} if title == "Kernels" else {"cpu_ms": "cpu ms"}
    times |= {"device_ms": "device ms"} if on_gpu else {}
    table = plain_table(
        title.lower(), ["calls", *times.values(), "share %"], f"{title} by their own time, means over the steps"
    )
    for row in rows[:SHOWN_ROWS]:
        table.add_row(
            shortened(row["name"]),
            formats.count(row["calls"]),
            *(number(row[name]) for name in times),
            formats.percent(row["share"]),
        )
    return table


def roofline_table(roofline: dict[str, Any]) -> Table:
    peaks = roofline["peaks"]
    title = f"Roofline: {number(peaks['copy_gb_s'])} GB/s copied, {number(peaks['product_tflop_s'])} TFLOP/s"
    figures = ["GFLOP", "MiB", "ms", "floor ms", "bound", "distance", "MFU %"]
    table = plain_table("stage", figures, f"{title} {peaks['dtype']}, as measured")
    for row in (*roofline["stages"], roofline["total"]):
        cells = [number(row[name]) for name in ("gflop", "minimum_mib", "ms", "floor_ms")]
        table.add_row(row["name"], *cells, row["bound"] or "", number(row["distance"]), formats.percent(row["mfu"]))
    table.caption = "MiB: that must move; floor: what the machine allows; distance: ms over floor"
    return table


def closing_lines(result: dict[str, Any]) -> Iterator[str]:
    """Memory, process and GPU."""
    process, memory, gpu = result["process"], result["memory"], result["gpu"]
    if memory:
        place = ", ".join((memory["peak_stage"], str(shortened(memory["peak_operator"] or "no operator"))))
        yield f"{'memory':>18}  at most {number(memory['peak_mib'])} MiB of tensors, in {place}"
        verdict = "it LEAKS" if memory["leaking"] else "no leak"
        yield f"{'growth':>18}  {number(memory['growth_mib_per_step'])} MiB a step: {verdict}"
    cpu_s, rss_mib = process["cpu_seconds_per_step"], process["peak_rss_mib"]
    yield f"{'process':>18}  {number(cpu_s)} s of CPU time a step, at most {number(rss_mib)} MiB resident"
    if gpu is None:
        yield f"{'GPU':>18}  n/a"
        return
    for name in ("utilisation_percent", "memory_mib", "power_watts", "sm_clock_mhz", "temperature_celsius"):
        seen = gpu[name] or {}
        yield f"{name:>18}  mean {number(seen.get('mean'))}, most {number(seen.get('max'))}"
    yield f"{'energy_joules':>18}  {number(gpu['energy_joules'])}"
    yield f"{'throttled':>18}  {', '.join(gpu['throttled']) or 'no'}"
