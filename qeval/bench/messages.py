"""The requests of the job and the answers of an engine's process: small, frozen, plain."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qeval.bench.engines.base import Identity, Memory, Tokens
from qeval.bench.engines.engine_spec import EngineSpec

Trouble = Literal["oom", "refused", "failed"]


@dataclass(frozen=True)
class PrepareRequest:
    """Make what an engine runs."""

    engine: str
    spec: EngineSpec


@dataclass(frozen=True)
class Prepared:
    """The place of what was prepared."""

    place: Path


@dataclass(frozen=True)
class OpenRequest:
    """Open what was prepared; a process opens one engine."""

    engine: str
    spec: EngineSpec
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
    """A request that could not be done; `fatal`: the process should be ended."""

    trouble: Trouble
    reason: str
    fatal: bool = False


WorkerRequest = PrepareRequest | OpenRequest | Time | Choose
