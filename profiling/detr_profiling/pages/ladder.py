"""The report's sections on the ladder and on the comparison with baselines: rows of ladder.csv and race.csv."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from matplotlib.figure import Figure

from detr_profiling.measuring.row import CONDITIONS, LadderRow
from detr_profiling.pages import charts, formats
from detr_profiling.pages.blocks import (
    NOTABLE,
    Block,
    Cell,
    Chart,
    Paragraph,
    Section,
    Table,
    capital,
    cells,
    figures,
    judged,
    sentence,
    without_unknown,
    words,
)

README_COLUMNS = [
    *words("step", ""),
    *figures("ms (IQR, runs)", "images/s", "speedup over reference", "peak MiB"),
    *words("error of"),
    *figures("error", "of allowed, %"),
    *words("verdict"),
]


def ladder_sections(ladder: Sequence[LadderRow]) -> Iterator[Section]:
    """Yield the ladder: of each mode a sentence, a chart, a table of times and one of costs and errors."""
    blocks: list[Block] = [*map(Paragraph, conditions_of(ladder))]
    for index, (mode, rows) in enumerate(by_mode(ladder).items()):
        title = f"{capital(mode)}: every row adds one technique to the row above it"
        blocks.append(Paragraph(sentence([f"{mode}: {climb(rows)}", slower_rows(rows), *remarks(rows)])))
        blocks += time_chart(f"ladder-{index}", title, rows, charts.ladder_bars)
        blocks += [time_table(mode, rows), cost_table(mode, rows)]
    yield Section("Ladder", blocks)


def baseline_sections(race: Sequence[LadderRow]) -> Iterator[Section]:
    """Yield the comparison with baselines: of each mode a sentence, a chart and a table."""
    blocks: list[Block] = [*map(Paragraph, conditions_of(race))]
    for index, (mode, rows) in enumerate(by_mode(race).items()):
        title = f"{capital(mode)}: baselines and detr_fast, measured in turns"
        blocks.append(Paragraph(sentence([f"{mode}: {beside_baselines(rows)}", *remarks(rows)])))
        blocks += time_chart(f"baselines-{index}", title, rows, charts.baseline_bars)
        blocks.append(baseline_table(mode, rows))
    yield Section("Comparison with baselines", blocks)


def by_mode(ladder: Sequence[LadderRow]) -> dict[str, list[LadderRow]]:
    return {mode: [row for row in ladder if row.mode == mode] for mode in dict.fromkeys(row.mode for row in ladder)}


def conditions_of(ladder: Sequence[LadderRow]) -> list[str]:
    """Return what was measured, where and when: one line, or one for each mode where they differ."""
    modes: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for mode, rows in by_mode(ladder).items():
        modes.setdefault(rows[0].conditions, []).append(mode)
    lines = []
    for conditions, names in modes.items():
        known = {name: dict(conditions).get(name, formats.NOT_KNOWN) for name in CONDITIONS}
        mixed = ", mixed sizes" if known["sizes"] == "mixed" else ""
        lines.append(
            "{model}, {size} px{mixed}, batch size {batch_size}, {modes}: {device}, {threads} threads, torch {torch}, "
            "{date}, commit {commit}.".format(modes=" and ".join(names), mixed=mixed, **known)
        )
    return lines


def time_chart(
    name: str, title: str, rows: Sequence[LadderRow], draw: Callable[[list[charts.Bar]], Figure]
) -> Iterator[Chart]:
    """Yield the chart of all rows that were measured, where there are some."""
    bars = [
        charts.Bar(row.technique, row.median_ms, *(row.median_ms if q is None else q for q in (row.q1_ms, row.q3_ms)))
        for row in rows
        if row.median_ms
    ]
    if bars:
        description = "; ".join(f"{bar.name} {formats.number(bar.median_ms)} ms" for bar in bars)
        yield Chart(name, title, description, partial(draw, bars))


def top_row(rows: Sequence[LadderRow]) -> LadderRow | None:
    """Return the last row that was measured."""
    return next((row for row in reversed(rows) if row.median_ms), None)


def climb(rows: Sequence[LadderRow]) -> str:
    """Tell how many times as fast as the first row the last is, with both figures."""
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


def beside_baselines(rows: Sequence[LadderRow]) -> str:
    """Tell how many times as fast as the fastest baseline the last row, ours, is, with both figures."""
    *others, ours = rows
    baselines = [row for row in others if row.median_ms]
    if not ours.median_ms or not baselines:
        return "nothing was measured that could be compared"
    fastest = min(baselines, key=lambda row: row.median_ms or 0.0)
    return (
        f"{formats.number((fastest.median_ms or 0.0) / ours.median_ms)} times as fast as the fastest baseline: "
        f"{ours.technique} takes {ladder_timing(ours, 'ms')}, {fastest.technique} {ladder_timing(fastest, 'ms')}"
    )


def ladder_timing(row: LadderRow, unit: str | None = None) -> str:
    return formats.timing(row.median_ms, row.q1_ms, row.q3_ms, row.runs, unit)


def slower_rows(rows: Sequence[LadderRow]) -> str:
    slower = [row.technique for row, before in pairs(rows) if change(row, before) > 0]
    return f"slower than the row before: {', '.join(slower)}" if slower else ""


def remarks(rows: Sequence[LadderRow]) -> Iterator[str]:
    """Yield what one should not overlook: rows that are not close or not measured, and unclear ranks."""
    far = [row.technique for row in rows if row.close is False]
    if far:
        yield f"NOT close to the reference: {', '.join(far)}"
    left_out = [f"{row.technique} ({row.note})" if row.note else row.technique for row in rows if not row.median_ms]
    if left_out:
        yield f"not measured: {', '.join(left_out)}"
    rounds = max(len(row.rounds_ms) for row in rows)
    if rounds > 1:
        unclear = [f"{a} and {b}" for a, b in unclear_ranks(rows)]
        order = f"not in the same order in every one: {', '.join(unclear)}" if unclear else "the same ranking in each"
        yield f"{formats.many(rounds, 'round')}, {order}"


def unclear_ranks(rows: Sequence[LadderRow]) -> list[tuple[str, str]]:
    """Return pairs of which now one is faster, now the other."""
    return [
        (a.technique, b.technique)
        for a, b in itertools.combinations(rows, 2)
        if len({x < y for x, y in zip(a.rounds_ms, b.rounds_ms, strict=False)}) > 1
    ]


def ranks(rows: Sequence[LadderRow]) -> dict[str, int]:
    """Rank techniques, the fastest first: one plus the rows that were faster in every round.

    Rows that change places from round to round share a rank, and keep it when they are measured again.
    """
    measured = [row for row in rows if row.rounds_ms]
    return {
        row.technique: 1 + sum(always_faster(other, row) for other in measured if other is not row) for row in measured
    }


def always_faster(row: LadderRow, other: LadderRow) -> bool:
    return all(mine < theirs for mine, theirs in zip(row.rounds_ms, other.rounds_ms, strict=False))


def pairs(rows: Sequence[LadderRow]) -> Iterator[tuple[LadderRow, LadderRow]]:
    """Yield each measured row with the measured one before it."""
    measured = [row for row in rows if row.median_ms]
    yield from zip(measured[1:], measured, strict=False)


def change(row: LadderRow, before: LadderRow) -> float:
    """Return the relative change of the median: above 0 where it is slower."""
    assert row.median_ms and before.median_ms
    return row.median_ms / before.median_ms - 1


def overlapping(row: LadderRow, before: LadderRow) -> bool:
    """Tell whether their quartiles overlap: then nothing is certain."""
    limits = (row.q1_ms, row.q3_ms, before.q1_ms, before.q3_ms)
    low, high, low_before, high_before = (float("nan") if limit is None else limit for limit in limits)
    return low <= high_before and low_before <= high


def compared(row: LadderRow, rows: Sequence[LadderRow]) -> Cell:
    """Compare a row with the one before it."""
    before = next((before for each, before in pairs(rows) if each is row), None)
    if before is None:
        return Cell(row.note)
    by = change(row, before)
    remark = "IQRs overlap" if overlapping(row, before) else "slower" if by > 0 else ""
    text = ", ".join(part for part in (formats.signed_percent(by), remark, row.note) if part)
    return Cell(text, NOTABLE if by > 0 else "")


def error_cells(row: LadderRow) -> list[Cell]:
    """Return what the error is of, the error, what it uses of what is allowed, and the verdict."""
    error, used = formats.error(row.error), formats.used(row.error, row.allowed)
    return cells(row.quantity or formats.NOT_KNOWN, error, used, judged(formats.verdict(row.close), row.close))


def baseline_table(mode: str, rows: Sequence[LadderRow]) -> Table:
    titles = figures("ms (IQR, runs)", "images/s", "speedup over reference", "padding overhead, %", "peak MiB")
    errors = [*words("error of"), *figures("error", "of allowed, %"), *words("verdict")]
    table = Table(f"{capital(mode)}: in turns", [*words(""), *titles, *errors], [*map(baseline_cells, rows)])
    return without_unknown(table)


def baseline_cells(row: LadderRow) -> list[Cell]:
    return cells(
        row.technique,
        ladder_timing(row),
        *(formats.number(each) for each in (row.images_per_second, row.speedup)),
        formats.overhead(row.padding),
        formats.number(row.peak_mib),
        *error_cells(row),
    )


def time_table(mode: str, rows: Sequence[LadderRow]) -> Table:
    top = top_row(rows)
    columns = [
        *words("technique"),
        *figures("ms (IQR, runs)", "images/s", "speedup over reference", "padding overhead, %"),
        *words("against the row above"),
        *figures("leave-one-out, ms (IQR, runs)", "× everything on", "rank"),
    ]
    return without_unknown(Table(f"{capital(mode)}: time", columns, [time_cells(row, rows, top) for row in rows]))


def time_cells(row: LadderRow, rows: Sequence[LadderRow], top: LadderRow | None) -> list[Cell]:
    without_ms = row.without_median_ms
    return cells(
        row.technique,
        ladder_timing(row),
        formats.number(row.images_per_second),
        formats.number(row.speedup),
        formats.overhead(row.padding),
        compared(row, rows),
        formats.timing(without_ms, row.without_q1_ms, row.without_q3_ms, row.without_runs),
        formats.number(without_ms / top.median_ms if without_ms and top and top.median_ms else None),
        str(ranks(rows).get(row.technique, formats.NOT_KNOWN)),
    )


def cost_table(mode: str, rows: Sequence[LadderRow]) -> Table:
    columns = [
        *words("technique"),
        *figures("peak MiB", "energy, J/image", "CPU time, s/image", "first run, s"),
        *words("error of"),
        *figures("error", "of allowed, %"),
        *words("verdict"),
    ]
    return without_unknown(Table(f"{capital(mode)}: memory, energy, exactness", columns, [*map(cost_cells, rows)]))


def cost_cells(row: LadderRow) -> list[Cell]:
    costs = (row.peak_mib, row.energy_j_per_image, row.cpu_seconds_per_image, row.first_run_s)
    return cells(row.technique, *(formats.number(cost) for cost in costs), *error_cells(row))


def readme_cells(row: LadderRow) -> list[Cell]:
    """Return the cells of README_COLUMNS."""
    rates = (formats.number(each) for each in (row.images_per_second, row.speedup, row.peak_mib))
    return cells(row.mode, row.technique, ladder_timing(row), *rates, *error_cells(row))
