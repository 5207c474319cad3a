"""A checkpoint's tensors by name, read when they are asked for; and a linear's, by the linear's name."""

import json
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from qeval.errors import UsageError
from qeval.models.weights import TensorEntry, read_entries, weight_files


@dataclass(frozen=True, eq=False)
class Tensors:
    """The tensors of a checkpoint folder. `header` is what its safetensors files say of themselves."""

    entries: tuple[TensorEntry, ...]
    header: dict[str, str]
    _files: dict[Path, Any]
    _names: tuple[str, ...]

    def __contains__(self, name: str) -> bool:
        """Whether there is a tensor of that name."""
        at = bisect_left(self._names, name)
        return at < len(self._names) and self._names[at] == name

    def named(self) -> tuple[str, ...]:
        """All names, sorted."""
        return self._names

    def load(self, name: str) -> Tensor:
        """A tensor, in the file's type.

        Raises:
            UsageError: it can't be read.
        """
        return self._loaded(name, lambda file: file.get_tensor(name))

    def load_part(self, name: str, index: int) -> Tensor:
        """What a stack holds at an index, in the file's type; the rest is not read.

        Raises:
            UsageError: it can't be read.
        """
        return self._loaded(name, lambda file: file.get_slice(name)[index])

    def _loaded(self, name: str, read: Callable[[Any], Tensor]) -> Tensor:
        entry = self.entries[bisect_left(self._names, name)]
        try:
            return read(self._files[entry.path])
        except (SafetensorError, KeyError, TypeError, IndexError) as error:
            raise UsageError(f"'{entry.path}' holds {name} as {entry.dtype}, which can't be read ({error}).") from error

    def parts_of(self, module: str) -> dict[str, Tensor]:
        """The tensors of a module, by what follows its name."""
        return {name.removeprefix(f"{module}."): self.load(name) for name in self.below(module)}

    def below(self, module: str) -> Sequence[str]:
        """The names of a module's tensors."""
        prefix = f"{module}."
        start = bisect_left(self._names, prefix)
        end = bisect_left(self._names, f"{module}/")  # '/' follows '.' in ASCII
        return self._names[start:end]


@contextmanager
def opened(folder: Path) -> Iterator[Tensors]:
    """The tensors of the checkpoint in `folder`, mapped for the length of the block.

    Raises:
        UsageError: there are none, pickles alone, or files are torn.
    """
    files = weight_files(folder)
    entries = tuple(read_entries(files))
    with ExitStack() as stack:
        handles = {path: stack.enter_context(safe_open(path, "pt")) for path in files}
        header: dict[str, str] = {}
        for handle in handles.values():
            header |= handle.metadata() or {}
        yield Tensors(entries, header, handles, tuple(entry.name for entry in entries))


def read_config(folder: Path) -> dict[str, Any]:
    """A folder's config.json.

    Raises:
        UsageError: it is missing or no JSON object.
    """
    if not (folder / "config.json").is_file():
        raise UsageError(f"'{folder}' is no checkpoint: there is no config.json in it.")
    return _read_object(folder / "config.json")


def read_quantization(folder: Path) -> dict[str, Any] | None:
    """How a folder says that it is quantized: in its config.json, or beside it as Model Optimizer did first.

    Raises:
        UsageError: config.json is missing, or a file is no JSON object.
    """
    config = read_config(folder)
    beside = folder / "hf_quant_config.json"
    quantized = config.get("quantization_config") or config.get("compression_config")
    if quantized is None and beside.is_file():
        return {"quant_method": "modelopt", **(_read_object(beside).get("quantization") or {})}
    return quantized


def _read_object(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"'{path}' can't be read: {error}.") from error
    if not isinstance(config, dict):
        raise UsageError(f"'{path}' holds no JSON object.")
    return config
