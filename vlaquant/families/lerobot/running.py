"""What a LeRobot policy does with its inputs: for calibration, for acting, and to see whether it sees."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from vlaquant.errors import CalibrationError
from vlaquant.families.base import Decision, Inputs, TokenType
from vlaquant.families.lerobot.processing import ACTION, NOISE, STATE, TIME, TOKEN_MASK, TOKENS, complete
from vlaquant.families.objectives import roots


def run(policy: Any, inputs: Inputs) -> Tensor:
    """Every denoising step, and then the joint pass of training towards the demonstrated action.

    Returns the normalized action, followed by the squared errors of the velocity where there is a demonstrated action:
    [b, numbers].
    """
    with eager(policy):
        sampled = _sample(policy, inputs)
        if ACTION not in inputs:
            return sampled.flatten(1)
        with torch.no_grad():
            errors = _errors(policy, inputs)
        return torch.cat([sampled.flatten(1), errors.flatten(1)], dim=1)


def decide(policy: Any, inputs: Inputs) -> Decision:
    """The errors of the velocity at the sample's random time, in the joint pass of training."""
    if ACTION not in inputs:
        raise CalibrationError("weighing tokens by gradients takes the pass of training; use data with actions")
    with eager(policy):
        return Decision(roots(_errors(policy, inputs)), tokens=False)


def act(policy: Any, inputs: Inputs) -> Tensor:
    """The action [chunk, dims], in the units of the robot if the policy has its post-processor, else normalized."""
    with eager(policy):
        action = _sample(policy, inputs).float()
    processors = getattr(policy, "processors", None)
    if processors is not None and processors.present:
        action = processors.after(action)
    return action[0]


@contextmanager
def eager(policy: Any) -> Iterator[None]:
    """Inside, nothing that ``compile_model`` wrapped is compiled: hooks would not see its Linears."""
    attributes = policy.model.__dict__
    wrapped = {name: attributes[name] for name in ("sample_actions", "forward") if name in attributes}
    compiled = {name: call for name, call in wrapped.items() if hasattr(call, "_torchdynamo_orig_callable")}
    for name in compiled:
        del attributes[name]
    try:
        yield
    finally:
        attributes.update(compiled)


def _batch(inputs: Inputs) -> dict[str, Tensor]:
    """A copy, as policies for ALOHA change states and actions in place."""
    return {name: tensor.clone() for name, tensor in inputs.items() if name not in {NOISE, TIME}}


def _sample(policy: Any, inputs: Inputs) -> Tensor:
    batch = {name: tensor for name, tensor in _batch(inputs).items() if name != ACTION}
    action: Tensor = policy.predict_action_chunk(batch, noise=inputs[NOISE].clone())
    return action


def _errors(policy: Any, inputs: Inputs) -> Tensor:
    """The joint pass of training with the inputs' noise and time: squared errors [b, chunk, padded dims]."""
    batch = _batch(inputs)
    if getattr(policy.config, "adapt_to_pi_aloha", False):
        batch[STATE] = policy._pi_aloha_decode_state(batch[STATE])  # noqa: SLF001  as the policy's own forward does
        batch[ACTION] = policy._pi_aloha_encode_actions_inv(batch[ACTION])  # noqa: SLF001
    images, seen = prepared_images(policy, batch)
    state = [policy.prepare_state(batch)] if hasattr(policy, "prepare_state") else []
    action = policy.prepare_action(batch)
    time, noise = inputs[TIME].clone(), inputs[NOISE].clone()
    errors: Tensor = policy.model.forward(images, seen, batch[TOKENS], batch[TOKEN_MASK], *state, action, noise, time)
    return errors


def prepared_images(policy: Any, batch: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Images as the vision tower takes them, and for each whether it is a camera [b] and not a dummy."""
    prepare = getattr(policy, "prepare_images", None) or policy._preprocess_images  # noqa: SLF001
    images, seen = prepare(batch)
    return list(images), list(seen)


def token_masks(policy: Any, inputs: Inputs) -> dict[str, Tensor]:
    """Cameras in the order in which they go through the vision tower; for the language the whole prefix [b, t].

    Expert layers that turn the language's keys and values into their own read the prefix, too.
    """
    _, seen = prepared_images(policy, _batch(inputs))
    whole = torch.cat(seen)
    mask = torch.cat([counts for _, counts in _prefix(policy, inputs)], dim=1)
    return {"vision": whole, "projector": whole} | _for_readers_of_prefix(policy, mask)


def token_types(policy: Any, inputs: Inputs) -> dict[str, Tensor]:
    """Of the prefix. The expert's own tokens are all actions, but for the state that π0 puts before them."""
    parts = [torch.full_like(counts, kind, dtype=torch.int64) for kind, counts in _prefix(policy, inputs)]
    types = _for_readers_of_prefix(policy, torch.cat(parts, dim=1))
    if policy.config.type == "pi0":
        order = [TokenType.STATE, *[TokenType.ACTION] * policy.config.chunk_size]
        types["expert"] = torch.tensor(order).expand(len(inputs[TOKENS]), -1)
    return types


def _for_readers_of_prefix(policy: Any, values: Tensor) -> dict[str, Tensor]:
    """The language, and the expert's layers that turn its keys and values into their own."""
    crossing = {f"{layer}.self_attn.{name}_proj": values for layer in _crossing_layers(policy) for name in "kv"}
    return {"language": values} | crossing


def _prefix(policy: Any, inputs: Inputs) -> list[tuple[TokenType, Tensor]]:
    """The tokens that the language model reads, in pieces: of what type they are, and which of them count [b, t]."""
    images, seen = prepared_images(policy, _batch(inputs))
    pieces: list[tuple[TokenType, Tensor]] = []
    special = getattr(policy.config, "add_image_special_tokens", False)
    for image, camera in zip(images, seen, strict=True):
        around = [torch.ones(len(camera), 2, dtype=torch.bool, device=camera.device)] if special else []
        tokens = camera[:, None].expand(-1, _image_tokens(policy, image))
        pieces += [(TokenType.IMAGE, part) for part in (*around, tokens, *(one[:, :1] for one in around))]
    pieces.append((TokenType.TEXT, inputs[TOKEN_MASK].bool()))
    if policy.config.type == "smolvla":  # the state is a token of the prefix
        counts = torch.ones(len(inputs[TOKENS]), 1, dtype=torch.bool, device=inputs[TOKENS].device)
        pieces.append((TokenType.STATE, counts))
    missing = getattr(policy.config, "prefix_length", -1) - sum(counts.shape[1] for _, counts in pieces)
    if missing > 0:
        pieces.append((TokenType.TEXT, pieces[-1][1].new_zeros(len(inputs[TOKENS]), missing)))
    return pieces


def _crossing_layers(policy: Any) -> list[str]:
    """SmolVLA's expert layers that attend to the language's keys and values only."""
    if policy.config.type != "smolvla" or "cross" not in policy.config.attention_mode:
        return []
    both, every = policy.model.vlm_with_expert, policy.config.self_attn_every_n_layers
    return [
        f"model.vlm_with_expert.lm_expert.layers.{index}"
        for index in range(both.num_expert_layers)
        if every <= 0 or index % every
    ]


def _image_tokens(policy: Any, image: Tensor) -> int:
    """How many tokens of the prefix one image is."""
    if policy.config.type == "smolvla":
        backbone = policy.model.vlm_with_expert.vlm.config
        side = backbone.vision_config.patch_size
        return int((image.shape[-2] // side) * (image.shape[-1] // side) // backbone.scale_factor**2)
    side = policy.model.paligemma_with_expert.paligemma.config.vision_config.patch_size
    return int((image.shape[-2] // side) * (image.shape[-1] // side))


def example(policy: Any) -> Inputs:
    """All cameras with noise, six words and two of padding."""
    config, draw = policy.config, torch.Generator().manual_seed(0)
    batch = {
        name: torch.rand((1, *feature.shape), generator=draw)
        for name, feature in config.image_features.items()
        if ".empty_camera_" not in name
    }
    mask = torch.ones(1, 8, dtype=torch.bool)
    mask[:, 6:] = False
    batch |= {
        TOKENS: torch.randint(3, 32, (1, 8), generator=draw),
        TOKEN_MASK: mask,
        STATE: torch.rand((1, config.input_features[STATE].shape[0]), generator=draw),
        ACTION: torch.rand((1, config.chunk_size, config.output_features[ACTION].shape[0]), generator=draw),
    }
    return complete(policy, batch, seed=0)


def check(policy: Any, inputs: Inputs) -> None:
    """The policy must see: another action for another image, from the same noise.

    Raises:
        CalibrationError: it does not, all its cameras are masked out, or its actions are NaN.
    """
    _, seen = prepared_images(policy, _batch(inputs))
    if not any(bool(camera.any()) for camera in seen):
        raise CalibrationError("all cameras are masked out, so there is nothing to see; give images")
    negative = {name: 1 - inputs[name] for name in policy.config.image_features if name in inputs}
    with torch.inference_mode(), eager(policy):
        change = float((_sample(policy, inputs) - _sample(policy, inputs | negative)).abs().max())
    if not change >= 0:
        raise CalibrationError("the actions are NaN: check the weights and the dtype")
    if change == 0:
        raise CalibrationError(
            "two different images give the same action: the image does not reach it. Check that the vision weights "
            "were loaded, and that the checkpoint matches its config.json"
        )
