"""The tools that `--methods` can name, by the method's name in `config.TOOLS`."""

from importlib.metadata import version
from importlib.util import find_spec

from qeval.calibrate.tools import hqq, modelopt, ort, saved, torchao
from qeval.calibrate.tools.base import Tool
from qeval.errors import UsageError

TOOLS: dict[str, Tool] = {
    "modelopt": modelopt.TOOL,
    "torchao": torchao.TOOL,
    "hqq": hqq.TOOL,
    "gptqmodel": saved.GPTQMODEL,
    "autoround": saved.AUTOROUND,
    "ort": ort.TOOL,
}


def installed_tool(method: str) -> Tool:
    """The tool of a method.

    Raises:
        UsageError: its package is not installed.
    """
    tool = TOOLS[method]
    if find_spec(tool.package) is None:
        raise UsageError(f"'{method}' is {tool.distribution}'s, which is not installed: {tool.install}.")
    return tool


def tool_version(method: str) -> str:
    """The version of a method's package: part of what decides its numbers."""
    return version(installed_tool(method).distribution)
