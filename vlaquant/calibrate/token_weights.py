"""How much each token matters to what the model decides, from one backward pass a sample.

Rounding a weight moves the output of its Linear at token t by e_t = ΔW·x_t. To second order that changes what the model
decides by Σ_t (∂L/∂y_t · e_t)². Where nothing is known of the direction of e_t, its size counts with
ω_t = ‖∂L/∂y_t‖², and the error to be minimized becomes Σ_t ω_t‖ΔW·x_t‖²: a Hessian of weighted tokens.
Sources: MBQ (Li et al. 2024, arXiv:2412.19509, one weight a modality), GuidedQuant (Kim et al. 2025, arXiv:2505.07004,
section 3, here with one group of output channels).

L is the objective of a decision: something whose squared gradient, in the mean over what it draws, is the curvature of
the difference between the decisions of two models (the Fisher information of token policies; Gauss-Newton for actions
that are numbers). A loss on demonstrated actions would be small just where the policy is sure of itself.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vlaquant.errors import CalibrationError


def gradient_weights(
    model: nn.Module, layers: Sequence[str], objective: Callable[[], Tensor], shared: Sequence[Sequence[str]] = ()
) -> dict[str, list[Tensor]]:
    """ω_t = ‖∂L/∂y_t‖² for what every layer gives at every token t of one sample.

    Args:
        model: holds its weights; nothing of it is changed.
        layers: names of Linears.
        objective: runs the sample and returns L, a scalar.
        shared: sets of layers that read the very same tensors and have one Hessian: each gets the sum of their weights.

    Returns:
        For each layer one float32 tensor [..., tokens] a call, of the shape of the layer's output without its last
        dimension.

    Raises:
        CalibrationError: L depends on no layer, is not finite, or does not depend on one of the layers.
    """
    found: dict[str, list[Tensor]] = {name: [] for name in layers}
    with torch.inference_mode(mode=False), torch.enable_grad(), ExitStack() as stack:
        stack.enter_context(_frozen(model))
        # Gives the first layers something to differentiate by, though no parameter is
        origin = torch.zeros((), requires_grad=True)
        for name in layers:
            hook = model.get_submodule(name).register_forward_hook(_watch(found[name], origin))
            stack.callback(hook.remove)
        loss = objective()
        if not loss.requires_grad:
            raise CalibrationError("the gradient of the action reaches no layer: the model computes without gradients")
        if not bool(loss.isfinite()):
            raise CalibrationError(f"what tokens are weighed by is {loss.item()}; look at the data and the weights")
        loss.backward()
    lost = [name for name, calls in found.items() if not any(bool(each.any()) for each in calls)]
    if lost:
        raise CalibrationError(
            f"no gradient of the action reaches {', '.join(lost[:5])}{f' and {len(lost) - 5} more' * (len(lost) > 5)}; "
            "keep these layers in float, or weigh tokens by their type"
        )
    for names in shared:
        together = [name for name in names if name in found]
        for calls in zip(*(found[name] for name in together), strict=True):
            total = torch.stack([call.clone() for call in calls]).sum(dim=0)
            for call in calls:
                call.copy_(total)
    return found


def _watch(calls: list[Tensor], origin: Tensor) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    def watch(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        if not output.requires_grad:
            output = output + origin.to(output)
        weights = torch.zeros(output.shape[:-1])
        calls.append(weights)

        def keep(gradient: Tensor) -> None:
            weights.copy_(gradient.float().square().sum(dim=-1))

        output.register_hook(keep)
        return output

    return watch


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No gradients of parameters, which would take as much memory as the model."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad = False
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad = True
