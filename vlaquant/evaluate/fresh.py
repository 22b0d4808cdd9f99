"""The fresh process of :mod:`vlaquant.evaluate.memory`.

``python -m vlaquant.evaluate.fresh DIRECTORY INPUTS REPORT THREADS FAMILY MODULE`` loads a directory, runs the stored
inputs through it, and writes how much memory that took (JSON, bytes). MODULE is where the family is defined.
"""

import importlib
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from vlaquant.engine.log import peak_memory, resident_memory
from vlaquant.evaluate.memory import resident_bytes
from vlaquant.export import load
from vlaquant.families import family_called


def main() -> None:
    """Run with the arguments of the command line."""
    directory, inputs_file, report = (Path(argument) for argument in sys.argv[1:4])
    torch.set_num_threads(int(sys.argv[4]))
    importlib.import_module(sys.argv[6])  # registers a family that is not one of ours
    family, inputs = family_called(sys.argv[5]), load_file(inputs_file)
    before = resident_memory()
    model = load(directory)
    with torch.inference_mode():
        (family.run if family.act is None else family.act)(model, inputs)
    found = {
        "before_loading": before,
        "tensors": resident_bytes(model),
        "resident": resident_memory(),
        "peak": peak_memory(),
    }
    report.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
