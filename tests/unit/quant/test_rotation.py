"""Rotations: orthogonal, of any size, the same for one seed, and fast products that are the matrix's own."""

import numpy as np
import pytest
import torch
from scipy.linalg import hadamard

from qeval.quant.rotation import random_rotation, sylvester, turn_runs

SIZES = {
    1: "",
    2: "Hadamard 2",
    7: "random orthogonal 7",
    12: "Paley 12",
    64: "Hadamard 64",
    112: "Hadamard 4 x Paley 28",
    144: "Hadamard 4 x Paley 36",
    172: "Hadamard 4 x random orthogonal 43",
    256: "Hadamard 256",
    304: "Hadamard 4 x Paley 76",
    576: "Hadamard 16 x Paley 36",
}


def matrix(rotation):
    """The whole matrix, from its parts by Kronecker's product: not how it is multiplied by."""
    power = rotation.size // len(rotation.core)
    left = hadamard(power) / np.sqrt(power)
    return torch.from_numpy(np.diag(rotation.signs) @ np.kron(left, rotation.core))


@pytest.mark.parametrize(("size", "words"), SIZES.items())
def test_rotations_of_every_size_are_orthogonal(size, words):
    rotation = random_rotation(size, seed=3)
    whole = matrix(rotation)
    assert rotation.words == words
    assert torch.allclose(whole @ whole.T, torch.eye(size, dtype=torch.float64), atol=1e-13)
    rows = torch.randn(5, 3 * size, dtype=torch.float64)
    expected = (rows.reshape(5, 3, size) @ whole).reshape(5, 3 * size)
    assert torch.allclose(rotation.turn(rows), expected, atol=1e-12)


@pytest.mark.parametrize("order", [12, 20, 28, 36, 44, 60, 76, 108, 140, 148])
def test_orders_of_paley_have_entries_of_one_magnitude(order):
    core = random_rotation(order, 0).core
    assert len(core) == order
    assert torch.allclose(core.abs(), torch.full_like(core, order**-0.5))


def test_sylvesters_matrix_is_scipys():
    assert torch.equal(sylvester(64), torch.from_numpy(hadamard(64)).double())


def test_a_seed_says_which_signs_and_which_core():
    one, same, other = (random_rotation(7, seed) for seed in (1, 1, 2))
    assert torch.equal(one.core, same.core)
    assert torch.equal(one.signs, same.signs)
    assert not torch.equal(one.core, other.core)
    assert not torch.equal(random_rotation(64, 1).signs, random_rotation(64, 2).signs)
    assert torch.equal(random_rotation(64, 1, signs=False).signs, torch.ones(64, dtype=torch.float64))


def test_one_outlier_is_spread_evenly():
    rows = torch.zeros(1, 576)
    rows[0, 100] = 24.0
    turned = random_rotation(576, 0).turn(rows)
    assert torch.allclose(turned.abs(), torch.ones_like(turned), atol=1e-5)


def test_turning_leaves_what_it_is_given_as_it_was():
    rows, core = torch.randn(4, 24), random_rotation(12, 0).core.float()
    before = rows.clone()
    assert turn_runs(rows, core, 12).dtype == torch.float32
    assert torch.equal(rows, before)
