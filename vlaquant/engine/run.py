"""One run from open files to finished stages: what ``pipeline.quantize`` tells the story of."""

import sys
import time
import uuid
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import torch
from torch import nn

from vlaquant.calibrate.cache import ActivationCache
from vlaquant.calibrate.flow import Flow
from vlaquant.calibrate.probing import probe
from vlaquant.calibrate.running import StageRunner, blamed_on
from vlaquant.calibrate.units import find_units
from vlaquant.checkpoint import TensorFiles, source_identity
from vlaquant.engine.block import require_blocks, tuning_memory
from vlaquant.engine.chains import FLOAT_CHAIN, require_float_chain
from vlaquant.engine.fingerprint import fingerprint, first_difference, package_versions
from vlaquant.engine.log import RunLog
from vlaquant.engine.loop import Data, StageLoop
from vlaquant.engine.masking import Masks, sample_masks
from vlaquant.engine.memory import return_free_memory
from vlaquant.engine.opening import Run, bring_weights, open_model, recipe_samples
from vlaquant.engine.prediction import Prediction, available_memory, predict, require_room, resident_memory
from vlaquant.engine.processes import ALONE, Processes
from vlaquant.engine.rotating import plan_for, rotate_
from vlaquant.engine.stage import put_tensor_
from vlaquant.engine.tables import pack_tables_
from vlaquant.engine.weighing import Weights, token_weights
from vlaquant.engine.work import LOG, Finished, WorkDirectory, write_finished
from vlaquant.errors import CalibrationError, ExportError
from vlaquant.families import Inputs
from vlaquant.linear import Table, replace_module_
from vlaquant.plan import Plan, with_dead, without
from vlaquant.recipe import AutoRound, Recipe, needs_calibration, needs_float_chain, pairs_inputs

_MIN_TOKENS = 32
#: Memory for the weights of units that run again and again, if there is so much to spare.
_KEPT_WEIGHTS = 10**9


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How a run uses the machine. Nothing here changes its result.

    Attributes:
        max_memory: bytes that each process may hold. Activations beyond it are put on the disk; a run that needs more
            all the same is refused. None: what the machine has.
        mode: ``replay`` lets finished units answer from stored outputs where a probe run proves that they may;
            ``rerun`` runs every sample from the start in every stage.
        device: where the model runs; of several processes with ``cuda`` each takes a GPU of its own.
        log: file for the run's log, JSON lines; None puts it beside the output if weights are read on demand, and
            writes none for a model in memory.
    """

    max_memory: int | None = None
    mode: Literal["replay", "rerun"] = "replay"
    device: str = "cpu"
    log: Path | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Probed:
    """Calibration data that went through the model once.

    Attributes:
        run: takes a sample through the model.
        samples: all of them.
        masks: of those that this process takes.
        weights: likewise.
        flow: what the probe run found about units.
        once: layers that run exactly once a sample, in order.
        shared: sets of layers that read the very same tensors.
        min_tokens: it is an error if a layer sees fewer.
        seconds: that one sample took, without being watched.
    """

    run: Run
    samples: Sequence[Any]
    masks: Masks
    weights: Weights
    flow: Flow
    once: tuple[str, ...]
    shared: tuple[tuple[str, ...], ...]
    min_tokens: int
    seconds: float


class QuantizationRun:
    """The open model, log and work directory of one run; a context manager that closes them.

    Of several processes each has one, and all call the same methods. Only the main one shows, logs and tidies up.

    Attributes:
        opened: the model, its family and where it came from.
        identity: what the run depends on; known once its stages begin.
        inputs: of the first sample, if vlaquant runs the samples itself.
    """

    def __init__(
        self,
        model_or_path: nn.Module | str | Path,
        recipe: Recipe,
        output: Path | None,
        options: RunOptions,
        *,
        show: bool,
        processes: Processes = ALONE,
    ) -> None:
        self._processes = processes
        self._device = processes.device(options.device)
        self.opened = open_model(model_or_path, recipe, stream=output is not None)
        self.identity: dict[str, Any] = {}
        self.inputs: Inputs | None = None
        self._recipe = recipe
        self._output = output
        self._options = options
        self._show = show and processes.main
        self._units = find_units(self.opened.model)
        self.opened = rotate_(self.opened, recipe, self._units, self._device)
        keep = recipe.calibration is not None or bool(needs_calibration(recipe))
        self._weights = bring_weights(self.opened, self._units, self._device, keep=keep)
        self._tables: dict[str, Table] = {}
        self._work: WorkDirectory | None = None
        self._log: RunLog | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        if self._weights is not None:
            self._stack.callback(self._weights.close)
        if self.opened.files is not None:
            self._stack.callback(self.opened.files.close)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._log is not None:
            self._log.__exit__(kind, error, trace)
        self._stack.close()
        if self._work is None:
            return
        if error is None or not self._work.records:
            if not self._processes.main:
                return
            if error is None and self._options.log is None and self._output is not None:
                self._work.save_log(log_path(self._output))
            self._work.remove()
        else:
            error.add_note(
                f"{len(self._work.records)} finished stages are kept in {self._work.path}; go on with --resume"
            )

    def plan(self) -> Plan:
        """What the recipe will do to every weight.

        Raises:
            PlanError: a rule that decides nothing, a group size that does not divide.
        """
        return plan_for(self.opened.model, self.opened.family, self._recipe, untied=self.opened.untied)

    def observe(self, plan: Plan, samples: Sequence[Any] | None, run: Run | None) -> tuple[Probed | None, Plan]:
        """Take the first sample through the model, to learn how data flows through it.

        Returns:
            What was learnt, None without samples; and the plan with layers that never ran, or whose weight is used
            elsewhere, taken out.

        Raises:
            CalibrationError: no samples, or a model that must not be calibrated.
        """
        model, family = self.opened.model, self.opened.family
        if samples is None and self._recipe.calibration is not None:
            samples = recipe_samples(self._recipe, self.opened)
        if samples is None:
            return None, plan
        if not samples:
            raise CalibrationError("the calibration data is empty; give at least one sample")
        if len(samples) < self._processes.size:
            raise CalibrationError(
                f"{len(samples)} samples for {self._processes.size} processes; give each at least one, or start fewer"
            )
        masks: Masks = {}
        if run is None:
            masks = sample_masks(model, family, samples, self._processes)
            with blamed_on(0):
                self.inputs = family.inputs(model, samples[0])
                family.check(model, self.inputs)
        run_sample = run or (lambda model, sample: family.run(model, family.inputs(model, sample)))
        with torch.inference_mode(), blamed_on(0):
            found = probe(model, lambda: run_sample(model, samples[0]), self._units)
            started = time.perf_counter()
            run_sample(model, samples[0])
        seconds = time.perf_counter() - started
        return_free_memory()
        reason = "its weight is also used outside of the layer, which a packed layer does not allow"
        plan = without(with_dead(plan, found.never_ran), dict.fromkeys(found.functional, reason))
        section = self._recipe.calibration
        tokens = _MIN_TOKENS if section is None else section.min_tokens
        once = tuple(name for name in found.order if found.calls[name] == 1)
        limits: dict[str, Any] = {"limit": self._limit(), "device": self._device, "processes": self._processes}
        weights = token_weights(self.opened, self._recipe, plan, samples, run, found.shared, **limits)
        return Probed(run_sample, samples, masks, weights, found.flow, once, found.shared, tokens, seconds), plan

    def _predict(self, plan: Plan, data: Probed | None) -> Prediction:
        """What the stages will need; refuses what cannot fit. Activations beyond the memory go to the disk."""
        limit = self._limit()
        activations = 0 if data is None else data.flow.bytes_per_sample * len(data.samples)
        tuning = 0
        if data is not None and isinstance(self._recipe.quantizer, AutoRound):
            tuning = tuning_memory(plan, data.flow, activations)
        prediction = predict(
            self.opened.model,
            plan,
            self._units,
            with_data=data is not None,
            keep_all=bool(self._recipe.scalings),
            streamed=self.opened.files is not None,
            activations=(2 if self._two_chains else 1) * activations,
            tuning=tuning,
            paired=data.flow.bytes_per_sample if data is not None and pairs_inputs(self._recipe) else None,
            seconds=None if data is None else self._seconds(data),
            limit=limit,
        )
        require_room(prediction, self._output, limit)
        return prediction

    @property
    def _two_chains(self) -> bool:
        return needs_float_chain(self._recipe)

    def _limit(self) -> int:
        """Bytes that this process may hold."""
        if self._options.max_memory is not None:
            return self._options.max_memory
        return resident_memory() + (available_memory() or sys.maxsize) // self._processes.size

    def _seconds(self, data: Probed) -> float:
        passes = 1 + (self._recipe.propagate == "quantized") + self._two_chains
        share = 1.0 if self._options.mode == "replay" and data.flow.replayable else len(data.flow.stages) / 2
        return data.seconds * len(self._processes.positions(len(data.samples))) * passes * share

    def stages(self, plan: Plan, data: Probed | None, *, overwrite: bool, resume: bool) -> StageLoop:
        """The loop over all stages, ready to begin or to go on.

        Raises:
            PlanError: too little memory, or a model that the recipe's quantizer cannot see in float.
            ExportError: too little disk; an unfinished run is in the way, or was another one.
        """
        if data is not None and isinstance(self._recipe.quantizer, AutoRound):
            require_blocks(plan, data.flow, self._options.mode)
        elif data is not None and self._two_chains:
            require_float_chain(data.flow, plan, self._options.mode)
        prediction = self._predict(plan, data)
        if self.opened.files is not None:
            self.identity = self._identify(plan, data)
            assert self._output is not None
            self._work = WorkDirectory.open(
                self._output, self.identity, resume=resume, overwrite=overwrite, processes=self._processes
            )
        elif resume:
            raise ExportError(f"only a run that reads its weights on demand can go on, and here {self.opened.note}")
        log = self._options.log or (None if self._work is None else self._work.path / LOG)
        self._log = RunLog(log if self._processes.main else None, show=self._show)
        self._log.say(self.opened.note)
        several = f"each of {self._processes.size} processes " if self._processes.size > 1 else ""
        self._log.say(f"{several}{prediction}")
        self._tables = pack_tables_(self.opened.model, plan, weights=self._weights, device=self._device)
        stages = self._units if data is None else data.flow.stages
        if data is None:
            stages = tuple(stage for stage in stages if any(name in plan.quantized for name in stage.linears))
        return StageLoop(
            self.opened.model,
            self.opened.family,
            plan,
            self._recipe,
            stages,
            data=None if data is None else self._data(data, prediction),
            weights=self._weights,
            work=self._work,
            log=self._log,
            processes=self._processes,
        )

    def _data(self, data: Probed, prediction: Prediction) -> Data:
        assert self._log is not None
        spill = None if self._work is None else self._work.spill
        cache = ActivationCache(limit_bytes=prediction.room, spill_directory=spill)
        runner, floats = (
            StageRunner(self.opened.model, data.flow, data.run, mode=self._options.mode, cache=cache, chain=chain)
            for chain in ("", FLOAT_CHAIN)
        )
        self._log.say(runner.summary())
        if self._weights is not None:
            self._weights.dormant = lambda unit: runner.answers(unit) or floats.answers(unit)
            if self._options.mode == "rerun" or len(data.flow.replayable) < len(data.flow.stages):
                # Units run again for every sample of every stage
                self._weights.budget = max(self._weights.budget, min(_KEPT_WEIGHTS, self._limit() - prediction.memory))
        stored = data.flow.replayable if self._options.mode == "replay" else frozenset()
        return Data(
            runner,
            data.samples,
            data.masks,
            data.weights,
            stored,
            data.once,
            data.shared,
            data.min_tokens,
            floats if self._two_chains else None,
        )

    def _identify(self, plan: Plan, data: Probed | None) -> dict[str, Any]:
        assert self.opened.directory is not None
        samples: dict[str, Any] | None = None
        if data is not None:
            # Samples that cannot be compared are never the same
            never = self._processes.from_main(f"unknown {uuid.uuid4().hex}")
            content = fingerprint(data.samples) or never
            samples = {"count": len(data.samples), "sha256": content}
        recipe = {key: value for key, value in self._recipe.resolved().items() if key not in {"model", "output"}}
        source = None
        if self._processes.main:
            converted = self.opened.family.converted(self.opened.directory).files
            source = source_identity(self.opened.directory, also=[file.name for file in converted])
        identity = {
            "source_sha256": self._processes.from_main(source),
            "recipe": recipe,
            "plan": plan.to_dict(),
            "samples": samples,
            "processes": self._processes.size,
            "versions": package_versions(),
        }
        self._require_same(identity)
        return identity

    def _require_same(self, identity: dict[str, Any]) -> None:
        """Processes with different samples would make something that no recipe describes."""
        everyone = self._processes.gather(identity)
        for rank, other in enumerate(everyone):
            difference = first_difference(other, everyone[0])
            if difference is not None:
                raise CalibrationError(
                    f"processes 0 and {rank} were not given the same: they differ in {difference.partition(':')[0]}; "
                    "give all of them the same model, recipe and samples"
                )

    @property
    def source_sha256(self) -> dict[str, str]:
        """Sums of the source's weight files."""
        sums = self.identity["source_sha256"]
        return {name: value for name, value in sums.items() if not name.endswith(".json")}

    def finished(self) -> list[Finished]:
        """The quantized units that lie in the work directory, and the embeddings and banks."""
        assert self._work is not None
        found = []
        if self._tables:
            tensors = {f"{n}.{leaf}": t for n, table in self._tables.items() for leaf, t in table.state_dict().items()}
            found.append(write_finished(self._work.path / "tables.safetensors", tensors))
            self._stack.callback(found[0].files.close)
        for index, record in enumerate(self._work.records):
            if record["packed"]:
                files = self._stack.enter_context(TensorFiles.open([self._work.stage_file(index)]))
                found.append(Finished(files, record["sha256"]))
        return found

    def fits(self, packed_bytes: int) -> bool:
        """Whether two processes may hold the packed model at once, beside each other."""
        limit = self._options.max_memory
        if limit is None:
            available = available_memory()
            return available is None or 3 * packed_bytes < available
        return resident_memory() + 2 * packed_bytes < limit

    def held(self, loop: StageLoop) -> nn.Module | None:
        """The quantized model, if it is in memory."""
        if self.opened.files is not None:
            return None
        for name, tensor in loop.changed.items():
            put_tensor_(self.opened.model, name, tensor)
        for name, layer in loop.packed.items():
            if self.opened.model.get_submodule(name) is not layer:
                replace_module_(self.opened.model, name, layer)
        return self.opened.model


def log_path(output: Path) -> Path:
    """Where the log of an output lies: beside it."""
    return output.parent / f"{output.name}.log.jsonl"
