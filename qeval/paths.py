"""Where things lie: the cache (`QEVAL_HOME`) and the data files that are shipped with the program."""

import os
from pathlib import Path

HOME = "QEVAL_HOME"
"""The variable that names the cache folder."""

_PACKAGE = Path(__file__).resolve().parent


def home() -> Path:
    """The cache folder: `QEVAL_HOME`, else `~/.cache/qeval`."""
    return Path(os.environ.get(HOME) or Path.home() / ".cache" / "qeval").expanduser()


def shipped(relative: str) -> Path:
    """A shipped data file or folder such as `configs/models.yaml`: in a checkout or inside the wheel."""
    checkout = _PACKAGE.parent / relative
    return checkout if checkout.exists() else _PACKAGE / "data" / relative
