"""Rotation: the same float model in another basis, in which no channel stands out. Which tensor becomes what.

R1 turns the residual stream, R2 the values of each head, and both fold into the weights:

- an embedding becomes E·R1, and a reader of the stream W·diag(g)·R1 with the gain g of the norm before it, which
  becomes 1; a writer becomes R1ᵀ·W, its bias R1ᵀ·b;
- attention mixes tokens and not the channels of a head, so rows and bias of ``v`` may turn by R2 in each head, if the
  columns of ``o`` that read them turn too: heads share one R2, so it does not matter which of them read one value head.

Sources: R1 and R2 are those of SpinQuant, arXiv:2405.16406, section 3.1; norm gains move into the readers in SliceGPT,
arXiv:2401.15024, and random Hadamard matrices in place of learned ones are QuaRot's, arXiv:2404.00456. Rotations of
activations at run time (R3, R4) are left out: docs/decisions/0012-rotation.md.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from vlaquant.errors import PlanError
from vlaquant.families import Residual
from vlaquant.passes.hadamard import Rotation, rotation, turned_columns, turned_rows
from vlaquant.recipe import Rotation as RotationSection


@dataclass(frozen=True, slots=True, eq=False)
class Turned:
    """What becomes of one tensor.

    Attributes:
        source: name of the tensor that it is made of.
        gain: name of the norm's weight that multiplies its columns.
        offset: what that norm adds to its weight.
        columns: what they are turned by.
        rows: what they, or the numbers of a bias, are turned by.
        constant: or else, all its values.
    """

    source: str
    gain: str | None = None
    offset: float = 0.0
    columns: Rotation | None = None
    rows: Rotation | None = None
    constant: float | None = None

    @property
    def sources(self) -> tuple[str, ...]:
        """The tensors that :meth:`make` takes."""
        return (self.source,) if self.gain is None else (self.source, self.gain)

    @torch.no_grad()
    def make(self, tensor: Tensor, gain: Tensor | None = None) -> Tensor:
        """The new tensor, on the CPU, in the dtype of the old one; rounded to it once."""
        tensor = tensor.detach().cpu()
        if self.constant is not None:
            return torch.full_like(tensor, self.constant)
        new = tensor.to(torch.promote_types(tensor.dtype, torch.float32)) if self.rows and self.columns else tensor
        if self.columns is not None:
            scale = None if gain is None else gain.detach().cpu().to(torch.float64) + self.offset
            new = turned_columns(new, self.columns, scale)
        if self.rows is not None:
            new = turned_rows(new, self.rows)
        return new.to(tensor.dtype)


def turned_tensors(model: nn.Module, residual: Residual, section: RotationSection, seed: int) -> dict[str, Turned]:
    """Every tensor that a rotation changes, by its name in the model.

    Args:
        model: for which Linears have a bias.
        residual: of the model; what is tied must be untied by whoever applies the result.
        section: which rotations.
        seed: of both.

    Raises:
        PlanError: no values that could be turned, and nothing else was asked for.
    """
    biased = {name for name, _ in model.named_parameters() if name.endswith(".bias")}
    turned = _stream(residual, rotation(residual.width, seed), biased) if section.residual else {}
    for fold in residual.values if section.values else ():
        assert fold.head_dim is not None
        turn = rotation(fold.head_dim, seed)
        for name in (f"{fold.source}.weight", f"{fold.source}.bias"):
            if name.endswith(".weight") or name in biased:
                turned[name] = replace(turned.get(name, Turned(name)), rows=turn)
        for name in (f"{target}.weight" for target in fold.targets):
            turned[name] = replace(turned.get(name, Turned(name)), columns=turn)
    if not turned:
        raise PlanError("rotation: no attention whose values only its own o_proj reads; use 'residual: true'")
    return turned


def _stream(residual: Residual, turn: Rotation, biased: set[str]) -> dict[str, Turned]:
    embedding = f"{residual.embedding}.weight"
    turned = {embedding: Turned(embedding, columns=turn)}
    for read in residual.reads:
        gain = f"{read.norm}.weight"
        turned[gain] = Turned(gain, constant=1.0 - read.offset)
        for reader in read.readers:
            name = f"{reader}.weight"
            source = embedding if residual.tied and reader == residual.head else name
            turned[name] = Turned(source, gain, read.offset, columns=turn)
    for writer in residual.writes:
        turned[f"{writer}.weight"] = Turned(f"{writer}.weight", rows=turn)
        if f"{writer}.bias" in biased:
            turned[f"{writer}.bias"] = Turned(f"{writer}.bias", rows=turn)
    return turned
