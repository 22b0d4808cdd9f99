import json
from pathlib import Path
from types import SimpleNamespace

KINDS = ("smolvla", "pi0", "pi05")


class PreTrainedConfig:
    @classmethod
    def from_pretrained(cls, directory: str) -> SimpleNamespace:
        values = json.loads(Path(directory, "config.json").read_text(encoding="utf-8"))
        if values["type"] not in KINDS:
            raise ValueError(f"Policy type '{values['type']}' is not registered.")
        unknown = sorted(set(values) & {"quantization_config", "vlaquant"})
        if unknown:
            raise ValueError(f"The fields {unknown} are not valid")
        for key in ("input_features", "output_features"):
            values[key] = {name: SimpleNamespace(**feature) for name, feature in values[key].items()}
        images = {name: one for name, one in values["input_features"].items() if one.type == "VISUAL"}
        return SimpleNamespace(**values, image_features=images)
