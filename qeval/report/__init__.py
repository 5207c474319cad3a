"""Reports from a finished run folder alone, without torch: `build_report` measures, `render` makes the files."""

from qeval.report.build import build_paired, build_report
from qeval.report.console import summary_table
from qeval.report.model import Report, report_json
from qeval.report.render import Rendered, render, write_report

__all__ = [
    "Rendered",
    "Report",
    "build_paired",
    "build_report",
    "render",
    "report_json",
    "summary_table",
    "write_report",
]
