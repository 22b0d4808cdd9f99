"""One run of auto-round, in its own environment: ``python auto_round_tuning.py SETTINGS.json``.

The last line of output is JSON: seconds, peak memory in bytes, versions. Settings: model, class (of transformers),
tokens (a safetensors file with ``tokens`` [samples, length]), output (gets dequantized float weights), threads, bits,
group_size (a number or "channel"), activation_bits (null or 8: dynamic, per token). Iterations, learning rates and
batch size are auto-round's defaults.
"""

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
import transformers
from auto_round import AutoRound
from datasets import Dataset
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import AutoTokenizer


def peak_memory() -> int:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) * 1024


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(settings["threads"])
    tokens = load_file(settings["tokens"])["tokens"]
    started = time.perf_counter()
    model = getattr(transformers, settings["class"]).from_pretrained(settings["model"], dtype=torch.float32)
    group = settings["group_size"]
    activations = {}
    if settings["activation_bits"] is not None:
        activations = {"act_bits": settings["activation_bits"], "act_group_size": -1, "act_dynamic": True}
    tuner = AutoRound(
        model,
        AutoTokenizer.from_pretrained(settings["model"]),
        bits=settings["bits"],
        group_size=-1 if group == "channel" else group,
        sym=True,
        **activations,
        dataset=DataLoader(Dataset.from_dict({"input_ids": tokens.tolist()}).with_format("torch"), batch_size=1),
        nsamples=len(tokens),
        seqlen=tokens.shape[1],
        device_map="cpu",
    )
    quantized, _ = tuner.quantize()
    seconds = time.perf_counter() - started
    # Layers that round their inputs are wrapped, and would be saved under names that no model has
    for name, module in [*quantized.named_modules()]:
        if hasattr(module, "orig_layer"):
            quantized.set_submodule(name, module.orig_layer)
    quantized.save_pretrained(settings["output"])
    versions = {name: version(name) for name in ("auto-round", "torch", "transformers")}
    print(json.dumps({"total": seconds, "peak": peak_memory(), "versions": versions}))


if __name__ == "__main__":
    main()
