"""Round to nearest: the baseline, and the example to copy for a new quantizer."""

import torch
from torch import Tensor

from vlaquant.numerics import OBSERVERS, QuantizedWeight, quantize_weight
from vlaquant.scheme import QuantSpec


def round_to_nearest(
    weight: Tensor, spec: QuantSpec, *, scale_dtype: torch.dtype, clip: str = "minmax"
) -> QuantizedWeight:
    """Codes for a weight [n, k] without any data; ``clip`` names one of :data:`vlaquant.numerics.OBSERVERS`."""
    return quantize_weight(weight, spec, scale_dtype=scale_dtype, observer=OBSERVERS[clip])
