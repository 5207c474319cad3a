"""The nouns that every layer shares."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Literal

from qeval.errors import UsageError

Better = Literal["lower", "higher", "neither"]
FloatType = Literal["fp32", "fp16", "bf16"]
OnnxFormat = Literal["nbits", "qdq"]
"""The forms of quantized weights in a graph: MatMulNBits, or DequantizeLinear before a MatMul."""
OnnxPrecision = Literal["fp32", "fp16"]
"""The type that a graph computes in."""
TokenIds = tuple[int, ...]
Prediction = Mapping[int, float]
"""Log-probabilities (nats) of the next token by id: of the likeliest, and of the token that follows where one does.

An id below zero stands for a likely token that the engine names by a text that several tokens have."""


@dataclass(frozen=True)
class Estimate:
    """A number with its interval, its unit, which way is better, and how many items it rests on.

    `low` and `high` bound the 95 % interval, or are None where fewer than two clusters leave it undefined;
    `value` is None where nothing was scored. `n` counts items (tokens, questions), `clusters` what they were
    resampled by (windows, subjects).
    """

    value: float | None
    low: float | None
    high: float | None
    unit: str
    better: Better
    n: int
    clusters: int


@dataclass(frozen=True)
class Sampler:
    """A sampler: tokens are drawn from the likeliest that hold `top_p`, after logits are divided by `temperature`."""

    top_p: float = 1.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        """Refuse what no sampler does.

        Raises:
            UsageError: A number is not finite or out of its range.
        """
        if not 0 < self.top_p <= 1:
            raise UsageError(f"--sampling top_p={self.top_p:g}: top_p is a share above 0, and at most 1.")
        if not isfinite(self.temperature) or self.temperature <= 0:
            raise UsageError(
                f"--sampling temperature={self.temperature:g}: a temperature is finite and above 0; greedy choices are "
                "compared by top1_agreement."
            )

    def __str__(self) -> str:
        """Return it as `--sampling` takes it."""
        return f"top_p={self.top_p:g},temperature={self.temperature:g}"


@dataclass(frozen=True)
class Request:
    """Token ids to run and the positions (indices into `tokens`, ascending) whose final state is wanted."""

    tokens: tuple[int, ...]
    positions: tuple[int, ...]

    def __post_init__(self) -> None:
        """Refuse a request whose positions do not lie in its tokens."""
        if not self.tokens or not self.positions:
            raise ValueError("A request needs tokens and at least one position.")
        if list(self.positions) != sorted(set(self.positions)):
            raise ValueError("Positions must be ascending and distinct.")
        if self.positions[0] < 0 or self.positions[-1] >= len(self.tokens):
            raise ValueError("A position lies outside its tokens.")

    def after(self, prefix: tuple[int, ...]) -> "Request":
        """Return the request for the whole sequence, where `prefix` stands before its tokens."""
        return Request(prefix + self.tokens, tuple(position + len(prefix) for position in self.positions))


@dataclass(frozen=True)
class Call:
    """A batch that a session will be asked for: its requests, and the prefix that they continue.

    `path` holds the prefix's parts from the first token on, each of which continues the one before it; empty: none.
    """

    path: tuple[tuple[int, ...], ...]
    requests: tuple[Request, ...]
