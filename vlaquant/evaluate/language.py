"""How far a quantized language model is from the float one, on text."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlaquant.errors import EvaluationError
from vlaquant.evaluate.statistics import percentiles_ms


@dataclass(frozen=True, slots=True)
class LanguageError:
    """Candidate against reference on the same windows of text.

    Attributes:
        perplexity: exp of the candidate's mean negative log-likelihood per token.
        reference_perplexity: the reference's.
        divergence: mean Kullback-Leibler divergence of the candidate from the reference, nats per token.
        top1_agreement: share of positions with the same most likely token.
        tokens: how many were predicted.
    """

    perplexity: float
    reference_perplexity: float
    divergence: float
    top1_agreement: float
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@torch.inference_mode()
def compare_text(
    candidate: nn.Module,
    reference: nn.Module,
    windows: Sequence[Tensor],
    progress: Callable[[Sequence[Tensor]], Sequence[Tensor]],
) -> tuple[LanguageError, dict[str, Any]]:
    """Run both models over every window [1, t] in turn.

    Returns:
        The error, and the latency of one window of each, with their ratio.

    Raises:
        EvaluationError: no text.
    """
    if not windows:
        raise EvaluationError("no text to compare the models on")
    sums = torch.zeros(4, dtype=torch.float64)
    count = 0
    seconds: dict[str, list[float]] = {"candidate": [], "reference": []}
    for ids in progress(windows):
        mine, elapsed = _logits(candidate, ids)
        seconds["candidate"].append(elapsed)
        theirs, elapsed = _logits(reference, ids)
        seconds["reference"].append(elapsed)
        target = ids[0, 1:]
        p, q = theirs[0, :-1].float().log_softmax(-1), mine[0, :-1].float().log_softmax(-1)
        sums += torch.stack(
            [
                F.nll_loss(q, target, reduction="sum"),
                F.nll_loss(p, target, reduction="sum"),
                F.kl_div(q, p, reduction="sum", log_target=True),
                (p.argmax(-1) == q.argmax(-1)).sum(),
            ]
        ).double()
        count += len(target)
    mean = (sums / count).tolist()
    error = LanguageError(math.exp(mean[0]), math.exp(mean[1]), mean[2], mean[3], count)
    latency: dict[str, Any] = {who: percentiles_ms(values) for who, values in seconds.items()}
    latency["ratio"] = latency["reference"]["p50_ms"] / latency["candidate"]["p50_ms"]
    return error, latency


def _logits(model: nn.Module, ids: Tensor) -> tuple[Tensor, float]:
    started = perf_counter()
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits, perf_counter() - started
