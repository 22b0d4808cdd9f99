"""Any ``nn.Module``: the caller brings the loaded model and the function that runs one sample."""

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vlaquant.errors import CheckpointError
from vlaquant.families.base import Family, Inputs, nothing_dead, nothing_to_check


def _cannot_load(directory: Path) -> nn.Module:
    raise CheckpointError(
        f"{directory}: a model of no known family; build it yourself and pass it: vlaquant.load(directory, model=model)"
    )


def _cannot_run(model: nn.Module, inputs: Any = None) -> Any:
    raise CheckpointError(
        f"{type(model).__name__} is of no known family: give vlaquant.quantize a run(model, sample) that runs it"
    )


def _no_output(model: nn.Module, inputs: Inputs) -> Tensor:
    output: Tensor = _cannot_run(model, inputs)
    return output


MODULE = Family(
    name="module",
    parts=(("model", r".*"),),
    folds=(),
    owns=lambda model: True,
    owns_config=lambda config: False,
    load=_cannot_load,
    build=_cannot_load,
    dead=nothing_dead,
    inputs=_cannot_run,
    run=_no_output,
    example=_cannot_run,
    check=nothing_to_check,
)
