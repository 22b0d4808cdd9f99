"""Naive, obviously right versions of the algorithms, in float64 and with loops; and a way to break the real ones."""

import inspect
import itertools
import math
import types
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vlaquant.numerics import Observer, qparams
from vlaquant.scheme import Granularity, QuantSpec


def mutant(module: types.ModuleType, old: str, new: str) -> types.ModuleType:
    """A copy of ``module`` in whose source the one occurrence of ``old`` reads ``new``: would a test notice?"""
    source = inspect.getsource(module)
    assert source.count(old) == 1, f"{module.__name__} holds {old!r} {source.count(old)} times; adapt the mutation"
    copy = types.ModuleType(module.__name__)
    exec(compile(source.replace(old, new), f"<mutant of {module.__name__}>", "exec"), copy.__dict__)
    return copy


def correlated_inputs(tokens: int, k: int, seed: int) -> Tensor:
    """[t, k] like activations of a network: few directions carry most, and a few channels are much larger."""
    generator = torch.Generator().manual_seed(seed)
    directions = max(k // 8, 1)
    mixing = torch.randn(directions, k, generator=generator)
    x = torch.randn(tokens, directions, generator=generator) @ mixing / math.sqrt(directions)
    x += 0.3 * torch.randn(tokens, k, generator=generator)
    channel = torch.exp(0.5 * torch.randn(k, generator=generator))
    channel[torch.randperm(k, generator=generator)[: max(k // 32, 1)]] *= 8.0
    return x * channel


def random_weight(n: int, k: int, seed: int) -> Tensor:
    """[n, k] like a trained weight: rows of different size, a little heavier tails than a normal distribution."""
    generator = torch.Generator().manual_seed(seed + 1000)
    rows = torch.exp(0.3 * torch.randn(n, 1, generator=generator))
    return torch.randn(n, k, generator=generator) * rows * 0.02 * (1.0 + 0.3 * torch.randn(n, k, generator=generator))


def naive_hessian(x: Tensor) -> Tensor:
    """Mean of x·xᵀ over tokens [t, k], one outer product at a time, float64."""
    total = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64)
    for token in x.double():
        total += torch.outer(token, token)
    return total / len(x)


def naive_output_error(delta: Tensor, x: Tensor) -> float:
    """Mean over tokens of ‖ΔW·x‖², one token at a time, float64."""
    return math.fsum(float((delta.double() @ token).square().sum()) for token in x.double()) / len(x)


def naive_full_range(values: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Scale and zero point of all values; symmetric, the largest one gets the code that reaches furthest."""
    scale, zero = qparams(values.min(), values.max(), spec, torch.float32)
    if spec.symmetric and spec.bits < 8:
        largest = max(values.flatten().tolist(), key=lambda value: (abs(value), -value))
        scale = torch.tensor(largest / spec.qmin if largest else 2.0**-126)
    return scale, zero


def naive_rtn(weight: Tensor, spec: QuantSpec) -> list[list[int]]:
    """Codes [n][k] for min-max ranges and scales stored in float32, one value at a time."""
    n, k = weight.shape
    size = spec.group_size or k
    codes = [[0] * k for _ in range(n)]
    for row in range(n):
        for column in range(k):
            start = column // size * size
            same_scale = weight if spec.granularity is Granularity.TENSOR else weight[row, start : start + size]
            scale, zero = naive_full_range(same_scale, spec)
            code = round(float(weight[row, column] / scale + zero))
            codes[row][column] = min(max(code, spec.qmin), spec.qmax)
    return codes


def naive_gptq(
    weight: Tensor,
    hessian: Tensor,
    spec: QuantSpec,
    *,
    scale_dtype: torch.dtype,
    observer: Observer,
    damp: float,
    act_order: bool,
    cross: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Codes and rounded weight [n, k]: one column at a time, each time with the whole inverse of what remains.

    Optimal brain quantization in a fixed order (equations 2 and 3 of the paper): no Cholesky factor, no blocks.

    With ``cross``, the mean of (x − x̂)·x̂ᵀ, this is algorithm 1 of GPTAQ (Li et al. 2025): the columns that remain also
    take over what they can of the drift of the column that was just rounded.
    """
    W, H = weight.double().clone(), hessian.double().clone()
    k = W.shape[1]
    dead = H.diagonal() == 0
    damping = damp * H.diagonal()[~dead].mean()
    H.diagonal()[dead] = 1.0
    remaining = torch.argsort(H.diagonal(), descending=True, stable=True).tolist() if act_order else list(range(k))
    H += damping * torch.eye(k)

    size = spec.group_size or k
    moving = spec.granularity is Granularity.GROUP and not act_order

    def fit(columns: Tensor) -> tuple[Tensor, Tensor]:
        groups = columns.reshape(1, 1, -1) if spec.granularity is Granularity.TENSOR else columns.unsqueeze(1)
        scale, zero = observer(groups.float(), spec, scale_dtype)
        return scale.flatten().double(), zero.flatten().double()

    grids = {group: fit(W[:, group * size : (group + 1) * size]) for group in range(k // size)}
    codes, rounded = torch.zeros_like(W), torch.zeros_like(W)
    while remaining:
        j, rest = remaining[0], remaining[1:]
        if moving and j % size == 0:
            grids[j // size] = fit(W[:, j : j + size])
        scale, zero = grids[j // size]
        codes[:, j] = torch.round(W[:, j] / scale + zero).clamp(spec.qmin, spec.qmax)
        rounded[:, j] = (codes[:, j] - zero) * scale
        inverse = torch.linalg.inv(H[remaining][:, remaining])
        column = W[:, j].clone()
        W[:, rest] -= torch.outer((column - rounded[:, j]) / inverse[0, 0], inverse[0, 1:])
        if cross is not None and rest:
            W[:, rest] += torch.outer(column, cross[j, rest].double() @ torch.linalg.inv(H[rest][:, rest]))
        remaining = rest
    return codes, rounded


def drifted_inputs(tokens: int, k: int, seed: int, drift: float = 0.15) -> tuple[Tensor, Tensor]:
    """What a layer reads in the float model and behind quantized layers, [t, k] each.

    The difference holds a part that follows from the tokens and one that nothing can make up for.
    """
    x = correlated_inputs(tokens, k, seed)
    generator = torch.Generator().manual_seed(seed + 2000)
    mixing = torch.randn(k, k, generator=generator) / math.sqrt(k)
    noise = torch.randn(tokens, k, generator=generator) * x.std(dim=0)
    return x, x + drift * (x @ mixing + noise)


def naive_two_output_error(weight: Tensor, x: Tensor, rounded: Tensor, seen: Tensor) -> float:
    """Mean over tokens of ‖W·x − Ŵ·x̂‖², one token at a time, float64."""
    pairs = zip(x.double(), seen.double(), strict=True)
    return math.fsum(float((weight.double() @ a - rounded.double() @ b).square().sum()) for a, b in pairs) / len(x)


def naive_shifted_weight(weight: Tensor, x: Tensor, seen: Tensor, damp: float) -> Tensor:
    """The weight W' whose output on ``seen`` [t, k] is nearest to that of ``weight`` [n, k] on ``x`` [t, k], float64.

    By least squares over the tokens, with one more row a channel for the damping: mean ‖W·x − W'·x̂‖² + λ·‖W − W'‖².
    """
    mean_square = seen.double().square().mean(dim=0)
    root = math.sqrt(damp * float(mean_square[mean_square > 0].mean()))
    extra = root * torch.eye(x.shape[1], dtype=torch.float64)
    W, count = weight.double(), math.sqrt(len(x))
    matrix = torch.cat([seen.double() / count, extra])
    wanted = torch.cat([x.double() @ W.T / count, extra @ W.T])
    return torch.linalg.lstsq(matrix, wanted).solution.T


def naive_smooth_scale(act_absmax: Tensor, weights: Sequence[Tensor], alpha: float) -> list[float]:
    """Equation 4 of SmoothQuant, one channel at a time."""
    scales = []
    for j, activation in enumerate(act_absmax.tolist()):
        weight = max(abs(float(w[i, j])) for w in weights for i in range(len(w)))
        scales.append(1.0 if activation == 0 or weight == 0 else activation**alpha / weight ** (1 - alpha))
    return scales


def naive_awq_scales(x: Tensor, grid: int) -> list[list[float]]:
    """The scale [k] for each ratio of the grid, from the tokens ``x`` [t, k] themselves."""
    mean_abs = x.double().abs().mean(dim=0).tolist()
    scales = []
    for step in range(grid):
        raw = [value ** (step / grid) if value > 0 else None for value in mean_abs]
        live = [value for value in raw if value is not None]
        middle = math.sqrt(max(live) * min(live))
        scales.append([1.0 if value is None else value / middle for value in raw])
    return scales


def naive_awq_loss(weights: Sequence[Tensor], x: Tensor, quantize: Callable[[Tensor], Tensor], scale: Tensor) -> float:
    """Output error of all weights together for one scale, running every token through them."""
    return math.fsum(naive_output_error(quantize(w * scale) / scale - w, x) for w in weights)


def naive_clip(weight: Tensor, x: Tensor, spec: QuantSpec, ratios: Sequence[float]) -> Tensor:
    """Rounded weight [n, k] with the best ratio for each group, by the error of the group's share of the output."""
    n, k = weight.shape
    size = spec.group_size or k
    rounded = torch.zeros_like(weight)
    for row in range(n):
        for start in range(0, k, size):
            columns = slice(start, start + size)
            w = weight[row, columns]
            best = math.inf
            ranges = [naive_full_range(w, spec)]
            for ratio, sign in itertools.product(ratios, (1, -1) if spec.symmetric and spec.bits < 8 else (1,)):
                scale, zero = qparams(w.min() * ratio, w.max() * ratio, spec, torch.float32)
                ranges.append((sign * scale, zero))
            for scale, zero in ranges:
                candidate = (torch.round(w / scale + zero).clamp(spec.qmin, spec.qmax) - zero) * scale
                error = float((x[:, columns].double() @ (candidate - w).double()).square().mean())
                if error < best:
                    best = error
                    rounded[row, columns] = candidate
    return rounded


def naive_statistics(x: Tensor) -> dict[str, Tensor]:
    """All statistics of rows [t, k] at once, float64."""
    x = x.double()
    return {
        "channel_low": x.amin(dim=0),
        "channel_high": x.amax(dim=0),
        "absmax": x.abs().amax(dim=0),
        "low": x.min(),
        "high": x.max(),
        "mean_abs": x.abs().mean(dim=0),
        "hessian": naive_hessian(x),
    }


def naive_autoround(
    weights: Sequence[Tensor],
    starts: Sequence[tuple[Tensor, Tensor, Tensor]],
    spec: QuantSpec,
    loss: Callable[[list[Tensor], list[int]], Tensor],
    batches: Sequence[list[int]],
    *,
    rate: float,
    edge: float,
    ranges: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    """Rounding offsets [n, k] and rounded weights [n, k] after all steps: equations 3 to 5 in float64, by autograd.

    ``starts`` hold codes, scales and zero points, each spread to [n, k]; ``loss(weights, batch)`` is to be lowered.
    Weights keep the distance ``edge`` from the ends of their code's interval.
    """
    moved, parameters = [], []
    for weight, (codes, scale, zero) in zip(weights, starts, strict=True):
        place = weight.double() / scale.double() + zero
        for row in range(len(place)):
            for column in range(place.shape[1]):
                code = float(codes[row, column])
                low = -math.inf if code == spec.qmin else code - 0.5 + edge
                high = math.inf if code == spec.qmax else code + 0.5 - edge
                place[row, column] = min(max(float(place[row, column]), low), high)
        moved.append((place - zero) * scale.double())
        offset = torch.zeros_like(place, requires_grad=True)
        groups = 1 if spec.group_size is None else place.shape[1] // spec.group_size
        factor = torch.ones(len(place), groups, dtype=torch.float64, requires_grad=True)
        parameters.append((offset, factor))

    def rounded(index: int) -> Tensor:
        (_, start, zero), (offset, factor) = starts[index], parameters[index]
        scale = start.double() * factor.repeat_interleave(start.shape[1] // factor.shape[1], dim=1)
        place = moved[index] / scale + zero + offset
        codes = (place + (torch.round(place) - place).detach()).clamp(spec.qmin, spec.qmax)
        return scale * (codes - zero)

    for step, batch in enumerate(batches):
        length = rate * (1.0 - step / len(batches))
        loss([rounded(index) for index in range(len(weights))], batch).backward()
        for offset, factor in parameters:
            assert offset.grad is not None
            assert factor.grad is not None
            with torch.no_grad():
                offset.sub_(length * offset.grad.sign()).clamp_(-0.5, 0.5)
                if ranges:
                    factor.sub_(length * factor.grad.sign()).clamp_(0.5, 1.5)
            offset.grad = factor.grad = None
    with torch.no_grad():
        return [offset.detach() for offset, _ in parameters], [rounded(index) for index in range(len(weights))]
