"""Tools that quantize a folder into a folder: GPTQModel and AutoRound, their own packings read by our own readers."""

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol

from qeval.calibrate.tools.base import Job, Tool
from qeval.errors import QevalError, UsageError
from qeval.formats.base import Matrix, Module
from qeval.formats.checkpoint import opened, read_config
from qeval.formats.registry import format_of
from qeval.quant.grid import Grid, PerBlock, PerTensor


class _Run(Protocol):
    def __call__(self, job: Job, source: Path, target: Path, grid: Grid, size: int) -> None: ...


def gptqmodel(job: Job) -> Mapping[str, Matrix]:
    """GPTQ by GPTQModel, with its defaults."""
    return _through_folders(job, "gptqmodel", _run_gptqmodel)


def autoround(job: Job) -> Mapping[str, Matrix]:
    """AutoRound (Cheng et al. 2024), with its defaults."""
    return _through_folders(job, "autoround", _run_autoround)


def _run_gptqmodel(job: Job, source: Path, target: Path, grid: Grid, size: int) -> None:
    from gptqmodel import GPTQModel, QuantizeConfig  # noqa: PLC0415 - an extra

    model = GPTQModel.load(str(source), QuantizeConfig(bits=grid.bits, group_size=size, sym=grid.symmetric))
    model.quantize([{"input_ids": list(sample), "attention_mask": [1] * len(sample)} for sample in job.samples])
    model.save(str(target))


def _run_autoround(job: Job, source: Path, target: Path, grid: Grid, size: int) -> None:
    import torch  # noqa: PLC0415 - with the tool
    from auto_round import AutoRound  # noqa: PLC0415 - an extra

    samples = [{"input_ids": torch.tensor([list(sample)])} for sample in job.samples]
    settings = {"bits": grid.bits, "group_size": size, "sym": grid.symmetric, "nsamples": len(samples)}
    length = min(len(sample) for sample in job.samples)
    tool = AutoRound(job.model, None, dataset=samples, seqlen=length, **settings)
    tool.quantize_and_save(str(target), format="auto_gptq")


def _through_folders(job: Job, tool: str, run: _Run) -> Mapping[str, Matrix]:
    grid = job.one_grid(tool)
    if isinstance(grid.granularity, PerTensor):
        raise UsageError(f"{tool} takes blocks or one scale a row, not {grid}.")
    size = grid.granularity.size if isinstance(grid.granularity, PerBlock) else -1
    with TemporaryDirectory(prefix=f"qeval-{tool}-") as temporary:
        source, target = Path(temporary) / "model", Path(temporary) / "quantized"
        job.model.save_pretrained(source)
        run(job, source, target, grid, size)
        return _read(target, job, tool)


def _read(folder: Path, job: Job, tool: str) -> Mapping[str, Matrix]:
    config = read_config(folder).get("quantization_config") or {}
    reads = format_of(config, str(folder))
    found: dict[str, Matrix] = {}
    with opened(folder) as tensors:
        for name in job.grids:
            module, (rows, columns) = name.removesuffix(".weight"), job.parameters[name].shape
            parts = tensors.parts_of(module)
            if not any(marker in parts for marker in reads.markers):
                raise QevalError(f"{tool} left {name} in float, though its grid asks for integers.")
            found[name] = reads.decode(Module(module, rows, columns, parts), config)
    return found


GPTQMODEL = Tool(gptqmodel, "gptqmodel", "gptqmodel", "pip install 'qeval[gptqmodel]'")
AUTOROUND = Tool(autoround, "auto_round", "auto-round", "pip install 'qeval[autoround]'")
