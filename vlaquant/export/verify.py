"""Does the written directory hold what was in memory? Asked in a process that knows nothing but the directory."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from vlaquant.checkpoint import read_tensors, weight_files
from vlaquant.engine.fingerprint import digest
from vlaquant.errors import ExportError
from vlaquant.export.compressed_tensors import file_tensors
from vlaquant.families import MODULE, Family, Inputs


def verify(model: nn.Module, directory: Path, family: Family, inputs: Inputs | None) -> dict[str, str | int]:
    """Compare every tensor bit for bit, and one output if the family can build the model.

    Returns:
        What was compared, for the manifest.

    Raises:
        ExportError: the directory differs from ``model``, or does not load.
    """
    if family is MODULE:
        found = {name: digest(tensor) for name, tensor in read_tensors(weight_files(directory))}
        _compare(model, directory, found)
        return {"tensors": len(found), "output": "not compared: the model's class is not vlaquant's to build"}
    inputs = family.example(model) if inputs is None else inputs
    with tempfile.TemporaryDirectory() as scratch:
        inputs_file, report_file = Path(scratch, "inputs.safetensors"), Path(scratch, "report.safetensors")
        save_file({name: tensor.cpu().contiguous() for name, tensor in inputs.items()}, inputs_file)
        _run_fresh(directory, inputs_file, report_file, family)
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


def verify_tensors(directory: Path, wanted: Mapping[str, str], family: Family) -> dict[str, str | int]:
    """Compare every tensor bit for bit in a fresh process, one at a time, for checkpoints larger than the memory.

    Args:
        directory: has to fit its model: the names, shapes and dtypes are those that the loader wants.
        wanted: digests by name.
        family: builds the model.

    Raises:
        ExportError: the directory differs, or does not fit.
    """
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch, "report.safetensors")
        _run_fresh(directory, None, report, family)
        found = json.loads(report.with_suffix(".json").read_text(encoding="utf-8"))
    compare_digests(directory, wanted, found)
    return {"tensors": len(found), "output": "not compared: the model is larger than the memory that was allowed"}


def _compare(model: nn.Module, directory: Path, found: dict[str, str]) -> None:
    compare_digests(directory, {name: digest(tensor) for name, tensor in file_tensors(model).items()}, found)


def compare_digests(directory: Path, wanted: Mapping[str, str], found: Mapping[str, str]) -> None:
    """Compare digests by tensor name.

    Raises:
        ExportError: some differ, or are on one side only.
    """
    wrong = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    if wrong:
        raise ExportError(f"{directory}: {len(wrong)} tensors differ from those in memory: {', '.join(wrong[:5])}")


def _run_fresh(directory: Path, inputs_file: Path | None, report_file: Path, family: Family) -> None:
    arguments = [str(path) for path in (directory, inputs_file or "-", report_file)]
    threads = str(torch.get_num_threads())
    done = subprocess.run(
        [sys.executable, "-m", "vlaquant.export.fresh", *arguments, threads, family.load.__module__],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise ExportError(f"{directory}: a fresh process could not load and run it: {last[0]}")
