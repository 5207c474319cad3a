"""Which formats are read: the `quant_method` of a checkpoint's config.json, and who reads it."""

from importlib.util import find_spec

from qeval.errors import UsageError
from qeval.formats import autoround, awq, bitsandbytes, compressed, fp8, gptq, hqq, modelopt, torchao
from qeval.formats.base import Config, Format

FORMATS: dict[str, Format] = {
    "awq": awq.FORMAT,
    "gptq": gptq.FORMAT,
    "auto-round": autoround.FORMAT,
    "intel/auto-round": autoround.FORMAT,
    "compressed-tensors": compressed.FORMAT,
    "bitsandbytes": bitsandbytes.FORMAT,
    "hqq": hqq.FORMAT,
    "torchao": torchao.FORMAT,
    "modelopt": modelopt.FORMAT,
    "fp8": fp8.FORMAT,
    "fbgemm_fp8": fp8.FBGEMM,
}


def format_of(config: Config, where: str) -> Format:
    """The format of a checkpoint with this `quantization_config`.

    Raises:
        UsageError: none reads it, or what reads it is not installed.
    """
    method = str(config.get("quant_method", "unnamed"))
    if method not in FORMATS:
        raise UsageError(f"'{where}' is quantized by '{method}', which is not read; these are: {', '.join(FORMATS)}.")
    found = FORMATS[method]
    if found.library and find_spec(found.library[0]) is None:
        raise UsageError(f"'{where}' is read by {found.library[0]}, which is not installed: {found.library[1]}.")
    return found
