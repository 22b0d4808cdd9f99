"""What the look-alikes of LeRobot's flow policies share: the outer policy, sampling and the pass of training.

Written from the published structure of lerobot 0.6.1: the same module names, the same order of calls, the same reads of
``weight.dtype``; sizes come from ``config.json``.
"""

import math
from collections import deque
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

STATE, ACTION = "observation.state", "action"
TOKENS, TOKEN_MASK = "observation.language.tokens", "observation.language.attention_mask"


def padded(vector: Tensor, width: int) -> Tensor:
    return F.pad(vector, (0, width - vector.shape[-1]))


def embedded_time(time: Tensor, width: int) -> Tensor:
    """Sines and cosines [b, width]."""
    period = 4e-3 * 1e3 ** torch.linspace(0.0, 1.0, width // 2, dtype=torch.float64)
    angle = time[:, None] * (2 * math.pi / period)[None]
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def rotated(x: Tensor, positions: Tensor) -> Tensor:
    """Rotary embedding of x [b, t, heads, d] in float32."""
    half = x.shape[-1] // 2
    angle = positions[..., None].float() / 10_000 ** (torch.arange(half).float() / half)
    sin, cos = angle.sin()[:, :, None], angle.cos()[:, :, None]
    one, two = x.float().split(half, dim=-1)
    return torch.cat([one * cos - two * sin, two * cos + one * sin], dim=-1).to(x.dtype)


def attended(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    """Attention of q [b, t, heads, d] to k, v [b, s, kv heads, d] where ``allowed`` [b, t, s]; [b, t, heads · d]."""
    groups = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(groups, dim=2), v.repeat_interleave(groups, dim=2)
    weights = torch.einsum("bthd,bshd->bhts", q.float(), k.float()) * q.shape[-1] ** -0.5
    weights = weights.masked_fill(~allowed[:, None], torch.finfo(torch.float32).min).softmax(dim=-1)
    return torch.einsum("bhts,bshd->bthd", weights.to(v.dtype), v).flatten(2)


def allowed_pairs(real: Tensor, steps: Tensor) -> Tensor:
    """[b, t, t]: a token sees real tokens of its own step and of those before."""
    order = steps.cumsum(dim=1)
    return (order[:, None, :] <= order[:, :, None]) & real[:, None, :] & real[:, :, None]


class FlowModel(nn.Module):
    """Training and sampling over ``embed_prefix``, ``embed_suffix`` and ``both`` of a subclass."""

    config: Any

    def embed_prefix(self, images: Any, seen: Any, tokens: Tensor, real: Tensor, state: Any) -> Any:
        raise NotImplementedError

    def embed_suffix(self, noisy: Tensor, time: Tensor, state: Any) -> Any:
        raise NotImplementedError

    def both(self, states: Any, allowed: Tensor, positions: Tensor, cache: Any, condition: Any, *, fill: bool) -> Any:
        raise NotImplementedError

    def forward(self, images: Any, seen: Any, tokens: Tensor, real: Tensor, *rest: Tensor) -> Tensor:
        """Squared errors of the velocity [b, chunk, dims]."""
        *state, actions, noise, time = rest
        mixed = time[:, None, None] * noise + (1 - time[:, None, None]) * actions
        prefix, prefix_real, prefix_steps = self.embed_prefix(images, seen, tokens, real, state)
        suffix, suffix_real, suffix_steps, condition = self.embed_suffix(mixed, time, state)
        reals = torch.cat([prefix_real, suffix_real], dim=1)
        allowed = allowed_pairs(reals, torch.cat([prefix_steps, suffix_steps], dim=1))
        states, _ = self.both([prefix, suffix], allowed, reals.cumsum(dim=1) - 1, None, condition, fill=False)
        return F.mse_loss(noise - actions, self.velocity(states[1]), reduction="none")

    def velocity(self, suffix: Tensor) -> Tensor:
        out: Tensor = self.action_out_proj(suffix[:, -self.config.chunk_size :].float())
        return out

    def sample_actions(
        self, images: Any, seen: Any, tokens: Tensor, real: Tensor, *state: Tensor, noise: Any
    ) -> Tensor:
        prefix, prefix_real, prefix_steps = self.embed_prefix(images, seen, tokens, real, state)
        allowed = allowed_pairs(prefix_real, prefix_steps)
        _, cache = self.both([prefix, None], allowed, prefix_real.cumsum(dim=1) - 1, {}, None, fill=True)
        steps = self.config.num_steps
        action = (
            torch.randn(len(tokens), self.config.chunk_size, self.config.max_action_dim) if noise is None else noise
        )
        for step in range(steps):
            time = torch.tensor(1 - step / steps, dtype=torch.float32).expand(len(tokens))
            action = action - self.denoised(action, time, state, prefix_real, cache) / steps
        return action

    def denoised(self, action: Tensor, time: Tensor, state: Any, prefix_real: Tensor, cache: Any) -> Tensor:
        suffix, real, steps, condition = self.embed_suffix(action, time, state)
        before = prefix_real[:, None, :].expand(-1, suffix.shape[1], -1)
        allowed = torch.cat([before, allowed_pairs(real, steps)], dim=2)
        positions = prefix_real.sum(dim=1, keepdim=True) + real.cumsum(dim=1) - 1
        states, _ = self.both([None, suffix], allowed, positions, cache, condition, fill=False)
        return self.velocity(states[1])


class FlowPolicy(nn.Module):
    """What a robot calls. Cameras that a batch lacks become images of −1 that are masked out."""

    name = ""
    side = 0

    def __init__(self, config: Any, model: nn.Module) -> None:
        super().__init__()
        self.config = config
        self.model = model
        if config.compile_model:
            self.model.sample_actions = torch.compile(self.model.sample_actions)
        self.model.to(config.device)
        self.reset()

    def reset(self) -> None:
        self._queue: deque[Tensor] = deque(maxlen=self.config.n_action_steps)

    def prepare_images(self, batch: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        present = [name for name in self.config.image_features if name in batch]
        if not present:
            raise ValueError("All image features are missing from the batch.")
        device = next(self.parameters()).device
        size = (self.side, self.side)
        images = [F.interpolate(batch[name].to(device), size) * 2 - 1 for name in present]
        seen = [torch.ones(len(images[0]), dtype=torch.bool, device=device) for _ in present]
        for _ in range(len(self.config.image_features) - len(present)):
            images.append(torch.ones_like(images[0]) * -1)
            seen.append(torch.zeros_like(seen[0]))
        return images, seen

    def prepare_action(self, batch: dict[str, Tensor]) -> Tensor:
        return padded(batch[ACTION], self.config.max_action_dim)

    @torch.no_grad()
    def predict_action_chunk(self, batch: dict[str, Tensor], noise: Tensor | None = None) -> Tensor:
        self.eval()
        images, seen = self.prepare_images(batch)
        state = [self.prepare_state(batch)] if hasattr(self, "prepare_state") else []
        sampled = self.model.sample_actions(images, seen, batch[TOKENS], batch[TOKEN_MASK], *state, noise=noise)
        return sampled[:, :, : self.config.output_features[ACTION].shape[0]]

    @torch.no_grad()
    def select_action(self, batch: dict[str, Tensor], noise: Tensor | None = None) -> Tensor:
        if not self._queue:
            self._queue.extend(self.predict_action_chunk(batch, noise=noise).transpose(0, 1))
        return self._queue.popleft()
