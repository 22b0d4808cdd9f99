"""Orthogonal matrices whose entries are all of one size, and rotations made of them.

A Hadamard matrix has entries ±1 and rows that are orthogonal to each other. What it rotates is spread over all
channels, so that no channel stands out, which is what rounding wants: QuIP, arXiv:2307.13304; QuaRot, arXiv:2404.00456.

Sources: Sylvester, Phil. Mag. 34 (1867): H ⊗ H' is one if both are, so that all powers of two follow from order 2.
Paley, J. Math. Phys. 12 (1933): from the squares modulo a prime q one of order q + 1 if q = 3 mod 4, and one of order
2(q + 1) if q = 1 mod 4. Random signs: QuIP#, arXiv:2402.04396, section 3.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

#: Kronecker factors of a power of two are at most so large: a row of n numbers then costs n·64 products a factor and
#: not n².
_LARGEST_FACTOR = 64
#: Numbers that are rotated at once, in float64.
_VALUES = 1 << 22


@dataclass(frozen=True, slots=True, eq=False)
class Rotation:
    """An orthogonal matrix R = diag(signs) · (F₁ ⊗ F₂ ⊗ …), float64.

    Attributes:
        signs: [n], each 1 or −1.
        factors: orthogonal, [f, f] each; n is the product of all f.
    """

    signs: Tensor
    factors: tuple[Tensor, ...]

    @property
    def size(self) -> int:
        """How many channels are mixed."""
        return len(self.signs)

    def __str__(self) -> str:
        return f"{self.size} channels ({' x '.join(str(len(factor)) for factor in self.factors)})"

    def turn(self, x: Tensor) -> Tensor:
        """The product x R, for x [..., n·h]: each n channels that follow each other are rotated by themselves. Float64.

        The product with F₁ ⊗ F₂ ⊗ … is one with each factor, along an axis of its own.
        """
        y = x.to(torch.float64).reshape(-1, self.size) * self.signs
        y = y.reshape(-1, *(len(factor) for factor in self.factors))
        for axis, factor in enumerate(self.factors, start=1):
            y = (y.movedim(axis, -1) @ factor).movedim(-1, axis)
        return y.reshape(x.shape)


def rotation(size: int, seed: int) -> Rotation:
    """A random rotation: a Hadamard matrix with random signs where one is known, else any orthogonal matrix.

    Args:
        size: number of channels n.
        seed: of the signs, or of the matrix.
    """
    generator = torch.Generator().manual_seed(seed)
    factors = hadamard_factors(size)
    if factors is None:
        gaussian = torch.randn(size, size, generator=generator, dtype=torch.float64)
        q, r = torch.linalg.qr(gaussian)
        # With these signs all rotations are equally likely (Mezzadri, arXiv:math-ph/0609050, section 5)
        return Rotation(torch.ones(size, dtype=torch.float64), (q * r.diagonal().sign(),))
    signs = torch.randint(0, 2, (size,), generator=generator).to(torch.float64) * 2 - 1
    return Rotation(signs, tuple(factor / math.sqrt(len(factor)) for factor in factors))


def hadamard_factors(size: int) -> tuple[Tensor, ...] | None:
    """Hadamard matrices whose Kronecker product has order ``size``; None if these constructions give none."""
    power = size & -size
    for shift in range(power.bit_length()):
        order = size // power << shift
        first = paley(order)
        if first is not None:
            return tuple(f for f in (first, *_sylvester_factors(size // order)) if len(f) > 1) or (first,)
    return None


def _sylvester_factors(size: int) -> tuple[Tensor, ...]:
    factors = []
    while size > 1:
        factors.append(sylvester(min(size, _LARGEST_FACTOR)))
        size //= len(factors[-1])
    return tuple(factors)


def sylvester(order: int) -> Tensor:
    """The Hadamard matrix of an order that is a power of two, by doubling, float64."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < order:
        matrix = torch.cat([torch.cat([matrix, matrix], dim=1), torch.cat([matrix, -matrix], dim=1)])
    return matrix


def paley(order: int) -> Tensor | None:
    """A Hadamard matrix by one of Paley's constructions over a prime field, float64; None where neither fits."""
    if order == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if _is_prime(order - 1) and order % 4 == 0:
        return torch.eye(order, dtype=torch.float64) + _conference(order - 1)
    if order % 4 == 0 and _is_prime(order // 2 - 1) and (order // 2 - 1) % 4 == 1:
        conference = _conference(order // 2 - 1)
        ones = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        diagonal = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(conference, ones) + torch.kron(torch.eye(order // 2, dtype=torch.float64), diagonal)
    return None


def _conference(q: int) -> Tensor:
    """C [q+1, q+1] with 0 on the diagonal, ±1 elsewhere and C Cᵀ = q·1; Cᵀ = C if q = 1 mod 4, else −C."""
    squares = {i * i % q for i in range(1, q)}
    character = torch.tensor([0.0] + [1.0 if i in squares else -1.0 for i in range(1, q)], dtype=torch.float64)
    index = torch.arange(q)
    matrix = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    matrix[0, 1:] = 1.0
    matrix[1:, 0] = 1.0 if q % 4 == 1 else -1.0
    matrix[1:, 1:] = character[(index.unsqueeze(-1) - index) % q]
    return matrix


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))


def turned_columns(weight: Tensor, turn: Rotation, gain: Tensor | None = None) -> Tensor:
    """W diag(gain) R for W [n, k]; computed in float64 and rounded once to the dtype of W."""
    out = torch.empty_like(weight, memory_format=torch.contiguous_format)
    step = max(_VALUES // weight.shape[1], 1)
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        part = weight[rows].to(torch.float64)
        out[rows] = turn.turn(part if gain is None else part * gain).to(weight.dtype)
    return out


def turned_rows(weight: Tensor, turn: Rotation) -> Tensor:
    """Rᵀ W for W [n, k], or Rᵀ b for a bias b [n]; as :func:`turned_columns`."""
    if weight.ndim == 1:
        return turn.turn(weight).to(weight.dtype)
    return turned_columns(weight.T, turn).T.contiguous()
