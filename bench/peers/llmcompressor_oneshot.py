"""One run of llm-compressor, in its own environment: ``python llmcompressor_oneshot.py SETTINGS.json``.

The last line of output is JSON: seconds by phase, peak memory in bytes, versions. Settings: model, class (of
transformers), tokens (a safetensors file with ``tokens`` [samples, length]), output, threads, method (rtn, gptq,
gptq + mse, smoothquant + gptq; mse is its observer that searches ranges), bits, group_size (a number or "channel"),
activation_bits (null or 8: dynamic, per token), damp.
"""

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.smoothquant import SmoothQuantModifier
from safetensors.torch import load_file


def peak_memory() -> int:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) * 1024


def recipe(settings: dict[str, Any]) -> list[Any]:
    group = settings["group_size"]
    weights = QuantizationArgs(
        num_bits=settings["bits"],
        symmetric=True,
        observer="mse" if "mse" in settings["method"] else "minmax",
        **({"strategy": "channel"} if group == "channel" else {"strategy": "group", "group_size": group}),
    )
    activations = None
    if settings["activation_bits"] is not None:
        activations = QuantizationArgs(
            num_bits=settings["activation_bits"], symmetric=True, strategy="token", dynamic=True
        )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, input_activations=activations)
    shared = {"config_groups": {"group_0": scheme}, "ignore": ["lm_head"]}
    if settings["method"] == "rtn":
        return [QuantizationModifier(**shared)]
    solver = GPTQModifier(**shared, dampening_frac=settings["damp"], actorder="static")
    return [SmoothQuantModifier(smoothing_strength=0.5), solver] if "smoothquant" in settings["method"] else [solver]


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(settings["threads"])
    started = time.perf_counter()
    model = getattr(transformers, settings["class"]).from_pretrained(settings["model"], dtype="auto")
    loaded = time.perf_counter()
    tokens = load_file(settings["tokens"])["tokens"].tolist()
    data = Dataset.from_dict({"input_ids": tokens, "attention_mask": [[1] * len(row) for row in tokens]})
    oneshot(
        model=model,
        dataset=data,
        recipe=recipe(settings),
        max_seq_length=len(tokens[0]),
        num_calibration_samples=len(tokens),
        shuffle_calibration_samples=False,
        pipeline="sequential",
    )
    solved = time.perf_counter()
    model.save_pretrained(settings["output"], save_compressed=True)
    ended = time.perf_counter()
    result = {
        "seconds": {"load": loaded - started, "calibrate_and_solve": solved - loaded, "save": ended - solved},
        "total": ended - started,
        "peak": peak_memory(),
        "versions": {name: version(name) for name in ("llmcompressor", "torch", "transformers", "compressed-tensors")},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
