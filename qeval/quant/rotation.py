"""Rotations that spread outliers over all channels: randomized Hadamard matrices of any size, and their products.

Ashkboos et al., *QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs*, arXiv 2404.00456, and Liu et al., *SpinQuant*,
arXiv 2405.16406, name four places: R1 turns the residual stream and R2 each head's values, both folded into the
weights; R3 turns queries and keys after the rotary embedding; R4 turns the input of the last matrix of a feed-forward,
while running. A size is a power of two times a small Hadamard order of Paley's (12, 20, 28, 36, 76 ...) where there is
one, else a power of two times a random orthogonal matrix of the odd rest.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

ROTATIONS_VERSION = 1
"""Part of every rotated variant's key: raise it when the same words give other matrices."""
_LARGEST_PALEY = 256
"""Orders above are dense matrices that cost more than they spread."""
_LARGEST_FACTOR = 64
"""Sylvester's matrices are multiplied by in factors of at most this size."""


@dataclass(frozen=True, eq=False)
class Rotation:
    """An orthogonal matrix Q = diag(signs) (H x core): H is Sylvester's of a power of two, x the Kronecker product.

    `core` [m, m] and `signs` [size], fp64 on the CPU; `words` say what they are.
    """

    core: Tensor
    signs: Tensor
    words: str

    @property
    def size(self) -> int:
        """The channels that are turned together."""
        return len(self.signs)

    def turn(self, rows: Tensor) -> Tensor:
        """Return `rows` [..., n * size] times Q, each run of `size` by itself, in the type of `rows`."""
        signs = self.signs.to(rows).repeat(rows.shape[-1] // self.size)
        return turn_runs(rows * signs, self.core.to(rows), self.size)


def turn_runs(rows: Tensor, core: Tensor, size: int) -> Tensor:
    """Multiply each run of `size` numbers of the last dimension by H x core.

    Args:
        rows: [..., n * size].
        core: [m, m], of the type of `rows`; m divides `size`, and the rest is a power of two.
        size: The length of a run.

    Returns:
        Of the shape and type of `rows`.
    """
    run = len(core)
    turned = rows.reshape(-1, run) @ core if run > 1 else rows
    for factor in hadamard_factors(size // run, rows.dtype, rows.device):
        turned = torch.matmul(factor, turned.reshape(-1, len(factor), run))
        run *= len(factor)
    return turned.reshape(rows.shape)


def hadamard_factors(power: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Return orthonormal Hadamard matrices whose Kronecker product, the last first, is that of a power of two."""
    factors = []
    while power > 1:
        size = min(power, _LARGEST_FACTOR)
        factors.append(_factor(size, dtype, device))
        power //= size
    return factors


def random_rotation(size: int, seed: int, *, signs: bool = True) -> Rotation:
    """Return the rotation of a size that a seed draws.

    Args:
        size: Its channels.
        seed: Of the signs, and of the core where no Hadamard order fits.
        signs: Whether channels are given random signs first.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(0, 2, (size,), generator=generator).double() * 2 - 1
    core, kind = _core(size, generator)
    power = size // len(core)
    words = " x ".join(filter(None, [f"Hadamard {power}" if power > 1 else "", kind]))
    return Rotation(core, drawn if signs else torch.ones_like(drawn), words)


def sylvester(size: int) -> Tensor:
    """Return Sylvester's Hadamard matrix of a power of two: symmetric, of ones and minus ones, fp64."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


@lru_cache(maxsize=32)
def _factor(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return (sylvester(size) / math.sqrt(size)).to(device, dtype)


def _core(size: int, generator: torch.Generator) -> tuple[Tensor, str]:
    """Return the factor beside Sylvester's matrix, and its name: the odd rest times as few twos as an order needs."""
    power = size & -size
    odd = size // power
    if odd == 1:
        return torch.ones(1, 1, dtype=torch.float64), ""
    order = 4 * odd
    while order <= min(size, _LARGEST_PALEY):
        if size % order == 0 and (core := _paley(order)) is not None:
            return core, f"Paley {order}"
        order *= 2
    return _random_orthogonal(odd, generator), f"random orthogonal {odd}"


def _paley(order: int) -> Tensor | None:
    """Return Paley's Hadamard matrix of an order over its root, or None where neither of his constructions has one.

    Paley, *On Orthogonal Matrices*, 1933: of order q + 1 for a prime q = 3 mod 4, and 2 (q + 1) for q = 1 mod 4.
    """
    first, second = order - 1, order // 2 - 1
    if first % 4 == 3 and _is_prime(first):
        bordered = _bordered(first)
        bordered[1:, 0] = -1
        return (bordered + torch.eye(order, dtype=torch.float64)) / math.sqrt(order)
    if second % 4 == 1 and _is_prime(second):
        bordered, unit = _bordered(second), torch.eye(second + 1, dtype=torch.float64)
        ones = torch.tensor([[1, 1], [1, -1]], dtype=torch.float64)
        others = torch.tensor([[1, -1], [-1, -1]], dtype=torch.float64)
        return (torch.kron(bordered, ones) + torch.kron(unit, others)) / math.sqrt(order)
    return None


def _bordered(prime: int) -> Tensor:
    """Return the matrix of which difference of two indices is a square modulo a prime, with a border of ones."""
    squares = {place * place % prime for place in range(1, prime)}
    characters = torch.tensor([0.0, *(1.0 if place in squares else -1.0 for place in range(1, prime))])
    places = torch.arange(prime)
    matrix = torch.ones(prime + 1, prime + 1, dtype=torch.float64)
    matrix[0, 0] = 0
    matrix[1:, 1:] = characters[(places[:, None] - places) % prime].double()
    return matrix


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))


def _random_orthogonal(size: int, generator: torch.Generator) -> Tensor:
    """Return an orthogonal matrix that is drawn evenly: Q of QR of normal numbers, the signs of R's diagonal taken."""
    drawn = torch.randn(size, size, generator=generator, dtype=torch.float64)
    orthogonal, upper = torch.linalg.qr(drawn)
    turned: Tensor = orthogonal * upper.diagonal().sign()
    return turned
