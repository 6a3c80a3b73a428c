"""The report's section on the ladder: what each technique is worth, on the way up and at the top."""

import itertools
from collections.abc import Iterator, Sequence

from detr_profiling.measuring.row import LadderRow
from detr_profiling.pages import charts, formats
from detr_profiling.pages.page import (
    NOTABLE,
    Block,
    Cell,
    Key,
    Paragraph,
    Picture,
    Table,
    capital,
    cells,
    figures,
    judged,
    sentence,
    words,
)

KEYS = [
    Key("time", "the row's median"),
    Key("saved", "saved against the row before"),
    Key("cost", "slower than the row before"),
    Key("spread", "from the first to the third quartile"),
]


def ladder_blocks(ladder: Sequence[LadderRow]) -> Iterator[Block]:
    """Of each mode a sentence, its picture and its table."""
    for index, (mode, rows) in enumerate(by_mode(ladder).items()):
        yield from mode_blocks(mode, rows, f"waterfall-{index}")


def by_mode(ladder: Sequence[LadderRow]) -> dict[str, list[LadderRow]]:
    return {mode: [row for row in ladder if row.mode == mode] for mode in dict.fromkeys(row.mode for row in ladder)}


def mode_blocks(mode: str, rows: Sequence[LadderRow], anchor: str) -> Iterator[Block]:
    yield Paragraph(sentence([f"{mode}: {climb(rows)}", *remarks(rows)]))
    bars = [
        charts.Bar(row.technique, row.median_ms, *(row.median_ms if q is None else q for q in (row.q1_ms, row.q3_ms)))
        for row in rows
        if row.median_ms
    ]
    if bars:
        title = f"{capital(mode)}: every row adds one technique to the row above it"
        yield Picture(charts.waterfall(anchor, title, bars), title, KEYS)
    yield time_table(mode, rows)
    yield cost_table(mode, rows)


def top_row(rows: Sequence[LadderRow]) -> LadderRow | None:
    """The last that was measured."""
    return next((row for row in reversed(rows) if row.median_ms), None)


def climb(rows: Sequence[LadderRow]) -> str:
    """How many times as fast the top is, with both figures."""
    first, top = rows[0], top_row(rows)
    if top is None:
        return "nothing was measured"
    reached = "everything on" if top is rows[-1] else f"all up to {top.technique}"
    if top is first or not first.median_ms or not top.median_ms:
        return f"{top.technique} takes {ladder_timing(top, 'ms')}, and there is nothing to compare it with"
    return (
        f"{formats.number(first.median_ms / top.median_ms)} times as fast: {reached} takes {ladder_timing(top, 'ms')}, "
        f"{first.technique} {ladder_timing(first, 'ms')}"
    )


def ladder_timing(row: LadderRow, unit: str | None = None) -> str:
    return formats.timing(row.median_ms, row.q1_ms, row.q3_ms, row.runs, unit)


def remarks(rows: Sequence[LadderRow]) -> Iterator[str]:
    """What one should not overlook."""
    far = [row.technique for row in rows if row.close is False]
    if far:
        yield f"NOT close to the reference: {', '.join(far)}"
    slower = [row.technique for row, before in pairs(rows) if change(row, before) > 0]
    if slower:
        yield f"slower than the row before: {', '.join(slower)}"
    left_out = [row.technique for row in rows if not row.median_ms]
    if left_out:
        yield f"not measured: {', '.join(left_out)}"
    rounds = max(len(row.rounds_ms) for row in rows)
    if rounds > 1:
        unclear = [f"{a} and {b}" for a, b in unclear_ranks(rows)]
        order = f"not in the same order in every one: {', '.join(unclear)}" if unclear else "the same ranking in each"
        yield f"{formats.many(rounds, 'round')}, {order}"


def unclear_ranks(rows: Sequence[LadderRow]) -> list[tuple[str, str]]:
    """Pairs of which now one is faster, now the other."""
    return [
        (a.technique, b.technique)
        for a, b in itertools.combinations(rows, 2)
        if len({x < y for x, y in zip(a.rounds_ms, b.rounds_ms, strict=False)}) > 1
    ]


def ranks(rows: Sequence[LadderRow]) -> dict[str, int]:
    """Technique to its place, the fastest first. A row comes after those that were faster in every round: those of
    which now one, now the other is faster share a place, and keep it when they are measured again."""
    measured = [row for row in rows if row.rounds_ms]
    return {
        row.technique: 1 + sum(always_faster(other, row) for other in measured if other is not row) for row in measured
    }


def always_faster(row: LadderRow, other: LadderRow) -> bool:
    return all(mine < theirs for mine, theirs in zip(row.rounds_ms, other.rounds_ms, strict=False))


def pairs(rows: Sequence[LadderRow]) -> Iterator[tuple[LadderRow, LadderRow]]:
    """Each measured row with the measured one before it."""
    measured = [row for row in rows if row.median_ms]
    yield from zip(measured[1:], measured, strict=False)


def change(row: LadderRow, before: LadderRow) -> float:
    """Relative, of the median: above 0 where it is slower."""
    assert row.median_ms and before.median_ms
    return row.median_ms / before.median_ms - 1


def overlapping(row: LadderRow, before: LadderRow) -> bool:
    """Whether their quartiles overlap: then nothing is certain."""
    limits = (row.q1_ms, row.q3_ms, before.q1_ms, before.q3_ms)
    low, high, low_before, high_before = (float("nan") if limit is None else limit for limit in limits)
    return low <= high_before and low_before <= high


def compared(row: LadderRow, rows: Sequence[LadderRow]) -> Cell:
    """With the row before it."""
    before = next((before for each, before in pairs(rows) if each is row), None)
    if before is None:
        return Cell(row.note)
    by = change(row, before)
    remark = "within the spread" if overlapping(row, before) else "slower" if by > 0 else ""
    text = ", ".join(part for part in (formats.signed_percent(by), remark, row.note) if part)
    return Cell(text, NOTABLE if by > 0 else "")


def race_blocks(race: Sequence[LadderRow]) -> Iterator[Block]:
    """Of each mode ours beside others, as they took turns."""
    titles = figures("ms (spread, runs)", "images/s", "× reference", "padding", "peak MiB", "error", "allowed")
    for mode, rows in by_mode(race).items():
        yield Paragraph(sentence([f"{mode}: {climb(rows)}", *remarks(rows)]))
        yield Table(f"{capital(mode)}: in turns", [*words(""), *titles, *words("verdict")], [*map(race_cells, rows)])


def race_cells(row: LadderRow) -> list[Cell]:
    return cells(
        row.technique,
        ladder_timing(row),
        *(formats.number(each) for each in (row.images_per_second, row.speedup, row.padding, row.peak_mib)),
        *(formats.error(each) for each in (row.error, row.allowed)),
        judged(formats.verdict(row.close), row.close),
    )


def time_table(mode: str, rows: Sequence[LadderRow]) -> Table:
    top = top_row(rows)
    columns = [
        *words("technique"),
        *figures("ms (spread, runs)", "images/s", "speedup", "padding"),
        *words("against the row above"),
        *figures("without it, ms (spread, runs)", "× everything on", "rank"),
    ]
    return Table(f"{capital(mode)}: time", columns, [time_cells(row, rows, top) for row in rows])


def time_cells(row: LadderRow, rows: Sequence[LadderRow], top: LadderRow | None) -> list[Cell]:
    without_ms = row.without_median_ms
    return cells(
        row.technique,
        ladder_timing(row),
        formats.number(row.images_per_second),
        formats.number(row.speedup),
        formats.number(row.padding),
        compared(row, rows),
        formats.timing(without_ms, row.without_q1_ms, row.without_q3_ms, row.without_runs),
        formats.number(without_ms / top.median_ms if without_ms and top and top.median_ms else None),
        str(ranks(rows).get(row.technique, formats.NOT_KNOWN)),
    )


def cost_table(mode: str, rows: Sequence[LadderRow]) -> Table:
    columns = [
        *words("technique"),
        *figures("peak MiB", "energy, J/image", "CPU time, s/image", "first run, s", "error", "allowed"),
        *words("verdict", "error of"),
    ]
    return Table(f"{capital(mode)}: memory, energy, exactness", columns, [cost_cells(row) for row in rows])


def cost_cells(row: LadderRow) -> list[Cell]:
    costs = (row.peak_mib, row.energy_j_per_image, row.cpu_seconds_per_image, row.first_run_s)
    return cells(
        row.technique,
        *(formats.number(cost) for cost in costs),
        *(formats.error(each) for each in (row.error, row.allowed)),
        judged(formats.verdict(row.close), row.close),
        row.quantity,
    )
