r"""Residual streams: the sum x that all blocks of a language model read and add to, and that may be rotated.

With an orthogonal R the model stays the same function if x becomes x R everywhere: what writes to the stream
(embedding, ``o_proj``, ``down_proj``, a projector's last Linear) has its output rotated, what reads it its input. All
reading goes through norms. An RMSNorm x̂·g, with x̂ = x / rms(x), divides by a length that no rotation changes, so that
x̂ turns with x; the gain g does not, and moves into the columns of the readers. Hence:

- readers W -> W·diag(g)·R, norms g -> 1, writers W -> Rᵀ·W and b -> Rᵀ·b, embeddings E -> E·R.
- A LayerNorm subtracts a mean, an adaptive norm multiplies by what another input says, and a gain after the norm of a
  *writer* (Gemma 2 and 3) has no reader to move to: no rotation there.
- An embedding that is also the head cannot be both E·R and E·diag(g)·R: the head gets a weight of its own.

A family describes its stream by names. That every parameter of the model has a place in the description is checked, so
that no reader and no writer can be forgotten; so is what its norms compute.

Sources: QuaRot, arXiv:2404.00456, section 4, after SliceGPT, arXiv:2401.15024, section 3.
"""

import copy
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vlaquant.errors import PlanError
from vlaquant.families.folds import FoldGroup, norm_offset

#: Relative difference that float32 may make in a norm.
_TOLERANCE = 1e-4


@dataclass(frozen=True, slots=True)
class Stream:
    r"""Where a model's residual stream is read and written; all names are templates.

    ``{stack}`` stands for what ``stack`` matched, ``{block}`` for each of its blocks.

    Attributes:
        stack: regular expression for the full name of the module that holds embedding, blocks and final norm.
        blocks: the list of blocks.
        embedding: makes the stream from tokens.
        norm: the last one.
        head: regular expression for the Linear that reads it.
        reads: (norm, the Linears that read it) in each block.
        writes: Linears in each block whose output is added.
        inputs: regular expressions for Linears outside of the stack whose output becomes part of the stream, such as a
            projector's last; of each group the first that fits anything.
        apart: regular expressions for modules that meet the stream through those only.
        apart_inside: templates of those in a block.
    """

    stack: str
    blocks: str
    embedding: str
    norm: str
    head: str
    reads: tuple[tuple[str, tuple[str, ...]], ...]
    writes: tuple[str, ...]
    inputs: tuple[tuple[str, ...], ...] = ()
    apart: tuple[str, ...] = ()
    apart_inside: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Read:
    """A norm that the stream goes through, what it adds to its weight (1 for Gemma's), and the Linears behind it."""

    norm: str
    offset: float
    readers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Residual:
    """A stream found in a model: live module names.

    Attributes:
        width: channels of the stream.
        embedding: as in :class:`Stream`.
        head: as there.
        reads: of all blocks, and the final one.
        writes: all Linears.
        values: folds of values that only their own ``o_proj`` reads, with the width of a head.
        tied: whether the embedding's weight is also the head's.
    """

    width: int
    embedding: str
    head: str
    reads: tuple[Read, ...]
    writes: tuple[str, ...]
    values: tuple[FoldGroup, ...]
    tied: bool


def llama_stream(
    stack: str, head: str, *, inputs: tuple[tuple[str, ...], ...] = (), apart: tuple[str, ...] = ()
) -> Stream:
    """The stream of Llama, Mistral, Qwen 2 and 3 and the first Gemma; arguments as in :class:`Stream`."""
    return Stream(
        stack,
        blocks="{stack}.layers",
        embedding="{stack}.embed_tokens",
        norm="{stack}.norm",
        head=head,
        reads=(
            ("{block}.input_layernorm", tuple(f"{{block}}.self_attn.{name}_proj" for name in "qkv")),
            ("{block}.post_attention_layernorm", ("{block}.mlp.gate_proj", "{block}.mlp.up_proj")),
        ),
        writes=("{block}.self_attn.o_proj", "{block}.mlp.down_proj"),
        inputs=inputs,
        apart=apart,
        apart_inside=("{block}.self_attn.q_norm", "{block}.self_attn.k_norm"),
    )


def find_residual(model: nn.Module, family: str, stream: Stream | None, folds: Sequence[FoldGroup]) -> Residual:
    """The model's residual stream, if it can be rotated. Works on the meta device.

    Args:
        model: as loaded.
        family: its name, for errors.
        stream: the family's description.
        folds: all that were found in the model.

    Raises:
        PlanError: there is none, something in it does not commute with a rotation, or a parameter has no place.
    """
    if stream is None:
        raise PlanError(
            f"rotation: family {family!r} has no residual stream that can be rotated; remove the transform, or use "
            "awq or smoothquant"
        )
    modules = dict(model.named_modules(remove_duplicate=False))
    stack = _stack(modules, stream)
    blocks = [f"{stream.blocks.format(stack=stack)}.{i}" for i in range(len(_list(modules, stream, stack)))]
    head = [name for name in modules if re.fullmatch(stream.head, name)]
    if len(head) != 1:
        raise PlanError(f"rotation: wanted one head that reads the stream, found {', '.join(head) or 'none'}")
    reads = [
        (norm.format(block=block), tuple(reader.format(block=block) for reader in readers))
        for block in blocks
        for norm, readers in stream.reads
    ]
    reads.append((stream.norm.format(stack=stack), (head[0],)))
    inputs = _inputs(modules, stream)
    writes = [*(name.format(block=block) for block in blocks for name in stream.writes), *inputs]
    embedding = stream.embedding.format(stack=stack)
    width = _width(modules, embedding)
    _require_widths(modules, [reader for _, readers in reads for reader in readers], writes, width)
    found = tuple(Read(norm, _offset(modules, norm, width), readers) for norm, readers in reads)
    inside = {name.format(block=block) for block in blocks for name in stream.apart_inside}
    known = {embedding, *writes, *(name for norm, readers in reads for name in (norm, *readers))}
    _require_accounted(model, known | inside, stream.apart if inputs else ())
    tied = _require_unshared(model, known, embedding, head[0])
    values = tuple(fold for fold in folds if fold.head_dim and fold.source in known and {*fold.targets} <= {*writes})
    return Residual(width, embedding, head[0], found, tuple(writes), values, tied)


def _stack(modules: Mapping[str, nn.Module], stream: Stream) -> str:
    wanted = (stream.blocks, stream.embedding, stream.norm)
    stacks = [
        name
        for name in modules
        if re.fullmatch(stream.stack, name) and all(template.format(stack=name) in modules for template in wanted)
    ]
    if len(stacks) != 1:
        names = ", ".join(template.removeprefix("{stack}.") for template in wanted)
        raise PlanError(
            f"rotation: wanted one module that holds {names}, found {', '.join(stacks) or 'none'}; only stacks like "
            "Llama's can be rotated"
        )
    return stacks[0]


def _list(modules: Mapping[str, nn.Module], stream: Stream, stack: str) -> nn.ModuleList:
    found = modules[stream.blocks.format(stack=stack)]
    if not isinstance(found, nn.ModuleList):
        raise PlanError(f"rotation: {stream.blocks.format(stack=stack)} is a {type(found).__name__}, no list of blocks")
    return found


def _inputs(modules: Mapping[str, nn.Module], stream: Stream) -> list[str]:
    found = []
    for group in stream.inputs:
        fits = ([name for name in modules if re.fullmatch(pattern, name)] for pattern in group)
        found += next((names for names in fits if names), [])
    return found


def _width(modules: Mapping[str, nn.Module], name: str) -> int:
    module = modules[name]
    if not isinstance(module, nn.Embedding):
        raise PlanError(f"rotation: {name} is a {type(module).__name__}, wanted an embedding")
    return module.embedding_dim


def _linear(modules: Mapping[str, nn.Module], name: str) -> nn.Linear:
    module = modules.get(name)
    if type(module) is not nn.Linear:
        kind = "missing" if module is None else f"a {type(module).__name__}"
        raise PlanError(
            f"rotation: {name} is {kind}, wanted exactly nn.Linear; only stacks like Llama's can be rotated"
        )
    return module


def _require_widths(modules: Mapping[str, nn.Module], reads: Sequence[str], writes: Sequence[str], width: int) -> None:
    for name in reads:
        if _linear(modules, name).in_features != width:
            raise PlanError(f"rotation: {name} reads {_linear(modules, name).in_features} channels of {width}")
    for name in writes:
        if _linear(modules, name).out_features != width:
            raise PlanError(f"rotation: {name} writes {_linear(modules, name).out_features} channels to {width}")


@torch.no_grad()
def _offset(modules: Mapping[str, nn.Module], name: str, width: int) -> float:
    """What a norm adds to its weight; found by trying, as is that x̂ is multiplied by the sum and turns with x."""
    norm = modules.get(name)
    weight = getattr(norm, "weight", None)
    if norm is None or not isinstance(weight, Tensor) or weight.shape != (width,) or len(list(norm.parameters())) != 1:
        raise PlanError(
            f"rotation: {name} is {type(norm).__name__ if norm else 'missing'}, wanted a norm with a gain [{width}] "
            "and nothing else, such as RMSNorm"
        )
    trial = copy.deepcopy(norm).to_empty(device="cpu").to(torch.float32)
    offset = norm_offset(trial)
    generator = torch.Generator().manual_seed(0)
    x, gain, mirror = torch.randn(3, width, generator=generator) + 0.5
    ones = torch.ones(width)
    plain = _normed(trial, x, ones - offset)
    turns = _close(_normed(trial, _reflected(x, mirror), ones - offset), _reflected(plain, mirror))
    if not (turns and _close(_normed(trial, x, gain - offset), plain * gain)):
        raise PlanError(
            f"rotation: {name} is a {type(norm).__name__} whose output does not turn with its input (a LayerNorm "
            "subtracts a mean, an adaptive norm has another input); only RMSNorms can be rotated"
        )
    return offset


def _normed(norm: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    norm.get_parameter("weight").copy_(weight)
    out: Tensor = norm(x)
    return out


def _reflected(x: Tensor, mirror: Tensor) -> Tensor:
    """The vector x H, with H = 1 − 2vvᵀ/vᵀv: a rotation without zeros that costs no matrix."""
    return x - 2.0 * (x @ mirror) / (mirror @ mirror) * mirror


def _close(left: Tensor, right: Tensor) -> bool:
    return float((left - right).norm()) <= _TOLERANCE * float(right.norm())


def _require_accounted(model: nn.Module, known: set[str], apart: Sequence[str]) -> None:
    for name, _ in model.named_parameters(remove_duplicate=False):
        owner = name.rpartition(".")[0]
        if owner not in known and not any(re.fullmatch(pattern, owner) for pattern in apart):
            raise PlanError(
                f"rotation: {name} has no place in the description of the residual stream, and what it does to the "
                "stream is not known; this model cannot be rotated"
            )


def _require_unshared(model: nn.Module, known: set[str], embedding: str, head: str) -> bool:
    """Whether the embedding is tied to the head, the only parameters that may be shared."""
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    table, weight = (model.get_parameter(f"{name}.weight") for name in (embedding, head))
    tied = table is weight
    for name in known:
        for leaf, parameter in model.get_submodule(name).named_parameters(recurse=False):
            if uses[id(parameter)] > (2 if tied and parameter is table else 1):
                raise PlanError(
                    f"rotation: {name}.{leaf} is shared with another module; a shared weight stays as it is"
                )
    return tied
