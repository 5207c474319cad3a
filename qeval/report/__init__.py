"""Reports from a finished run folder alone, without torch: `build` the numbers, `render` the files."""

from qeval.report.build import build
from qeval.report.console import summary_table
from qeval.report.model import Report, report_json
from qeval.report.render import Rendered, render, write

__all__ = ["Rendered", "Report", "build", "render", "report_json", "summary_table", "write"]
