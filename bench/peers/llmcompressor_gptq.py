"""One GPTQ run of llm-compressor, in its own environment: ``python llmcompressor_gptq.py SETTINGS.json``.

The last line of output is JSON: seconds by phase, peak memory in bytes, versions. Settings: model, tokens (a
safetensors file with ``tokens`` [samples, length]), output, threads, bits, group_size, damp.
"""

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


def peak_memory() -> int:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) * 1024


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(settings["threads"])
    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype="auto")
    loaded = time.perf_counter()
    tokens = load_file(settings["tokens"])["tokens"].tolist()
    data = Dataset.from_dict({"input_ids": tokens, "attention_mask": [[1] * len(row) for row in tokens]})
    arguments = QuantizationArgs(
        num_bits=settings["bits"], group_size=settings["group_size"], strategy="group", symmetric=True
    )
    recipe = GPTQModifier(
        config_groups={"group_0": QuantizationScheme(targets=["Linear"], weights=arguments)},
        ignore=["lm_head"],
        dampening_frac=settings["damp"],
        actorder="static",
    )
    oneshot(
        model=model,
        dataset=data,
        recipe=recipe,
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
