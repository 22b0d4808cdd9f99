"""The fresh process of verification: ``python -m vlaquant.export.fresh DIRECTORY INPUTS REPORT THREADS MODULE``.

Loads a directory, and writes the digest of every tensor (JSON) and the model's output for the stored inputs. With "-"
in the place of the inputs it never holds the model, and writes digests only. MODULE is where the family is defined.
"""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from vlaquant.checkpoint import TensorFiles, read_manifest, weight_files
from vlaquant.engine.fingerprint import digest
from vlaquant.errors import CheckpointError
from vlaquant.export.compressed_tensors import file_tensors
from vlaquant.export.loading import load_packed, packed_skeleton
from vlaquant.families import family_called


def main() -> None:
    """Run with the arguments of the command line."""
    directory, inputs_file, report_file = (Path(argument) for argument in sys.argv[1:4])
    torch.set_num_threads(int(sys.argv[4]))
    importlib.import_module(sys.argv[5])  # registers a family that is not one of ours
    manifest = read_manifest(directory, unfinished=True)
    if sys.argv[2] == "-":
        report_file.with_suffix(".json").write_text(json.dumps(_digests(directory, manifest)), encoding="utf-8")
        return
    model = load_packed(directory, manifest)
    digests = {name: digest(tensor) for name, tensor in file_tensors(model).items()}
    report_file.with_suffix(".json").write_text(json.dumps(digests), encoding="utf-8")
    with torch.inference_mode():
        output = family_called(manifest["plan"]["family"]).run(model, load_file(inputs_file))
    save_file({"output": output.contiguous()}, report_file)


def _digests(directory: Path, manifest: dict[str, Any]) -> dict[str, str]:
    """Digests of all tensors, one at a time, after making sure that the loader would take them."""
    model = packed_skeleton(directory, manifest)
    wanted = model.state_dict(keep_vars=True)
    digests = {}
    with TensorFiles.open(weight_files(directory)) as files:
        for name in files.names():
            tensor = files.read(name)
            if name not in wanted or (wanted[name].shape, wanted[name].dtype) != (tensor.shape, tensor.dtype):
                raise CheckpointError(f"{directory}: {name} {tuple(tensor.shape)} has no place in the model")
            digests[name] = digest(tensor)
    held = {id(wanted[name]) for name in digests}
    missing = [name for name, tensor in wanted.items() if tensor.is_meta and id(tensor) not in held]
    if missing:
        raise CheckpointError(f"{directory}: lacks tensors that the model needs: {', '.join(missing[:5])}")
    return digests


if __name__ == "__main__":
    main()
