"""Several processes that quantize one model together: who does what, and how the parts come together again.

Each of them is started with the same command and does the same things, but it takes only its share of the samples
through the model and solves only its share of the layers:

    torchrun --nproc-per-node 2 -m vlaquant quantize --config RECIPE
    accelerate launch -m vlaquant quantize --config RECIPE --device cuda

They have to run on one machine with one file system, because one of them, the main one, writes for all. Give each its
share of the cores with ``OMP_NUM_THREADS``: torchrun gives them one each. With as many threads each the result is that
of a single process, bit for bit: sums of statistics are kept in float64, and rounded once all are added.

Numbers and bytes travel as they are and everything else as JSON, nothing as pickles.
"""

import atexit
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType
from typing import Any, ClassVar, Self

import torch
import torch.distributed as dist
from torch import Tensor

from vlaquant.calibrate.statistics import RunningStats, no_stats
from vlaquant.errors import VlaquantError

#: How long the processes may take to find each other.
_MEETING = timedelta(minutes=10)

#: How long one may wait for another that is still there. A dead one is noticed at once, as its connection closes.
_PATIENCE = timedelta(days=7)


def launched() -> tuple[int, int]:
    """Rank and number of the processes that were started together, by the environment: 0 of 1 for a single one."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    return (int(os.environ.get("RANK", "0")), size) if size > 1 else (0, 1)


class Processes:
    """The processes of a run as one of them sees them; a context manager.

    All have to call the same methods in the same order. With a single process everything returns at once. If the block
    ends with an error the connections are closed, so that the others fail too and do not wait for ever.

    Attributes:
        rank: which one this is, from 0.
        size: how many there are.

    Raises:
        VlaquantError: from every method that waits: another process failed or died.
    """

    _open: ClassVar["Processes | None"] = None

    def __init__(self, rank: int = 0, size: int = 1, group: dist.ProcessGroup | None = None) -> None:
        self.rank = rank
        self.size = size
        self._group = group

    @classmethod
    def current(cls, device: str = "cpu") -> "Processes":
        """Those that were started with this one; connects to them at the first call.

        Args:
            device: where their tensors are: of ``cuda`` each process takes the GPU of its ``LOCAL_RANK``.

        Raises:
            VlaquantError: they are on several machines, or did not find each other.
        """
        rank, size = launched()
        if size == 1:
            return ALONE
        if cls._open is None:
            if int(os.environ.get("LOCAL_WORLD_SIZE", size)) != size:
                raise VlaquantError(f"{size} processes on several machines; start all of them on one")
            cls._open = cls(rank, size, _connect(rank, size, cuda=torch.device(device).type == "cuda"))
        return cls._open

    @property
    def main(self) -> bool:
        """Whether this is the one that writes, shows and logs."""
        return self.rank == 0

    def device(self, name: str) -> torch.device:
        """Where this process computes if the run was told to use ``name``.

        Raises:
            VlaquantError: there are fewer GPUs than processes.
        """
        try:
            device = torch.device(name)
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise VlaquantError(f"device {name!r} cannot be used: {error}") from error
        if self.size == 1 or device.type != "cuda":
            return device
        local = int(os.environ.get("LOCAL_RANK", self.rank))
        if local >= torch.cuda.device_count():
            raise VlaquantError(f"{self.size} processes, but {torch.cuda.device_count()} GPUs; start one for each GPU")
        torch.cuda.set_device(local)
        return torch.device("cuda", local)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and self._group is not None:
            Processes._open = None
            group, self._group = self._group, None
            dist.destroy_process_group(group)

    def positions(self, samples: int) -> range:
        """Which samples this process takes."""
        return range(self.rank, samples, self.size)

    def share(self, costs: Sequence[float]) -> list[int]:
        """Ranks for pieces of work: the most expensive first, each to whoever has least to do."""
        load, owners = [0.0] * self.size, [0] * len(costs)
        for piece in sorted(range(len(costs)), key=lambda piece: -costs[piece]):
            owners[piece] = load.index(min(load))
            load[owners[piece]] += costs[piece]
        return owners

    def barrier(self) -> None:
        """Wait until all are here."""
        if self.size > 1:
            with _together():
                dist.all_reduce(torch.zeros(1), group=self._group)

    def gather(self, value: Any) -> list[Any]:
        """The JSON values of all processes, by rank; with a single one its value as it is."""
        if self.size == 1:
            return [value]
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = self._all_parts(torch.tensor([len(text)]), [1] * self.size)
        counts = [int(length) for length in lengths]
        return [json.loads(part.numpy().tobytes()) for part in self._all_parts(text, counts)]

    def from_main(self, value: Any) -> Any:
        """The JSON value of the main process."""
        return self.gather(value if self.main else None)[0]

    def broadcast_(self, tensors: Iterable[Tensor], owner: int) -> None:
        """Fill contiguous tensors, shaped alike in all processes, with the values of the process ``owner``."""
        if self.size == 1:
            return
        for tensor in tensors:
            with _together():
                dist.broadcast(tensor.view(-1).view(torch.uint8), group=self._group, group_src=owner)

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Put the sum over all processes into contiguous tensors, which are shaped alike in all of them."""
        if self.size == 1:
            return
        for tensor in tensors:
            with _together():
                dist.all_reduce(tensor, group=self._group)

    def merge(
        self, names: Sequence[str], running: Mapping[str, RunningStats], device: torch.device
    ) -> dict[str, RunningStats]:
        """What all processes saw of each layer, from what each saw of it.

        Args:
            names: of all layers, in the same order everywhere.
            running: of the layers that this process saw; one object for layers that share. It is not to be used again.
            device: for sums of layers that this process did not see.

        Returns:
            One object for layers that shared in every process. Layers that nobody saw are left out.
        """
        if self.size == 1:
            return dict(running)
        reports = self.gather(_report(running))
        classes: dict[tuple[str | None, ...], list[str]] = {}
        for name in names:
            if any(name in report for report in reports):
                leaders = tuple(report[name]["leader"] if name in report else None for report in reports)
                classes.setdefault(leaders, []).append(name)
        uses = Counter(id(running[members[0]]) for members in classes.values() if members[0] in running)
        merged: dict[str, RunningStats] = {}
        for members in classes.values():
            facts = [report.get(members[0]) for report in reports]
            sums = running.get(members[0])
            if sums is None:
                sums = _nothing_seen(next(fact for fact in facts if fact is not None), device)
            elif uses[id(sums)] > 1:
                # Layers that others saw part: all but the last need sums of their own
                uses[id(sums)] -= 1
                sums = sums.copy()
            self._add_up_(sums, [0 if fact is None else fact["kept"] for fact in facts])
            sums.tokens = sum(fact["tokens"] for fact in facts if fact is not None)
            sums.weighted = any(fact["weighted"] for fact in facts if fact is not None)
            merged |= dict.fromkeys(members, sums)
        return {name: merged[name] for name in names if name in merged}

    def _add_up_(self, sums: RunningStats, kept: Sequence[int]) -> None:
        """All that can be added: everything but the tokens. ``kept`` are the lengths of all samples of rows."""
        low, high = sums.channel_low.clone(), sums.channel_high.clone()
        with _together():
            for tensor in (sums.abs_sum, sums.weight, *sums.strips):
                dist.all_reduce(tensor, group=self._group)
            dist.all_reduce(low, dist.ReduceOp.MIN, group=self._group)
            dist.all_reduce(high, dist.ReduceOp.MAX, group=self._group)
        sums.channel_low, sums.channel_high = low, high
        kept_parts = (sums.keys, sums.sample, sums.sample_weights)
        keys, rows, weights = (torch.cat(self._all_parts(tensor, kept)) for tensor in kept_parts)
        first = keys.argsort()[: sums.sample_rows]
        sums.keys, first = keys[first], first.to(rows.device)
        sums.sample, sums.sample_weights = rows[first], weights[first]

    def _all_parts(self, part: Tensor, counts: Sequence[int]) -> list[Tensor]:
        """The parts of all processes, which have ``counts`` rows."""
        padded = part.new_zeros(max(counts), *part.shape[1:])
        padded[: len(part)] = part
        parts = [torch.empty_like(padded) for _ in counts]
        with _together():
            dist.all_gather(parts, padded, group=self._group)
        return [each[:count] for each, count in zip(parts, counts, strict=True)]


#: A run of a single process.
ALONE = Processes()


def _report(running: Mapping[str, RunningStats]) -> dict[str, dict[str, Any]]:
    """What the others have to know about the sums of one process."""
    leaders: dict[int, str] = {}
    return {
        name: {
            "leader": leaders.setdefault(id(sums), name),
            "tokens": sums.tokens,
            "weighted": sums.weighted,
            "kept": len(sums.keys),
            "features": len(sums.abs_sum),
            "hessian": bool(sums.strips),
            "sample_rows": sums.sample_rows,
            "paired": sums.paired,
        }
        for name, sums in running.items()
    }


def _nothing_seen(fact: Mapping[str, Any], device: torch.device) -> RunningStats:
    return no_stats(
        fact["features"],
        hessian=fact["hessian"],
        sample_rows=fact["sample_rows"],
        device=device,
        paired=fact["paired"],
    )


def _connect(rank: int, size: int, *, cuda: bool) -> dist.ProcessGroup:
    """A group of this program's own, beside what else it may use torch.distributed for."""
    try:
        if not dist.is_initialized():
            dist.init_process_group("gloo", rank=rank, world_size=size, timeout=_MEETING)
            atexit.register(_disconnect)
        # What is on the CPU goes through gloo in any case, which notices a dead process
        group: dist.ProcessGroup = dist.new_group(backend="cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=_PATIENCE)
        return group
    except (RuntimeError, ValueError) as error:
        raise VlaquantError(
            f"process {rank} of {size} could not reach the others: {_line(error)}; start all of them with one command "
            "(torchrun or accelerate launch)"
        ) from error


def _disconnect() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def _together() -> Iterator[None]:
    """Errors of a collective operation: it is another process that failed."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise VlaquantError(
            f"another process of this run failed or died, see its own message ({_line(error)})"
        ) from error


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
