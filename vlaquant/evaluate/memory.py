"""How much memory a checkpoint takes: a fresh process loads it and takes one action, and says what it held."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vlaquant.errors import EvaluationError
from vlaquant.evaluate.figures import BYTES, Compared, Figure, compared
from vlaquant.evaluate.results import Memory
from vlaquant.families import Family, Inputs
from vlaquant.linear import W4A16Linear, W8A8Linear

_PROCESS = "processes"


def memory(reference: Path, candidate: Path, family: Family, inputs: Inputs) -> Memory:
    """Load each directory in a process of its own, and run the same inputs through it once.

    ``tensors`` are the bytes that the model's tensors hold afterwards, with the layouts that kernels made. ``resident``
    is what the process holds then, ``peak`` the most that it ever held, and ``before_loading`` what Python and its
    libraries hold without a model. Pages of the mapped weight files count as long as the system keeps them.

    Args:
        reference: the float directory.
        candidate: the quantized one.
        family: of both.
        inputs: of one action, or ``input_ids`` of a text.

    Raises:
        EvaluationError: a process failed.
    """
    found = [run_fresh(directory, family, inputs) for directory in (reference, candidate)]

    def both(name: str) -> Compared | None:
        figures = [Figure(float(one[name] or 0), BYTES, 1, _PROCESS) for one in found]
        return None if any(one[name] is None for one in found) else compared(figures[0], figures[1])

    tensors, peak = both("tensors"), both("peak")
    assert tensors is not None
    assert peak is not None
    return Memory(tensors, both("resident"), peak, both("before_loading"))


def run_fresh(directory: Path, family: Family, inputs: Inputs) -> dict[str, int | None]:
    """What ``python -m vlaquant.evaluate.fresh`` says of a directory, in bytes.

    Raises:
        EvaluationError: the process failed, for example because it ran out of memory.
    """
    with tempfile.TemporaryDirectory() as scratch:
        file, report = Path(scratch, "inputs.safetensors"), Path(scratch, "report.json")
        save_file({name: tensor.cpu().contiguous() for name, tensor in inputs.items()}, file)
        arguments = [str(directory), str(file), str(report), str(torch.get_num_threads()), family.name]
        done = subprocess.run(
            [sys.executable, "-m", "vlaquant.evaluate.fresh", *arguments, family.load.__module__],
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        if done.returncode != 0:
            last = done.stderr.strip().splitlines()[-1:] or [f"it ended with status {done.returncode}"]
            raise EvaluationError(f"{directory}: a fresh process could not load it and act: {last[0]}")
        found: dict[str, int | None] = json.loads(report.read_text(encoding="utf-8"))
    return found


def resident_bytes(model: nn.Module) -> int:
    """Memory that a model's tensors hold now, with the layouts that kernels made at the first run."""
    packed = [module for module in model.modules() if isinstance(module, W4A16Linear | W8A8Linear)]
    mine = {id(tensor) for layer in packed for tensor in (*layer.parameters(), *layer.buffers())}
    tensors: dict[int, Tensor] = {t.data_ptr(): t for t in (*model.parameters(), *model.buffers()) if id(t) not in mine}
    return sum(t.numel() * t.element_size() for t in tensors.values()) + sum(layer.resident_bytes for layer in packed)
