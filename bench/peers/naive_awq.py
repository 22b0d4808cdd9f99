"""AWQ as its paper's code does it, without any of our shortcuts, on the first blocks of a Llama-like model.

    python naive_awq.py SETTINGS.json

For each of the four groups of a block and each of the grid's ratios: scale the weights, round them to the grid, run the
block's own part (the attention, the MLP or the Linear) on all samples, and keep the ratio whose outputs are closest
(Lin et al. 2023, equation 4). Then every weight is rounded once more. With ``clip`` the range of each group is shrunk
before that, to a half at most, as far as it brings the Linear's output closer on 512 tokens (but not of queries and
keys, as there). Settings as for ``llmcompressor_oneshot.py``, and ``blocks``, ``clip`` and ``save`` (write dequantized
weights to ``output``). The last line of output is JSON.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

GRID = 20
#: Of the range, tried for each group.
SHRINKS = [1 - step / 20 for step in range(10)]
CLIP_TOKENS = 512


def rounded(weight: Tensor, bits: int, group_size: int, shrink: float | Tensor = 1.0) -> Tensor:
    """Symmetric, one scale a group; ``shrink`` [groups, 1] of its range."""
    groups = weight.reshape(-1, group_size)
    top = 2 ** (bits - 1) - 1
    scale = groups.abs().amax(1, keepdim=True).clamp(min=1e-8) * shrink / top
    return ((groups / scale).round().clamp(-top - 1, top) * scale).reshape(weight.shape)


def search_(linears: list[nn.Linear], part: nn.Module, calls: list[Any], inputs: list[Tensor], rounds: Any) -> Tensor:
    """The scale of one group of Linears that read the same inputs [t, k]."""
    mean = torch.stack([x.reshape(-1, x.shape[-1]).abs().mean(0) for x in inputs]).mean(0)
    wanted = [first(part(*args, **kwargs)) for args, kwargs in calls]
    kept = [linear.weight.data.clone() for linear in linears]
    best: tuple[float, Tensor] = (float("inf"), torch.ones_like(mean))
    for step in range(GRID):
        scale = mean.pow(step / GRID).clamp(min=1e-4)
        scale = scale / (scale.max() * scale.min()).sqrt()
        for linear, weight in zip(linears, kept, strict=True):
            linear.weight.data = rounds(weight * scale) / scale
        found = (first(part(*args, **kwargs)) for args, kwargs in calls)
        error = sum(float((one - out).square().mean()) for one, out in zip(found, wanted, strict=True))
        if error < best[0]:
            best = (error, scale)
    for linear, weight in zip(linears, kept, strict=True):
        linear.weight.data = weight
    return best[1]


def clipped(weight: Tensor, x: Tensor, bits: int, group_size: int) -> Tensor:
    """Rounded weight [n, k], each group with the range that leaves its share of the output of x [t, k] closest."""
    x = x[:: max(len(x) // CLIP_TOKENS, 1)].reshape(-1, weight.shape[1] // group_size, group_size)
    best = torch.full((weight.numel() // group_size, 1), torch.inf)
    chosen = torch.ones_like(best)
    for shrink in SHRINKS:
        change = (rounded(weight, bits, group_size, shrink) - weight).reshape(len(weight), -1, group_size)
        error = torch.einsum("tgk,ngk->tng", x, change).square().mean(0).reshape(-1, 1)
        better = error < best
        best, chosen = torch.where(better, error, best), torch.where(better, shrink, chosen)
    return rounded(weight, bits, group_size, chosen)


def recorded(module: nn.Module, run: Callable[[], Any]) -> list[tuple[Any, Any]]:
    """The arguments of every call of ``module``."""
    calls: list[tuple[Any, Any]] = []
    hook = module.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    run()
    hook.remove()
    return calls


def first(output: Any) -> Tensor:
    tensor: Tensor = output[0] if isinstance(output, tuple) else output
    return tensor


def quantize_block_(block: Any, run: Callable[[], Any], rounds: Any, clips: Any) -> None:
    attention, mlp = block.self_attn, block.mlp
    groups = (
        ([attention.q_proj, attention.k_proj, attention.v_proj], attention, block.input_layernorm),
        ([attention.o_proj], attention.o_proj, None),
        ([mlp.gate_proj, mlp.up_proj], mlp, block.post_attention_layernorm),
        ([mlp.down_proj], mlp.down_proj, mlp.up_proj),
    )
    for linears, part, before in groups:
        inputs = [args[0] for args, _ in recorded(linears[0], run)]
        calls = recorded(part, run)
        scale = search_(linears, part, calls, inputs, rounds)
        if before is None:  # grouped-query attention: the values cannot take the scale channel by channel
            continue
        for linear in linears:
            linear.weight.data = linear.weight.data * scale
        before.weight.data = before.weight.data / (scale if before.weight.ndim == 1 else scale[:, None])
    every = {name: module for name, module in block.named_modules() if type(module) is nn.Linear}
    for name, linear in every.items():
        if clips is None or name.endswith(("q_proj", "k_proj")):
            linear.weight.data = rounds(linear.weight.data)
        else:
            seen = torch.cat([args[0].flatten(0, -2) for args, _ in recorded(linear, run)])
            linear.weight.data = clips(linear.weight.data, seen)


@torch.inference_mode()
def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(settings["threads"])
    started = time.perf_counter()
    model: Any = AutoModelForCausalLM.from_pretrained(settings["model"], dtype="auto").eval()
    tokens = load_file(settings["tokens"])["tokens"]

    def start() -> None:
        for one in tokens.split(1):
            model.model(one)

    def rounds(weight: Tensor) -> Tensor:
        return rounded(weight, settings["bits"], settings["group_size"])

    def clips(weight: Tensor, x: Tensor) -> Tensor:
        return clipped(weight, x, settings["bits"], settings["group_size"])

    calls = recorded(model.model.layers[0], start)
    for block in model.model.layers[: settings["blocks"]]:

        def run(block: Any = block, calls: Any = calls) -> list[Tensor]:
            return [first(block(*args, **kwargs)) for args, kwargs in calls]

        quantize_block_(block, run, rounds, clips if settings.get("clip") else None)
        calls = [((output, *args[1:]), kwargs) for output, (args, kwargs) in zip(run(), calls, strict=True)]
    total = time.perf_counter() - started
    if settings.get("save"):
        model.save_pretrained(settings["output"])
    print(json.dumps({"total": total}))


if __name__ == "__main__":
    main()
