"""A quantized model → a directory, verified before it takes its name."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from vlaquant.checkpoint import (
    MANIFEST,
    TensorFiles,
    atomic_directory,
    copy_side_files,
    join_tensor_files,
    read_config,
    require_finite,
    sha256,
    weight_files,
    write_json,
    write_tensors,
)
from vlaquant.engine.fingerprint import digest, package_versions
from vlaquant.engine.work import Finished
from vlaquant.errors import ExportError
from vlaquant.export.compressed_tensors import file_names, file_tensors, to_quantization_config
from vlaquant.export.loading import load_packed, packed_skeleton
from vlaquant.export.verify import compare_digests, verify, verify_tensors
from vlaquant.families import Converted, Family, Inputs


def write(
    model: nn.Module,
    output: Path,
    manifest: dict[str, Any],
    *,
    source: Path | None,
    family: Family,
    inputs: Inputs | None,
    changed: Mapping[str, Any],
    overwrite: bool,
) -> dict[str, Any]:
    """Write a model in memory to ``output`` and verify it in a fresh process; all or nothing.

    Args:
        model: holds packed layers.
        output: the directory to make.
        manifest: what is known so far; checksums, sizes and the verification are added.
        source: the float checkpoint, whose side files are copied; None if the model came from memory.
        family: loads and runs the directory in a fresh process; ``module`` cannot, so only tensors are compared.
        inputs: of the run that is compared; None takes the family's made-up example.
        changed: fields of the source's ``config.json`` that the run changed.
        overwrite: replace what is there.

    Returns:
        The complete manifest.

    Raises:
        ExportError: the output exists, the disk is full, or the directory does not read back as it was written.
    """
    with atomic_directory(output, overwrite=overwrite) as partial:
        converted = Converted() if source is None else family.converted(source)
        write_tensors(partial, file_tensors(model), numbered=converted.numbered)
        side = _write_side_files(model, partial, source, converted)
        config = _float_config(model, source) | converted.config | dict(changed)
        config |= {"quantization_config": to_quantization_config(model)}
        origin = _weights_of(source, converted)
        return _complete(partial, manifest, config, side, origin, lambda _: verify(model, partial, family, inputs))


def write_streamed(
    output: Path,
    manifest: dict[str, Any],
    *,
    source: Path,
    files: TensorFiles,
    finished: Sequence[Finished],
    family: Family,
    inputs: Inputs | None,
    fits: bool,
    changed: Mapping[str, Any],
    overwrite: bool,
) -> dict[str, Any]:
    """As :func:`write`, for a model that is never in memory: tensors are copied from finished units and the source.

    Args:
        output: the directory to make.
        manifest: as for :func:`write`.
        source: the float checkpoint.
        files: its tensors.
        finished: the quantized units.
        family: as for :func:`write`.
        inputs: as for :func:`write`.
        fits: whether the packed model may be loaded, to compare its output in two processes.
        changed: as for :func:`write`.
        overwrite: replace what is there.

    Raises:
        ExportError: as for :func:`write`.
        CheckpointError: the source changed, or a tensor that no stage looked at holds NaN or Inf.
    """
    with atomic_directory(output, overwrite=overwrite) as partial:
        converted = family.converted(source)
        side = copy_side_files(source, partial, converted.files)
        write_json(partial / "config.json", read_config(source) | converted.config | dict(changed))
        skeleton = packed_skeleton(partial, manifest)
        places = {name: unit.files for unit in finished for name in unit.digests}
        names = file_names(skeleton)
        join_tensor_files(
            [(name, places.get(name, files), name) for name in names], partial, numbered=converted.numbered
        )
        wanted = {name: value for unit in finished for name, value in unit.digests.items()}
        wanted |= {name: _checked_digest(name, files, source) for name in names if name not in wanted}
        config = read_config(partial) | {"quantization_config": to_quantization_config(skeleton)}

        def check(unfinished: dict[str, Any]) -> dict[str, str | int]:
            if not fits:
                return verify_tensors(partial, wanted, family)
            model = load_packed(partial, unfinished)
            found = {name: digest(tensor) for name, tensor in file_tensors(model).items()}
            compare_digests(partial, wanted, found)
            return verify(model, partial, family, inputs)

        return _complete(partial, manifest, config, side, _weights_of(source, converted), check)


def _weights_of(source: Path | None, converted: Converted) -> list[Path] | None:
    """The files that the output's weights came from; None if they came from memory."""
    return None if source is None else [*weight_files(source), *(p for p in converted.files if p.suffix != ".json")]


def _checked_digest(name: str, files: TensorFiles, source: Path) -> str:
    """The digest of a tensor that is copied as it is."""
    tensor = files.read(name)
    require_finite(name, tensor, source)
    return digest(tensor)


def _complete(
    partial: Path,
    manifest: dict[str, Any],
    config: dict[str, Any],
    side: dict[str, str],
    origin: list[Path] | None,
    check: Callable[[dict[str, Any]], dict[str, str | int]],
) -> dict[str, Any]:
    """Everything after the weights: config, manifest, verification."""
    write_json(partial / "config.json", config)
    if "source_sha256" not in manifest:
        manifest["source_sha256"] = {path.name: sha256(path) for path in origin or ()}
    manifest = manifest | {
        "versions": package_versions(),
        "output_sha256": {path.name: sha256(path) for path in [*weight_files(partial), partial / "config.json"]},
        "side_files_sha256": side,
        "complete": False,
    }
    write_json(partial / MANIFEST, manifest)
    manifest["verification"] = check(manifest)
    manifest["bytes_on_disk"] = {
        "weights": sum(path.stat().st_size for path in weight_files(partial)),
        "source_weights": None if origin is None else sum(path.stat().st_size for path in origin),
    }
    manifest["complete"] = True
    write_json(partial / MANIFEST, manifest)
    return manifest


def _write_side_files(model: nn.Module, target: Path, source: Path | None, converted: Converted) -> dict[str, str]:
    if source is not None:
        return copy_side_files(source, target, converted.files)
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
