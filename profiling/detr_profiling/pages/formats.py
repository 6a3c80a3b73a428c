"""Numbers as text, the same in every report: three digits, thousands apart, n/a for what is not known."""

import math
from collections.abc import Sequence

NOT_KNOWN = "n/a"


def number(value: float | None, digits: int = 3) -> str:
    """Return at least `digits` significant digits, whole from 100 on, with an exponent below a thousandth."""
    if value is None or not math.isfinite(value):
        return NOT_KNOWN
    if value == 0:
        return "0"
    size = abs(value)
    if size < 1e-3:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    decimals = max(0, digits - 1 - math.floor(math.log10(size)))
    return f"{value:,.{decimals}f}"


def count(value: float | None) -> str:
    """Return a number of things: whole, unless it is a mean that is not."""
    if value is None or not math.isfinite(value):
        return NOT_KNOWN
    return f"{value:,.0f}" if value == round(value) else number(value)


def error(value: float | None) -> str:
    return number(value, digits=2)


def used(error: float | None, allowed: float | None) -> str:
    """Return an error in percent of what is allowed."""
    return NOT_KNOWN if error is None or not allowed else number(100 * error / allowed, digits=2)


def overhead(padding: float | None) -> str:
    """Return what is padding in percent of the images' own pixels; `padding`: pixels computed for each of these."""
    return NOT_KNOWN if padding is None else number(max(0.0, round(100 * (padding - 1), 6)), digits=2)


def many(value: float, one: str, several: str | None = None) -> str:
    """Return `1 run`, `2 runs`."""
    return f"{count(value)} {one if value == 1 else several or one + 's'}"


def timing(
    median: float | None, q1: float | None, q3: float | None, runs: float | None, unit: str | None = None
) -> str:
    """Return `302 (11, 5 runs)`, or with a unit `302 ms (11, 5 runs)`: the median, the IQR, the runs."""
    shown = number(median) if unit is None or median is None else f"{number(median)} {unit}"
    if q1 is None or q3 is None or runs is None:
        return shown
    return f"{shown} ({number(q3 - q1, digits=2)}, {many(runs, 'run')})"


def signed_percent(change: float) -> str:
    """Return a relative change, as in `−25 %`."""
    return f"{'+' if change >= 0 else '−'}{number(100 * abs(change), digits=2)} %"


def percent(fraction: float | None) -> str:
    return NOT_KNOWN if fraction is None or not math.isfinite(fraction) else f"{100 * fraction:.1f}"


def percents(fractions: Sequence[float | None]) -> list[str]:
    """Round the parts of a whole so that what is shown adds up to 100.0 where the parts do."""
    known = [fraction or 0.0 for fraction in fractions]
    if None in fractions or abs(sum(known) - 1) > 5e-4:
        return [percent(fraction) for fraction in fractions]
    tenths = [math.floor(1000 * fraction) for fraction in known]
    by_rest = sorted(range(len(known)), key=lambda index: tenths[index] - 1000 * known[index])
    for index in by_rest[: 1000 - sum(tenths)]:
        tenths[index] += 1
    return [f"{tenth / 10:.1f}" for tenth in tenths]


def verdict(close: bool | None) -> str:
    return {True: "close", False: "NOT close", None: NOT_KNOWN}[close]
