"""Renders blocks as one HTML page without scripts that fetches nothing: its charts are images within it."""

from base64 import b64encode
from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined

from detr_profiling.pages.blocks import Report


def render_html(report: Report) -> str:
    return templates().get_template("report.html.j2").render(report=report)


@cache
def templates() -> Environment:
    """Return the templates, which escape all text by themselves."""
    loader = PackageLoader("detr_profiling", "pages/templates")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["data_uri"] = data_uri
    return environment


def data_uri(svg: str) -> str:
    """Return an SVG as an image's source: what is in it runs nothing, and its ids are its own."""
    return f"data:image/svg+xml;base64,{b64encode(svg.encode()).decode()}"
