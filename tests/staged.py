"""Runs of the staged engine on tiny checkpoints, and comparisons of what they leave behind."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import llama, observations, openvla, save_llama, save_openvla
from torch import Tensor

import vlaquant
from vlaquant.benchmark.limits import Limits
from vlaquant.engine.run import RunOptions
from vlaquant.engine.work import WorkDirectory, work_path
from vlaquant.export.compressed_tensors import file_tensors
from vlaquant.result import QuantizationResult

#: Enough random tokens that the smallest layers see more than the least number.
WINDOWS = [torch.randint(0, 128, (1, 24), generator=torch.Generator().manual_seed(seed)) for seed in range(3)]

SCHEMES: dict[str, dict[str, Any]] = {
    "w4a16": {"scheme": "w4a16", "group_size": 32},
    "w8a8": {"scheme": "w8a8"},
    "w8a8 static": {"scheme": "w8a8_static"},
}
QUANTIZERS: dict[str, dict[str, Any]] = {
    "rtn": {"quantizer": {"kind": "rtn"}},
    "rtn mse": {"quantizer": {"kind": "rtn", "clip": "mse"}},
    "gptq": {"quantizer": {"kind": "gptq"}},
    "gptaq": {"quantizer": {"kind": "gptaq"}},
    "awq": {"transforms": [{"kind": "awq", "grid": 4}], "quantizer": {"kind": "rtn", "clip": "awq"}},
    "smoothquant": {"transforms": [{"kind": "smoothquant"}], "quantizer": {"kind": "rtn"}},
    "awq + gptq": {"transforms": [{"kind": "awq", "grid": 4}], "quantizer": {"kind": "gptq"}},
    "awq + gptaq": {"transforms": [{"kind": "awq", "grid": 4}], "quantizer": {"kind": "gptaq"}},
}
MODELS = ("llama", "llama tied", "openvla")

#: A recipe for the command: all of a Llama in a folder with a text file.
GPTQ_TEXT: dict[str, Any] = {
    "rules": [{"part": part, **SCHEMES["w4a16"]} for part in ("language", "head")],
    "quantizer": {"kind": "gptq"},
    "calibration": {"kind": "text", "path": "text.txt", "samples": 4, "sequence_length": 32},
}


def make_source(directory: Path, kind: str) -> Path:
    """A float checkpoint of one of ``MODELS``."""
    if kind == "openvla":
        return save_openvla(directory, openvla())
    return save_llama(directory, llama(tied=kind == "llama tied"))


def samples_for(kind: str) -> list[Any]:
    return observations(8) if kind == "openvla" else list(WINDOWS)


def recipe_for(kind: str, quantizer: str, scheme: str, **more: Any) -> dict[str, Any]:
    """Every part of the model that can be quantized is."""
    parts = ["language", "vision", "projector"] if kind == "openvla" else ["language"]
    if kind == "llama":
        parts.append("head")
    return {"rules": [{"part": part, **SCHEMES[scheme]} for part in parts], **QUANTIZERS[quantizer], **more}


def streamed(
    source: Path,
    recipe: dict[str, Any],
    samples: list[Any] | None,
    output: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    **options: Any,
) -> QuantizationResult:
    """A run whose weights come on demand."""
    return vlaquant.quantize(
        source,
        recipe,
        samples=samples,
        output=output,
        resume=resume,
        overwrite=overwrite,
        options=RunOptions(**options),
    )


def in_memory(source: Path, recipe: dict[str, Any], samples: list[Any] | None, **options: Any) -> dict[str, Tensor]:
    """The same run on a loaded model: its tensors under the names of the file."""
    model = vlaquant.load(source)
    vlaquant.quantize(model, recipe, samples=samples, options=RunOptions(**options))
    return file_tensors(model)


def written(directory: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint directory."""
    found: dict[str, Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        found |= load_file(file)
    return found


def differing(left: dict[str, Tensor], right: dict[str, Tensor]) -> list[str]:
    """Names that are on one side only, or whose bits, shape or dtype differ."""
    common = left.keys() & right.keys()
    return sorted(left.keys() ^ right.keys()) + sorted(name for name in common if not _same(left[name], right[name]))


def _same(left: Tensor, right: Tensor) -> bool:
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(left, right)


def files_of(directory: Path) -> dict[str, bytes]:
    """Every file below a directory, byte for byte."""
    return {
        str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()
    }


def left_behind(output: Path) -> list[str]:
    """What lies beside the source but should not, once a run is over: hidden work and partial directories."""
    return sorted(path.name for path in output.parent.iterdir() if path.name.startswith("."))


def stages_in(output: Path) -> int:
    """How many finished stages an unfinished run of ``output`` has."""
    return len(list(work_path(output).glob("stage-*.json")))


def skip_verification(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the fresh process, which takes seconds, where a test compares in its own way."""
    for name in ("verify", "verify_tensors"):
        monkeypatch.setattr(f"vlaquant.export.writing.{name}", lambda *_: {"tensors": 0, "output": "skipped"})


def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Made-up limits of the machine for ``vlaquant bench --shapes``: measuring them takes seconds."""
    monkeypatch.setattr("vlaquant.benchmark.shapes.last_level_cache", lambda: 20_000)
    monkeypatch.setattr(
        "vlaquant.benchmark.shapes.measure_limits", lambda *_, **__: Limits(10.0, 100.0, 50.0, 400.0, {})
    )


class KilledError(BaseException):
    """Nothing may catch it."""


@contextmanager
def killed_after(stages: int) -> Iterator[None]:
    """Inside, a run dies when it is about to finish one stage more than this."""
    commit = WorkDirectory.commit

    def mortal(self: WorkDirectory, *args: Any) -> None:
        if len(self.records) == stages:
            raise KilledError
        commit(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WorkDirectory, "commit", mortal)
        with pytest.raises(KilledError):
            yield


def unfinished(source: Path, output: Path, stages: int = 1, recipe: dict[str, Any] | None = None) -> Path:
    """Leave an unfinished run behind; returns its work directory."""
    with killed_after(stages):
        streamed(source, recipe or recipe_for("llama", "gptq", "w4a16"), WINDOWS, output)
    assert not output.exists()
    assert stages_in(output) == stages
    return work_path(output)
