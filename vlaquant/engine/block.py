"""A stage as one function of its weights: what a quantizer needs that looks at the output of a whole block."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from vlaquant.calibrate.flow import Flow
from vlaquant.calibrate.masks import counted_rows, counted_weights
from vlaquant.calibrate.outputs import tensors_in, with_tensors
from vlaquant.calibrate.running import StageRunner
from vlaquant.engine.log import RunLog
from vlaquant.engine.masking import Masks, layer_masks
from vlaquant.engine.processes import Processes
from vlaquant.engine.stage import pack
from vlaquant.engine.weighing import Weights
from vlaquant.errors import CalibrationError
from vlaquant.families import Family
from vlaquant.kernels import unpack
from vlaquant.linear import QuantLinear
from vlaquant.numerics import QuantizedWeight
from vlaquant.passes.autoround import autoround, start_from
from vlaquant.passes.layer import LayerRecord, Work, static_input
from vlaquant.passes.loss import weight_loss
from vlaquant.passes.straight_through import round_input
from vlaquant.plan import Plan
from vlaquant.recipe import AutoRound, Recipe

#: Float32 copies of a block's weights, and float32 tensors of the size of its output that one pass keeps.
_COPIES = 7
_TAPE = 60
#: Arguments of a call.
Call = tuple[tuple[Any, ...], dict[str, Any]]


def require_blocks(plan: Plan, flow: Flow, mode: str) -> None:
    """Every unit with a layer to quantize must be one module that runs once a sample.

    Raises:
        CalibrationError: names those that are not, with the reason.
    """
    if mode != "replay":
        raise CalibrationError(
            f"the quantizer autoround runs single blocks again and again; use mode replay, not {mode}"
        )
    live = {name for name, layer in plan.quantized.items() if not layer.dead}
    wrong = [
        f"{stage.unit} ({flow.reasons[stage.unit]})"
        for stage in flow.stages
        if stage.unit in flow.reasons and not live.isdisjoint(stage.linears)
    ]
    if wrong:
        raise CalibrationError(
            f"the quantizer autoround needs blocks that run once a sample and give all of their result back, and "
            f"{len(wrong)} of this model are not like that: {', '.join(wrong[:3])}; keep their layers float, or use "
            "another quantizer, such as gptq"
        )


def tuning_memory(plan: Plan, flow: Flow, activations: int) -> int:
    """Bytes that tuning the largest block needs: an upper estimate.

    Args:
        plan: says which layers are quantized.
        flow: the stages, and the size of their outputs.
        activations: bytes of one block's outputs for all samples.
    """
    layers = {name: layer.shape[0] * layer.shape[1] for name, layer in plan.quantized.items()}
    sizes = [sum(layers.get(name, 0) for name in stage.linears) for stage in flow.stages]
    # A block in float32, moved weights, offsets, rounded weights, their gradients, and what a step makes on the way;
    # inputs and float32 targets of all samples; of one sample, all that the backward pass needs
    return _COPIES * 4 * max(sizes) + 3 * activations + _TAPE * flow.bytes_per_sample


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """One sample at a block.

    Attributes:
        call: what the block is called with, in the quantized model.
        target: what it returns in the float model, the tokens that count: float32 [rows, width].
        mask: of the tokens that count; None for all.
        weight: what each of them counts for, [rows, 1]; None if all count the same.
    """

    call: Call
    target: Tensor
    mask: Tensor | None
    weight: Tensor | None

    def square(self, values: Tensor) -> Tensor:
        """Σ w·v² of values [rows, width]."""
        squares = values.square()
        return (squares if self.weight is None else squares * self.weight).sum()


class BlockFunction:
    """A block in float32, as a function of the weights of some of its layers.

    Args:
        unit: name of the block.
        module: the block.
        works: of the layers whose weights are given at each call: their float weights, and how their inputs are
            rounded.
    """

    def __init__(self, unit: str, module: nn.Module, works: Mapping[str, Work]) -> None:
        self._unit = unit
        self._module = module
        self._works = works
        self._floats = {
            name: tensor.detach().to(torch.float32) if tensor.is_floating_point() else tensor
            for name, tensor in [*module.named_parameters(), *module.named_buffers()]
        }
        for name, work in works.items():
            self._floats |= {self._leaf(name, "weight"): work.weight.to(torch.float32)}
            if work.bias is not None:
                self._floats |= {self._leaf(name, "bias"): work.bias.to(torch.float32)}

    def _leaf(self, layer: str, leaf: str) -> str:
        return f"{layer}.{leaf}".removeprefix(f"{self._unit}.")

    def __call__(self, call: Call, weights: Mapping[str, Tensor]) -> Tensor:
        """The first float tensor that the block returns, [..., width]; layers without one of ``weights`` are float."""
        args, kwargs = with_tensors(call, _private)
        tensors = self._floats | {self._leaf(name, "weight"): weight for name, weight in weights.items()}
        returned = functional_call(self._module, tensors, args, kwargs)
        floats = [tensor for tensor in tensors_in(returned) if tensor.is_floating_point()]
        if not floats:
            raise CalibrationError(f"{self._unit} returns no floating-point tensor, so there is nothing to reproduce")
        return floats[0]

    @contextmanager
    def rounded_inputs(self) -> Iterator[None]:
        """Inside, layers of schemes with rounded activations round them."""
        with ExitStack() as hooks:
            for name, work in self._works.items():
                hook = _input_rounder(work)
                if hook is not None:
                    layer = self._module.get_submodule(name.removeprefix(self._unit).removeprefix("."))
                    hooks.callback(layer.register_forward_pre_hook(hook).remove)
            yield


def _private(tensor: Tensor) -> Tensor:
    """A copy that the block may change, floats in float32."""
    wanted = torch.float32 if tensor.is_floating_point() else tensor.dtype
    return tensor.detach().to(wanted, copy=True)


def _input_rounder(work: Work) -> Callable[[nn.Module, Any], Any] | None:
    spec = work.scheme.activation
    if spec is None:
        return None
    static = None
    if not spec.dynamic:
        assert work.stats is not None
        scale, zero = static_input(work.stats, spec, work.scale_dtype)
        static = (scale, torch.zeros_like(scale) if zero is None else zero)
    return lambda _module, args: (round_input(args[0], spec, static), *args[1:])


class BlockLoss:
    """How far a block with rounded weights is from the float one: see :class:`vlaquant.passes.autoround.Block`.

    Several processes each take some of the samples. Gradients are then summed up in another order than by a single
    process, so that results are equal only for equal numbers of processes.

    Args:
        unit: name of the block.
        function: the block.
        examples: index among all samples -> the sample, for those of this process.
        samples: how many all processes have.
        processes: that do the same.
        dtype: of the products in gradients.
    """

    def __init__(
        self,
        unit: str,
        function: BlockFunction,
        examples: Mapping[int, Example],
        samples: int,
        processes: Processes,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._unit = unit
        self._function = function
        self._examples = examples
        self._processes = processes
        self._dtype = dtype
        self.samples = samples
        sums = processes.gather(float(sum(one.square(one.target).to(torch.float64) for one in examples.values())))
        self._power = max(sum(sums), torch.finfo(torch.float32).tiny)

    def loss(self, weights: Mapping[str, Tensor]) -> float:
        """Squared error over all samples, as a share of the square of what the float block returns."""
        with torch.no_grad():
            errors = float(sum(self._error(one, weights).to(torch.float64) for one in self._examples.values()))
        loss: float = sum(self._processes.gather(errors)) / self._power
        if not loss < torch.inf:
            raise CalibrationError("the output of a block with rounded weights is not finite in float32")
        return loss

    def gradients(self, weights: Mapping[str, Tensor], batch: Sequence[int]) -> dict[str, Tensor]:
        """Of the squared error over some samples, sample by sample to need little memory."""
        leaves = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
        device = next(iter(weights.values())).device.type
        with torch.enable_grad(), torch.autocast(device, self._dtype, enabled=self._dtype is not torch.float32):
            for position in batch:
                if position in self._examples:
                    (self._error(self._examples[position], leaves) / self._power).backward()
        gradients = {name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in leaves.items()}
        self._processes.sum_(gradients.values())
        return gradients

    def _error(self, example: Example, weights: Mapping[str, Tensor]) -> Tensor:
        with self._function.rounded_inputs():
            output = counted_rows(self._unit, self._function(example.call, weights), example.mask)
        return example.square(output - example.target)


class BlockTuner:
    """Lets AutoRound go on from the codes that the layers of a stage got one by one.

    Args:
        model: holds the stage as it was, with its transforms.
        family: for its masks.
        recipe: its quantizer is autoround.
        runner: runs samples through earlier stages as they are quantized.
        floats: runs them through earlier stages as they were.
        samples: all of them.
        masks: of those that this process takes.
        weights: likewise; those of a stage's last layer are taken for what the stage returns.
        processes: that do the same.
        log: is told the loss of each block.
    """

    def __init__(
        self,
        model: nn.Module,
        family: Family,
        recipe: Recipe,
        *,
        runner: StageRunner,
        floats: StageRunner,
        samples: Sequence[Any],
        masks: Masks,
        weights: Weights,
        processes: Processes,
        log: RunLog,
    ) -> None:
        assert isinstance(recipe.quantizer, AutoRound)
        self._model = model
        self._family = family
        self._quantizer = recipe.quantizer
        self._seed = recipe.seed
        self._runner = runner
        self._floats = floats
        self._samples = samples
        self._masks = masks
        self._weights = weights
        self._processes = processes
        self._log = log

    def tune_(
        self,
        index: int,
        unit: str,
        works: Mapping[str, Work],
        packed: dict[str, QuantLinear],
        records: dict[str, LayerRecord],
    ) -> None:
        """Exchange the packed layers of a stage, and their records, for tuned ones."""
        started = time.perf_counter()
        self._log.doing(f"{unit}: autoround")
        function = BlockFunction(unit, self._model.get_submodule(unit), works)
        examples = {
            position: self._example(index, unit, position, function, [*works][-1])
            for position in self._processes.positions(len(self._samples))
        }
        dtype = getattr(torch, self._quantizer.dtype)
        loss = BlockLoss(unit, function, examples, len(self._samples), self._processes, dtype)
        starts = {name: unpack(packed[name].stored(), packed[name].query()) for name in works}
        result = autoround(
            {name: start_from(works[name].weight, start) for name, start in starts.items()},
            loss,
            iterations=self._quantizer.iterations,
            rate=self._quantizer.learning_rate,
            batch=self._quantizer.batch,
            ranges=self._quantizer.ranges,
            seed=self._seed,
        )
        packed |= pack(works, result.weights)
        records |= {name: _tuned(records[name], works[name], result.weights[name]) for name in works}
        losses = {"loss": result.loss, "loss_start": result.loss_start, "iteration": result.iteration}
        self._log.write("autoround", unit=unit, seconds=round(time.perf_counter() - started, 3), **losses)

    def _example(self, index: int, unit: str, position: int, function: BlockFunction, last: str) -> Example:
        mask = layer_masks(self._family, self._masks.get(position, {}), [unit]).get(unit)
        sample, weight = self._samples[position], None
        with torch.no_grad():
            target = function(self._floats.call(index, position, sample), {})
            weights = self._weights.get(position, {}).get(last)
            if weights is not None:
                weight = counted_weights(unit, target, mask, weights[0])
            call = self._runner.call(index, position, sample)
        weight = None if weight is None else weight.unsqueeze(-1)
        return Example(call, counted_rows(unit, target, mask), mask, weight)


def _tuned(record: LayerRecord, work: Work, weight: QuantizedWeight) -> LayerRecord:
    """The record of a layer after its block was tuned; its own loss may have grown where that of the block fell."""
    assert work.stats is not None
    assert work.stats.hessian is not None
    wide = work.weight.to(torch.float32)
    power = max(weight_loss(wide, work.stats.hessian), torch.finfo(torch.float32).tiny)
    loss = weight_loss(weight.dequantize().sub_(wide), work.stats.hessian) / power
    return replace(record, quantizer=f"autoround from {record.quantizer}", loss=loss)
