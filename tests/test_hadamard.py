"""Hadamard matrices by construction, and rotations made of them, against dense matrices."""

from functools import reduce

import pytest
import torch
from torch import Tensor

from vlaquant.passes import hadamard
from vlaquant.passes.hadamard import hadamard_factors, paley, rotation, sylvester, turned_columns, turned_rows

#: Widths of language models, of which each needs another construction.
KNOWN = [1, 2, 4, 8, 12, 20, 24, 28, 36, 40, 44, 60, 64, 76, 104, 256, 576, 768, 896, 960, 1152, 1536, 2304]
UNKNOWN = [3, 6, 10, 52, 92]


def is_hadamard(matrix: Tensor) -> bool:
    n = len(matrix)
    return bool((matrix.abs() == 1).all()) and torch.equal(matrix @ matrix.T, n * torch.eye(n, dtype=matrix.dtype))


def dense(turn: hadamard.Rotation) -> Tensor:
    """R itself, as its docstring says it."""
    return turn.signs.diag() @ reduce(torch.kron, turn.factors)


@pytest.mark.parametrize("size", KNOWN)
def test_entries_are_of_one_size_and_rows_orthogonal(size: int) -> None:
    factors = hadamard_factors(size)
    assert factors is not None
    product = reduce(torch.kron, factors)
    assert product.shape == (size, size)
    assert is_hadamard(product)


@pytest.mark.parametrize("order", [4, 8, 12, 20, 24, 28, 32, 36, 44, 76, 124])
def test_paley_from_primes_of_both_kinds(order: int) -> None:
    matrix = paley(order)
    assert matrix is not None
    assert is_hadamard(matrix)


def test_sylvester_matrices_are_the_signs_of_common_bits() -> None:
    """H[i, j] = (−1)^(number of bits that i and j share): another definition of the same matrix."""
    signs = [[(-1.0) ** (i & j).bit_count() for j in range(16)] for i in range(16)]
    assert torch.equal(sylvester(16), torch.tensor(signs, dtype=torch.float64))


def test_the_check_sees_a_number_that_is_no_prime(monkeypatch: pytest.MonkeyPatch) -> None:
    assert paley(16) is None, "15 is no prime"
    monkeypatch.setattr(hadamard, "_is_prime", lambda number: True)
    matrix = paley(16)
    assert matrix is not None
    assert not is_hadamard(matrix)


@pytest.mark.parametrize("size", UNKNOWN)
def test_any_orthogonal_matrix_where_none_is_known(size: int) -> None:
    assert hadamard_factors(size) is None
    turn = rotation(size, seed=0)
    matrix = dense(turn)
    assert turn.size == size
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), rtol=0.0, atol=1e-12)


@pytest.mark.parametrize("size", [1, 6, 12, 64, 576])
def test_turning_is_the_product_with_the_dense_matrix(size: int) -> None:
    turn = rotation(size, seed=3)
    x = torch.randn(5, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(turn.turn(x), x @ dense(turn), rtol=0.0, atol=1e-12)


def test_every_head_turns_by_itself() -> None:
    turn = rotation(12, seed=1)
    x = torch.randn(3, 5 * 12, dtype=torch.float64)
    blocks = torch.block_diag(*[dense(turn)] * 5)
    torch.testing.assert_close(turn.turn(x), x @ blocks, rtol=0.0, atol=1e-12)


def test_the_seed_decides() -> None:
    assert torch.equal(dense(rotation(64, 5)), dense(rotation(64, 5)))
    assert not torch.equal(dense(rotation(64, 5)), dense(rotation(64, 6)))
    assert not torch.equal(dense(rotation(6, 5)), dense(rotation(6, 6)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_rounded_once_and_in_parts_as_a_whole(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    turn = rotation(12, seed=1)
    weight, gain = torch.randn(24, 12).to(dtype), torch.rand(12, dtype=torch.float64) + 0.5
    matrix = dense(turn)
    columns = (weight.double() * gain @ matrix).to(dtype)
    rows = (torch.block_diag(matrix, matrix).T @ weight.double()).to(dtype)
    for values in (1 << 22, 30):
        monkeypatch.setattr(hadamard, "_VALUES", values)
        torch.testing.assert_close(turned_columns(weight, turn, gain), columns)
        torch.testing.assert_close(turned_rows(weight, turn), rows)
        assert turned_rows(weight, turn).is_contiguous()


def test_biases_turn_as_rows_do() -> None:
    turn = rotation(12, seed=1)
    bias = torch.randn(12, dtype=torch.float64)
    torch.testing.assert_close(turned_rows(bias, turn), dense(turn).T @ bias)
