"""A checkpoint's tensors by name, read when they are asked for; and a linear's, by the linear's name."""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from qeval.errors import UsageError
from qeval.escape import cut
from qeval.models.checkpoint.weights import TensorEntry, read_entries, weight_files
from qeval.models.trust import read_settings
from qeval.parsing import load_object, one_sentence


@dataclass(frozen=True, eq=False)
class CheckpointTensors:
    """The tensors of a checkpoint folder. `header` is what its safetensors files say of themselves."""

    entries: tuple[TensorEntry, ...]
    header: dict[str, str]
    _files: dict[Path, Any]
    _names: tuple[str, ...]

    def __contains__(self, name: str) -> bool:
        """Return whether there is a tensor of that name."""
        at = bisect_left(self._names, name)
        return at < len(self._names) and self._names[at] == name

    def named(self) -> tuple[str, ...]:
        """Return all names, sorted."""
        return self._names

    def load(self, name: str) -> Tensor:
        """Read a tensor, in the file's type.

        Raises:
            UsageError: It can't be read.
        """
        return self._loaded(name, lambda file: file.get_tensor(name))

    def load_part(self, name: str, index: int) -> Tensor:
        """Read what a stack holds at an index, in the file's type; the rest is not read.

        Raises:
            UsageError: It can't be read.
        """
        return self._loaded(name, lambda file: file.get_slice(name)[index])

    def _loaded(self, name: str, read: Callable[[Any], Tensor]) -> Tensor:
        entry = self.entries[bisect_left(self._names, name)]
        try:
            return read(self._files[entry.path])
        except (SafetensorError, KeyError, TypeError, IndexError) as error:
            raise UsageError(f"'{entry.path}' holds {name} as {entry.dtype}, which can't be read ({error}).") from error

    def parts_of(self, module: str) -> dict[str, Tensor]:
        """Read the tensors of a module, by what follows its name."""
        return {name.removeprefix(f"{module}."): self.load(name) for name in self.below(module)}

    def below(self, module: str) -> Sequence[str]:
        """Return the names of a module's tensors."""
        prefix = f"{module}."
        start = bisect_left(self._names, prefix)
        end = bisect_left(self._names, f"{module}/")  # '/' follows '.' in ASCII
        return self._names[start:end]


@contextmanager
def open_checkpoint(folder: Path) -> Iterator[CheckpointTensors]:
    """Map the tensors of the checkpoint in `folder` for the length of the block.

    Raises:
        UsageError: There are none, pickles alone, or files are torn.
    """
    files = weight_files(folder)
    entries = tuple(read_entries(files))
    with ExitStack() as stack:
        handles, header = {}, dict[str, str]()
        for path in files:
            with one_sentence(f"'{path}' is torn or not safetensors", after="Download it again."):
                handles[path] = stack.enter_context(safe_open(path, "pt"))
                header |= handles[path].metadata() or {}
        yield CheckpointTensors(entries, header, handles, tuple(entry.name for entry in entries))


def read_quantization(folder: Path) -> dict[str, Any] | None:
    """Return how a folder says that it is quantized: in its config.json, and in Model Optimizer's own file.

    Raises:
        UsageError: config.json is missing, or a file is no JSON object.
    """
    config = read_settings(folder)
    other_file = folder / "hf_quant_config.json"
    quantized = config.get("quantization_config") or config.get("compression_config")
    is_modelopt = quantized is None or (isinstance(quantized, dict) and quantized.get("quant_method") == "modelopt")
    if is_modelopt and other_file.is_file():
        own = load_object(other_file).get("quantization") or {}
        quantized = {"quant_method": "modelopt", **own, **(quantized or {})} if isinstance(own, dict) else own
    if quantized is not None and not isinstance(quantized, dict):
        raise UsageError(f"'{folder}' says that it is quantized by {cut(quantized)}, and not how; download it again.")
    return quantized
