"""A file's names for the baseline's parameters, where transformers renames or stacks tensors as it loads them.

A file's names may lack what the base model's begin with (`model.`). Experts that transformers keeps in one stack
(`mlp.experts.gate_up_proj[3]`) lie in files one by one, gate and up apart: as `mlp.experts.3.gate_proj` (Qwen, OLMoE,
DeepSeek) or `block_sparse_moe.experts.3.w1` (Mixtral, Phi-3.5-MoE).
Source: the entries `qwen2_moe` and `mixtral` of transformers/conversion_mapping.py (5.23).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qeval.errors import UsageError
from qeval.formats.checkpoint import CheckpointTensors
from qeval.models.structure.weight_views import expert_of, is_expert, stack_of

_APART = {"gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")), "down_proj": (("down_proj",), ("w2",))}
"""The modules whose rows, one after the other, are an expert's matrix in a stack."""
_IN_THE_MODEL, _IN_FILES = ".mlp.", ".block_sparse_moe."


@dataclass(frozen=True, eq=False)
class TensorNames:
    """A file's tensors by the baseline's names. `prefix`: what the base model's names begin with, such as `model.`."""

    tensors: CheckpointTensors
    prefix: str

    def __contains__(self, name: str) -> bool:
        """Return whether the file has a parameter, or tensors that a format makes its weight of."""
        return self._as_float(name) is not None or bool(self.modules(name))

    def modules(self, name: str) -> tuple[str, ...]:
        """Return the file's modules whose rows, one after the other, are a weight; empty where it has none of it."""
        if not (is_expert(name) or name.endswith(".weight")):
            return ()
        spelled = _spellings(name, self.prefix)
        return next((each for each in spelled if all(self.tensors.below(module) for module in each)), ())

    def stored(self, name: str) -> str | None:
        """Return the tensor that holds a parameter, or the first of its rows; None where none does."""
        tensors = self._as_float(name)
        return tensors[0] if tensors else None

    def load(self, name: str) -> Tensor:
        """Read a parameter that lies in the file as it is, in the file's type.

        Raises:
            UsageError: Only parts of another format are there.
        """
        tensors = self._as_float(name)
        if tensors is None:
            parts = self.tensors.below(next(iter(self.modules(name)), name))
            hint = f", but {parts[0]}, which its format does not say how to read" if parts else ""
            raise UsageError(f"it has no {name}{hint}.")
        if is_expert(name) and len(tensors) == 1 and not tensors[0].endswith(".weight"):
            return self.tensors.load_part(tensors[0], expert_of(name))
        rows = [self.tensors.load(each) for each in tensors]
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def belonging(self, name: str) -> set[str]:
        """Return every tensor of the file that belongs to a parameter, however it is spelled."""
        weight = is_expert(name) or name.endswith(".weight")
        tensors = {each for spelled in _tensors(name, self.prefix) for each in spelled if each in self.tensors}
        below = (self.tensors.below(module) for each in _spellings(name, self.prefix) for module in each)
        return tensors.union(*below) if weight else tensors

    def _as_float(self, name: str) -> tuple[str, ...] | None:
        spellings = _tensors(name, self.prefix)
        return next((each for each in spellings if all(tensor in self.tensors for tensor in each)), None)


def _tensors(name: str, prefix: str) -> Iterator[tuple[str, ...]]:
    """Yield the ways to spell the tensors that hold a parameter: a whole stack comes first for an expert."""
    if is_expert(name):
        yield from ((stack,) for stack in _module_names(stack_of(name), prefix))
        leaf = "weight"
    else:
        leaf = name.rpartition(".")[2]
    yield from (tuple(f"{module}.{leaf}" for module in each) for each in _spellings(name, prefix))


def _spellings(name: str, prefix: str) -> Iterator[tuple[str, ...]]:
    """Yield the ways to spell the modules that hold a parameter's rows."""
    place, _, leaf = stack_of(name).rpartition(".")
    for spelled in _module_names(place, prefix):
        if is_expert(name):
            parts = _APART.get(leaf, ())
            yield from (tuple(f"{spelled}.{expert_of(name)}.{part}" for part in each) for each in parts)
        else:
            yield (spelled,)


def _module_names(module: str, prefix: str) -> Iterator[str]:
    """Yield a module's name, with and without what the base model's begin with; each with the older parent's too."""
    for each in (module, module.removeprefix(prefix) if module.startswith(prefix) else prefix + module):
        yield each
        if _IN_THE_MODEL in f"{each}.":
            yield f"{each}.".replace(_IN_THE_MODEL, _IN_FILES, 1)[:-1]
