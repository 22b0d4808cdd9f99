"""Kernels side by side on weights of given shapes.

For every shape and number of tokens all paths run in turn: float products, each kernel that can compute the scheme,
the whole layer, and the peers that are installed. Each path has several copies of its weight, together larger than the
last-level cache, and a turn uses the next of them, so that weights come from memory as they do in a model.

Letters: n out, k in, t tokens.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from vlaquant.benchmark.limits import Limits, best_of, measure_limits
from vlaquant.benchmark.paths import (
    BF16,
    FP32,
    PREPACKED,
    PackedWeight,
    Path,
    Run,
    float_paths,
    pack,
    packed_paths,
    peer_paths,
)
from vlaquant.benchmark.peers import Peer, installed_peers
from vlaquant.errors import EvaluationError, PlanError, RecipeError
from vlaquant.evaluate.machine import last_level_cache, machine
from vlaquant.evaluate.timing import CLOCKS, interleave, ratio, summary_ms, synchronize, threads
from vlaquant.kernels import KERNELS
from vlaquant.scheme import Granularity, Scheme, get_scheme

#: Copies of a weight are this many times as large as the last-level cache.
_BEYOND_CACHE = 1.25
_MOST_COPIES = 128
#: Calls in one turn; with many tokens one call is long enough to be timed alone.
_CALLS, _FEW_TOKENS = 3, 64
#: An int8 path whose error is below this did not round its input to int8.
_EXACT = {torch.float32: 1e-4, torch.bfloat16: 3e-3}


@dataclass(frozen=True, slots=True)
class Settings:
    """What is measured.

    Attributes:
        shapes: (n, k) of each weight.
        tokens: numbers of rows of the input.
        schemes: of packed weights; those with groups get ``group_size``.
        dtype: of the activations of packed layers.
        threads: for torch and for the peers.
        rounds: that count.
        clock: ``wall``, or ``cpu`` for the time that this process was computing.
        device: ``cpu`` or ``cuda``.
        seed: of weights and inputs, which are normally distributed.
    """

    shapes: tuple[tuple[int, int], ...]
    tokens: tuple[int, ...]
    schemes: tuple[Scheme, ...]
    dtype: torch.dtype = torch.float32
    threads: int = 1
    rounds: int = 7
    clock: str = "wall"
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        for scheme in self.schemes:
            for n, k in self.shapes:
                group = scheme.weight.group_size
                if group is not None and k % group != 0:
                    legal = ", ".join(str(size) for size in (16, 32, 64, 128, 256) if k % size == 0) or "none"
                    raise PlanError(
                        f"shape {n}x{k}, {scheme.name}: in_features={k} is not a multiple of group_size={group}; "
                        f"group sizes that divide it: {legal} (--group-size)"
                    )


def parse_shapes(text: str) -> tuple[tuple[int, int], ...]:
    """(out, in) of each shape in text such as ``4096x11008,2048x2048``.

    Raises:
        RecipeError: it is written otherwise.
    """
    shapes = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([1-9]\d*)\s*[x×]\s*([1-9]\d*)\s*", part, re.IGNORECASE)
        if match is None:
            raise RecipeError(f"{part!r} is no shape; write OUTxIN, such as 4096x11008, with commas between shapes")
        shapes.append((int(match[1]), int(match[2])))
    return tuple(shapes)


def parse_schemes(text: str, group_size: int) -> tuple[Scheme, ...]:
    """The presets of these names, with groups of ``group_size`` where they have groups.

    Raises:
        RecipeError: no such preset, or a group size that is not positive.
    """
    schemes = [get_scheme(name.strip()) for name in text.split(",")]
    return tuple(
        scheme.with_weight(group_size=group_size) if scheme.weight.granularity is Granularity.GROUP else scheme
        for scheme in schemes
    )


def bench_shapes(
    settings: Settings,
    *,
    peers: tuple[Peer, ...] | None = None,
    limits: Limits | None = None,
    progress: Callable[[Sequence[Any]], Iterable[Any]] = iter,
) -> dict[str, Any]:
    """Measure; returns plain values for JSON and :func:`~vlaquant.benchmark.tables.shapes_table`.

    Args:
        settings: what is measured.
        peers: other packages; by default all that are installed.
        limits: of the machine; measured if not given.
        progress: what the list of shapes and tokens is iterated through.

    Raises:
        EvaluationError: no such device.
    """
    if settings.device != "cpu" and not torch.cuda.is_available():
        raise EvaluationError(f"device {settings.device!r}: this torch sees no CUDA device")
    found, missing = installed_peers() if peers is None else (peers, {})
    rows: list[dict[str, Any]] = []
    left_out: list[dict[str, Any]] = []
    with threads(settings.threads), torch.inference_mode():
        facts, cache = machine(), _cache_bytes(settings.device)
        seen = limits or measure_limits(settings.device, cache, settings.clock)
        for n, k in progress(settings.shapes):
            bench = _Shape(settings, cache, n, k, found)
            for tokens in settings.tokens:
                rows += bench.measure(tokens, left_out)
        # Other work on the machine can have held them down the first time
        best = limits or best_of(seen, measure_limits(settings.device, cache, settings.clock))
    for row in rows:
        operations = 2 * row["tokens"] * math.prod(map(int, row["shape"].split("x")))
        least = best.least_seconds(row["weight_bytes"], operations, row["arithmetic"])
        row["fraction_of_limit"] = 1e3 * least / row["median_ms"]
    return {
        "kind": "shapes",
        "machine": facts,
        "settings": {
            "tokens": list(settings.tokens),
            **{name: getattr(settings, name) for name in ("threads", "rounds", "clock", "device", "seed")},
            "shapes": [f"{n}x{k}" for n, k in settings.shapes],
            "schemes": [scheme.name for scheme in settings.schemes],
            "dtype": str(settings.dtype).removeprefix("torch."),
        },
        "limits": asdict(best),
        "peers_missing": missing,
        "left_out": left_out,
        "rows": rows,
    }


def _cache_bytes(device: str) -> int:
    return last_level_cache() if device == "cpu" else int(torch.cuda.get_device_properties(0).L2_cache_size)


@dataclass(frozen=True, slots=True, eq=False)
class _Contender:
    """A path with its copies, and what it is compared on."""

    path: Path
    scheme: str
    packed: PackedWeight | None
    copies: list[Run]

    @property
    def label(self) -> str:
        return f"{self.scheme} {self.path.kind} {self.path.name}"


class _Shape:
    """All paths for one weight; their copies serve every number of tokens."""

    def __init__(self, settings: Settings, cache: int, n: int, k: int, peers: tuple[Peer, ...]) -> None:
        self.settings, self.cache, self.n, self.k = settings, cache, n, k
        self.random = torch.Generator().manual_seed(settings.seed)
        self.weight = self._normal(n, k) / k**0.5
        self.packed = [pack(self.weight, scheme, settings.dtype) for scheme in settings.schemes]
        self.failed: dict[str, str] = {}
        self.lasting: list[_Contender] = []
        for packed in self.packed:
            paths = [*packed_paths(packed, KERNELS), *peer_paths(packed, peers, settings.threads)]
            self.lasting += [self._contender(path, packed) for path in paths]

    def measure(self, tokens: int, left_out: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """A row for each path; those that fail or are wrong go to ``left_out`` instead."""
        x = self._normal(tokens, self.k)
        inputs = {dtype: x.to(dtype) for dtype in (torch.float32, torch.bfloat16)}
        # The copies of float weights are laid out for a number of tokens, and not kept
        floats = [self._contender(path, None) for path in float_paths(self.weight, tokens)]
        wanted = {one.scheme.name: _wanted(one, inputs[self.settings.dtype]) for one in self.packed}
        errors, sound = {}, []
        for one in [*floats, *self.lasting]:
            x = inputs[one.path.input_dtype]
            right, reference = wanted.get(one.scheme) or (x.double() @ self.weight.double().T, None)
            reason, errors[one.label] = self._check(one, x, right, reference)
            if reason is None:
                sound.append(one)
            else:
                where = {"shape": f"{self.n}x{self.k}", "tokens": tokens}
                left_out.append(where | {"scheme": one.scheme, "path": one.path.name, "reason": reason})
        turns = {one.label: self._turn(one.copies, inputs[one.path.input_dtype]) for one in sound}
        seconds = interleave(turns, self.settings.rounds)
        timed = {label: summary_ms(values) for label, values in seconds.items()}
        # Float paths by name, and the fastest peer by scheme
        against = {one.path.name: timed[one.label] for one in sound if one.path.kind == "float"}
        for one in sound:
            if one.path.kind == "peer" and one.path.comparable:
                best = against.get(one.scheme, timed[one.label])
                against[one.scheme] = min(best, timed[one.label], key=lambda found: found["median_ms"])
        return iter([self._row(one, tokens, timed[one.label], against, errors[one.label]) for one in sound])

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.random).to(self.settings.device)

    def _contender(self, path: Path, packed: PackedWeight | None) -> _Contender:
        scheme = "" if packed is None else packed.scheme.name
        count = min(int(_BEYOND_CACHE * self.cache / max(path.weight_bytes, 1)) + 1, _MOST_COPIES)
        contender = _Contender(path, scheme, packed, [])
        try:
            contender.copies.extend(path.make() for _ in range(count))
        except Exception as error:  # whatever another package raises is told, not hidden
            self.failed[contender.label] = f"{type(error).__name__}: {error}"
        return contender

    def _check(
        self, one: _Contender, x: Tensor, wanted: Tensor, reference: Tensor | None
    ) -> tuple[str | None, dict[str, float]]:
        """Why a path must be left out, or None; and its errors."""
        if one.label in self.failed:
            return f"failed to prepare: {self.failed[one.label]}", {}
        try:
            y = one.copies[0](x)
        except Exception as error:
            return f"failed: {type(error).__name__}: {error}", {}
        if y.shape != wanted.shape:
            return f"wrong: gave the shape {list(y.shape)}, wanted {list(wanted.shape)}", {}
        errors = {"error": _distance(y, wanted)}
        if reference is not None:
            errors["error_to_reference"] = _distance(y, reference)
        if not errors["error"] <= one.path.tolerance:
            return f"wrong: its error of {errors['error']:.1e} is above {one.path.tolerance:.0e}", errors
        return None, errors

    def _turn(self, copies: list[Run], x: Tensor) -> Callable[[int], float]:
        """One turn on the next copies, all of which have run before: first calls compile and lay out."""
        few = len(x) <= _FEW_TOKENS
        calls, copies = (_CALLS, copies) if few else (1, copies[:1])
        clock, device = CLOCKS[self.settings.clock], self.settings.device
        for run in copies:
            run(x)

        def turn(number: int) -> float:
            chosen = [copies[(number * calls + call) % len(copies)] for call in range(calls)]
            synchronize(device)
            started = clock()
            for run in chosen:
                run(x)
            synchronize(device)
            return (clock() - started) / calls

        return turn

    def _row(
        self,
        one: _Contender,
        tokens: int,
        timed: dict[str, float],
        against: dict[str, dict[str, float]],
        errors: dict[str, float],
    ) -> dict[str, Any]:
        seconds, path = timed["median_ms"] / 1e3, one.path
        operations = 2 * tokens * self.n * self.k
        return {
            "shape": f"{self.n}x{self.k}",
            "tokens": tokens,
            "scheme": one.scheme,
            "path": path.name,
            "kind": path.kind,
            "dtype": str(path.input_dtype).removeprefix("torch."),
            **timed,
            "x_fp32": ratio(against.get(FP32), timed),
            "x_bf16": ratio(against.get(BF16), timed),
            "x_prepacked": ratio(against.get(PREPACKED), timed),
            "x_best_peer": ratio(against.get(one.scheme), timed),
            **errors,
            "rounds_activations": path.arithmetic == "int8" and errors["error"] > _EXACT[path.input_dtype],
            "arithmetic": path.arithmetic,
            "weight_bytes": path.weight_bytes,
            "copies": len(one.copies) if tokens <= _FEW_TOKENS else 1,
            "gb_per_s": path.weight_bytes / seconds / 1e9,
            "gop_per_s": operations / seconds / 1e9,
        }


def _wanted(packed: PackedWeight, x: Tensor) -> tuple[Tensor, Tensor]:
    """The product with the dequantized weight in float64, and what the reference kernel makes of x [t, k]."""
    exact = x.double() @ packed.codes.dequantize(torch.float64).T
    return exact, KERNELS[-1].run(x, packed.layer.stored(), (), packed.query)


def _distance(y: Tensor, wanted: Tensor) -> float:
    """Relative, in the Frobenius norm; NaN where y is not finite."""
    wanted = wanted.double()
    return float((y.double() - wanted).norm() / wanted.norm().clamp(min=torch.finfo(torch.float64).tiny))
