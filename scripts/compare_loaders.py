"""One W8A8 language model in two loaders: vlaquant's own, and transformers with compressed-tensors.

    python scripts/compare_loaders.py --model DIR --text FILE --json bench/results/smollm2_loaders.json

compressed-tensors simulates dynamic int8 activations with absmax / 127.5; kernels divide by 127, and so does vlaquant
(docs/decisions/0006-int8-range.md). The model is therefore measured there twice: as it is, and with the range of the
kernels. All in float32, on the same windows; the interval is that of the mean difference over windows.
"""

import argparse
import json
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import AutoModelForCausalLM

import vlaquant
from vlaquant.families.hf_samples import text_samples


@contextmanager
def kernel_range() -> Iterator[None]:
    """Codes −127 … 127 and absmax / 127 in compressed-tensors, as the kernels that run its checkpoints have it."""
    with ExitStack() as stack:
        for module in ("utils.helpers", "lifecycle.forward"):
            name = f"compressed_tensors.quantization.{module}.calculate_range"
            stack.enter_context(patch(name, lambda *_: (torch.tensor(-127.0), torch.tensor(127.0))))
        yield


@torch.inference_mode()
def loss(model: nn.Module, ids: Tensor) -> float:
    """Mean negative log-likelihood of a window [1, t], nats per token."""
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
    return float(F.cross_entropy(logits, ids[0, 1:]))


def summary(mine: list[float], others: list[float]) -> dict[str, Any]:
    """Perplexity of ``others``, and how much that of ``mine`` is higher, with a standard error."""
    difference = torch.tensor(mine, dtype=torch.float64) - torch.tensor(others, dtype=torch.float64)
    return {
        "perplexity": math.exp(sum(others) / len(others)),
        "vlaquant_higher_by": math.expm1(float(difference.mean())),
        "standard_error": float(difference.std() / math.sqrt(len(others))),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a quantized W8A8 directory")
    parser.add_argument("--text", type=Path, required=True, help="text that was not used for calibration")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=256)
    parser.add_argument("--sequence-length", type=int, default=512)
    args = parser.parse_args()
    windows = text_samples(args.model, args.text, args.windows, args.sequence_length)
    ours = vlaquant.load(args.model).float()
    theirs = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    losses: dict[str, list[float]] = {"vlaquant": [], "as_it_is": [], "kernel_range": []}
    for ids in tqdm(windows):
        losses["vlaquant"].append(loss(ours, ids))
        losses["as_it_is"].append(loss(theirs, ids))
        with kernel_range():
            losses["kernel_range"].append(loss(theirs, ids))
    mine = losses.pop("vlaquant")
    result = {
        "tokens": sum(ids.shape[1] - 1 for ids in windows),
        "vlaquant": {"perplexity": math.exp(sum(mine) / len(mine))},
        "compressed_tensors": {name: summary(mine, values) for name, values in losses.items()},
    }
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
