"""Does the written directory hold what was in memory? Asked in a process that knows nothing but the directory."""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vlaquant.checkpoint import read_tensors, weight_files
from vlaquant.errors import ExportError
from vlaquant.export.compressed_tensors import file_tensors
from vlaquant.families import GENERIC, Family, Inputs


def digest(tensor: Tensor) -> str:
    """SHA-256 over dtype, shape and bytes."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    head = f"{tensor.dtype}{tuple(tensor.shape)}".encode()
    return hashlib.sha256(head + flat.numpy().tobytes()).hexdigest()


def verify(model: nn.Module, directory: Path, family: Family, inputs: Inputs | None) -> dict[str, str | int]:
    """Compare every tensor bit for bit, and one output if the family can build the model.

    Returns:
        What was compared, for the manifest.

    Raises:
        ExportError: the directory differs from ``model``, or does not load.
    """
    if family is GENERIC:
        found = {name: digest(tensor) for name, tensor in read_tensors(weight_files(directory))}
        _compare(model, directory, found)
        return {"tensors": len(found), "output": "not compared: the model's class is not vlaquant's to build"}
    inputs = family.example(model) if inputs is None else inputs
    with tempfile.TemporaryDirectory() as scratch:
        inputs_file, report_file = Path(scratch, "inputs.safetensors"), Path(scratch, "report.safetensors")
        save_file({name: tensor.cpu().contiguous() for name, tensor in inputs.items()}, inputs_file)
        _run_fresh(directory, inputs_file, report_file)
        report = json.loads(report_file.with_suffix(".json").read_text(encoding="utf-8"))
        output = load_file(report_file)["output"]
    _compare(model, directory, report)
    with torch.inference_mode():
        expected = family.run(model, inputs).cpu()
    if digest(expected) != digest(output):
        worst = float((expected.float() - output.float()).abs().max())
        raise ExportError(
            f"{directory}: all tensors are equal, but the output differs by {worst:.3g} in a fresh process"
        )
    return {"tensors": len(report), "output": "equal bit for bit", "output_values": expected.numel()}


def _compare(model: nn.Module, directory: Path, found: dict[str, str]) -> None:
    wanted = {name: digest(tensor) for name, tensor in file_tensors(model).items()}
    wrong = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    if wrong:
        raise ExportError(f"{directory}: {len(wrong)} tensors differ from those in memory: {', '.join(wrong[:5])}")


def _run_fresh(directory: Path, inputs_file: Path, report_file: Path) -> None:
    arguments = [str(path) for path in (directory, inputs_file, report_file)]
    threads = str(torch.get_num_threads())
    done = subprocess.run(
        [sys.executable, "-m", "vlaquant.export.fresh", *arguments, threads],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise ExportError(f"{directory}: a fresh process could not load and run it: {last[0]}")
