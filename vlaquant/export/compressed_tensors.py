"""The compressed-tensors format: schemes ↔ ``quantization_config``. The tensors need no conversion (see ``linear``).

``targets`` are regular expressions on live module names and ``ignore`` is empty: with the class name ``Linear`` and a
list of exceptions, a name that differs between file and model silently quantizes what should stay float.
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from vlaquant.linear import QuantEmbedding, W4A16Linear, W8A8Linear
from vlaquant.scheme import Granularity, QuantSpec, Scheme

#: The version of the format that is written, as its own tools name it.
_FORMAT_VERSION = "0.20.0"


def quantized_layers(model: nn.Module) -> dict[str, Scheme]:
    """Live module name -> scheme, for every packed layer that the format knows: Linears and embeddings.

    It has no words for banks (``linear.category``), which are in our manifest only.
    """
    kinds = (W4A16Linear, W8A8Linear, QuantEmbedding)
    return {name: module.scheme for name, module in model.named_modules() if isinstance(module, kinds)}


def format_of(scheme: Scheme) -> str:
    """The format that stores a Linear of this scheme."""
    return "pack-quantized" if scheme.activation is None else "int-quantized"


def to_quantization_config(model: nn.Module) -> dict[str, Any]:
    """``quantization_config`` for ``config.json``: one group a scheme and format."""
    embeddings = {name for name, module in model.named_modules() if isinstance(module, QuantEmbedding)}
    layers = {
        name: (scheme, "int-quantized" if name in embeddings else format_of(scheme))
        for name, scheme in quantized_layers(model).items()
    }
    float_kinds = (nn.Linear, nn.Embedding)
    everything = [name for name, module in model.named_modules() if isinstance(module, float_kinds) or name in layers]
    # Widest first: transformers' `dequantize=True` reads all layers by the first group's scheme. Codes of fewer bits do
    # not fit into that, which is an error; those of more bits would become wrong weights without a word
    kinds = sorted(dict.fromkeys(layers.values()), key=lambda kind: -kind[0].weight.bits)
    groups = {}
    for number, (scheme, stored) in enumerate(kinds):
        mine = {name for name, other in layers.items() if other == (scheme, stored)}
        groups[f"group_{number}"] = {
            "targets": target_patterns(mine, everything),
            "format": stored,
            "weights": _arguments(scheme.weight),
            "input_activations": None if scheme.activation is None else _arguments(scheme.activation),
            "output_activations": None,
        }
    formats = {stored for _, stored in kinds}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "version": _FORMAT_VERSION,
        "sparsity_config": {},
        "transform_config": {},
    }


def target_patterns(names: set[str], everything: list[str]) -> list[str]:
    r"""Regular expressions that match all of ``names`` and no other module of ``everything``.

    Block numbers become ``\d+`` where every block is treated alike, so that a model of 32 blocks has 7 patterns.
    """
    patterns: list[str] = []
    for name in sorted(names):
        general = re.sub(r"(?<=\\\.)\d+(?=\\\.)", lambda _: r"\d+", re.escape(name))
        alike = {other for other in everything if re.fullmatch(general, other)}
        pattern = f"re:^{general if alike <= names else re.escape(name)}$"
        if pattern not in patterns:
            patterns.append(pattern)
    return patterns


def _arguments(spec: QuantSpec) -> dict[str, Any]:
    return {
        "num_bits": spec.bits,
        "type": "int",
        "symmetric": spec.symmetric,
        "strategy": spec.granularity.value,
        "group_size": spec.group_size,
        "dynamic": spec.dynamic,
    }


def from_quantization_config(config: Mapping[str, Any], names: list[str]) -> dict[str, Scheme]:
    """Inverse of :func:`to_quantization_config` for a model with these modules: name -> scheme."""
    layers: dict[str, Scheme] = {}
    for key, group in config["config_groups"].items():
        activation = group["input_activations"]
        scheme = Scheme(
            name=key, weight=_spec(group["weights"]), activation=None if activation is None else _spec(activation)
        )
        patterns = [re.compile(target.removeprefix("re:")) for target in group["targets"]]
        layers.update({name: scheme for name in names if any(pattern.match(name) for pattern in patterns)})
    return layers


def _spec(arguments: Mapping[str, Any]) -> QuantSpec:
    return QuantSpec(
        bits=arguments["num_bits"],
        granularity=Granularity(arguments["strategy"]),
        symmetric=arguments["symmetric"],
        group_size=arguments["group_size"],
        dynamic=arguments["dynamic"],
    )


def file_names(skeleton: nn.Module) -> list[str]:
    """Names of the tensors that a model on the meta device has in its file; of tied ones, the first."""
    names: dict[int, str] = {}
    for name, tensor in skeleton.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), name)
    return list(names.values())


def file_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The model's tensors under their live names; of tensors that share memory (tied weights), the first."""
    tensors: dict[str, Tensor] = {}
    seen: set[tuple[int, tuple[int, ...], tuple[int, ...]]] = set()
    for name, tensor in model.state_dict().items():
        key = (tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride()))
        if tensor.numel() > 0 and key in seen:
            continue
        seen.add(key)
        tensors[name] = tensor
    return tensors
