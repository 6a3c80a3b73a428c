"""The report's section on training with many GPUs, as computed from one GPU's step."""

from collections.abc import Iterator, Mapping
from typing import Any

from detr_profiling.pages import formats, page
from detr_profiling.pages.page import Block, Paragraph, Table, cells, words

TITLE = "Many GPUs, on paper and not measured"
FIGURES = ["exchange, ms", "not hidden", "step, ms", "images/s", "efficiency, %"]
KIND = "gradients"


def scaling_blocks(scaling: Mapping[str, Any]) -> Iterator[Block]:
    yield Paragraph(about(scaling))
    columns = [*page.figures("GPUs", *FIGURES), *words(KIND)]
    yield Table(TITLE, columns, [cells(*figures(row)) for row in scaling["rows"]])


def figures(row: Mapping[str, Any]) -> list[str]:
    times = (row[name] for name in ("exchange_ms", "exposed_ms", "step_ms", "images_per_second"))
    percent = formats.percent(row["efficiency"])
    return [formats.count(row["gpus"]), *(formats.number(each) for each in times), percent, row["exchange"]]


def about(scaling: Mapping[str, Any]) -> str:
    """What it is computed from."""
    basis, links = scaling["basis"], scaling["links"]
    step_ms, mib = (formats.number(basis[name]) for name in ("step_ms", "gradient_mib"))
    most = max(scaling["rows"], key=lambda row: row["gpus"])
    planning = formats.number(most["planning_ms"])
    within, between = (f"{links[f'{w}_gb_s']:g} GB/s and {links[f'{w}_us']:g} us a step" for w in ("within", "between"))
    return (
        f"{basis['model']}, {basis['batch_size']} images a step on each GPU, {step_ms} ms on one "
        f"({basis['step_from']}), {basis['backward_share']:.0%} of it the backward pass ({basis['backward_from']}); "
        f"{mib} MiB of gradients, in buckets of {links['bucket_mib']:g} or all afterwards; "
        f"{links['gpus_a_machine']} GPUs a machine, within it {within}, between machines {between}, "
        f"{links['reached']:.0%} of the bandwidths reached. Planning the order of all images takes {planning} ms a "
        f"step with {formats.count(most['gpus'])} GPUs, in a thread beside it."
    )
