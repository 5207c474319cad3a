"""What a file calls a parameter of the baseline, where transformers renames or stacks tensors as it loads them.

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
from qeval.formats.checkpoint import Tensors
from qeval.models.matrices import expert_of, is_expert, stack_of

_APART = {"gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")), "down_proj": (("down_proj",), ("w2",))}
"""The modules whose rows, one after the other, are an expert's matrix in a stack."""
_IN_THE_MODEL, _IN_FILES = ".mlp.", ".block_sparse_moe."


@dataclass(frozen=True, eq=False)
class Names:
    """A file's tensors by the baseline's names. `prefix`: what the base model's names begin with, such as `model.`."""

    tensors: Tensors
    prefix: str

    def __contains__(self, name: str) -> bool:
        """Whether the file has a parameter, or tensors that a format makes its weight of."""
        return self._as_float(name) is not None or bool(self.modules(name))

    def modules(self, name: str) -> tuple[str, ...]:
        """The file's modules whose rows, one after the other, are a weight; empty where it has none of that weight."""
        if not (is_expert(name) or name.endswith(".weight")):
            return ()
        spelled = _spellings(name, self.prefix)
        return next((each for each in spelled if all(self.tensors.below(module) for module in each)), ())

    def stored(self, name: str) -> str | None:
        """The tensor that holds a parameter, or the first of its rows; None where none does."""
        held = self._as_float(name)
        return held[0] if held else None

    def load(self, name: str) -> Tensor:
        """A parameter that lies in the file as it is, in the file's type.

        Raises:
            UsageError: only parts of another format are there.
        """
        held = self._as_float(name)
        if held is None:
            parts = self.tensors.below(next(iter(self.modules(name)), name))
            beside = f", but {parts[0]}, which its format does not say how to read" if parts else ""
            raise UsageError(f"it has no {name}{beside}.")
        if is_expert(name) and len(held) == 1 and not held[0].endswith(".weight"):
            return self.tensors.load_part(held[0], expert_of(name))
        rows = [self.tensors.load(each) for each in held]
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def belonging(self, name: str) -> set[str]:
        """Every tensor of the file that belongs to a parameter, however it is spelled."""
        weight = is_expert(name) or name.endswith(".weight")
        found = {each for spelled in _tensors(name, self.prefix) for each in spelled if each in self.tensors}
        below = (self.tensors.below(module) for each in _spellings(name, self.prefix) for module in each)
        return found.union(*below) if weight else found

    def _as_float(self, name: str) -> tuple[str, ...] | None:
        every = _tensors(name, self.prefix)
        return next((each for each in every if all(tensor in self.tensors for tensor in each)), None)


def _tensors(name: str, prefix: str) -> Iterator[tuple[str, ...]]:
    """The ways to spell the tensors that hold a parameter: a whole stack comes first for an expert."""
    if is_expert(name):
        yield from ((stack,) for stack in _places(stack_of(name), prefix))
        leaf = "weight"
    else:
        leaf = name.rpartition(".")[2]
    yield from (tuple(f"{module}.{leaf}" for module in each) for each in _spellings(name, prefix))


def _spellings(name: str, prefix: str) -> Iterator[tuple[str, ...]]:
    """The ways to spell the modules that hold a parameter's rows."""
    place, _, leaf = stack_of(name).rpartition(".")
    for spelled in _places(place, prefix):
        if is_expert(name):
            parts = _APART.get(leaf, ())
            yield from (tuple(f"{spelled}.{expert_of(name)}.{part}" for part in each) for each in parts)
        else:
            yield (spelled,)


def _places(module: str, prefix: str) -> Iterator[str]:
    """A module's name; that with or without what the base model's names begin with; both with the older parent's."""
    for each in (module, module.removeprefix(prefix) if module.startswith(prefix) else prefix + module):
        yield each
        if _IN_THE_MODEL in f"{each}.":
            yield f"{each}.".replace(_IN_THE_MODEL, _IN_FILES, 1)[:-1]
