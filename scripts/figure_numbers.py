"""What the figures of docs/concepts.md show: measured on the shipped policy, with the functions that quantize it.

Every figure has a function here that returns what is drawn, and in ``summary`` the numbers that pages quote.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from html import unescape
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlaquant.calibrate import ActStats, observe
from vlaquant.checkpoint import read_config
from vlaquant.families import Family, family_of_config, find_folds
from vlaquant.families.data import load_observations
from vlaquant.numerics import (
    from_codes,
    qparams,
    quantize_tokens,
    quantize_weight,
    round_weight,
    split_groups,
    to_codes,
)
from vlaquant.passes.awq import awq_scales
from vlaquant.passes.gptq import gptq
from vlaquant.passes.loss import output_loss, weight_loss
from vlaquant.passes.smoothquant import smooth_scale
from vlaquant.scheme import Granularity, QuantSpec

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
SCALES = torch.bfloat16  # what the policy is stored in, and so its scales
GROUPS: tuple[int | str, ...] = ("tensor", "channel", 128, 64, 32)
_SAMPLES = 16
_TOKENS_OF = "language_model.model.layers.1.mlp.down_proj"
_INT8 = QuantSpec(bits=8, granularity=Granularity.CHANNEL)
_DYNAMIC = QuantSpec(bits=8, granularity=Granularity.TOKEN, dynamic=True)

#: name -> {what: number or list of numbers}; of ``summary`` the pages quote.
Numbers = dict[str, Any]


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """The float policy and what its Linears read on a few recorded observations.

    Attributes:
        held_out: statistics on observations of other episodes.
        folds: where SmoothQuant and AWQ may move a scale: statistics of the input, and all weights that read it.
        kinds: of the language model's tokens in the first observation, one word each: ``image``, ``text``, ``action``.
        peaks: [t], largest |x| of each of these tokens where they enter the last Linear of the second block.
    """

    model: nn.Module
    stats: Mapping[str, ActStats]
    held_out: Mapping[str, ActStats]
    folds: Mapping[str, tuple[ActStats, Tensor]]
    kinds: list[str]
    peaks: Tensor

    def weight(self, name: str) -> Tensor:
        """[n, k], float32."""
        linear = self.model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        return linear.weight.detach().to(torch.float32)

    def language(self) -> list[str]:
        """Names of the language model's Linears, in the order in which they are stored."""
        return [name for name in self.stats if name.startswith("language_model.model.")]


@torch.inference_mode()
def measure() -> Measured:
    """Run the shipped policy on recorded observations."""
    family = family_of_config(read_config(EXAMPLES / "demo_policy"))
    model = family.load(EXAMPLES / "demo_policy")
    dead = family.dead(model)
    names = [name for name, one in model.named_modules() if type(one) is nn.Linear and name not in dead]
    seen = {}
    for split in ("calibration", "evaluation"):
        samples = load_observations(EXAMPLES / "demo_episodes", split, _SAMPLES)
        with observe(model, names, hessian_for=names) as observation:
            for sample in samples:
                observation.begin_sample()
                family.run(model, family.inputs(model, sample))
        seen[split] = observation.stats()
    kinds, peaks = _tokens(model, family, samples[0])
    measured = Measured(model, seen["calibration"], seen["evaluation"], {}, kinds, peaks)
    return replace(measured, folds=_folds(measured, family))


def _folds(measured: Measured, family: Family) -> dict[str, tuple[ActStats, Tensor]]:
    """Those with a scale for each column: no LayerScales, and no heads that read one value head."""
    found = {}
    for group in find_folds(measured.model, family.folds):
        if group.gamma is None and group.head_dim is None and group.targets[0] in measured.stats:
            weights = torch.cat([measured.weight(name) for name in group.targets])
            found[group.source] = measured.stats[group.targets[0]], weights
    return found


def _tokens(model: nn.Module, family: Family, sample: Any) -> tuple[list[str], Tensor]:
    entering: list[Tensor] = []
    first = model.get_submodule(_TOKENS_OF)
    hook = first.register_forward_pre_hook(lambda _, args: entering.append(args[0][0]))
    inputs = family.inputs(model, sample)
    family.run(model, inputs)
    hook.remove()
    actions = len(model.get_submodule("").config.action_query_token_ids)  # type: ignore[union-attr, arg-type]
    text = inputs["input_ids"].shape[1]
    image = len(entering[0]) - text - actions
    kinds = ["text"] + ["image"] * image + ["text"] * (text - 1) + ["action"] * actions
    return kinds, entering[0].float().abs().amax(dim=-1)


def _group_spec(bits: int, group: int | str, *, symmetric: bool = True) -> QuantSpec:
    if isinstance(group, int):
        return QuantSpec(bits, Granularity.GROUP, symmetric=symmetric, group_size=group)
    return QuantSpec(bits, Granularity(group), symmetric=symmetric)


def grid(measured: Measured) -> Numbers:
    """One group of 64 weights, of a layer the one with the most uneven range, and the two grids of 4 bits."""
    weight = measured.weight("language_model.model.layers.1.mlp.down_proj")
    specs = {name: _group_spec(4, 64, symmetric=name == "symmetric") for name in ("symmetric", "asymmetric")}
    groups = split_groups(weight, specs["symmetric"]).flatten(0, 1)
    low, high = groups.amin(dim=1), groups.amax(dim=1)
    values = groups[int(((high + low).abs() / (high - low)).argmax())].sort().values.reshape(1, -1)
    drawn: Numbers = {"values": values[0].tolist(), "summary": {}}
    for name, spec in specs.items():
        rounded = quantize_weight(values, spec, scale_dtype=SCALES)
        scale, zero = float(rounded.scale), 0 if rounded.zero is None else int(rounded.zero)
        error = float((rounded.dequantize() - values).square().mean().sqrt())
        drawn[name] = {
            "levels": [scale * (code - zero) for code in range(spec.qmin, spec.qmax + 1)],
            "rounded": rounded.dequantize()[0].tolist(),
        }
        used = int(rounded.codes.max()) - int(rounded.codes.min()) + 1
        drawn["summary"] |= {f"{name} scale": scale, f"{name} error": error, f"{name} zero": zero, f"{name} span": used}
    return drawn


def granularity(measured: Measured) -> Numbers:
    """Error of all weights of the language model together against their bits, scales included."""
    weights = [measured.weight(name) for name in measured.language()]
    power = sum(float(weight.square().sum()) for weight in weights)
    count = sum(weight.numel() for weight in weights)
    drawn: Numbers = {"summary": {}}
    for bits in (2, 3, 4, 8):
        points = []
        for group in GROUPS:
            spec = _group_spec(bits, group)
            error, scales = 0.0, 0
            for weight in weights:
                rounded = quantize_weight(weight, spec, scale_dtype=SCALES)
                error += float((rounded.dequantize() - weight).square().sum())
                scales += rounded.scale.numel()
            points.append((bits + 16 * scales / count, error / power))
            drawn["summary"][f"{bits} bits, {group}"] = error / power
        drawn[f"{bits} bits"] = points
    return drawn


def outliers(measured: Measured) -> Numbers:
    """The fold whose output suffers most from 8 bits, before and after SmoothQuant."""
    before = {}
    for source, (stats, weight) in measured.folds.items():
        before[source] = _w8a8_error(stats.sample, weight, torch.ones(weight.shape[1]))
    source = max(before, key=before.__getitem__)
    stats, weight = measured.folds[source]
    scale = smooth_scale(stats.absmax, [weight], 0.5)
    columns, after = weight.abs().amax(dim=0), stats.absmax / scale
    return {
        "source": source,
        "input before": stats.absmax.tolist(),
        "input after": after.tolist(),
        "weight before": columns.tolist(),
        "weight after": (columns * scale).tolist(),
        "summary": {
            "ratio before": float(stats.absmax.max() / stats.absmax.median()),
            "ratio after": float(after.max() / after.median()),
            "error before": before[source],
            "error after": _w8a8_error(stats.sample, weight, scale),
        },
    }


def _w8a8_error(x: Tensor, weight: Tensor, scale: Tensor) -> float:
    """Squared error of the output as a share of its square, 8 bits each, with columns scaled."""
    codes, step, zero = quantize_tokens(x / scale, _DYNAMIC)
    rounded = quantize_weight(weight * scale, _INT8, scale_dtype=SCALES).dequantize()
    power = float((x @ weight.T).square().sum(dim=-1).mean())
    return output_loss(x, weight, from_codes(codes, step, zero), rounded) / power


def awq(measured: Measured) -> Numbers:
    """Output error against the exponent of AWQ's scale, in 4 bits: the folds in which it helps most and least."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for source, (stats, weight) in measured.folds.items():
        assert stats.hessian is not None
        power = weight_loss(weight, stats.hessian)
        curves[source] = []
        for ratio, scale in awq_scales(stats.mean_abs, 20):
            delta = round_weight(weight * scale, _group_spec(4, 64), scale_dtype=SCALES) / scale - weight
            curves[source].append((ratio, weight_loss(delta, stats.hessian) / power))
    gains = {source: min(error for _, error in curve) / curve[0][1] for source, curve in curves.items()}
    drawn: Numbers = {"summary": {}}
    for name, source in {"most": min(gains, key=gains.__getitem__), "least": max(gains, key=gains.__getitem__)}.items():
        drawn |= {name: curves[source], f"{name} source": source}
        drawn["summary"] |= {
            f"{name}, none": curves[source][0][1],
            f"{name}, best": gains[source] * curves[source][0][1],
        }
    return drawn


def rounding(measured: Measured) -> Numbers:
    """For every Linear of the language model in 4 bits: error of the weight, and of the output on held-out data."""
    spec = _group_spec(4, 64)
    drawn: Numbers = {"layers": measured.language(), "summary": {}}
    for method in ("nearest", "gptq"):
        weight_errors, output_errors = [], []
        for name in measured.language():
            weight, hessian = measured.weight(name), measured.stats[name].hessian
            other = measured.held_out[name].hessian
            assert hessian is not None
            assert other is not None
            if method == "nearest":
                solved = quantize_weight(weight, spec, scale_dtype=SCALES)
            else:
                solved = gptq(weight, hessian, spec, scale_dtype=SCALES).weight
            delta = solved.dequantize() - weight
            weight_errors.append(float(delta.square().sum() / weight.square().sum()))
            output_errors.append(weight_loss(delta, other) / weight_loss(weight, other))
        drawn[method] = {"weight": weight_errors, "output": output_errors}
        drawn["summary"] |= {
            f"{method}, weight": sum(weight_errors) / len(weight_errors),
            f"{method}, output": sum(output_errors) / len(output_errors),
        }
    return drawn


def tokens(measured: Measured) -> Numbers:
    """Largest value of each token of one observation, and what 8 bits for all of them leave of a small one."""
    stats = measured.stats[_TOKENS_OF]
    low, high = float(stats.low), float(stats.high)
    spec = QuantSpec(bits=8, granularity=Granularity.TENSOR, symmetric=False)
    scale, zero = qparams(stats.low, stats.high, spec, torch.float32)
    median = {kind: _median(measured, kind) for kind in ("image", "text", "action")}
    codes = to_codes(torch.tensor([-median["image"], median["image"]]), scale, zero, spec)
    return {
        "kinds": measured.kinds,
        "peaks": measured.peaks.tolist(),
        "static": max(-low, high),
        "summary": {
            **{f"{kind} tokens": measured.kinds.count(kind) for kind in median},
            **{f"{kind} peak": peak for kind, peak in median.items()},
            "largest": max(-low, high),
            "codes of an image token": int(codes[1] - codes[0]) + 1,
        },
    }


def _median(measured: Measured, kind: str) -> float:
    return float(measured.peaks[torch.tensor([one == kind for one in measured.kinds])].median())


FIGURES = {
    "grid": grid,
    "granularity": granularity,
    "outliers": outliers,
    "tokens": tokens,
    "awq": awq,
    "rounding": rounding,
}


def quoted(numbers: Mapping[str, Numbers]) -> dict[str, list[str]]:
    """Figure -> what a page must say below it, in any language."""
    of = {name: one["summary"] for name, one in numbers.items()}
    return {
        "grid": [
            f"{of['grid']['symmetric scale']:.4f}",
            f"{of['grid']['asymmetric scale']:.4f}",
            f"{of['grid']['symmetric span']}",
            f"{1 - of['grid']['asymmetric error'] / of['grid']['symmetric error']:.0%}".replace("%", " %"),
        ],
        "granularity": [_percent(of["granularity"][f"4 bits, {group}"]) for group in GROUPS],
        "outliers": [
            *(f"{of['outliers'][f'ratio {when}']:.1f}" for when in ("before", "after")),
            *(_percent(of["outliers"][f"error {when}"]) for when in ("before", "after")),
        ],
        "tokens": [
            *(f"{of['tokens'][f'{kind} tokens']}" for kind in ("image", "text", "action")),
            f"{of['tokens']['codes of an image token']}",
        ],
        "awq": [_percent(of["awq"][f"{fold}, {what}"]) for fold in ("most", "least") for what in ("none", "best")],
        "rounding": [
            _percent(of["rounding"][f"{method}, {what}"])
            for method in ("nearest", "gptq")
            for what in ("weight", "output")
        ],
    }


def _percent(share: float) -> str:
    """Two significant digits, as ``0.15 %``."""
    percent = f"{100 * share:#.2g}" if share < 0.1 else f"{100 * share:.0f}"
    return percent.rstrip(".") + " %"


def numbers_in(svg: str) -> Numbers:
    """What a figure that make_figures.py wrote was drawn from."""
    found = re.search(r"<metadata>(.*?)</metadata>", svg, flags=re.DOTALL)
    assert found is not None
    numbers: Numbers = json.loads(unescape(found[1]))
    return numbers


def rounded(value: Any) -> Any:
    """Numbers to five significant digits, so that another machine's last bits do not change the files."""
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(one) for one in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value
