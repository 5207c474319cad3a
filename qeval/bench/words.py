"""What the job and the process of an engine say to one another: small, frozen, plain."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qeval.engines.base import Identity, Memory, Tokens
from qeval.engines.opening import Opening

Trouble = Literal["oom", "refused", "failed"]


@dataclass(frozen=True)
class Prepare:
    """Make what an engine runs."""

    engine: str
    opening: Opening


@dataclass(frozen=True)
class Prepared:
    """Where it lies."""

    place: Path


@dataclass(frozen=True)
class Open:
    """Open what was prepared; a process opens one engine."""

    engine: str
    opening: Opening
    place: Path


@dataclass(frozen=True)
class Ready:
    """An open engine; `rss_bytes` is what its process holds."""

    identity: Identity
    memory: Memory
    max_length: int
    load_seconds: float
    rss_bytes: int


@dataclass(frozen=True, eq=False)
class Time:
    """Run the prompts [batch, prompt] and generate `generate` tokens of each greedily, by the clock."""

    prompts: Tokens
    generate: int


@dataclass(frozen=True)
class Timed:
    """One run: seconds of the prompt and of each further token, peaks of memory in each phase, bytes.

    `compiled_seconds` is what of the run was compiling: such a run is a warm-up, whatever it was meant to be.
    `all_compiled_seconds` is what compiling came to since the engine was opened.
    """

    prompt_seconds: float
    step_seconds: tuple[float, ...]
    peak_prompt_bytes: int
    peak_generate_bytes: int
    cache_bytes: int | None
    energy_joules: float | None
    compiled_seconds: float
    all_compiled_seconds: float


@dataclass(frozen=True)
class Choose:
    """Choose `count` tokens after one prompt freely."""

    prompt: tuple[int, ...]
    count: int


@dataclass(frozen=True)
class Failed:
    """What was asked could not be done; `fatal`: the process should be given up."""

    trouble: Trouble
    reason: str
    fatal: bool = False


Ask = Prepare | Open | Time | Choose
