"""A quantized model in memory → a directory, verified before it takes its name."""

import json
from pathlib import Path
from typing import Any

from torch import nn

from vlaquant.checkpoint import (
    MANIFEST,
    atomic_directory,
    copy_side_files,
    read_config,
    sha256,
    weight_files,
    write_json,
    write_tensors,
)
from vlaquant.errors import ExportError
from vlaquant.export.compressed_tensors import file_tensors, package_versions, to_quantization_config
from vlaquant.export.verify import verify
from vlaquant.families import Family, Inputs


def write(
    model: nn.Module,
    output: Path,
    manifest: dict[str, Any],
    *,
    source: Path | None,
    family: Family,
    inputs: Inputs | None,
    overwrite: bool,
) -> dict[str, Any]:
    """Write ``model`` to ``output`` and verify it in a fresh process; all or nothing.

    Args:
        model: holds packed layers.
        output: the directory to make.
        manifest: what is known so far; checksums, sizes and the verification are added.
        source: the float checkpoint, whose side files are copied; None if the model came from memory.
        family: loads and runs the directory in a fresh process; ``generic`` cannot, so only tensors are compared.
        inputs: of the run that is compared; None takes the family's made-up example.
        overwrite: replace what is there.

    Returns:
        The complete manifest.

    Raises:
        ExportError: the output exists, the disk is full, or the directory does not read back as it was written.
    """
    with atomic_directory(output, overwrite=overwrite) as partial:
        write_tensors(partial, file_tensors(model))
        side = _write_side_files(model, partial, source)
        config = _float_config(model, source) | {"quantization_config": to_quantization_config(model)}
        write_json(partial / "config.json", config)
        manifest = manifest | {
            "versions": package_versions(),
            "source_sha256": {} if source is None else {path.name: sha256(path) for path in weight_files(source)},
            "output_sha256": {path.name: sha256(path) for path in [*weight_files(partial), partial / "config.json"]},
            "side_files_sha256": side,
            "complete": False,
        }
        write_json(partial / MANIFEST, manifest)
        manifest["verification"] = verify(model, partial, family, inputs)
        manifest["bytes_on_disk"] = {
            "weights": sum(path.stat().st_size for path in weight_files(partial)),
            "source_weights": None if source is None else sum(path.stat().st_size for path in weight_files(source)),
        }
        manifest["complete"] = True
        write_json(partial / MANIFEST, manifest)
    return manifest


def _write_side_files(model: nn.Module, target: Path, source: Path | None) -> dict[str, str]:
    if source is not None:
        return copy_side_files(source, target)
    for attribute in ("processor", "generation_config"):
        saver = getattr(getattr(model, attribute, None), "save_pretrained", None)
        if callable(saver):
            saver(target)
    return {path.name: sha256(path) for path in sorted(target.iterdir()) if path.suffix != ".safetensors"}


def _float_config(model: nn.Module, source: Path | None) -> dict[str, Any]:
    if source is not None:
        return read_config(source)
    config = getattr(model, "config", None)
    if config is None:
        return {"architectures": [type(model).__name__]}
    if not hasattr(config, "to_json_string"):
        raise ExportError(f"{type(model).__name__}.config is a {type(config).__name__}, not a transformers config")
    data: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return data | {"architectures": [type(model).__name__]}
