"""The fresh process of verification: ``python -m vlaquant.export.fresh DIRECTORY INPUTS REPORT THREADS``.

Loads a directory, and writes the digest of every tensor (JSON) and the model's output for the stored inputs.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from vlaquant.checkpoint import read_manifest
from vlaquant.export.compressed_tensors import file_tensors
from vlaquant.export.loading import load_packed
from vlaquant.export.verify import digest
from vlaquant.families import FAMILIES


def main() -> None:
    """Run with the arguments of the command line."""
    directory, inputs_file, report_file = (Path(argument) for argument in sys.argv[1:4])
    torch.set_num_threads(int(sys.argv[4]))
    manifest = read_manifest(directory, unfinished=True)
    model = load_packed(directory, manifest)
    digests = {name: digest(tensor) for name, tensor in file_tensors(model).items()}
    report_file.with_suffix(".json").write_text(json.dumps(digests), encoding="utf-8")
    with torch.inference_mode():
        output = FAMILIES[manifest["plan"]["family"]].run(model, load_file(inputs_file))
    save_file({"output": output.contiguous()}, report_file)


if __name__ == "__main__":
    main()
