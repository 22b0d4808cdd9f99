"""A look-alike of GR00T N1.7, written from its published structure: the same names, shapes and flow of data.

The backbone is transformers' own Qwen3-VL, cut to its first layers. What the original does and this does not: it loads
the backbone by name from the hub, caches keys and values between denoising steps, and drops out in training.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel, Qwen3VLConfig
from transformers import Qwen3VLForConditionalGeneration as Qwen3VL
from transformers.feature_extraction_utils import BatchFeature


class CategorySpecificLinear(nn.Module):
    def __init__(self, num_categories: int, input_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.num_categories = num_categories
        self.W = nn.Parameter(0.02 * torch.randn(num_categories, input_dim, hidden_dim))
        self.b = nn.Parameter(0.02 * torch.randn(num_categories, hidden_dim))

    def forward(self, x: Tensor, cat_ids: Tensor) -> Tensor:
        return torch.bmm(x, self.W[cat_ids]) + self.b[cat_ids].unsqueeze(1)


class CategorySpecificMLP(nn.Module):
    def __init__(self, num_categories: int, input_dim: int, hidden_dim: int, output_dim: int) -> None:
        super().__init__()
        self.layer1 = CategorySpecificLinear(num_categories, input_dim, hidden_dim)
        self.layer2 = CategorySpecificLinear(num_categories, hidden_dim, output_dim)

    def forward(self, x: Tensor, cat_ids: Tensor) -> Tensor:
        return self.layer2(F.relu(self.layer1(x, cat_ids)), cat_ids)


class MultiEmbodimentActionEncoder(nn.Module):
    def __init__(self, action_dim: int, hidden_size: int, num_embodiments: int) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.W1 = CategorySpecificLinear(num_embodiments, action_dim, hidden_size)
        self.W2 = CategorySpecificLinear(num_embodiments, 2 * hidden_size, hidden_size)
        self.W3 = CategorySpecificLinear(num_embodiments, hidden_size, hidden_size)

    def forward(self, actions: Tensor, timesteps: Tensor, cat_ids: Tensor) -> Tensor:
        encoded = self.W1(actions, cat_ids)
        time = sinusoids(timesteps, self.hidden_size).to(encoded.dtype)
        time = time.unsqueeze(1).expand(-1, actions.shape[1], -1)
        return self.W3(F.silu(self.W2(torch.cat([encoded, time], dim=-1), cat_ids)), cat_ids)


def sinusoids(steps: Tensor, width: int) -> Tensor:
    """[b] -> [b, width]."""
    powers = torch.arange(width // 2, device=steps.device) * (-math.log(10000.0) / (width // 2))
    angles = steps.float().unsqueeze(-1) * powers.exp()
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class TimestepEmbedding(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(256, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class TimestepEncoder(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.timestep_embedder = TimestepEmbedding(dim)

    def forward(self, timesteps: Tensor) -> Tensor:
        return self.timestep_embedder(sinusoids(timesteps, 256).to(next(self.parameters()).dtype))


class AdaLayerNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, 2 * dim)
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        scale, shift = self.linear(F.silu(temb)).chunk(2, dim=1)
        return self.norm(x) * (1 + scale[:, None]) + shift[:, None]


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int, cross_dim: int | None) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(cross_dim or dim, dim)
        self.to_v = nn.Linear(cross_dim or dim, dim)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim), nn.Dropout(0.0)])

    def forward(self, x: Tensor, seen: Tensor | None, mask: Tensor | None) -> Tensor:
        seen = x if seen is None else seen
        q, k, v = (
            y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (self.to_q(x), self.to_k(seen), self.to_v(seen))
        )
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=None if mask is None else mask[:, None, None])
        return self.to_out[1](self.to_out[0](mixed.transpose(1, 2).flatten(2)))


class GELU(nn.Module):
    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, inner)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([GELU(dim, 4 * dim), nn.Dropout(0.0), nn.Linear(4 * dim, dim), nn.Dropout(0.0)])

    def forward(self, x: Tensor) -> Tensor:
        for module in self.net:
            x = module(x)
        return x


class BasicTransformerBlock(nn.Module):
    def __init__(self, dim: int, heads: int, *, cross_dim: int | None = None, adaptive: bool = False) -> None:
        super().__init__()
        self.norm1 = AdaLayerNorm(dim) if adaptive else nn.LayerNorm(dim)
        self.attn1 = Attention(dim, heads, cross_dim)
        self.norm3 = nn.LayerNorm(dim, elementwise_affine=not adaptive)
        self.ff = FeedForward(dim)

    def forward(
        self, x: Tensor, temb: Tensor | None = None, seen: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        normed = self.norm1(x) if temb is None else self.norm1(x, temb)
        x = x + self.attn1(normed, seen, mask)
        return x + self.ff(self.norm3(x))


class AlternateVLDiT(nn.Module):
    """Even blocks attend to words and images in turn, odd ones to the actions themselves."""

    def __init__(self, dim: int, heads: int, layers: int, cross_dim: int, output_dim: int) -> None:
        super().__init__()
        self.timestep_encoder = TimestepEncoder(dim)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(dim, heads, cross_dim=None if index % 2 else cross_dim, adaptive=True)
            for index in range(layers)
        )
        self.norm_out = nn.LayerNorm(dim, elementwise_affine=False)
        self.proj_out_1 = nn.Linear(dim, 2 * dim)
        self.proj_out_2 = nn.Linear(dim, output_dim)

    def forward(self, x: Tensor, seen: Tensor, timestep: Tensor, image_mask: Tensor, mask: Tensor) -> Tensor:
        temb = self.timestep_encoder(timestep)
        for index, block in enumerate(self.transformer_blocks):
            shown = (image_mask if index % 4 else ~image_mask) & mask
            x = block(x, temb) if index % 2 else block(x, temb, seen, shown)
        shift, scale = self.proj_out_1(F.silu(temb)).chunk(2, dim=1)
        return self.proj_out_2(self.norm_out(x) * (1 + scale[:, None]) + shift[:, None])


class SelfAttentionTransformer(nn.Module):
    def __init__(self, dim: int, heads: int, layers: int) -> None:
        super().__init__()
        self.transformer_blocks = nn.ModuleList(BasicTransformerBlock(dim, heads) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.transformer_blocks:
            x = block(x)
        return x


class Gr00tN1d7Config(PreTrainedConfig):
    model_type = "Gr00tN1d7"

    def __init__(
        self,
        backbone_config: dict[str, Any] | None = None,
        select_layer: int = 16,
        max_state_dim: int = 132,
        max_action_dim: int = 132,
        action_horizon: int = 40,
        hidden_size: int = 1024,
        input_embedding_dim: int = 1536,
        max_seq_len: int = 1024,
        dit_layers: int = 32,
        dit_heads: int = 32,
        vl_layers: int = 4,
        vl_heads: int = 32,
        num_inference_timesteps: int = 4,
        num_timestep_buckets: int = 1000,
        max_num_embodiments: int = 32,
        **kwargs: Any,
    ) -> None:
        self.backbone_config = backbone_config or {}
        self.select_layer = select_layer
        self.max_state_dim, self.max_action_dim = max_state_dim, max_action_dim
        self.action_horizon = action_horizon
        self.hidden_size, self.input_embedding_dim = hidden_size, input_embedding_dim
        self.max_seq_len = max_seq_len
        self.dit_layers, self.dit_heads = dit_layers, dit_heads
        self.vl_layers, self.vl_heads = vl_layers, vl_heads
        self.num_inference_timesteps = num_inference_timesteps
        self.num_timestep_buckets = num_timestep_buckets
        self.max_num_embodiments = max_num_embodiments
        super().__init__(**kwargs)


class Gr00tN1d7ActionHead(nn.Module):
    def __init__(self, config: Gr00tN1d7Config, backbone_dim: int) -> None:
        super().__init__()
        self.config = config
        robots, width = config.max_num_embodiments, config.input_embedding_dim
        self.model = AlternateVLDiT(width, config.dit_heads, config.dit_layers, backbone_dim, config.hidden_size)
        self.state_encoder = CategorySpecificMLP(robots, config.max_state_dim, config.hidden_size, width)
        self.action_encoder = MultiEmbodimentActionEncoder(config.max_action_dim, width, robots)
        self.action_decoder = CategorySpecificMLP(robots, config.hidden_size, config.hidden_size, config.max_action_dim)
        self.vlln = nn.LayerNorm(backbone_dim)
        self.vl_self_attention = SelfAttentionTransformer(backbone_dim, config.vl_heads, config.vl_layers)
        self.position_embedding = nn.Embedding(config.max_seq_len, width)

    def features(self, seen: BatchFeature) -> Tensor:
        return self.vl_self_attention(self.vlln(seen["backbone_features"]))

    def velocity(
        self, vl: Tensor, seen: BatchFeature, state: Tensor, actions: Tensor, steps: Tensor, robot: Tensor
    ) -> Tensor:
        made = self.action_encoder(actions, steps, robot)
        made = made + self.position_embedding(torch.arange(made.shape[1], device=made.device)).unsqueeze(0)
        tokens = torch.cat([self.state_encoder(state.flatten(1).unsqueeze(1), robot), made], dim=1)
        output = self.model(tokens, vl, steps, seen["image_mask"], seen["backbone_attention_mask"])
        return self.action_decoder(output, robot)[:, -actions.shape[1] :]

    def forward(self, seen: BatchFeature, batch: BatchFeature) -> BatchFeature:
        """The error of the velocity at a random time between noise and action."""
        actions = batch["action"]
        noise = torch.randn_like(actions)
        time = ((1 - torch.distributions.Beta(1.5, 1.0).sample([len(actions)])) * 0.999).to(actions.dtype)
        noisy = (1 - time[:, None, None]) * noise + time[:, None, None] * actions
        steps = (time * self.config.num_timestep_buckets).long()
        velocity = self.velocity(self.features(seen), seen, batch["state"], noisy, steps, batch["embodiment_id"])
        error = F.mse_loss(velocity, actions - noise, reduction="none") * batch["action_mask"]
        return BatchFeature({"loss": error.sum() / batch["action_mask"].sum(), "action_loss": error})

    def get_action(self, seen: BatchFeature, batch: BatchFeature) -> BatchFeature:
        vl, count = self.features(seen), self.config.num_inference_timesteps
        actions = torch.randn(len(vl), self.config.action_horizon, self.config.max_action_dim, dtype=vl.dtype)
        for step in range(count):
            steps = torch.full((len(vl),), int(step / count * self.config.num_timestep_buckets))
            velocity = self.velocity(vl, seen, batch["state"], actions, steps, batch["embodiment_id"])
            actions = actions + velocity / count
        return BatchFeature({"action_pred": actions})


class Qwen3Backbone(nn.Module):
    def __init__(self, config: Gr00tN1d7Config) -> None:
        super().__init__()
        self.model: Any = Qwen3VL(Qwen3VLConfig(**config.backbone_config))
        del self.model.model.language_model.layers[config.select_layer :]

    def forward(self, batch: BatchFeature) -> BatchFeature:
        given = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values", "image_grid_thw")}
        # Newer versions of transformers do not find the places of pictures themselves
        kinds = (batch["input_ids"] == self.model.config.image_token_id).int()
        found = self.model(**given, mm_token_type_ids=kinds, output_hidden_states=True, logits_to_keep=1)
        return BatchFeature(
            {
                "backbone_features": found.hidden_states[-1],
                "backbone_attention_mask": batch["attention_mask"] == 1,
                "image_mask": batch["input_ids"] == self.model.config.image_token_id,
            }
        )


class Gr00tN1d7(PreTrainedModel):
    config_class = Gr00tN1d7Config

    def __init__(self, config: Gr00tN1d7Config) -> None:
        super().__init__(config)
        self.backbone = Qwen3Backbone(config)
        self.action_head = Gr00tN1d7ActionHead(config, self.backbone.model.config.text_config.hidden_size)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """All values come from the constructors."""

    def _given(self, inputs: dict[str, Tensor]) -> BatchFeature:
        dtype = next(self.parameters()).dtype
        return BatchFeature({n: x.to(dtype) if x.is_floating_point() else x for n, x in inputs.items()})

    def forward(self, inputs: dict[str, Tensor]) -> BatchFeature:
        batch = self._given(inputs)
        return self.action_head(self.backbone(batch), batch)

    @torch.no_grad()
    def get_action(self, inputs: dict[str, Tensor]) -> BatchFeature:
        batch = self._given(inputs)
        return self.action_head.get_action(self.backbone(batch), batch)


AutoConfig.register("Gr00tN1d7", Gr00tN1d7Config, exist_ok=True)
AutoModel.register(Gr00tN1d7Config, Gr00tN1d7, exist_ok=True)
