"""The settings of `--backend vllm`: the interpreter that has it, and its own options that change a number."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from qeval.compare import arguments as read
from qeval.compare.options import Checked, Option
from qeval.errors import UsageError


@dataclass(frozen=True)
class VllmChoice(Checked):
    """The interpreter, the type that is computed in, the GPUs of a layer, the type of keys and values."""

    python: Annotated[
        Path | None,
        Option(
            "With --backend vllm: the Python that has vLLM installed, such as ENV/bin/python; default: this one.",
            keyword="vllm_python",
            parse=read.path_or_none,
        ),
    ] = None
    dtype: Annotated[
        str,
        Option("With --backend vllm: what it computes in: auto, float32, bfloat16, float16.", keyword="vllm_dtype"),
    ] = "auto"
    tensor_parallel: Annotated[
        int,
        Option("With --backend vllm: GPUs that each layer is split over.", keyword="vllm_tensor_parallel", least=1),
    ] = 1
    kv_cache: Annotated[
        str,
        Option("With --backend vllm: its --kv-cache-dtype: auto, fp8, fp8_e5m2.", keyword="vllm_kv_cache"),
    ] = "auto"


def check_vllm(names: Collection[str], choice: VllmChoice) -> None:
    """Refuse options of vLLM where it does not run.

    Args:
        names: The backends' names.
        choice: The options.

    Raises:
        UsageError: It names the flags.
    """
    if "vllm" not in names and choice != VllmChoice():
        raise UsageError("--vllm-... flags are for --backend vllm; add it, or leave them out.")
