"""What parity found as tables for a terminal: of each variant what is nearest to its limit, and all that is past it."""

from collections.abc import Iterator
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.table import Column, Table
from rich.text import Text

from detr_profiling.pages import formats


def parity_tables(record: dict[str, Any]) -> Iterator[RenderableType]:
    """Of the dict that parity.json holds."""
    yield rows_table(record["variants"])
    for name, reason in record["left_out"].items():
        yield Text(f"{name} is left out: {reason}")
    for part, table in ((record["curve"], curve_table), (record["ap"], ap_table)):
        if part:
            yield table(part)
            yield Text.assemble(judged(part["close"]), f": {part['message']}\n")
    yield judged(record["close"], "Parity holds.", "Parity does NOT hold.")


def judged(close: bool, yes: str = "close", no: str = "NOT close") -> Text:
    return Text(yes, "green") if close else Text(no, "bold red")


def right(*names: str) -> list[Column]:
    return [Column(name, justify="right") for name in names]


def rows_table(variants: list[dict[str, Any]]) -> Table:
    """`used` is the share of the allowed error."""
    title = "Errors against the plain reference in float64"
    table = Table("", "nearest to its limit", *right("error", "allowed", "used"), title=title, box=SIMPLE_HEAD)
    for variant in variants:
        table.add_row(Text(variant["name"], "bold"), judged(variant["close"]))
        for row in nearest_rows(variant["rows"]):
            kind = f"  {row['kind']}, {sum(each['kind'] == row['kind'] for each in variant['rows'])} rows"
            numbers = (formats.error(row[name]) for name in ("error", "allowed"))
            used = f"{formats.percent(share(row))} %"
            table.add_row(kind, Text(row["quantity"]), *numbers, Text(used, "" if row["close"] else "bold red"))
        if variant["equal_matches"] is not None:
            table.add_row("", f"{100 * variant['equal_matches']:.1f} % of matches are float64's")
        table.add_section()
    return table


def nearest_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each kind the one that is nearest to its limit, and all that are not close."""
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_kind.setdefault(row["kind"], []).append(row)
    nearest = [max(each, key=lambda row: share(row) or 0.0) for each in by_kind.values()]
    return [row for row in rows if not row["close"] or row in nearest]


def share(row: dict[str, Any]) -> float | None:
    """Of what is allowed."""
    if row["error"] is None or not row["allowed"]:
        return None
    return row["error"] / row["allowed"]


def curve_table(curve: dict[str, Any]) -> Table:
    steps = sorted(
        {0, 1, *(curve["steps"] * quarter // 4 - 1 for quarter in (1, 2, 3, 4))} & set(range(curve["steps"]))
    )
    title = f"Loss of {curve['model']} on one batch of {curve['data']}"
    table = Table("run", *right(*(f"step {step + 1}" for step in steps)), title=title, box=SIMPLE_HEAD)
    for name, losses in ({"reference fp64": curve["oracle"]} | curve["losses"]).items():
        table.add_row(name, *(formats.number(losses[step], digits=6) for step in steps))
    for name, allowed in curve["allowed"].items():
        table.add_row(Text(f"{name} may part by", "dim"), *(formats.error(allowed[step]) for step in steps))
    return table


def ap_table(ap: dict[str, Any]) -> Table:
    title = f"Average precision of the same weights on {ap['images']} images ({ap['data']})"
    table = Table("run", *right("AP", "AP50"), title=title, box=SIMPLE_HEAD)
    for row in ap["rows"]:
        table.add_row(
            row["name"], *(formats.NOT_KNOWN if row[name] is None else f"{row[name]:.4f}" for name in ("AP", "AP50"))
        )
    return table
