"""The language model's part of an action: one pass over prompt and image, then greedily one token after another.

transformers' ``forward`` makes a mask, positions and longer copies of all cached keys and values at every step, and
passes through four Python calls a block. A plain Llama is run here by the same tensor operations in the same order, so
results are equal bit for bit, into a cache that is allocated once an action. Everything else (another language model,
hooks on its blocks, another attention than SDPA) goes through transformers.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaForCausalLM

#: (block, q [1, h, t, d], k and v [1, kv heads, t, d], softmax scale) -> what the queries see [1, h, t, d].
Attend = Callable[[int, Tensor, Tensor, Tensor, float], Tensor]

#: A compiled step is made for one length of the cache; this many positions at a time keep prompts at one length.
_CAPACITY_STEP = 64
#: CUDA graphs, and values rounded wherever the plain step rounds them.
_INDUCTOR_OPTIONS: dict[str, str | int | bool | Callable[..., Any]] = {
    "triton.cudagraphs": True,
    "emulate_precision_casts": True,
}
#: Attributes of a module whose calls somebody sees or takes over: hooks of torch, of accelerate, a forward of its own.
_WATCHERS = ("_forward_hooks", "_forward_pre_hooks", "_hf_hook", "forward")


def hidden_states(language_model: nn.Module, embeddings: Tensor, mask: Tensor | None = None) -> Tensor:
    """Last hidden states [b, t, width] of one causal pass, or of one under ``mask`` [b, 1, t, t] of added scores."""
    model: Any = language_model.model
    if not is_plain(language_model):
        states: Tensor = model(inputs_embeds=embeddings, attention_mask=mask, use_cache=False).last_hidden_state
        return states

    def attend(_block: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return _attention(q, k, v, scale, mask, is_causal=mask is None)

    return _run(model, embeddings, _rotations(model, embeddings, embeddings.shape[1]), attend)


def decode(language_model: nn.Module, embeddings: Tensor, count: int, compiled: "CompiledStep | None" = None) -> Tensor:
    """The ``count`` likeliest tokens one after another, from a prompt's ``embeddings`` [1, t, width]. Returns [count].

    ``compiled`` takes the steps after the first token, where :func:`is_plain` holds.
    """
    if not is_plain(language_model):
        return _decode_by_transformers(language_model, embeddings, count)
    if compiled is not None:
        return compiled.decode(language_model, embeddings, count)
    model: Any = language_model.model
    start = embeddings.shape[1]
    cos, sin = _rotations(model, embeddings, start + count - 1)
    keys, values = (cache.unbind() for cache in _empty_cache(model.config, embeddings, start + count - 1))
    begin, end = 0, start

    def attend(block: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        keys[block][:, :, begin:end] = k
        values[block][:, :, begin:end] = v
        return _attention(q, keys[block][:, :, :end], values[block][:, :, :end], scale, is_causal=begin == 0)

    tokens: list[Tensor] = []
    while True:
        states = _run(model, embeddings, (cos[..., begin:end, :], sin[..., begin:end, :]), attend)
        tokens.append(_likeliest(language_model, states))
        if len(tokens) == count:
            return torch.cat(tokens, dim=1)[0]
        embeddings = model.embed_tokens(tokens[-1])
        begin, end = end, end + 1


def is_plain(language_model: nn.Module) -> bool:
    """Whether this module may run the blocks itself: a Llama with SDPA, and nobody who watches or moves its blocks."""
    if type(language_model) is not LlamaForCausalLM or language_model.training:
        return False
    model: Any = language_model.model
    # These frequencies depend on the longest position so far
    if "dynamic" in model.rotary_emb.rope_type or model.rotary_emb.rope_type == "longrope":
        return False
    watched = [language_model, model, *model.layers, *(block.self_attn for block in model.layers)]
    return model.config._attn_implementation == "sdpa" and not any(  # noqa: SLF001 - it has no public name
        vars(module).get(name) for module in watched for name in _WATCHERS
    )


class CompiledStep:
    """``torch.compile`` of one token's pass, over a cache of fixed length: as CUDA graphs where there is a GPU.

    Steps of one policy share that cache, so actions that are asked for at the same time wait for each other. A copy of
    the policy compiles again.
    """

    def __init__(self, backend: str) -> None:
        self._backend = backend
        options = _INDUCTOR_OPTIONS if backend == "inductor" else None
        self._step = torch.compile(_static_step, backend=backend, options=options, dynamic=False)
        self._cache: tuple[Tensor, Tensor] | None = None
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type, tuple[str]]:
        return CompiledStep, (self._backend,)

    def decode(self, language_model: nn.Module, embeddings: Tensor, count: int) -> Tensor:
        """As the function of this name."""
        model: Any = language_model.model
        start = embeddings.shape[1]
        with self._lock:
            keys, values = self._cleared_cache(model.config, embeddings, start + count - 1)
            capacity = keys.shape[3]

            def attend(block: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
                keys[block, :, :, :start] = k
                values[block, :, :, :start] = v
                return _attention(q, k, v, scale, is_causal=True)

            cos, sin = _rotations(model, embeddings, capacity)
            states = _run(model, embeddings, (cos[..., :start, :], sin[..., :start, :]), attend)
            tokens = [_likeliest(language_model, states)]
            for position in torch.arange(start, start + count - 1, device=embeddings.device).unsqueeze(1):
                # A CUDA graph writes its result to the same place each time
                tokens.append(self._step(language_model, tokens[-1], position, (cos, sin), keys, values).clone())
            return torch.cat(tokens, dim=1)[0]

    def _cleared_cache(self, config: Any, like: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """The cache of earlier actions where it fits; zeros, as NaN in a position would pass through any mask."""
        kept = self._cache
        if (
            kept is None
            or kept[0].shape[3] < length
            or (kept[0].dtype, kept[0].device, kept[0].shape[0]) != (like.dtype, like.device, config.num_hidden_layers)
        ):
            keys, values = _empty_cache(config, like, -(-length // _CAPACITY_STEP) * _CAPACITY_STEP)
            for tensor in (keys, values):
                torch._dynamo.mark_static_address(tensor)  # noqa: SLF001 - CUDA graphs write into it
            self._cache = kept = keys, values
        for tensor in kept:
            tensor.zero_()
        return kept


def _static_step(
    language_model: Any, token: Tensor, position: Tensor, rotations: Sequence[Tensor], keys: Tensor, values: Tensor
) -> Tensor:
    """The token [1, 1] that follows ``token`` at ``position`` [1]; no shape depends on how long the prompt is."""
    seen = torch.arange(keys.shape[3], device=token.device) <= position  # [capacity]

    def attend(block: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        keys[block].index_copy_(2, position, k)
        values[block].index_copy_(2, position, v)
        return _attention(q, keys[block], values[block], scale, seen.expand(1, 1, 1, -1))

    cos, sin = (rotation.index_select(2, position) for rotation in rotations)
    states = _run(language_model.model, language_model.model.embed_tokens(token), (cos, sin), attend)
    return _likeliest(language_model, states)


def _run(model: Any, x: Tensor, rotations: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
    """Embeddings [b, t, width] -> last hidden states; ``rotations`` are cos and sin [1, 1, t, d] of their positions."""
    for index, block in enumerate(model.layers):
        attention = block.self_attn
        heads = (*x.shape[:2], -1, attention.head_dim)
        h = block.input_layernorm(x)
        q, k, v = (p(h).view(heads).transpose(1, 2) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
        mixed = attend(index, _rotate(q, *rotations), _rotate(k, *rotations), v, attention.scaling)
        x = x + attention.o_proj(mixed.transpose(1, 2).reshape(*x.shape[:2], -1))
        x = x + block.mlp(block.post_attention_layernorm(x))
    states: Tensor = model.norm(x)
    return states


def _rotations(model: Any, like: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine [1, 1, length, d] of the rotary embedding (Su et al. 2021, arXiv:2104.09864).

    The sine of the first half is negative, as :func:`_rotate` wants it.
    """
    cos, sin = model.rotary_emb(like, torch.arange(length, device=like.device).unsqueeze(0))
    half = sin.shape[-1] // 2
    return cos.unsqueeze(1), torch.cat([-sin[..., :half], sin[..., half:]], dim=-1).unsqueeze(1)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates [b, h, t, d] as transformers does: a product has the same bits, whichever of its factors is negative."""
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin


def _attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None, *, is_causal: bool = False
) -> Tensor:
    grouped = k.shape[1] != q.shape[1]
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, scale=scale, enable_gqa=grouped)


def _empty_cache(config: Any, like: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Room for keys and values, each [blocks, 1, kv heads, length, d]."""
    shape = (config.num_hidden_layers, 1, config.num_key_value_heads, length, config.head_dim)
    return like.new_empty(shape), like.new_empty(shape)


def _likeliest(language_model: Any, states: Tensor) -> Tensor:
    """The token [1, 1] after the last position."""
    token: Tensor = language_model.lm_head(states[:, -1:]).argmax(dim=-1)
    return token


def _decode_by_transformers(language_model: Any, embeddings: Tensor, count: int) -> Tensor:
    tokens: list[Tensor] = []
    cache = None
    while True:
        step = language_model(inputs_embeds=embeddings, past_key_values=cache, use_cache=True, logits_to_keep=1)
        tokens.append(step.logits.argmax(dim=-1))  # [1, 1]
        if len(tokens) == count:
            return torch.cat(tokens, dim=1)[0]
        embeddings, cache = language_model.get_input_embeddings()(tokens[-1]), step.past_key_values
