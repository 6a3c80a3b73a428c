"""The report's section on parity: how far everything is from the plain reference, and whether that is close."""

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from detr_profiling.pages import charts, formats
from detr_profiling.pages.blocks import (
    BAD,
    GOOD,
    Block,
    Cell,
    Chart,
    Paragraph,
    Section,
    Table,
    cells,
    code,
    figures,
    judged,
    sentence,
    words,
)

LONGEST_TABLE = 16
"""Rows that are shown open. Of more the nearest to its limit of each kind is, and the whole is folded."""
COLUMNS = [
    *code("quantity"),
    *words("kind"),
    *figures("error", "baseline error", "allowed", "of allowed, %"),
    *words("verdict"),
]


def parity_sections(parity: Mapping[str, Any]) -> Iterator[Section]:
    """Yield the verdict, each variant's table and chart, the training curve and AP."""
    variants, left_out = parity["variants"], parity.get("left_out") or {}
    blocks: list[Block] = [Paragraph(sentence([f"parity {verdict(parity)}", *failures(variants)]))]
    if left_out:
        blocks.append(Paragraph(sentence(f"{name} is left out: {reason}" for name, reason in left_out.items())))
    for index, variant in enumerate(variants):
        blocks += variant_blocks(parity, variant, f"parity-{index}")
    yield Section("Parity", [*blocks, *curve_blocks(parity.get("curve")), *ap_blocks(parity.get("ap"))])


def verdict(parity: Mapping[str, Any]) -> Cell:
    """Return the rest of a sentence on parity."""
    variants = parity["variants"]
    far = [variant["name"] for variant in variants if not variant["close"]]
    far += [name for name in ("curve", "ap") if (parity.get(name) or {}).get("close") is False]
    if far or not parity["close"]:
        return Cell(f"does NOT hold: {', '.join(far) or 'see its section'}", BAD)
    if not variants:
        return Cell("nothing was compared")
    return Cell(f"holds in {formats.many(len(variants), 'variant')}", GOOD)


def failures(variants: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for variant in variants:
        far = [each["quantity"] for each in variant["rows"] if not each["close"]]
        if far:
            more = f" and {len(far) - 4} more" if len(far) > 4 else ""
            yield f"{variant['name']} is NOT close in {', '.join(far[:4])}{more}"


def variant_blocks(parity: Mapping[str, Any], variant: Mapping[str, Any], anchor: str) -> Iterator[Block]:
    name, rows = variant["name"], variant["rows"]
    word = formats.verdict(variant["close"])
    if variant.get("equal_matches") is not None:
        equal = formats.percent(variant["equal_matches"])
        yield Paragraph(f"{name}: {equal} % of the matches are those of float64.")
    if len(rows) <= LONGEST_TABLE:
        yield Table(f"{name}: {word}", COLUMNS, [parity_cells(each) for each in rows])
    else:
        shown = [parity_cells(each) for each in nearest_of_each_kind(rows)]
        yield Table(f"{name}: {word}; of each kind the nearest to its limit, and all that are past it", COLUMNS, shown)
        yield Table(
            f"{name}: all {formats.count(len(rows))}", COLUMNS, [parity_cells(each) for each in rows], folded=True
        )
    yield from output_charts(parity, name, anchor)


def parity_cells(each: Mapping[str, Any]) -> list[Cell]:
    return cells(
        each["quantity"],
        each["kind"],
        *(formats.error(each[name]) for name in ("error", "eager_error", "allowed")),
        formats.used(each["error"], each["allowed"]),
        judged(formats.verdict(each["close"]), each["close"]),
    )


def nearest_of_each_kind(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return, in the rows' own order, of each kind the one nearest to its limit, and all that are not close."""
    nearest = {
        kind: max((r for r in rows if r["kind"] == kind), key=used) for kind in dict.fromkeys(r["kind"] for r in rows)
    }
    return [each for each in rows if not each["close"] or any(each is other for other in nearest.values())]


def used(each: Mapping[str, Any]) -> float:
    """Return the fraction of what is allowed that an error takes; one that is no number takes more than any other."""
    error, allowed = each["error"], each["allowed"]
    if error is None or not math.isfinite(error):
        return float("inf")
    return float(error / allowed) if allowed else float(error > 0)


def output_charts(parity: Mapping[str, Any], name: str, anchor: str) -> Iterator[Chart]:
    sampled = ((parity.get("samples") or {}).get(name) or {}).get("logits", ())
    pairs = [pair for pair in sampled if all(each is not None and math.isfinite(each) for each in pair)]
    errors = (parity.get("error_histogram") or {}).get(name) or {"edges_log10": [], "counts": []}
    if pairs or errors["counts"]:
        description = (
            f"{len(pairs)} logits here over those of the reference, and errors of {sum(errors['counts']):,} logits"
        )
        draw = partial(charts.outputs, pairs, errors["edges_log10"], errors["counts"])
        yield Chart(anchor, f"{name}: logits beside the reference's in float64, and their errors", description, draw)


def curve_blocks(curve: Mapping[str, Any] | None) -> Iterator[Block]:
    if not curve:
        return
    losses = curve["losses"]
    yield Paragraph(
        sentence([f"training curve of {formats.many(curve['steps'], 'step')}", curve["message"].rstrip(".")])
    )
    if any(losses.values()):
        title = "Training loss, on the same data and seed and without dropout"
        description = f"{curve['steps']} steps of {', '.join(losses)}"
        yield Chart("parity-curve", title, description, partial(charts.loss_curves, losses))
    yield curve_table(curve)


def curve_table(curve: Mapping[str, Any]) -> Table:
    """Return the losses at the first steps and at each quarter, and how far those of a precision may diverge."""
    count = curve["steps"]
    steps = sorted({0, 1, *(count * quarter // 4 - 1 for quarter in (1, 2, 3, 4))} & set(range(count)))
    runs = ({"reference fp64": curve["reference"]} if "reference" in curve else {}) | dict(curve["losses"])
    rows = [
        cells(name, *(formats.number(values[step] if step < len(values) else None, digits=5) for step in steps))
        for name, values in runs.items()
    ]
    for name, allowed in (curve.get("allowed") or {}).items():
        rows.append(cells(f"{name} may diverge by (relative)", *(formats.error(allowed[step]) for step in steps)))
    columns = [*words("run"), *figures(*(f"step {step + 1}" for step in steps))]
    return Table(f"Training curve: {formats.verdict(curve['close'])}", columns, rows)


def ap_blocks(ap: Mapping[str, Any] | None) -> Iterator[Block]:
    if not ap:
        return
    yield Paragraph(
        sentence([f"AP on {formats.many(ap['images'], 'image')} of {ap['data']}", ap["message"].rstrip(".")])
    )
    rows = [cells(each["name"], *(average_precision(each[name]) for name in ("AP", "AP50"))) for each in ap["rows"]]
    yield Table(f"Average precision: {formats.verdict(ap['close'])}", [*words("run"), *figures("AP", "AP50")], rows)
    if ap.get("classes"):
        rows = [cells(each["name"], average_precision(each["AP"])) for each in ap["classes"]]
        yield Table("AP by class", [*words("class"), *figures("AP")], rows, folded=len(rows) > LONGEST_TABLE)


def average_precision(value: float | None) -> str:
    return formats.NOT_KNOWN if value is None else f"{value:.4f}"
