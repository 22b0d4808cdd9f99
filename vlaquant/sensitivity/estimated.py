"""Estimated sensitivity: a second-order Taylor expansion with the Fisher information of the policy's own decisions.

Let p(a) be what a policy chooses its action from. Changing weights by δ moves it by

    KL(p ‖ p_δ) ≈ ½ δᵀ F δ,        F = E over a ~ p of g gᵀ,        g = ∂ −log p(a) / ∂ weights

so the expected (gᵀδ)² / 2 over actions that are drawn *from the policy* is the divergence that rounding causes
(Optimal Brain Damage, LeCun et al. 1989, with the Fisher information for the Hessian; drawn, and not demonstrated
actions, as Kunstner et al. 2019, arXiv:1905.12558, advise). A policy that gives numbers is taken as a normal
distribution around them with variance 1; with random signs v in the place of its noise, g = ∂ vᵀ a / ∂ weights and the
expected (gᵀδ)² is the squared change of the numbers (Hutchinson's estimator of a trace).

gᵀδ is a sum over the tokens of a layer, ∂L/∂y_t · δ x_t, so neither the gradient of a weight nor that of another sample
is kept: one product ∂L/∂yᵀ x, one inner product with the δ of each candidate, one number each.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from vlaquant.calibrate.running import blamed_on, seeded
from vlaquant.errors import CalibrationError
from vlaquant.families.objectives import objective
from vlaquant.sensitivity.effects import Policy, each_sample
from vlaquant.sensitivity.groups import Group
from vlaquant.sensitivity.rounding import Codes


def estimate(
    model: nn.Module,
    policy: Policy,
    samples: Sequence[Any],
    positions: Sequence[int],
    groups: Sequence[Group],
    codes: Codes,
    progress: Callable[[Iterable[Any]], Iterable[Any]],
    *,
    seed: int,
) -> list[list[float]]:
    """The expected effect of each group in each candidate, [groups][candidates].

    For tokens the Kullback-Leibler divergence, nats a token; for numbers the mean squared difference of what
    ``Family.decide`` returns. Each sample costs one forward and one backward pass.

    Raises:
        CalibrationError: no gradient reaches the layers, or it is NaN.
    """
    owner = {name: g for g, group in enumerate(groups) for name in group.names}
    sums = torch.zeros(len(groups), len(codes), dtype=torch.float64)
    reached: set[str] = set()
    for position, prepared in progress(each_sample(policy, samples, positions)):
        products = torch.zeros_like(sums)
        with blamed_on(position), torch.enable_grad(), _Watched(model, owner, codes, products, reached):
            decision = policy.decide(model, prepared)
            if not decision.output.requires_grad:
                raise CalibrationError(
                    "no gradient goes through this policy's path, so its sensitivity cannot be estimated; use "
                    "'method: measured' (--measured)"
                )
            with seeded((seed << 32) + position):
                loss = objective(decision)
            torch.autograd.backward(loss)
        rows = decision.output.shape[0] if decision.tokens else decision.output.numel()
        sums += products.square() * ((0.5 if decision.tokens else 1.0) / (rows * len(positions)))
    missing = [name for name in owner if name not in reached]
    if missing:
        raise CalibrationError(
            f"no gradient of the action reaches {len(missing)} of {len(owner)} layers, such as {missing[0]}, so their "
            "sensitivity cannot be estimated; use 'method: measured' (--measured)"
        )
    if not bool(sums.isfinite().all()):
        raise CalibrationError("the gradients of the action are NaN: check the weights and the dtype")
    return sums.tolist()


class _Watched(ExitStack):
    """While it is open, a backward pass adds the gᵀδ of layers that it reaches to ``products`` [groups, candidates]."""

    def __init__(
        self, model: nn.Module, owner: dict[str, int], codes: Codes, products: Tensor, reached: set[str]
    ) -> None:
        super().__init__()
        for name, g in owner.items():
            layer = model.get_submodule(name)
            assert isinstance(layer, nn.Linear)
            changes = [_change(layer, weights[name]) for weights in codes.values()]
            self.callback(layer.register_forward_hook(_hook(name, changes, products[g], reached)).remove)


def _change(layer: nn.Linear, weight: Any) -> Callable[[], Tensor]:
    """δ [n, k], made when it is needed: all of them at once would be several models in float32."""
    return lambda: weight.dequantize() - layer.weight.detach().to(torch.float32)


def _hook(
    name: str, changes: Sequence[Callable[[], Tensor]], products: Tensor, reached: set[str]
) -> Callable[..., Tensor]:
    def hook(_layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return output
        x = args[0].detach()
        version = x._version  # noqa: SLF001  torch checks only what its own graph keeps
        # The weights have no gradients, so the graph begins at the first layer that is watched
        y = output if output.requires_grad else output.detach().requires_grad_().clone()

        def collect(gradient: Tensor) -> None:
            if x._version != version:  # noqa: SLF001
                raise CalibrationError(f"{name}: the model changes what the layer read in place; measure instead")
            reached.add(name)
            rows = gradient.reshape(-1, gradient.shape[-1]).to(torch.float32)
            g = rows.T @ x.reshape(-1, x.shape[-1]).to(torch.float32)
            for c, change in enumerate(changes):
                products[c] += float((g * change()).sum(dtype=torch.float64))

        y.register_hook(collect)
        return y

    return hook
