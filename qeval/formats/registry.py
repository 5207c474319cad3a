"""The formats that are read, by the `quant_method` of a checkpoint's config.json."""

from importlib.util import find_spec

from qeval.errors import UsageError
from qeval.formats import autoround, awq, bitsandbytes, compressed, fp8, gptq, hqq, modelopt, torchao
from qeval.formats.base import CheckpointFormat, Config

CHECKPOINT_FORMATS: dict[str, CheckpointFormat] = {
    "awq": awq.AWQ,
    "gptq": gptq.GPTQ,
    "auto-round": autoround.AUTO_ROUND,
    "intel/auto-round": autoround.AUTO_ROUND,
    "compressed-tensors": compressed.COMPRESSED_TENSORS,
    "bitsandbytes": bitsandbytes.BITSANDBYTES,
    "hqq": hqq.HQQ,
    "torchao": torchao.TORCHAO,
    "modelopt": modelopt.MODELOPT,
    "fp8": fp8.FP8_TILES,
    "fbgemm_fp8": fp8.FP8_ROWS,
}


def format_of(config: Config, where: str) -> CheckpointFormat:
    """Return the format of a checkpoint with this `quantization_config`.

    Raises:
        UsageError: None reads it, or what reads it is not installed.
    """
    method = str(config.get("quant_method", "unnamed"))
    if method not in CHECKPOINT_FORMATS:
        raise UsageError(
            f"'{where}' is quantized by '{method}', which is not read; these are: {', '.join(CHECKPOINT_FORMATS)}."
        )
    reader = CHECKPOINT_FORMATS[method]
    if reader.library and find_spec(reader.library[0]) is None:
        raise UsageError(f"'{where}' is read by {reader.library[0]}, which is not installed: {reader.library[1]}.")
    return reader
