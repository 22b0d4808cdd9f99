"""The code of ``docs/lerobot.md``, run on a tiny SmolVLA: of LeRobot's classes, or of those that look like them."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlaquant.families.observation import Observation

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "lerobot.md").read_text(encoding="utf-8")
RECIPE = "lerobot_smolvla_w4a16_awq.yaml"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)


def prepare(folder: Path, samples: Sequence[Observation]) -> None:
    """The recipe, for widths of 96 and 72 and with fewer strengths to try, and ``recordings`` in ``folder``."""
    text = (ROOT / "configs" / RECIPE).read_text(encoding="utf-8")
    for shipped, tiny in {"group_size: 64": "group_size: 32", "nearest": "channel", "grid: 20": "grid: 2"}.items():
        assert shipped in text
        text = text.replace(shipped, tiny)
    text = text.replace("clip: awq", "clip: minmax")
    (folder / "configs").mkdir()
    (folder / "configs" / RECIPE).write_text(text, encoding="utf-8")
    (folder / "recordings").mkdir()
    lines = []
    for number, one in enumerate(samples):
        assert one.state is not None
        assert one.action is not None
        names: list[str | None] = []
        for camera, image in enumerate(one.images):
            names.append(None if image is None else f"{number}-{camera}.png")
            if image is not None:
                image.save(folder / "recordings" / str(names[-1]))
        line = {"images": names, "instruction": one.instruction, "episode": one.episode}
        lines.append(json.dumps(line | {"state": one.state.tolist(), "action": one.action.tolist()}))
    (folder / "recordings" / "calibration.jsonl").write_text("\n".join(lines), encoding="utf-8")


def run(count: int, sample: Observation) -> dict[str, Any]:
    """What the first ``count`` blocks leave behind, run one after the other in the current folder."""
    left: dict[str, Any] = {"image": np.array(sample.image), "state": sample.state}
    for block in blocks("python")[:count]:
        exec(block, left)
    return left
