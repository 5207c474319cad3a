"""What a benchmark leaves: one record a repeat of a cell, one a cell, one an engine with a variant; nothing averaged.

A *cell* is a batch size with a prompt length. Seconds are of the wall clock, bytes are bytes.
"""

from dataclasses import dataclass
from typing import Literal

Outcome = Literal["measured", "oom", "refused", "failed", "unspent"]
"""`refused`: the engine can't do such a cell, and says so; `unspent`: the budget ended before its first repeat."""


@dataclass(frozen=True)
class Opened:
    """An engine with a variant: what ran, what it took to open, what it holds.

    `variant` is the method's own name (`awq`, `rtn:int8-channel`) or the baseline's type (`fp32`); `reason` says in
    one sentence why it could not be opened, and is None when it was; the fields after it are then undefined.
    """

    engine: str
    variant: str
    reason: str | None
    provider: str = ""
    dtype: str = ""
    weights: str = ""
    threads: int = 0
    version: str = ""
    load_seconds: float | None = None
    compile_seconds: float | None = None
    disk_bytes: int | None = None
    weights_bytes: int | None = None


@dataclass(frozen=True)
class Timing:
    """One repeat of one cell, after the warm-ups.

    `prompt_seconds` ends with the first token's choice, so it is the time to first token; `step_seconds` has the
    latency of each further generated token, [generated - 1]. `order` is the repeat's place among all of the run.
    `energy_joules` is the device's between begin and end, or None where it can't be read.
    """

    engine: str
    variant: str
    batch: int
    prompt: int
    repeat: int
    order: int
    prompt_seconds: float
    step_seconds: tuple[float, ...]
    energy_joules: float | None = None


@dataclass(frozen=True)
class Cell:
    """What became of a cell, and its peaks of memory in bytes (a process's own RSS, or the device's) in each phase."""

    engine: str
    variant: str
    batch: int
    prompt: int
    outcome: Outcome
    reason: str | None = None
    peak_prompt_bytes: int | None = None
    peak_generate_bytes: int | None = None
    cache_bytes: int | None = None


@dataclass(frozen=True)
class Drift:
    """Greedy tokens of an engine against the reference logits of the same variant, for one prompt.

    `equal_share` is the share of positions, each after the reference's own tokens, at which the engine's most likely
    token is the reference's. `first_divergence` is the index of the first generated token that differs when the engine
    runs freely, or None. At it: `kl_nats` is KL(reference || engine), `margin_nats` the reference's log-probability of
    its first choice less that of the engine's; `rejoined`: forcing the reference's token there, the engine's free run
    goes on with the reference's tokens for the next `rejoin_tokens`.
    """

    engine: str
    variant: str
    prompt_index: int
    tokens: int
    equal_share: float
    first_divergence: int | None
    kl_nats: float | None
    margin_nats: float | None
    rejoined: bool | None
    rejoin_tokens: int
