"""Run notebooks from top to bottom; the first cell that raises ends it with an error.

python scripts/run_notebooks.py examples/*.ipynb [--in-place]

Copies with the outputs go to ``build/notebooks/executed``. With ``--in-place`` the notebooks themselves get them, too,
if nothing speaks against committing them (``notebook_checks.py``). A notebook whose metadata names packages under
``vlaquant.needs`` is skipped where they are not installed, and that is said. Needs the extra ``notebooks``.
"""

import argparse
import json
import os
import sys
import time
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

# Before jupyter_client is imported: the kernel of this environment, and not one of the user's that has the same name
os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from notebook_checks import complaints

_OUTPUT = Path(__file__).resolve().parent.parent / "build" / "notebooks" / "executed"
#: No hub is needed. Progress bars are for people who wait; the committed outputs are for people who read.
_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}


def missing(notebook: Any) -> list[str]:
    """Packages that the notebook needs, and that are not installed."""
    needs = notebook.metadata.get("vlaquant", {}).get("needs", [])
    return [name for name in needs if not any(distributions(name=name))]


def execute(path: Path, *, timeout: int) -> Any:
    """The notebook, run in its own folder, with its outputs and without what differs from machine to machine.

    Raises:
        CellExecutionError: a cell raised.
    """
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=timeout, kernel_name="python3", record_timing=False)
    client.coalesce_streams = True
    client.extra_arguments = ["--log-level=ERROR", "--colors=nocolor"]
    client.execute(cwd=str(path.parent), env=os.environ | _ENVIRONMENT)
    notebook.metadata.pop("widgets", None)
    notebook.metadata["language_info"] = {"name": "python"}
    for cell in notebook.cells:
        cell.metadata.clear()
    return notebook


def save(notebook: Any, path: Path) -> None:
    """One line a value, as Jupyter writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = nbformat.writes(notebook)
    path.write_text(json.dumps(json.loads(text), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, default=_OUTPUT, metavar="DIR", help="where copies with outputs go")
    parser.add_argument("--in-place", action="store_true", help="write the outputs into the notebooks themselves")
    parser.add_argument("--timeout", type=int, default=600, metavar="SECONDS", help="for one cell")
    args = parser.parse_args()
    for path in args.notebooks:
        lacking = missing(nbformat.read(path, as_version=4))
        if lacking:
            print(f"{path}: SKIPPED, needs {', '.join(lacking)}, which is not installed here", flush=True)
            continue
        started = time.perf_counter()
        try:
            notebook = execute(path, timeout=args.timeout)
        except CellExecutionError as error:
            sys.exit(f"{path}: a cell raised\n{error}")
        save(notebook, args.output / path.name)
        found = list(complaints(json.loads(nbformat.writes(notebook))))
        if found:
            sys.exit("\n".join(f"{path}: {complaint}" for complaint in found))
        if args.in_place:
            save(notebook, path)
        print(f"{path}: {time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
