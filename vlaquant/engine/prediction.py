"""What a run will need, said before it starts, and refused where it cannot fit."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from vlaquant.calibrate.units import Stage
from vlaquant.errors import ExportError, PlanError
from vlaquant.plan import LayerPlan, Plan

_GIB = 2**30


@dataclass(frozen=True, slots=True)
class Prediction:
    """Upper estimates.

    Attributes:
        memory: peak resident bytes of the process.
        largest: the unit that needs most of them.
        room: bytes of activations that may be in memory, out of those ``memory``; the rest goes to the disk.
        disk: bytes that must be free beside the output, the output included.
        seconds: of running all samples through all stages; None without samples. Solving comes on top.
    """

    memory: int
    largest: str
    room: int
    disk: int
    seconds: float | None

    def __str__(self) -> str:
        time_ = "" if self.seconds is None else f", and about {_duration(self.seconds)} to run the samples"
        return (
            f"needs at most {self.memory / _GIB:.2f} GiB of memory ({self.largest}) and {self.disk / _GIB:.2f} GiB of "
            f"disk{time_}"
        )


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def stage_memory(
    layers: Sequence[LayerPlan], unit_bytes: int, *, with_data: bool, keep_all: bool, paired: int | None = None
) -> int:
    """Bytes that one stage needs: its float weights, working copies, statistics and the solver's matrices.

    Args:
        layers: those that are quantized here.
        unit_bytes: of the unit's float weights.
        with_data: whether Hessians are collected.
        keep_all: whether all working copies are there at once (transforms couple layers).
        paired: bytes of a unit's output for one sample if the stage is observed in two chains; None for one.
    """
    if not layers:
        return unit_bytes
    sizes = [n * k for n, k in (layer.shape for layer in layers)]
    copies = 4 * (sum(sizes) if keep_all else max(sizes))
    # Rounding one layer: the groups, scaled and rounded, codes
    rounding = 3 * 4 * max(sizes)
    if not with_data:
        return unit_bytes + copies + rounding
    widths = {layer.shape[1] for layer in layers}
    # Accumulators in float64 (q/k/v and gate/up share theirs: about one a width and reader), then the solver's matrices
    readers = {(layer.shape[1], layer.name.rpartition(".")[0]) for layer in layers}
    accumulators = sum(8 * k * k for k, _ in readers)
    solver = 5 * 4 * max(widths) ** 2
    if paired is not None:
        # Second moments of twice as many channels, and the shifted weight beside the weight
        accumulators, solver = 4 * accumulators, solver + 2 * 4 * max(sizes)
        # What layers read in the float chain waits for the other; the output is as wide as the narrowest of them
        accumulators += paired * sum(k for k, _ in readers) // min(widths)
    return 2 * unit_bytes + copies + rounding + accumulators + solver


def predict(
    model: nn.Module,
    plan: Plan,
    stages: Sequence[Stage],
    *,
    with_data: bool,
    keep_all: bool,
    streamed: bool,
    activations: int,
    tuning: int,
    seconds: float | None,
    limit: int,
    paired: int | None = None,
) -> Prediction:
    """Estimate a run.

    Args:
        model: for the sizes of its tensors; may be on the meta device.
        plan: what will be quantized.
        stages: all units.
        with_data: whether statistics are collected.
        keep_all: as for :func:`stage_memory`.
        streamed: whether weights come on demand, or all lie in memory.
        activations: bytes of stored outputs of one unit, for all samples and chains.
        tuning: bytes that tuning a block needs on top.
        seconds: as measured and extrapolated by the caller.
        limit: bytes that the process may hold; what is left of it is for activations.
        paired: as for :func:`stage_memory`.
    """
    sizes = {name: tensor.nbytes for name, tensor in model.state_dict(keep_vars=True).items()}
    units = {
        stage.unit: sum(size for name, size in sizes.items() if name.startswith(f"{stage.unit}.")) for stage in stages
    }
    quantized = plan.quantized
    needs = {
        stage.unit: stage_memory(
            [quantized[name] for name in stage.linears if name in quantized],
            units[stage.unit],
            with_data=with_data,
            keep_all=keep_all,
            paired=paired,
        )
        for stage in stages
    }
    # Codes, once as such and once packed, beside what is in memory anyway
    needs |= {table.name: table.bytes_before + 2 * table.bytes_after for table in plan.replaced_tables.values()}
    largest = max(needs, key=lambda unit: needs[unit])
    outside = sum(sizes.values()) - sum(units.values())
    loaded = outside if streamed else sum(sizes.values()) + plan.bytes_after
    memory = resident_memory() + loaded + needs[largest] + tuning
    # Two generations are there while a stage hands on to the next
    room = min(2 * activations, max(limit - memory, 0))
    disk = (2 if streamed else 1) * plan.bytes_after + 2 * activations
    return Prediction(memory + room, largest, room, disk, seconds)


def resident_memory() -> int:
    """Bytes of memory that this process holds now; 0 where the system does not say."""
    status = Path("/proc/self/statm")
    if not status.is_file():
        return 0
    return int(status.read_text(encoding="ascii").split()[1]) * 4096


def available_memory() -> int | None:
    """Bytes of memory that programs can still get; None where the system does not say."""
    path = Path("/proc/meminfo")
    if not path.is_file():
        return None
    facts = dict(line.split(":", 1) for line in path.read_text(encoding="ascii").splitlines())
    return int(facts["MemAvailable"].split()[0]) * 1024


def require_room(prediction: Prediction, output: Path | None, limit: int) -> None:
    """Refuse a run that cannot fit.

    Raises:
        PlanError: not enough memory.
        ExportError: not enough disk.
    """
    if prediction.memory > limit:
        raise PlanError(
            f"this run needs {prediction.memory / _GIB:.2f} GiB of memory for {prediction.largest}, and has "
            f"{limit / _GIB:.2f} GiB; use fewer or shorter samples, a recipe without data (rtn), a higher --max-memory "
            "or a larger machine"
        )
    if output is None:
        return
    parent = output.absolute().parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if prediction.disk > free:
        raise ExportError(
            f"{output}: this run needs {prediction.disk / _GIB:.2f} GiB of disk and {free / _GIB:.2f} GiB are free; "
            "make room or choose another output"
        )
