"""The report as JSON: all of it, in base units. The schema is docs/json.md."""

from ..report import Report, to_json
from .registry import Options, renderer


@renderer("json")
def render(report: Report, options: Options) -> str:  # noqa: ARG001  # JSON has no width, colour or top
    """The report as `report.to_json` writes it, which `report.from_json` reads back."""
    return to_json(report)
