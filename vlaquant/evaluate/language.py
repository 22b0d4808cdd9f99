"""How far a quantized language model is from the float one, on text."""

from collections.abc import Callable, Sequence
from time import perf_counter

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlaquant.errors import EvaluationError
from vlaquant.evaluate.figures import NATS, RATIO, SHARE, Compared, Figure, compared, counted
from vlaquant.evaluate.results import LanguageFigures
from vlaquant.evaluate.statistics import Floats, bootstrap

_TOKENS = "tokens"
#: Columns of what is summed up over a window of text.
_CANDIDATE, _REFERENCE, _DIVERGENCE, _SAME, _COUNT = range(5)


@torch.inference_mode()
def compare_text(
    candidate: nn.Module,
    reference: nn.Module,
    windows: Sequence[Tensor],
    progress: Callable[[Sequence[Tensor]], Sequence[Tensor]],
) -> tuple[LanguageFigures, dict[str, list[float]]]:
    """Run both models over every window [1, t] in turn. Intervals come from drawing windows with replacement.

    Returns:
        The figures, and the seconds that each window took: ``{"candidate": …, "reference": …}``.

    Raises:
        EvaluationError: no text.
    """
    if not windows:
        raise EvaluationError("no text to compare the models on")
    seconds: dict[str, list[float]] = {"candidate": [], "reference": []}
    rows = []
    for ids in progress(windows):
        mine, elapsed = _logits(candidate, ids)
        seconds["candidate"].append(elapsed)
        theirs, elapsed = _logits(reference, ids)
        seconds["reference"].append(elapsed)
        rows.append(_sums(mine, theirs, ids[0, 1:]))
    return _figures(np.asarray(rows)), seconds


def _sums(candidate: Tensor, reference: Tensor, target: Tensor) -> list[float]:
    """Over the tokens of one window: negative log-likelihoods, divergence, equal top tokens, and how many there are."""
    p, q = reference[0, :-1].float().log_softmax(-1), candidate[0, :-1].float().log_softmax(-1)
    found = torch.stack(
        [
            F.nll_loss(q, target, reduction="sum"),
            F.nll_loss(p, target, reduction="sum"),
            F.kl_div(q, p, reduction="sum", log_target=True),
            (p.argmax(-1) == q.argmax(-1)).sum(),
        ]
    )
    return [*found.double().tolist(), float(len(target))]


def _figures(sums: Floats) -> LanguageFigures:
    tokens = int(sums[:, _COUNT].sum())

    def of(column: int, unit: str, shape: Callable[[Floats], Floats] = lambda values: values) -> Figure:
        def figure(totals: Floats) -> Floats:
            return shape(totals[:, column] / totals[:, _COUNT])

        value = float(figure(sums.sum(axis=0, keepdims=True))[0])
        return counted(value, unit, tokens, _TOKENS, bootstrap(sums, figure))

    def apart(totals: Floats) -> Floats:
        each = [np.exp(totals[:, column] / totals[:, _COUNT]) for column in (_CANDIDATE, _REFERENCE)]
        return np.asarray(each[0] - each[1])

    def times(totals: Floats) -> Floats:
        return np.asarray(np.exp((totals[:, _CANDIDATE] - totals[:, _REFERENCE]) / totals[:, _COUNT]))

    before, after = of(_REFERENCE, "perplexity", np.exp), of(_CANDIDATE, "perplexity", np.exp)
    both = compared(before, after, bootstrap(sums, apart))
    ratio = counted(both.ratio.value, RATIO, tokens, _TOKENS, bootstrap(sums, times))
    return LanguageFigures(
        Compared(before, after, ratio, both.difference),
        of(_DIVERGENCE, NATS),
        of(_SAME, SHARE),
        tokens,
    )


def _logits(model: nn.Module, ids: Tensor) -> tuple[Tensor, float]:
    started = perf_counter()
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits, perf_counter() - started
