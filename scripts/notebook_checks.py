"""What a committed notebook must be: run from top to bottom, without errors, small, and silent about the machine."""

import json
import re
from collections.abc import Iterator
from typing import Any

MAX_KIB = 500
_LOCAL_PATH = re.compile(r"(?<![\w.$}])(?:/(?:home|mnt|opt|private|root|srv|tmp|Users|work)/\w|[A-Z]:\\+Users)")


def complaints(notebook: dict[str, Any]) -> Iterator[str]:
    """What speaks against committing the notebook as it is."""
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    counts = [cell["execution_count"] for cell in cells]
    if not cells:
        yield "has no code"
    if counts != list(range(1, len(cells) + 1)):
        yield f"was not run once from top to bottom: its cells have the numbers {counts}"
    for number, cell in enumerate(cells, start=1):
        for output in cell["outputs"]:
            if output["output_type"] == "error":
                yield f"cell {number} raised {output['ename']}: {output['evalue']}"
            if output.get("name") == "stderr":
                yield f"cell {number} wrote to stderr: {''.join(output['text']).strip()[:200]}"
        text = json.dumps([_without_images(output) for output in cell["outputs"]], ensure_ascii=False)
        found = _LOCAL_PATH.search(text)
        if found is not None:
            yield f"cell {number} shows a path of this machine: {text[found.start() : found.start() + 60]!r}"
    size = len(json.dumps(notebook, ensure_ascii=False).encode()) / 1024
    if size > MAX_KIB:
        yield f"has {size:.0f} KiB, at most {MAX_KIB}; make its plots smaller"


def _without_images(output: dict[str, Any]) -> dict[str, Any]:
    data = {kind: value for kind, value in output.get("data", {}).items() if not kind.startswith("image/")}
    return output | {"data": data}
