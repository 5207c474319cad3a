"""Tools that quantize a folder into a folder: GPTQModel and AutoRound, whose packings `qeval.formats` reads.

Run for real with GPTQModel 7.6.0, 7.7.0 and AutoRound 0.16.1: what was read is what GPTQModel's own kernel multiplies
with.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import chdir, redirect_stdout
from itertools import chain, count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from qeval.errors import QevalError, UsageError
from qeval.formats.assemble import decode_weight, is_packed
from qeval.formats.base import DecodedMatrix
from qeval.formats.checkpoint import open_checkpoint
from qeval.formats.names import TensorNames
from qeval.formats.registry import format_of
from qeval.models.trust import read_settings
from qeval.quant.grid import Grid, PerBlock, PerTensor
from qeval.quantize.tools.base import Tool, ToolJob


class _Run(Protocol):
    def __call__(self, job: ToolJob, source: Path, target: Path, grid: Grid, size: int) -> None: ...


def gptqmodel(job: ToolJob) -> Mapping[str, DecodedMatrix]:
    """Quantize by GPTQModel, with its defaults."""
    return _through_folders(job, "gptqmodel", _run_gptqmodel)


def autoround(job: ToolJob) -> Mapping[str, DecodedMatrix]:
    """Quantize by AutoRound (Cheng et al. 2024), with its defaults."""
    return _through_folders(job, "autoround", _run_autoround)


def _run_gptqmodel(job: ToolJob, source: Path, target: Path, grid: Grid, size: int) -> None:
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # by itself it takes one on two cores, and then wants two
    from gptqmodel import GPTQModel, QuantizeConfig  # noqa: PLC0415 - an extra

    grouped = {} if size > 0 else {"act_group_aware": False}  # its default, which one group a row is refused with
    config = QuantizeConfig(bits=grid.bits, group_size=size, sym=grid.symmetric, **grouped)
    model = GPTQModel.load(str(source), config)
    model.quantize([{"input_ids": list(sample), "attention_mask": [1] * len(sample)} for sample in job.samples])
    model.save(str(target))


def _run_autoround(job: ToolJob, source: Path, target: Path, grid: Grid, size: int) -> None:
    import torch  # noqa: PLC0415 - with the tool
    from auto_round import AutoRound  # noqa: PLC0415 - an extra

    samples = [{"input_ids": torch.tensor([list(sample)])} for sample in job.samples]
    settings = {"bits": grid.bits, "group_size": size, "sym": grid.symmetric, "nsamples": len(samples)}
    length = min(len(sample) for sample in job.samples)
    tool = AutoRound(str(source), dataset=samples, seqlen=length, enable_torch_compile=False, **settings)
    tool.quantize_and_save(str(target), format="auto_gptq")


def _through_folders(job: ToolJob, tool: str, run: _Run) -> Mapping[str, DecodedMatrix]:
    grid = job.one_grid(tool)
    if isinstance(grid.granularity, PerTensor):
        raise UsageError(f"{tool} takes blocks or one scale a row, not {grid}.")
    size = grid.granularity.size if isinstance(grid.granularity, PerBlock) else -1
    with TemporaryDirectory(prefix=f"qeval-{tool}-") as temporary:
        source, target = Path(temporary) / "model", Path(temporary) / "quantized"
        job.model.save_pretrained(source)
        _tokenizer_for(job.samples).save_pretrained(source)
        with chdir(temporary), redirect_stdout(sys.stderr):  # GPTQModel leaves its logs where it stands; --json prints
            run(job, source, target, grid, size)
        return _read(_saved(target, tool), job, tool)


def _tokenizer_for(samples: Sequence[Sequence[int]]) -> PreTrainedTokenizerFast:
    """Return a tokenizer that both tools insist on loading and saving, though the samples are token ids already.

    They take its padding out of the samples, so that is an id that no sample has.
    """
    ids = set(chain.from_iterable(samples))
    pad = next(token for token in count() if token not in ids)
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"?": pad}, unk_token="?")), pad_token="?")


def _saved(target: Path, tool: str) -> Path:
    """Return the checkpoint that a tool left: in the target folder, or in one of its own naming inside."""
    configs = sorted(target.rglob("config.json"))
    if len(configs) != 1:
        raise QevalError(f"{tool} left {len(configs)} checkpoints where one was asked for.")
    return configs[0].parent


def _read(folder: Path, job: ToolJob, tool: str) -> Mapping[str, DecodedMatrix]:
    config = read_settings(folder).get("quantization_config") or {}
    reads = format_of(config, str(folder))
    matrices: dict[str, DecodedMatrix] = {}
    with open_checkpoint(folder) as tensors:
        names = TensorNames(tensors, f"{job.model.base_model_prefix}.")
        for name in job.grids:
            if not is_packed(names, reads, name):
                raise QevalError(f"{tool} left {name} in float, though its grid asks for integers.")
            matrices[name] = decode_weight(names, reads, config, name, job.parameters[name])
    return matrices


GPTQMODEL = Tool(gptqmodel, "gptqmodel", "gptqmodel", "pip install 'qeval[gptqmodel]'")
AUTOROUND = Tool(autoround, "auto_round", "auto-round", "pip install 'qeval[autoround]'")
