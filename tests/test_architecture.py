"""The rules that keep the project readable: import order, small files and functions, no pickle, no local paths.

Each checker takes source text and returns complaints, so that the second half of this file can show it bad code.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

#: A room of ``vlaquant/`` imports only from rooms before it.
ORDER = [
    "errors",
    "terminal",
    "scheme",
    "numerics",
    "packing",
    "kernels",
    "linear",
    "models",
    "families",
    "recipe",
    "checkpoint",
    "plan",
    "calibrate",
    "passes",
    "engine",
    "export",
    "result",
    "evaluate",
    "sensitivity",
    "goals",
    "pipeline",
    "training",
    "benchmark",
    "report",
    "closing",
    "commands",
    "cli",
]
#: Entrances to the package: they may import every room.
ENTRANCES = {"vlaquant", "vlaquant.__main__"}

#: Optional extras, which may be imported inside a function.
OPTIONAL = {
    *("av", "axe_playwright_python", "compressed_tensors", "gguf", "gymnasium", "lerobot", "libero"),
    *("matplotlib", "metaworld", "mujoco", "pdoc", "playwright", "scipy"),
}
PICKLES = {"cPickle", "cloudpickle", "dill", "joblib", "pickle", "shelve"}

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60

_LOCAL_PATH = re.compile(r"(?<![\w.$}])(?:/(?:home|mnt|opt|root|srv|tmp|Users)/\w|[A-Z]:\\Users)")
_TEXT_SUFFIXES = {".cfg", ".csv", ".html", ".json", ".md", ".py", ".sh", ".svg", ".toml", ".txt", ".yaml", ".yml", ""}
_TEXT_FOLDERS = [".ci", "bench", "configs", "docs", "examples", "scripts", "tests", "vlaquant"]


def python_files() -> list[Path]:
    folders = ["vlaquant", "scripts", "tests", "bench", "examples"]
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def text_files() -> list[Path]:
    """Everything written by hand; the policy and data under ``examples/`` are only looked at in their Python."""
    nested = [
        path for folder in _TEXT_FOLDERS for path in (ROOT / folder).rglob("*") if "__pycache__" not in path.parts
    ]
    written = [path for path in nested if path.suffix == ".py" or path.relative_to(ROOT).parts[0] != "examples"]
    top = [path for path in ROOT.iterdir() if path.name not in {".git", "LICENSE"}]
    return sorted(path for path in [*written, *top] if path.is_file() and path.suffix in _TEXT_SUFFIXES)


def package_sources() -> dict[str, str]:
    """Dotted module name -> source, for all of ``vlaquant/``."""
    sources = {}
    for path in sorted((ROOT / "vlaquant").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        sources[".".join(part for part in parts if part != "__init__")] = path.read_text(encoding="utf-8")
    return sources


def imports(source: str, modules: set[str]) -> Iterator[tuple[int, str]]:
    """(line, module of vlaquant) for each import; ``from a import b`` means ``a.b`` where that is a module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if alias.name.split(".")[0] == "vlaquant")
        elif isinstance(node, ast.ImportFrom) and node.level > 0:
            yield node.lineno, "." * node.level + (node.module or "")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vlaquant":
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                is_module = inner in modules or (node.module == "vlaquant" and alias.name in ORDER)
                yield node.lineno, inner if is_module else str(node.module)


def _room(module: str) -> str:
    return [*module.split("."), ""][1]


def order_complaints(sources: dict[str, str]) -> list[str]:
    """Imports that point down the order, at the package itself, or are relative."""
    complaints = []
    for module, source in sources.items():
        room = _room(module)
        if module in ENTRANCES:
            continue
        if room not in ORDER:
            complaints.append(f"{module}: room {room!r} has no place in the import order")
            continue
        for line, target in imports(source, set(sources)):
            if target.startswith("."):
                complaints.append(f"{module}:{line}: relative import of {target!r}; write it in full")
            elif target in ENTRANCES:
                complaints.append(f"{module}:{line}: imports the package itself; import the room that has the name")
            elif _room(target) not in ORDER:
                complaints.append(f"{module}:{line}: imports {target}, which has no place in the import order")
            elif ORDER.index(_room(target)) > ORDER.index(room):
                complaints.append(f"{module}:{line}: {room} comes before {_room(target)} and may not import it")
    return complaints


def cycle_complaints(sources: dict[str, str]) -> list[str]:
    """Modules of one room that import each other in a circle."""
    graph = {
        module: {target for _, target in imports(source, set(sources)) if _room(target) == _room(module)}
        for module, source in sources.items()
        if module not in ENTRANCES
    }
    # A module that only leads to modules without a way on is in no circle: take such modules off until none is left.
    while free := [module for module, targets in graph.items() if not targets & graph.keys()]:
        for module in free:
            del graph[module]
    return [f"{module}: is in or leads to an import cycle" for module in graph]


def size_complaints(name: str, source: str) -> list[str]:
    """A file or a function that is too long."""
    lines = len(source.splitlines())
    complaints = [f"{name}: {lines} lines, at most {MAX_FILE_LINES}"] if lines > MAX_FILE_LINES else []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            length = node.end_lineno - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                complaints.append(f"{name}:{node.lineno}: {node.name} has {length} lines, at most {MAX_FUNCTION_LINES}")
    return complaints


def inner_import_complaints(name: str, source: str) -> list[str]:
    """Imports inside functions, other than of optional extras."""
    complaints = set()
    for function in ast.walk(ast.parse(source)):
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        for node in ast.walk(function):
            if isinstance(node, ast.Import):
                packages = {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                packages = {(node.module or ".").split(".")[0]}
            else:
                continue
            complaints |= {f"{name}:{node.lineno}: imports {one!r} inside a function" for one in packages - OPTIONAL}
    return sorted(complaints)


def pickle_complaints(name: str, source: str) -> list[str]:
    """Ways to read or write pickles; ``torch.load(…, weights_only=True)`` reads tensors and can run no code."""
    complaints = []
    tree = ast.parse(source)
    tensors_only = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call) and _only_weights(node)}
    for node in ast.walk(tree):
        found: list[str] = []
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names if alias.name.split(".")[0] in PICKLES]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PICKLES:
            found = [str(node.module)]
        elif isinstance(node, ast.ImportFrom) and node.module == "torch":
            found = [f"torch.{alias.name}" for alias in node.names if alias.name in {"load", "save"}]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
            found = [f"torch.{node.attr}"] if node.attr in {"load", "save"} and id(node) not in tensors_only else []
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            harmless = isinstance(node.value, ast.Constant) and node.value.value is False
            found = [] if harmless else ["allow_pickle"]
        complaints += [f"{name}:{getattr(node, 'lineno', 0)}: {one}: no pickle here" for one in found]
    return complaints


def _only_weights(call: ast.Call) -> bool:
    loads = isinstance(call.func, ast.Attribute) and call.func.attr == "load"
    return loads and any(
        keyword.arg == "weights_only" and isinstance(keyword.value, ast.Constant) and keyword.value.value is True
        for keyword in call.keywords
    )


def path_complaints(name: str, text: str) -> list[str]:
    """Absolute paths that exist on one machine only."""
    return [
        f"{name}:{number}: path of one machine: {line.strip()[:80]}"
        for number, line in enumerate(text.splitlines(), start=1)
        if _LOCAL_PATH.search(line)
    ]


def in_every_file(paths, check):
    complaints = []
    for path in paths:
        complaints += check(str(path.relative_to(ROOT)), path.read_text(encoding="utf-8"))
    return complaints


def report(complaints):
    assert not complaints, "\n" + "\n".join(complaints)


def test_rooms_import_only_from_rooms_before_them():
    report(order_complaints(package_sources()))


def test_modules_of_a_room_do_not_import_in_circles():
    report(cycle_complaints(package_sources()))


def test_files_and_functions_are_small():
    report(in_every_file(python_files(), size_complaints))


def test_only_optional_extras_are_imported_inside_functions():
    report(in_every_file(python_files(), inner_import_complaints))


def test_package_has_no_pickle():
    report(in_every_file((ROOT / "vlaquant").rglob("*.py"), pickle_complaints))


def test_no_path_of_one_machine():
    report(in_every_file([path for path in text_files() if path != Path(__file__).resolve()], path_complaints))


def test_checkers_look_at_something():
    assert "vlaquant.errors" in package_sources()
    assert ROOT / "vlaquant" / "scheme.py" in python_files()
    assert {ROOT / "pyproject.toml", ROOT / "Makefile", ROOT / ".ci" / "run"} <= set(text_files())


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        ("vlaquant.scheme", "from vlaquant.linear import W4A16Linear", "scheme comes before linear"),
        ("vlaquant.scheme", "import vlaquant.cli", "scheme comes before cli"),
        ("vlaquant.scheme", "from vlaquant import linear", "scheme comes before linear"),
        (
            "vlaquant.scheme",
            "def f():\n    from vlaquant import kernels",
            "vlaquant.scheme:2: scheme comes before kernels",
        ),
        ("vlaquant.families.openvla", "from vlaquant.plan import Plan", "families comes before plan"),
        ("vlaquant.cli", "from vlaquant import quantize", "imports the package itself"),
        ("vlaquant.cli", "from .plan import Plan", "relative import of '.plan'"),
        ("vlaquant.utils", "", "room 'utils' has no place"),
        ("vlaquant.cli", "from vlaquant.helpers.misc import x", "imports vlaquant.helpers.misc"),
    ],
)
def test_order_checker_sees(module, source, complaint):
    (found,) = order_complaints({module: source})
    assert complaint in found


def test_order_checker_accepts_the_way_up():
    sources = {
        "vlaquant": "from vlaquant.cli import main",
        "vlaquant.cli": "from vlaquant.plan import Plan\nfrom vlaquant import scheme\nimport torch",
        "vlaquant.passes.gptq": "from vlaquant.passes.rtn import round_to_nearest",
        "vlaquant.passes.rtn": "from vlaquant.errors import VlaquantError",
    }
    assert order_complaints(sources) == []
    assert cycle_complaints(sources) == []


def test_cycle_checker_sees_a_circle_of_three():
    sources = {
        "vlaquant.passes": "from vlaquant.passes.rtn import x",
        "vlaquant.passes.rtn": "from vlaquant.passes import gptq",
        "vlaquant.passes.gptq": "import vlaquant.passes",
        "vlaquant.passes.awq": "from vlaquant.errors import VlaquantError",
    }
    assert [complaint.split(":")[0] for complaint in cycle_complaints(sources)] == list(sources)[:3]


def test_size_checker_sees_one_line_too_many():
    function = "def f():\n" + "    x = 1\n" * (MAX_FUNCTION_LINES - 1)
    assert size_complaints("a.py", function) == []
    assert "f has 61 lines" in size_complaints("a.py", function + "    x = 1\n")[0]
    assert size_complaints("a.py", "x = 1\n" * MAX_FILE_LINES) == []
    assert "401 lines" in size_complaints("a.py", "x = 1\n" * (MAX_FILE_LINES + 1))[0]


@pytest.mark.parametrize("statement", ["import json", "from os import path", "from . import x", "import mujoco, json"])
def test_inner_import_checker_sees(statement):
    assert len(inner_import_complaints("a.py", f"def f():\n    if True:\n        {statement}")) == 1
    assert inner_import_complaints("a.py", f"{statement}\ndef f():\n    import mujoco") == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from dill import loads",
        "from torch import load",
        "import torch\ntorch.load(p)",
        "torch.load(p, weights_only=False)",
        "torch.load(p, weights_only=flag)",
        "torch.save(x, p)",
        "torch.save(x, p, weights_only=True)",
        "read = torch.load",
        "numpy.load(p, allow_pickle=True)",
        "numpy.load(p, allow_pickle=flag)",
    ],
)
def test_pickle_checker_sees(source):
    assert len(pickle_complaints("a.py", source)) == 1


def test_pickle_checker_accepts_tensors_and_nothing_else():
    assert pickle_complaints("a.py", "import torch\ntorch.load(p, map_location='cpu', weights_only=True)") == []


def test_pickle_checker_accepts_safetensors():
    assert (
        pickle_complaints("a.py", "from safetensors.torch import load\nload(b)\nnp.load(p, allow_pickle=False)") == []
    )


@pytest.mark.parametrize(
    "text", ["x = '/home/me/model'", "see /srv/x", "cd /root/x", "/tmp/x/bin/python", r"C:\Users\me"]
)
def test_path_checker_sees(text):
    assert len(path_complaints("a.md", text)) == 1


@pytest.mark.parametrize("text", ["examples/srv/x", "https://a.b/home/x", "$HOME/work/x", "a/root/b", "/dev/null"])
def test_path_checker_accepts(text):
    assert path_complaints("a.md", text) == []
