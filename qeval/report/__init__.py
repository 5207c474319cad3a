"""Reports from a finished run folder alone, without torch: `build_report` measures, `render` makes the files.

Nothing here imports matplotlib, which takes as long as a gate: what draws is in `render`.
"""

from qeval.report.build import build_paired, build_report
from qeval.report.console import summary_table
from qeval.report.model import Report, report_json

__all__ = [
    "Report",
    "build_paired",
    "build_report",
    "report_json",
    "summary_table",
]
