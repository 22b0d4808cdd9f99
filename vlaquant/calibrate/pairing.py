"""Tokens of two chains brought together: what a layer reads in the float model, beside what it reads in the quantized.

One sample goes through the model twice. The two chains call the same layers in the same order, and row i of call c is
the same token in both. That is so wherever the values of tokens do not decide which layer reads them.
"""

from collections import deque

import torch
from torch import Tensor

from vlaquant.errors import CalibrationError


class Pairs:
    """The rows that layers read in the float chain, until the quantized chain of the same sample reads its own."""

    def __init__(self) -> None:
        self._kept: dict[str, deque[Tensor]] = {}
        self._last: Tensor | None = None

    def keep(self, layer: str, rows: Tensor) -> None:
        """Keep the rows [t, k] of the next call in the float chain. Layers that read the same rows share one copy."""
        last = self._last
        if last is None or last.dtype != rows.dtype or last.device != rows.device or not torch.equal(last, rows):
            self._last = rows.clone()
        assert self._last is not None
        self._kept.setdefault(layer, deque()).append(self._last)

    def beside(self, layer: str, rows: Tensor) -> Tensor:
        """[t, 2k]: the rows [t, k] of the next call in the quantized chain, and beside them those of the float chain.

        Raises:
            CalibrationError: that call did not happen in the float chain, or had another number of tokens.
        """
        kept = self._kept.get(layer)
        if not kept or kept[0].shape != rows.shape:
            found = f"{len(kept[0])}" if kept else "no more"
            raise CalibrationError(
                f"{layer}: reads {len(rows)} tokens of the quantized model, and {found} of the float model, so they "
                "cannot be paired; a layer whose tokens are chosen by their values needs the quantizer gptq"
            )
        return torch.cat([rows, kept.popleft()], dim=-1)

    def end(self) -> None:
        """The sample is over.

        Raises:
            CalibrationError: a layer was not called in the quantized chain as often as in the float chain.
        """
        kept, self._kept, self._last = self._kept, {}, None
        left = [layer for layer, calls in kept.items() if calls]
        if left:
            raise CalibrationError(
                f"{left[0]}: was called more often in the float model than in the quantized one, so its tokens cannot "
                "be paired; a layer that is called depending on values needs the quantizer gptq"
            )
