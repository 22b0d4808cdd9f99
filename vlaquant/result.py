"""What a quantization run did, for the caller and for the manifest."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from vlaquant.export import load
from vlaquant.passes.layer import LayerRecord
from vlaquant.passes.transform import TransformRecord
from vlaquant.plan import Plan, plan_from_dict
from vlaquant.recipe import Recipe

_SHOWN_NOTES = 10


@dataclass(frozen=True, slots=True, eq=False)
class QuantizationResult:
    """The result of :func:`vlaquant.quantize`. ``str(result)`` is a summary.

    Attributes:
        held: the model, if it is in memory.
        recipe: as it was read, with all defaults.
        plan: as carried out.
        transforms: one record for every fold that was tried.
        layers: one record for every packed layer.
        output: the directory that was written, or None.
        manifest: what ``vlaquant.json`` holds; empty if nothing was written.
    """

    held: nn.Module | None
    recipe: Recipe
    plan: Plan
    transforms: tuple[TransformRecord, ...]
    layers: tuple[LayerRecord, ...]
    output: Path | None = None
    manifest: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_manifest(cls, output: Path, recipe: Recipe, manifest: dict[str, Any]) -> "QuantizationResult":
        """What the run that wrote ``output`` returned."""
        return cls(
            None,
            recipe,
            plan_from_dict(manifest["plan"]),
            tuple(TransformRecord.from_dict(record) for record in manifest["transforms"]),
            tuple(LayerRecord.from_dict(record) for record in manifest["layers"]),
            output,
            manifest,
        )

    @property
    def model(self) -> nn.Module:
        """The model with packed layers: the very object that was passed in, if one was; else read from ``output``."""
        if self.held is not None:
            return self.held
        assert self.output is not None
        return load(self.output)

    @property
    def mean_relative_loss(self) -> float | None:
        """Mean over the layers with data of the squared output error as a share of the output; None without any."""
        losses = [layer.loss for layer in self.layers if layer.loss is not None]
        return sum(losses) / len(losses) if losses else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the manifest."""
        return {
            "recipe": self.recipe.resolved(),
            "plan": self.plan.to_dict(),
            "transforms": [record.to_dict() for record in self.transforms],
            "layers": [record.to_dict() for record in self.layers],
        }

    def __str__(self) -> str:
        lines = [str(self.plan), ""]
        if self.transforms:
            kept = sum(record.kept for record in self.transforms)
            lines.append(f"{kept} of {len(self.transforms)} scalings lower the output error and were kept")
            undone = [record for record in self.transforms if record.reverted is not None]
            lines += [f"taken back: {record.kind} of {record.source}: it {record.reverted}" for record in undone]
        if self.mean_relative_loss is not None:
            lines.append(
                f"output error of a layer: {self.mean_relative_loss:.3%} of its output's mean square, on average"
            )
        noted = [layer for layer in self.layers if layer.notes]
        lines += [f"note: {layer.name}: {'; '.join(layer.notes)}" for layer in noted[:_SHOWN_NOTES]]
        if len(noted) > _SHOWN_NOTES:
            lines.append(f"note: {len(noted) - _SHOWN_NOTES} more layers have notes; all are in vlaquant.json")
        measured = self.manifest.get("measured")
        if measured is not None:
            figures = ", ".join(f"{name} {measured[name]:.4g} ({gate:g})" for name, gate in measured["require"].items())
            lines.append(f"gates passed, run {len(measured['rounds'])}: {figures}")
        if self.output is not None:
            verified = self.manifest["verification"]
            lines.append(
                f"verified in a fresh process: {verified['tensors']} tensors equal; output {verified['output']}"
            )
            lines.append(f"written: {self.output} ({self.manifest['bytes_on_disk']['weights']:,} bytes of weights)")
        return "\n".join(lines)
