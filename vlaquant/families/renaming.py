"""What ``from_pretrained`` does to a checkpoint's tensors besides reading them: names, dtype, and what is lacking.

transformers renames tensors when it loads and renames them back when it saves, so that one model can lie on the disk
under several sets of names. The map is asked from transformers, never written down here.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from vlaquant.errors import CheckpointError


def live_names(model: nn.Module, names: Sequence[str]) -> dict[str, str]:
    """``Family.live_names`` for the classes of transformers.

    A tensor that transformers would compute from those in the files (split, fused, transposed) gets a name that no
    model has, so that nobody gives it to the model as it is.

    Args:
        model: may be on the meta device.
        names: of all tensors in the files.

    Returns:
        {name in a file: name in the model}, where they differ. Two names may become one: an embedding that is also
        stored as the head it is tied to.
    """
    live: Any = model
    tensors = live.state_dict(keep_vars=True)
    transforms = get_model_conversion_mapping(live)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    renamed = {}
    for name in sorted(names, key=dot_natural_key):  # some renamings depend on names that came before
        new, converted = rename_source_key(name, renamings, converters, live.base_model_prefix, tensors)
        if new not in tensors and name in tensors:  # a live name, which a renaming took for another's
            new, converted = rename_source_key(name, [], [], live.base_model_prefix, tensors)
        if converted is not None:
            new = f"{new} (computed from {name})"
        if new != name:
            renamed[name] = new
    return renamed


def stored_dtype(directory: Path, config: Any) -> torch.dtype | str | None:
    """What ``dtype="auto"`` chooses: the config's dtype, or that of the first floating-point tensor; None without."""
    if config.dtype is not None:
        dtype: torch.dtype | str = config.dtype
        return dtype
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  it is no mapping
                part = file.get_slice(name)
                found: torch.dtype | None = part[:0].dtype if part.get_shape() else None
                if found is not None and found.is_floating_point and found.itemsize > 1:
                    return found
    return None


def require_complete(directory: Path, info: dict[str, Iterable[Any]]) -> None:
    """Refuse a model for which the files lacked or misshaped something: transformers leaves random values there.

    Args:
        directory: named in the error.
        info: what ``from_pretrained(..., output_loading_info=True)`` tells.

    Raises:
        CheckpointError: tensors are missing, of another shape, or have no place in the model.
    """
    kinds = {
        "missing_keys": "lacks tensors that the model needs",
        "mismatched_keys": "holds tensors of other shapes than the model's",
        "unexpected_keys": "holds tensors that the model has not",
    }
    for kind, trouble in kinds.items():
        names = sorted(str(name) for name in info.get(kind, ()))
        if names:
            raise CheckpointError(
                f"{directory}: {trouble}: {', '.join(names[:5])} ({len(names)} in all). Check that its config.json "
                "is that of these weights"
            )
