"""Quantization-aware training: a short fine-tune with rounded weights, to see what it adds to a recipe.

The forward pass rounds as the packed layers will; the backward pass goes straight through (see
:mod:`vlaquant.passes.straight_through`). Ranges are those of the weights at every step, as in Jacob et al. 2018,
arXiv:1712.05877, section 3. What is written has the format of any other run.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from vlaquant.calibrate import observe
from vlaquant.checkpoint import check_output
from vlaquant.engine.run import Probed, QuantizationRun, RunOptions
from vlaquant.engine.tables import pack_tables_
from vlaquant.errors import CalibrationError, PlanError
from vlaquant.export.writing import write
from vlaquant.families import FAMILIES, Family
from vlaquant.linear import from_quantized, replace_module_
from vlaquant.numerics import (
    OBSERVERS,
    QuantizedWeight,
    as_quantized,
    fit_groups,
    full_range,
    min_max,
    split_groups,
    to_codes,
)
from vlaquant.passes.layer import LayerRecord, static_input
from vlaquant.passes.straight_through import fake_quantize_through, round_input
from vlaquant.plan import LayerPlan, Plan, make_plan
from vlaquant.recipe import Recipe, load_recipe
from vlaquant.result import QuantizationResult
from vlaquant.scheme import QuantSpec, Scheme
from vlaquant.terminal import bar


@dataclass(frozen=True, slots=True)
class Training:
    """How long and how fast.

    Attributes:
        steps: of AdamW; the learning rate falls linearly to 0.
        learning_rate: of the first step.
        batch: samples a step.
        follow: what the loss compares with: what the ``float`` model decides for the same sample (Hinton et al. 2015,
            arXiv:1503.02531, at temperature 1), or the ``demonstration``, by the loss that the family is trained with.
    """

    steps: int
    learning_rate: float = 1e-4
    batch: int = 8
    follow: Literal["float", "demonstration"] = "float"

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1 or not self.learning_rate > 0:
            raise CalibrationError(f"steps, batch and learning rate must be positive, got {self}")


class RoundedWeight(nn.Module):
    """A parametrization: a weight [n, k] as its codes will stand for it, with gradients for the weight.

    Args:
        weight: as it is at the start, which says how far ranges are clipped, as a share of the full one.
        spec: of the codes.
        scale_dtype: what scales will be stored in.
        clip: name of one of :data:`vlaquant.numerics.OBSERVERS`.
    """

    def __init__(self, weight: Tensor, spec: QuantSpec, scale_dtype: torch.dtype, clip: str) -> None:
        super().__init__()
        self._spec = spec
        self._scale_dtype = scale_dtype
        full, clipped = (
            fit_groups(weight.detach(), spec, OBSERVERS[name], torch.float32)[0].unsqueeze(-1)
            for name in ("minmax", clip)
        )
        self._share = (clipped / full).abs()

    def _grid(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The weight in groups [n, g, s], their scales and zero points [n, g, 1]."""
        groups = split_groups(weight, self._spec)
        low, high = min_max(groups)
        return groups, *full_range(low * self._share, high * self._share, self._spec, self._scale_dtype)

    def forward(self, weight: Tensor) -> Tensor:
        """Float32 [n, k]; gradients also reach the weights that make the range."""
        return fake_quantize_through(*self._grid(weight), self._spec).reshape(weight.shape)

    @torch.no_grad()
    def quantized(self, weight: Tensor) -> QuantizedWeight:
        """The codes whose values :meth:`forward` gives."""
        groups, scale, zero = self._grid(weight)
        codes = to_codes(groups, scale, zero, self._spec).reshape(weight.shape)
        return as_quantized(codes, scale.squeeze(-1), zero.squeeze(-1), self._spec, self._scale_dtype)


def finetune(
    model_or_path: nn.Module | str | Path,
    recipe: Recipe | Mapping[str, Any] | str | Path,
    training: Training,
    samples: Sequence[Any] | None = None,
    output: str | Path | None = None,
    *,
    overwrite: bool = False,
    progress: bool = False,
) -> QuantizationResult:
    """Train a policy's weights while they are rounded as the recipe's schemes say, and pack them.

    Only the weights of layers that are quantized are trained; everything else stays as it is. Of the recipe's
    quantizer the clipping of ranges is used, and no transform: ``qat`` in the manifest says so.

    Args:
        model_or_path: the float checkpoint directory, or a loaded model, which is changed in place.
        recipe: as for :func:`vlaquant.quantize`.
        training: how long and how fast.
        samples: demonstrations, in place of what the recipe names.
        output: directory to write.
        overwrite: replace the output if it exists.
        progress: show a progress bar on standard error.

    Raises:
        CalibrationError: a family whose training loss is not known, or data without demonstrated actions.
        VlaquantError: see :mod:`vlaquant.errors`.
    """
    recipe = load_recipe(recipe)
    target = None if output is None else Path(output)
    if target is not None:
        check_output(target, overwrite=overwrite)
    with QuantizationRun(model_or_path, recipe, None, RunOptions(), show=False) as job:
        opened = job.opened
        loss = _loss_of(opened.family, training, opened.model)
        data, plan = job.observe(make_plan(opened.model, opened.family, recipe), samples, None)
        if data is None:
            raise CalibrationError("fine-tuning needs demonstrations; add a section `calibration` to the recipe")
        if not plan.quantized:
            raise PlanError(f"no layer is left to train:\n{plan}")
        pack_tables_(opened.model, plan, weights=None, device=torch.device("cpu"))
        losses = _train_and_pack_(opened.model, plan, recipe, training, data, loss, progress=progress)
        result = QuantizationResult(opened.model, recipe, plan, (), _records(plan))
        if target is None:
            return result
        facts = asdict(training) | {"samples": len(data.samples), "losses": losses, "not_used": _not_used(recipe)}
        manifest = write(
            opened.model,
            target,
            result.to_dict() | {"qat": facts},
            source=opened.directory,
            family=opened.family,
            inputs=job.inputs,
            changed={},
            overwrite=overwrite,
        )
    return replace(result, output=target, manifest=manifest)


def _records(plan: Plan) -> tuple[LayerRecord, ...]:
    """Nothing is compared with plain rounding: the weights are others."""
    layers = ((layer.name, layer.scheme) for layer in plan.quantized.values())
    return tuple(LayerRecord(name, scheme.name, "qat", None, None, ()) for name, scheme in layers if scheme is not None)


def _loss_of(family: Family, training: Training, model: nn.Module) -> Callable[[Any, Any], Tensor]:
    """(model, sample) -> scalar; ``model`` is float yet, and stays behind as it is now where that is to be followed."""
    if training.follow == "float":
        return _distance_to(copy.deepcopy(model).requires_grad_(requires_grad=False).float(), family)
    if family.loss is None:
        known = ", ".join(name for name, each in FAMILIES.items() if each.loss is not None)
        raise CalibrationError(
            f"the training loss of the family {family.name} is not known, so it cannot be fine-tuned; known: {known}"
        )
    return family.loss


def _distance_to(teacher: nn.Module, family: Family) -> Callable[[Any, Any], Tensor]:
    """Mean divergence of the tokens' distributions from the teacher's; of numbers the squared error, as a share."""
    decide = family.decide
    if decide is None:
        raise CalibrationError(
            f"what a model of the family {family.name} decides is not known, so it cannot be followed; known: "
            f"{', '.join(name for name, each in FAMILIES.items() if each.decide is not None)}"
        )

    def distance(model: Any, sample: Any) -> Tensor:
        inputs = family.inputs(model, sample)
        with torch.no_grad():
            wanted = decide(teacher, inputs)
        found = decide(model, inputs)
        if found.tokens:
            p, q = (each.output.log_softmax(dim=-1) for each in (wanted, found))
            return F.kl_div(q, p, reduction="batchmean", log_target=True)
        power = wanted.output.square().sum().clamp(min=torch.finfo(torch.float32).tiny)
        return (found.output - wanted.output).square().sum() / power

    return distance


def _not_used(recipe: Recipe) -> list[str]:
    kinds: list[str] = [transform.kind for transform in recipe.transforms]
    return kinds if recipe.quantizer.kind == "rtn" else [*kinds, recipe.quantizer.kind]


def _train_and_pack_(
    model: nn.Module,
    plan: Plan,
    recipe: Recipe,
    training: Training,
    data: Probed,
    loss: Callable[[Any, Any], Tensor],
    *,
    progress: bool,
) -> list[float]:
    """The mean loss of each tenth of the steps; afterwards the model holds packed layers in its own dtypes."""
    dtypes = {name: tensor.dtype for name, tensor in _tensors(model)}
    static = _static_inputs(model, plan, recipe, data)
    model.requires_grad_(requires_grad=False).float()
    rounded: dict[str, RoundedWeight] = {}
    with _rounded_inputs(model, plan.quantized, static):
        for name, layer in plan.quantized.items():
            linear = model.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            assert layer.scheme is not None
            clip = getattr(recipe.layer_quantizer, "clip", "minmax")
            clip = "mse" if clip == "awq" else clip
            rounded[name] = RoundedWeight(linear.weight, layer.scheme.weight, dtypes[f"{name}.weight"], clip)
            linear.weight.requires_grad_()
            parametrize.register_parametrization(linear, "weight", rounded[name], unsafe=True)
        losses = _train(model, recipe.seed, training, data.samples, loss, progress=progress)
    for name, parametrization in rounded.items():
        parametrize.remove_parametrizations(model.get_submodule(name), "weight", leave_parametrized=False)
        _pack_(model, name, plan.quantized[name].scheme, parametrization, dtypes[f"{name}.weight"], static.get(name))
    for name, tensor in _tensors(model):
        # Codes of packed layers can have the name of the float weight
        if name in dtypes and tensor.is_floating_point():
            tensor.data = tensor.data.to(dtypes[name])
    return losses


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _train(
    model: nn.Module,
    seed: int,
    training: Training,
    samples: Sequence[Any],
    loss: Callable[[Any, Any], Tensor],
    *,
    progress: bool,
) -> list[float]:
    """AdamW without weight decay; the same seed gives the same weights."""
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=training.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - step / training.steps)
    random, seen = np.random.default_rng(seed), []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for _ in bar(range(training.steps), "qat", show=progress):
            optimizer.zero_grad()
            total = 0.0
            for position in random.choice(len(samples), training.batch, replace=len(samples) < training.batch):
                each = loss(model, samples[int(position)]) / training.batch
                each.backward()
                total += float(each.detach())
            if not total < torch.inf:
                raise CalibrationError("the training loss is not finite; lower the learning rate, or look at the data")
            optimizer.step()
            schedule.step()
            seen.append(total)
    return [float(np.mean(part)) for part in np.array_split(seen, min(10, len(seen)))]


def _static_inputs(model: nn.Module, plan: Plan, recipe: Recipe, data: Probed) -> dict[str, tuple[Tensor, Tensor]]:
    """Scale and zero point of static activations, from the ranges in the float model."""
    specs = {
        name: layer.scheme.activation
        for name, layer in plan.quantized.items()
        if layer.scheme is not None and layer.scheme.activation is not None and not layer.scheme.activation.dynamic
    }
    if not specs:
        return {}
    with torch.inference_mode(), observe(model, list(specs), seed=recipe.seed) as observation:
        for sample in data.samples:
            observation.begin_sample()
            data.run(model, sample)
    stats = observation.stats()
    found = {}
    for name, spec in specs.items():
        scale, zero = static_input(stats[name], spec, model.get_parameter(f"{name}.weight").dtype)
        found[name] = (scale.clone(), torch.zeros_like(scale) if zero is None else zero.clone())
    return found


@contextmanager
def _rounded_inputs(
    model: nn.Module, layers: Mapping[str, LayerPlan], static: Mapping[str, tuple[Tensor, Tensor]]
) -> Iterator[None]:
    """Inside, layers of schemes with rounded activations round them."""
    hooks = []
    for name, layer in layers.items():
        spec = None if layer.scheme is None else layer.scheme.activation
        if spec is not None:
            hooks.append(model.get_submodule(name).register_forward_pre_hook(_rounder(spec, static.get(name))))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _rounder(spec: QuantSpec, static: tuple[Tensor, Tensor] | None) -> Callable[[nn.Module, Any], Any]:
    return lambda _module, args: (round_input(args[0], spec, static), *args[1:])


def _pack_(
    model: nn.Module,
    name: str,
    scheme: Scheme | None,
    rounded: RoundedWeight,
    dtype: torch.dtype,
    static: tuple[Tensor, Tensor] | None,
) -> None:
    linear = model.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    assert scheme is not None
    scale, zero = (None, None) if static is None else static
    packed = from_quantized(
        rounded.quantized(linear.weight),
        scheme,
        linear.bias,
        dtype=dtype,
        input_scale=scale,
        input_zero=None if scheme.activation is None or scheme.activation.symmetric else zero,
    )
    replace_module_(model, name, packed)
