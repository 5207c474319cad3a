"""`qeval sensitivity`: which layer hurts."""

from qeval.api import making
from qeval.cli.options import CommandCall, with_flags_of
from qeval.cli.printing import print_json, stderr, stdout
from qeval.cli.progress import ConsoleProgress
from qeval.compare.defaults import HubChoice
from qeval.compare.options import Option
from qeval.compare.settings import Settings

_SHOWN = 20


@with_flags_of(
    making.sensitivity,
    trees=(Settings, HubChoice),
    method="rtn or awq, with any grid, such as rtn:int4-g32.",
    budgets=Option("Sizes of a mix, such as 4.5,4.8,5.5bpw. Default: five in between.", type=str | None),
    formats=Option(
        "What a mix chooses among: int4-g128/nvfp4/bf16. Default: the method's grid and INT8.", type=str | None
    ),
    measured_samples=Option("Calibration sequences that each KL is measured on.", type=int, least=1),
)
def sensitivity(call: CommandCall) -> None:
    """Measure each group of linears alone quantized and left in float, map them, and list what a mix would pick.

    The same command goes on where it stopped.
    """
    console = stderr()
    _, page, effects = making.sensitivity(**call.values, progress=ConsoleProgress(console, quiet=call.quiet))
    from qeval.report.console import terminal_table  # noqa: PLC0415 - the statistics take a second to import
    from qeval.report.sensitivity import groups_table, sensitivity_json, verdict  # noqa: PLC0415

    if call.as_json:
        print_json(sensitivity_json(effects))
        return
    stdout().print(terminal_table(groups_table(effects, _SHOWN)))
    stdout().print(verdict(effects), soft_wrap=True)
    if not call.quiet:
        console.print(f"report: {page}", soft_wrap=True)
