"""The report's section on parity: how far everything is from the plain reference, and whether that is close."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from detr_profiling.pages import charts, formats
from detr_profiling.pages.page import (
    BAD,
    GOOD,
    Block,
    Cell,
    Gallery,
    Key,
    Paragraph,
    Picture,
    Table,
    cells,
    code,
    figures,
    judged,
    sentence,
    words,
)

LONGEST_TABLE = 16
"""Rows that stand open. Of more the nearest to its limit of each kind does, and the whole is folded."""
CURVE_HUES = tuple(f"series-{index}" for index in range(6))
COLUMNS = [*code("quantity"), *words("kind"), *figures("error", "eager's error", "allowed"), *words("verdict")]


def parity_blocks(parity: Mapping[str, Any]) -> Iterator[Block]:
    """The verdict, each variant's table and pictures, the training curve and AP."""
    variants = parity["variants"]
    yield Paragraph(sentence([f"parity {verdict(parity)}", *failures(variants)]))
    for index, variant in enumerate(variants):
        yield from variant_blocks(parity, variant, f"parity-{index}")
    yield from curve_blocks(parity.get("curve"))
    yield from ap_blocks(parity.get("ap"))


def verdict(parity: Mapping[str, Any]) -> Cell:
    """As the rest of a sentence on parity."""
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
    if len(rows) <= LONGEST_TABLE:
        yield Table(f"{name}: {word}", COLUMNS, [parity_cells(each) for each in rows])
    else:
        shown = [parity_cells(each) for each in nearest_of_each_kind(rows)]
        yield Table(f"{name}: {word}; of each kind the nearest to its limit, and all that are past it", COLUMNS, shown)
        yield Table(
            f"{name}: all {formats.count(len(rows))}", COLUMNS, [parity_cells(each) for each in rows], folded=True
        )
    pictures = list(variant_pictures(parity, name, anchor))
    if pictures:
        yield Gallery(pictures)


def parity_cells(each: Mapping[str, Any]) -> list[Cell]:
    return cells(
        each["quantity"],
        each["kind"],
        *(formats.error(each[name]) for name in ("error", "eager_error", "allowed")),
        judged(formats.verdict(each["close"]), each["close"]),
    )


def nearest_of_each_kind(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """In the rows' own order."""
    nearest = {
        kind: max((r for r in rows if r["kind"] == kind), key=used) for kind in dict.fromkeys(r["kind"] for r in rows)
    }
    return [each for each in rows if not each["close"] or any(each is other for other in nearest.values())]


def used(each: Mapping[str, Any]) -> float:
    """How much of what is allowed its error takes; an error that is no number takes more than any other."""
    error, allowed = each["error"], each["allowed"]
    if error is None or not math.isfinite(error):
        return float("inf")
    return float(error / allowed) if allowed else float(error > 0)


def variant_pictures(parity: Mapping[str, Any], name: str, anchor: str) -> Iterator[Picture]:
    sampled = (parity.get("samples") or {}).get(name) or {}
    pairs = [
        pair for pair in sampled.get("logits", ()) if all(each is not None and math.isfinite(each) for each in pair)
    ]
    if pairs:
        title = f"{name}: logits here over those of the reference in float64"
        yield Picture(charts.scatter(f"{anchor}-scatter", title, pairs), f"{name}: {len(pairs)} logits")
    errors = (parity.get("error_histogram") or {}).get(name)
    if errors and errors["counts"]:
        title = f"{name}: how many logits err by how much"
        svg = charts.histogram(f"{anchor}-histogram", title, errors["edges_log10"], errors["counts"])
        yield Picture(svg, f"{name}: errors of all logits")


def curve_blocks(curve: Mapping[str, Any] | None) -> Iterator[Block]:
    if not curve:
        return
    losses = curve["losses"]
    yield Paragraph(
        sentence([f"training curve of {formats.many(curve['steps'], 'step')}", curve["message"].rstrip(".")])
    )
    if any(losses.values()):
        keys = [
            Key(f"{hue}{' beneath' if index == 0 else ''}", name)
            for index, (name, hue) in enumerate(zip(losses, CURVE_HUES, strict=False))
        ]
        svg = charts.loss_curves("parity-curve", "Loss over steps on the same data", losses, CURVE_HUES)
        yield Picture(svg, "Training loss, on the same data and seed and without dropout", keys)
    rows = [
        cells(name, *(formats.number(values[place], digits=5) if values else formats.NOT_KNOWN for place in (0, -1)))
        for name, values in losses.items()
    ]
    columns = [*words("run"), *figures("loss at the first step", "at the last")]
    yield Table(f"Training curve: {formats.verdict(curve['close'])}", columns, rows)


def ap_blocks(ap: Mapping[str, Any] | None) -> Iterator[Block]:
    if not ap:
        return
    yield Paragraph(
        sentence([f"AP on {formats.many(ap['images'], 'image')} of {ap['data']}", ap["message"].rstrip(".")])
    )
    rows = [cells(each["name"], *(formats.number(each[name]) for name in ("AP", "AP50"))) for each in ap["rows"]]
    yield Table(f"Average precision: {formats.verdict(ap['close'])}", [*words("run"), *figures("AP", "AP50")], rows)
    if ap.get("classes"):
        rows = [cells(each["name"], formats.number(each["AP"])) for each in ap["classes"]]
        yield Table("AP by class", [*words("class"), *figures("AP")], rows, folded=len(rows) > LONGEST_TABLE)
