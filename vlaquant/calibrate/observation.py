"""Collecting :class:`ActStats` with hooks, while the caller runs the model."""

import difflib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vlaquant.calibrate.masks import counted_rows, counted_weights, takes_turns
from vlaquant.calibrate.pairing import Pairs
from vlaquant.calibrate.statistics import ActStats, RunningStats, final_stats, no_stats, row_keys
from vlaquant.errors import CalibrationError

#: Calls of fewer rows are counted together, though never over the end of a sample: counting costs k² even for one row.
_WORTH_COUNTING = 256


class _Rows(NamedTuple):
    """Tokens [t, k] that one call read, and what each weighs, [t]; None: 1."""

    values: Tensor
    weights: Tensor | None

    def equal(self, other: "_Rows | None") -> bool:
        """Equal in value. Identity would neither notice a change in place nor survive a cast for each layer."""
        if other is None or (self.weights is None) != (other.weights is None):
            return False
        same = self.weights is None or other.weights is None or torch.equal(self.weights, other.weights)
        if self.values.device != other.values.device or self.values.dtype != other.values.dtype:
            return False
        return same and torch.equal(self.values, other.values)


@dataclass(slots=True, eq=False)
class _Group:
    """Layers that have read exactly the same rows up to now, and so have one set of statistics.

    All layers of one width begin in one group. The first member to read new rows leaves them ``pending``; members that
    read equal rows catch up. When a member reads something else, those still behind leave with the statistics as they
    were, and only then are the pending rows ``settled``. Groups are only ever split, so sharing cannot be wrong.
    """

    members: set[str]
    features: int
    hessian: bool
    running: RunningStats | None = None
    pending: _Rows | None = None
    behind: set[str] = field(default_factory=set)
    settled: list[_Rows] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)
    calls: int = 0


class Observation:
    """The statistics being collected; made by :func:`observe`.

    Attributes:
        masks: of the sample that runs, by layer: see :func:`~vlaquant.calibrate.masks.counted_rows`. Of the input of a
            layer without one every token counts. They may be changed at any time, also while a sample runs.
        weights: of the sample that runs, by layer: one for each call, used in turn; see
            :func:`~vlaquant.calibrate.masks.counted_weights`. Every token of a layer without them weighs 1.
    """

    def __init__(
        self,
        features: dict[str, int],
        *,
        hessian_for: Collection[str],
        sample_rows: int,
        seed: int,
        paired: bool = False,
    ) -> None:
        self.masks: Mapping[str, Tensor] = {}
        self.weights: Mapping[str, Sequence[Tensor]] = {}
        self._pairs = Pairs() if paired else None
        self._in_float_chain = False
        self._turns: dict[str, int] = {}
        self._calls: dict[str, int] = {}
        self._sample_rows = sample_rows
        self._seed = seed
        self._sample: int | None = None
        self._features = features
        self._group_of: dict[str, _Group] = {}
        alike: dict[tuple[int, bool], _Group] = {}
        for name, k in features.items():
            hessian = name in hessian_for
            group = alike.setdefault((k, hessian), _Group(set(), k, hessian))
            group.members.add(name)
            self._group_of[name] = group

    def begin_sample(
        self,
        masks: Mapping[str, Tensor] | None = None,
        *,
        weights: Mapping[str, Sequence[Tensor]] | None = None,
        index: int | None = None,
    ) -> None:
        """Say that the next sample starts, and which of its tokens count.

        Args:
            masks: see the attribute.
            weights: see the attribute.
            index: which one of all samples it is, whoever takes the others; by default the one after the last. Errors
                name it, and the draw of sampled rows depends on it.
        """
        self._count_all()
        if index is None:
            index = 0 if self._sample is None else self._sample + 1
        self._sample = index
        self.masks = masks or {}
        self.weights = weights or {}
        self._calls = {}
        for group in self._groups():
            group.calls = 0

    @contextmanager
    def float_chain(self) -> Iterator[None]:
        """Inside, the sample goes through the float chain of an observation of two; afterwards, the quantized one."""
        assert self._pairs is not None, "an observation of one chain"
        self._in_float_chain = True
        yield
        self._in_float_chain = False
        self._calls = {}
        self._end_turns()

    def record(self, name: str, x: Tensor) -> None:
        """Take in what layer ``name`` is about to read, [..., k]. The hooks call this.

        Raises:
            CalibrationError: a token that counts is not finite. As the first bad layer that runs raises, the message
                names the origin and not the layers it spoilt. Or a mask does not fit.
        """
        rows = self._counted(name, x.detach())
        if self._pairs is not None:
            if self._in_float_chain:
                self._pairs.keep(name, rows.values)
                return
            rows = rows._replace(values=self._pairs.beside(name, rows.values))
        if rows.values.shape[0] == 0:
            return
        group = self._group_of[name]
        # What is equal to rows that were finite is finite
        if name in group.behind and rows.equal(group.pending):
            group.behind.remove(name)
        else:
            self._require_finite(name, rows.values)
            self._settle(group)
            group = self._group_of[name]
            group.behind = group.members - {name}
            # A private copy of what is not counted at once: the model may go on to change x in place.
            waits = bool(group.behind) or len(rows.values) < _WORTH_COUNTING
            group.pending = rows._replace(values=rows.values.clone()) if waits else rows
        if not group.behind:
            self._settle(group)

    def stats(self) -> dict[str, ActStats]:
        """Statistics of every layer that saw a token, made anew; layers that always read the same rows share one."""
        return final_stats(self.running())

    def running(self) -> dict[str, RunningStats]:
        """The sums behind :meth:`stats`, which grow with the next sample; one object for layers that share.

        What several processes saw of one layer is added with :func:`vlaquant.calibrate.statistics.merge`, and then
        :func:`~vlaquant.calibrate.statistics.final_stats` makes statistics of it.
        """
        self._count_all()
        return {name: group.running for name, group in self._group_of.items() if group.running is not None}

    def shared(self) -> dict[str, str]:
        """For every layer that saw a token, the first layer (in the order of ``names``) that read the same rows."""
        leader: dict[int, str] = {}
        return {name: leader.setdefault(id(running), name) for name, running in self.running().items()}

    def check(self, min_tokens: int = 1, *, seen: Mapping[str, RunningStats] | None = None) -> None:
        """Make sure that the data reached every layer.

        Args:
            min_tokens: least number.
            seen: sums of all processes, to look at in place of those of this one.

        Raises:
            CalibrationError: layers that saw fewer than ``min_tokens`` tokens, each named with its count.
        """
        seen = self.running() if seen is None else seen
        counts = {name: seen[name].tokens if name in seen else 0 for name in self._group_of}
        starved = [f"{name} ({count})" for name, count in counts.items() if count < min_tokens]
        if starved:
            raise CalibrationError(
                f"{len(starved)} of {len(counts)} layers saw fewer than {min_tokens} tokens: {_some(starved)}; "
                "use more samples, or keep these layers in float (or quantize them without data)"
            )

    def _counted(self, name: str, x: Tensor) -> _Rows:
        mask, turn = self.masks.get(name), self._turns.get(name, 0)
        if takes_turns(mask, x):
            self._turns[name] = turn + 1
        each, call = self.weights.get(name, ()), self._calls.get(name, 0)
        self._calls[name] = call + 1
        weights = counted_weights(name, x, mask, each[call % len(each)] if each else None, turn=turn)
        return _Rows(counted_rows(name, x, mask, turn=turn), weights)

    def _end_turns(self) -> None:
        """Every image of the sample must have had its turn."""
        turns, self._turns = self._turns, {}
        for name, count in turns.items():
            mask = self.masks.get(name)
            if mask is not None and count % len(mask) and not mask.all():
                raise CalibrationError(
                    f"{name}: read {count} inputs of one image each, but its mask is about {len(mask)} images; the "
                    "family's token_masks must be as its layers read them"
                )

    def _require_finite(self, name: str, rows: Tensor) -> None:
        # One pass without a copy; a sum may overflow where no value is bad
        if rows.sum().isfinite():
            return
        bad = int((~rows.isfinite().all(dim=-1)).sum())
        if bad:
            where = "" if self._sample is None else f" in sample {self._sample}"
            raise CalibrationError(
                f"{name}: {bad} of {rows.shape[0]} input tokens hold NaN or Inf{where}, and it is "
                "the first observed layer to read any; look at that sample and at what runs just before this layer, or "
                "calibrate in float32"
            )

    def _groups(self) -> list[_Group]:
        return list({id(group): group for group in self._group_of.values()}.values())

    def _count_all(self) -> None:
        self._end_turns()
        if self._pairs is not None:
            self._pairs.end()
        for group in self._groups():
            self._settle(group)
        for group in self._groups():
            self._count(group)

    def _settle(self, group: _Group) -> None:
        """Take the pending rows for those who read them; the others leave with the statistics as they were."""
        if group.pending is None:
            return
        if group.behind:
            self._part(group)
        rows, group.pending = group.pending, None
        group.settled.append(rows)
        group.keys.append(row_keys(len(rows.values), seed=self._seed, sample=self._sample or 0, call=group.calls))
        group.calls += 1
        if sum(len(rows.values) for rows in group.settled) >= _WORTH_COUNTING:
            self._count(group)

    def _part(self, group: _Group) -> None:
        """Take those who did not read the pending rows out of the group."""
        running = None if group.running is None else group.running.copy()
        parted = replace(group, members=group.behind, running=running, pending=None, behind=set())
        # The tensors are shared, as nobody writes into them
        parted.settled, parted.keys = list(group.settled), list(group.keys)
        self._group_of.update(dict.fromkeys(group.behind, parted))
        group.members = group.members - group.behind
        group.behind = set()

    def _count(self, group: _Group) -> None:
        """Add the settled rows to the sums."""
        if not group.settled:
            return
        values, keys = _joined([rows.values for rows in group.settled]), _joined(group.keys)
        weights = None
        if any(rows.weights is not None for rows in group.settled):
            ones = values.new_ones
            weights = _joined([ones(len(v), dtype=torch.float32) if w is None else w for v, w in group.settled])
        group.settled, group.keys = [], []
        if group.running is None:
            group.running = no_stats(
                group.features,
                hessian=group.hessian,
                sample_rows=self._sample_rows,
                device=values.device,
                paired=self._pairs is not None,
            )
        group.running.add_(values, keys, weights)


def _some(names: list[str]) -> str:
    """At most five, so that the advice after them is still seen."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


@contextmanager
def observe(
    model: nn.Module,
    names: Collection[str],
    *,
    hessian_for: Collection[str] = (),
    sample_rows: int = 256,
    seed: int = 0,
    paired: bool = False,
) -> Iterator[Observation]:
    """Collect statistics of the inputs of the Linears ``names`` for as long as the context is open.

        with observe(model, names, hessian_for=names) as observation:
            for sample in samples:
                observation.begin_sample()
                run(model, sample)
        observation.check(min_tokens=128)
        stats = observation.stats()

    Args:
        model: what the names are relative to.
        names: Linears to watch, as in ``model.named_modules()``.
        hessian_for: those of ``names`` whose [k, k] Hessian is wanted too.
        sample_rows: how many input tokens to keep of each layer.
        seed: of the draw of those tokens.
        paired: watch two chains: after ``begin_sample`` each sample goes through the float chain, inside of
            :meth:`Observation.float_chain`, and then through the quantized one, of which the statistics are.

    Raises:
        CalibrationError: a name that is no plain ``nn.Linear`` of the model; while running, NaN or Inf activations.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    linears = {name: _linear(modules, name) for name in names}
    unwatched = sorted(set(hessian_for) - set(names))
    if unwatched:
        raise CalibrationError(f"a Hessian is wanted for layers that are not watched: {', '.join(unwatched)}")
    features = {name: linear.in_features for name, linear in linears.items()}
    observation = Observation(features, hessian_for=set(hessian_for), sample_rows=sample_rows, seed=seed, paired=paired)
    with ExitStack() as hooks:
        for name, linear in linears.items():
            handle = linear.register_forward_pre_hook(_recorder(observation, name), with_kwargs=True)
            hooks.callback(handle.remove)
        yield observation


def _recorder(observation: Observation, name: str) -> Any:
    def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        observation.record(name, args[0] if args else kwargs["input"])

    return record


def _linear(modules: Mapping[str, nn.Module], name: str) -> nn.Linear:
    module = modules.get(name)
    # Exactly nn.Linear: subclasses such as the output projection of nn.MultiheadAttention are not called through hooks.
    if type(module) is nn.Linear:
        return module
    found = f"is a {type(module).__name__}" if module is not None else "does not exist"
    linears = [other for other, candidate in modules.items() if type(candidate) is nn.Linear]
    near = difflib.get_close_matches(name, linears, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise CalibrationError(f"cannot watch {name!r}: it {found}, and only plain nn.Linear can be watched{hint}")
