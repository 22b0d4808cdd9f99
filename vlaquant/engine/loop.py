"""The loop over stages: observe → transform → quantize → stand in → hand on. The order of work is written here."""

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlaquant.calibrate import ActStats, observe
from vlaquant.calibrate.running import StageRunner
from vlaquant.calibrate.statistics import final_stats
from vlaquant.calibrate.units import Stage
from vlaquant.checkpoint import TensorFiles
from vlaquant.engine.block import BlockTuner
from vlaquant.engine.fingerprint import digest
from vlaquant.engine.log import RunLog
from vlaquant.engine.masking import Masks, layer_masks
from vlaquant.engine.memory import return_free_memory
from vlaquant.engine.processes import ALONE, Processes
from vlaquant.engine.stage import (
    StageResult,
    eligible_folds,
    float_tensors,
    pack,
    put_tensor_,
    stand_in_,
    transform_stage_,
    unit_tensors,
    working_copies,
)
from vlaquant.engine.weighing import Weights
from vlaquant.engine.weights import WeightsOnDemand
from vlaquant.engine.work import WorkDirectory
from vlaquant.errors import VlaquantError
from vlaquant.families import Family, find_folds, refused_folds
from vlaquant.linear import QuantLinear, empty_linear
from vlaquant.passes.layer import LayerRecord, Work, quantize_layers, solve_groups
from vlaquant.passes.transform import TransformRecord
from vlaquant.plan import LayerPlan, Plan
from vlaquant.recipe import AutoRound, Recipe, pairs_inputs


@dataclass(frozen=True, slots=True, eq=False)
class Data:
    """Calibration data, and how it goes through the model.

    Attributes:
        runner: runs one sample up to a stage.
        samples: all of them, the same in every process.
        masks: of those that this process takes.
        weights: likewise.
        stored: units that answer from stored outputs once they are finished.
        once: layers that run exactly once a sample, in order.
        shared: sets of layers that read the very same tensors.
        min_tokens: it is an error if a layer sees fewer.
        float_runner: runs one sample in the float chain, with outputs of its own in the same cache; None without one.
    """

    runner: StageRunner
    samples: Sequence[Any]
    masks: Masks
    weights: Weights
    stored: frozenset[str]
    once: tuple[str, ...]
    shared: tuple[tuple[str, ...], ...]
    min_tokens: int
    float_runner: StageRunner | None = None

    @property
    def chains(self) -> list[StageRunner]:
        """The runners of all chains."""
        return [self.runner] if self.float_runner is None else [self.runner, self.float_runner]


class StageLoop:
    """Quantizes a model stage by stage.

    Args:
        model: in memory, or empty with its weights on demand. It is changed.
        family: for its table of folds.
        plan: as it can be carried out.
        recipe: what to do.
        stages: in the order of work.
        data: None for recipes that need none.
        weights: where a model without weights gets them; None if it holds them.
        work: where finished stages go; None keeps them in memory.
        log: told about everything.
        processes: that do this together; each holds all packed layers and all records in the end.
    """

    def __init__(
        self,
        model: nn.Module,
        family: Family,
        plan: Plan,
        recipe: Recipe,
        stages: Sequence[Stage],
        *,
        data: Data | None,
        weights: WeightsOnDemand | None,
        work: WorkDirectory | None,
        log: RunLog,
        processes: Processes = ALONE,
    ) -> None:
        self._model = model
        self._family = family
        self._recipe = recipe
        self._stages = stages
        self._data = data
        self._weights = weights
        self._work = work
        self._log = log
        self._processes = processes
        self._positions = processes.positions(len(data.samples) if data is not None else 0)
        self._plan = plan.quantized
        self._tuner: BlockTuner | None = None
        if data is not None and data.float_runner is not None and isinstance(recipe.quantizer, AutoRound):
            self._tuner = BlockTuner(
                model,
                family,
                recipe,
                runner=data.runner,
                floats=data.float_runner,
                samples=data.samples,
                masks=data.masks,
                weights=data.weights,
                processes=processes,
                log=log,
            )
        self._folds = find_folds(model, family.folds)
        self._quantized = recipe.propagate == "quantized"
        self.packed: dict[str, QuantLinear] = {}
        self.changed: dict[str, Tensor] = {}
        self.layers: list[LayerRecord] = []
        self.transforms: list[TransformRecord] = []

    def run(self) -> None:
        """Go through all stages.

        ``layers`` and ``transforms`` hold the records. If nothing is written, ``packed`` and ``changed`` hold the
        layers and whatever else the model will have to take.
        """
        begin = self._resume()
        self._log.begin(len(self._stages), done=begin)
        if self._recipe.scalings:
            for source, reason in refused_folds(self._model, self._family.folds).items():
                self._log.say(f"{source}: no scale can be folded: {reason}")
        for index in range(begin, len(self._stages)):
            stage = self._stages[index]
            started = time.perf_counter()
            needed = self._data is not None or any(name in self._plan for name in stage.linears)
            with self._weights.hold(stage.unit) if self._weights and needed else nullcontext():
                # Later stages see this one as it was, if that is wanted, and not as transforms left it
                floats = float_tensors(self._model, stage) if self._data and not self._quantized else {}
                result = self._quantize(index, stage)
                self._hand_on(index, stage, result)
                self._put_back_(stage, result, floats)
            packed = len(result.packed)
            del floats, result
            return_free_memory()
            seconds = round(time.perf_counter() - started, 3)
            self._log.stage(stage.unit, index=index, layers=packed, seconds=seconds)

    def _quantize(self, index: int, stage: Stage) -> StageResult:
        layers = {name: self._plan[name] for name in stage.linears if name in self._plan}
        stats = self._observe(index, stage, layers)
        if not layers:
            return StageResult({}, (), ())
        works = working_copies(self._model, layers, stats, wide=bool(self._recipe.scalings))
        del stats
        transforms: tuple[TransformRecord, ...] = ()
        if self._data is not None and self._recipe.scalings:
            folds = eligible_folds(self._model, self._folds, works, self._data.shared, stage.unit)
            transforms = transform_stage_(
                self._model,
                folds,
                works,
                self._recipe,
                part_of=self._family.part_of,
                unit=stage.unit,
                look=lambda: self._look(index),
                processes=self._processes,
            )
            self._require_agreement(stage, transforms)
            for record in transforms:
                if record.reverted is not None:
                    self._log.say(f"{record.source}: the {record.kind} scale is taken back: it {record.reverted}")
        live = {name: work for name, work in works.items() if work.stats is not None}
        packed, records = self._solve(works)
        if self._tuner is not None and live:
            self._tuner.tune_(index, stage.unit, live, packed, records)
        return StageResult(packed, tuple(records[name] for name in layers), transforms)

    def _require_agreement(self, stage: Stage, transforms: Sequence[TransformRecord]) -> None:
        """All processes try the transforms on the same numbers; should they ever choose differently, nothing fits."""
        chosen = [[record.source, record.kept, record.strength] for record in transforms]
        if any(others != chosen for others in self._processes.gather(chosen)):
            raise VlaquantError(
                f"{stage.unit}: the processes chose different scales from the same statistics; use processes and "
                "GPUs that compute alike, or a single process"
            )

    def _solve(self, works: dict[str, Work]) -> tuple[dict[str, QuantLinear], dict[str, LayerRecord]]:
        """Codes and records of all layers: each process solves some groups of them, and gets the others."""
        groups = solve_groups(works)
        owners = self._processes.share([_cost(works, names) for names in groups])
        packed: dict[str, QuantLinear] = {}
        solved: dict[str, Any] = {}
        for names, owner in zip(groups, owners, strict=True):
            group = {name: works.pop(name) for name in names}
            if owner == self._processes.rank:
                self._log.doing(names[0])
                codes, records = self._solve_group(group)
                packed |= codes
                solved |= records
            else:
                packed |= {name: _empty(work) for name, work in group.items()}
        for names, owner in zip(groups, owners, strict=True):
            for name in names:
                self._processes.broadcast_(packed[name].state_dict().values(), owner)
        for rank, others in enumerate(self._processes.gather(solved)):
            if rank != self._processes.rank:
                self._log_layers(others)
                solved |= others
        return packed, {name: LayerRecord.from_dict(solved[name]["record"]) for name in packed}

    def _solve_group(self, group: dict[str, Work]) -> tuple[dict[str, QuantLinear], dict[str, Any]]:
        """Packed layers, and of each of them the record as plain values and the time that all took together."""
        started = time.perf_counter()
        for work in group.values():
            work.weight = work.weight.to(torch.float32)
        solved = quantize_layers(group, self._recipe.layer_quantizer)
        packed = pack(group, {name: codes for name, (codes, _) in solved.items()})
        seconds = round(time.perf_counter() - started, 4)
        done = {name: {"record": record.to_dict(), "seconds": seconds} for name, (_, record) in solved.items()}
        self._log_layers(done)
        return packed, done

    def _observe(self, index: int, stage: Stage, layers: dict[str, LayerPlan]) -> dict[str, ActStats]:
        """Run all samples through the float stage, in each chain: statistics of its live layers."""
        live = [name for name, layer in layers.items() if not layer.dead]
        if self._data is None or not live:
            return {}
        keep = not self._quantized
        # Nobody asks what the last layer computes
        in_order = [name for name in self._data.once if name in live]
        last = in_order[-1] if len(in_order) == len(live) and not keep else None
        floats, later = self._data.float_runner, index + 1 < self._last_observed()
        paired = pairs_inputs(self._recipe)
        if floats is not None and not paired and later:
            for position in self._positions:
                self._run(index, position, floats, store=True)
        with observe(self._model, live, hessian_for=live, seed=self._recipe.seed, paired=paired) as observation:
            for position in self._positions:
                masks = layer_masks(self._family, self._data.masks.get(position, {}), live)
                observation.begin_sample(masks, weights=self._data.weights.get(position), index=position)
                if floats is not None and paired:
                    with observation.float_chain():
                        self._run(index, position, floats, store=later, before=None if later else last)
                output = self._run(index, position, store=keep, before=last)
                self._log.doing(f"{stage.unit}: observing", self._tokens(output))
        device = self._model.get_parameter(f"{live[0]}.weight").device
        seen = self._processes.merge(live, observation.running(), device)
        observation.check(self._data.min_tokens, seen=seen)
        return final_stats(seen)

    def _hand_on(self, index: int, stage: Stage, result: StageResult) -> None:
        """Let later stages see this one, quantized or as it was, and put it where it survives."""
        if self._data is not None and self._quantized:
            stand_in_(self._model, result.packed)
        observed = any(not self._plan[name].dead for name in result.packed)
        if self._data is not None and index + 1 < self._last_observed():
            for runner in self._data.chains:
                # A chain that goes on with the float stage left its outputs when the stage was observed
                stored = observed and not (self._quantized and runner is self._data.runner)
                if stage.unit in self._data.stored and not stored:
                    for position in self._positions:
                        output = self._run(index, position, runner, store=True)
                        self._log.doing(f"{stage.unit}: handing on", self._tokens(output))
                runner.finished(index)
        self.layers += result.layers
        self.transforms += result.transforms
        if self._work is None:
            self.packed |= result.packed
            return
        self._commit(index, stage, result)

    def _last_observed(self) -> int:
        """One after the index of the last stage that needs data."""
        needs = [
            index
            for index, stage in enumerate(self._stages)
            if any(name in self._plan and not self._plan[name].dead for name in stage.linears)
        ]
        return needs[-1] + 1 if needs else 0

    def _run(
        self,
        index: int,
        position: int,
        runner: StageRunner | None = None,
        *,
        store: bool,
        before: str | None = None,
    ) -> Tensor | None:
        """One sample up to a stage, in the chain that is calibrated unless another runner is given."""
        assert self._data is not None
        runner = runner or self._data.runner
        with torch.inference_mode():
            output = runner.run(index, position, self._data.samples[position], store=store, before=before)
        return output if isinstance(output, Tensor) else None

    def _look(self, index: int) -> dict[str, Tensor]:
        """What a stage computes for the first sample."""
        assert self._data is not None
        with torch.inference_mode():
            return self._data.runner.outputs(index, self._positions[0], self._data.samples[self._positions[0]])

    def _commit(self, index: int, stage: Stage, result: StageResult) -> None:
        assert self._work is not None
        assert self._weights is not None
        # A unit that stays float is copied from the source at the end
        tensors = unit_tensors(self._model, stage.unit, result.packed) if result.packed else {}
        schemes = {name: layer.scheme for name, layer in result.packed.items()}
        if self._data is not None:
            self._data.runner.cache.save(self._work.new_chain())
        self._work.commit(
            tensors,
            {
                "unit": stage.unit,
                "packed": list(schemes),
                "sha256": {name: digest(tensor) for name, tensor in tensors.items()} if self._processes.main else {},
                "layers": [record.to_dict() for record in result.layers],
                "transforms": [record.to_dict() for record in result.transforms],
            },
        )
        if schemes and self._quantized:
            self._weights.finish_(stage.unit, TensorFiles.open([self._work.stage_file(index)]), schemes)

    def _put_back_(self, stage: Stage, result: StageResult, floats: Mapping[str, Tensor]) -> None:
        """Undo what a stage did to the model; ``changed`` keeps what belongs to its result."""
        if floats and self._work is None:
            after = self._model.get_submodule(stage.unit).state_dict(prefix=f"{stage.unit}.", keep_vars=True)
            self.changed |= {n: tensor for n, tensor in after.items() if n.rpartition(".")[0] not in result.packed}
        for name, tensor in floats.items():
            put_tensor_(self._model, name, tensor)

    def _resume(self) -> int:
        """Take over what an earlier run finished; returns the first stage that is left."""
        if self._work is None or not self._work.records:
            return 0
        assert self._weights is not None
        for index, record in enumerate(self._work.records):
            self.layers += [LayerRecord.from_dict(layer) for layer in record["layers"]]
            self.transforms += [TransformRecord.from_dict(each) for each in record["transforms"]]
            schemes = {name: scheme for name in record["packed"] if (scheme := self._plan[name].scheme) is not None}
            if schemes and self._quantized:
                self._weights.finish_(record["unit"], TensorFiles.open([self._work.stage_file(index)]), schemes)
        if self._data is not None and self._work.chain is not None:
            self._data.runner.cache.restore_(self._work.chain)
        self._log.say(f"{len(self._work.records)} of {len(self._stages)} stages were finished before")
        return len(self._work.records)

    def _log_layers(self, done: dict[str, Any]) -> None:
        for layer in done.values():
            self._log.write("layer", **layer["record"], seconds=layer["seconds"])

    def _tokens(self, output: Tensor | None) -> int:
        """How many went through all processes, if each has as many as this one."""
        return 0 if output is None or output.ndim < 2 else output.shape[:-1].numel() * self._processes.size


def _cost(works: Mapping[str, Work], names: Sequence[str]) -> float:
    """Of solving a group, on a scale of its own."""
    return float(sum(works[name].weight.shape[0] * works[name].weight.shape[1] ** 2 for name in names))


def _empty(work: Work) -> QuantLinear:
    """The layer that another process makes of it, with values to come."""
    n, k = work.weight.shape
    with work.weight.device:
        return empty_linear(k, n, work.scheme, bias=work.bias is not None, dtype=work.scale_dtype)
