"""The adapters of other tools, by the name of their method in `qeval.methods`."""

from importlib.metadata import version
from importlib.util import find_spec

from qeval.errors import UsageError
from qeval.quantize.tools import hqq, modelopt, ort, saved, torchao
from qeval.quantize.tools.base import Tool

TOOLS: dict[str, Tool] = {
    "modelopt": modelopt.MODELOPT_TOOL,
    "torchao": torchao.TORCHAO_TOOL,
    "hqq": hqq.HQQ_TOOL,
    "gptqmodel": saved.GPTQMODEL,
    "autoround": saved.AUTOROUND,
    "ort": ort.ORT_TOOL,
}


def installed_tool(method: str) -> Tool:
    """Return the tool of a method.

    Raises:
        UsageError: Its package is not installed.
    """
    tool = TOOLS[method]
    if find_spec(tool.package) is None:
        raise UsageError(f"'{method}' is {tool.distribution}'s, which is not installed: {tool.install}.")
    return tool


def tool_version(method: str) -> str:
    """Return the version of a method's package: part of what decides its numbers."""
    return version(installed_tool(method).distribution)
