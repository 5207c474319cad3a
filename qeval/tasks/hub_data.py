"""The data sets of the hub that texts and questions come from, and whether they lie on this machine already."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

import yaml

from qeval.errors import unknown
from qeval.files.atomic import write_text
from qeval.hub import data_sets_cache
from qeval.identity import digest
from qeval.paths import home

_MMLU_TEMPLATE = "_default_template_yaml"


@dataclass(frozen=True)
class HubText:
    """The location of a text on the hub, what joins its documents, and what stands for a blank one."""

    hub_id: str
    config: str | None
    split: str
    column: str
    joiner: str = "\n\n"
    blank: str = ""
    documents: int | None = None
    """The first so many; None: all."""

    @property
    def _path(self) -> Path:
        name = self.hub_id.rpartition("/")[2]
        return home() / "texts" / f"{name}-{self.split}-{digest(asdict(self))[:16]}.json"

    def read(self) -> str | None:
        """Return the text as it was written here before; None where it wasn't, or the file is torn."""
        try:
            record = json.loads(self._path.read_text(encoding="utf-8"))
            text, sha256 = str(record["text"]), record["check"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return text if digest({"text": text}) == sha256 else None

    def write(self, text: str) -> None:
        """Write the text, so that the next run asks no hub for it; the file appears whole.

        Raises:
            QevalError: The cache can't be written.
        """
        record = {"from": asdict(self), "check": digest({"text": text}), "text": text}
        write_text(self._path, json.dumps(record))

    @property
    def is_here(self) -> bool:
        """Return whether it can be had without the hub."""
        return self.read() is not None or in_cache(self.hub_id, self.config)


def in_cache(hub_id: str, config: str | None) -> bool:
    """Return whether the `datasets` library has a configuration of a data set in its cache (`HF_HOME`)."""
    owner, _, name = hub_id.rpartition("/")
    folder = data_sets_cache() / (f"{owner}___{_snake(name)}" if owner else _snake(name))
    return any(folder.glob(f"{config or '*'}/*/*/dataset_info.json"))


def mmlu_subjects() -> list[str]:
    """Return the subjects of lm-evaluation-harness's MMLU, without importing the harness."""
    return sorted(path.stem.removeprefix("mmlu_") for path in mmlu_folder().glob("mmlu_*.yaml"))


def mmlu_data_set() -> str:
    """Return the id of the data set that the harness's MMLU reads."""
    template = yaml.safe_load((mmlu_folder() / _MMLU_TEMPLATE).read_text(encoding="utf-8"))
    return str(template["dataset_path"])


def check_subjects(names: Sequence[str]) -> None:
    """Refuse subjects that MMLU does not have.

    Raises:
        UsageError: It names the nearest.
    """
    known = mmlu_subjects()
    for name in names:
        if name not in known:
            raise unknown("MMLU subject", name, known)


def mmlu_folder() -> Path:
    """Return where the harness's definitions of MMLU lie."""
    spec = find_spec("lm_eval")
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "tasks" / "mmlu" / "default"


def _snake(name: str) -> str:
    """Return a data set's name as its folder in the cache has it."""
    from datasets.naming import camelcase_to_snakecase  # noqa: PLC0415 - heavy, and needed where no hub answers alone

    return str(camelcase_to_snakecase(name))
