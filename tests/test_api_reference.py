"""The API reference builds without warnings, and knows what the pages import."""

import ast
import importlib
import inspect
import re
from pathlib import Path

import documents
import make_api_reference as reference
import pytest
from documents import ROOT, read


def test_it_builds_without_warnings(tmp_path: Path) -> None:
    pytest.importorskip("pdoc")
    reference.import_all()
    assert reference.build(tmp_path) == []
    page = read(tmp_path / "vlaquant.html")
    assert 'id="quantize"' in page
    assert 'id="_write"' not in page
    assert {path.stem for path in (tmp_path / "vlaquant").rglob("*.html")} >= {"numerics", "recipe", "gptq"}


def test_a_warning_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pdoc")
    (tmp_path / "wrongly_typed.py").write_text("def f(x: 'no_such_name.Type') -> None:\n    '''One.'''\n")
    monkeypatch.syspath_prepend(tmp_path)
    (complaint,) = reference.build(tmp_path / "out", ["wrongly_typed"])
    assert "no_such_name" in complaint


def public_names(module_name: str) -> set[str]:
    module = importlib.import_module(module_name)
    return set(getattr(module, "__all__", [name for name in vars(module) if not name.startswith("_")]))


def test_what_pages_import_is_public() -> None:
    blocks = [block for page in documents.pages() for block in documents.blocks(read(page), "python")]
    imported = [
        (node.module, alias.name)
        for block in blocks
        for node in ast.walk(ast.parse(block))
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "vlaquant"
        for alias in node.names
    ]
    assert len(imported) > 10
    assert [one for one in imported if one[0] not in reference.MODULES or one[1] not in public_names(str(one[0]))] == []


def unresolved(source: str, module_name: str) -> list[str]:
    """Roles in docstrings, such as :func:`x`, that name nothing."""
    module = importlib.import_module(module_name)
    return [name for name in re.findall(r":\w+:`~?([\w.]+)`", source) if not _exists(name, module)]


def _exists(name: str, module: object) -> bool:
    parts = name.split(".")
    if parts[0] == "vlaquant":
        for end in range(len(parts), 0, -1):
            try:
                found: object = importlib.import_module(".".join(parts[:end]))
            except ModuleNotFoundError:
                continue
            return _has(found, parts[end:])
    classes = [value for value in vars(module).values() if inspect.isclass(value)]
    return any(_has(one, parts) for one in (module, *classes))


def _has(found: object, names: list[str]) -> bool:
    for name in names:
        if not hasattr(found, name):
            return name in getattr(found, "__annotations__", {})
        found = getattr(found, name)
    return True


def test_names_in_docstrings_exist() -> None:
    complaints = []
    for path in sorted((ROOT / "vlaquant").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        source = read(path)
        if ":`" in source and "jit" not in path.stem and "peers" not in parts:
            module = ".".join(part for part in parts if part != "__init__")
            complaints += [f"{module}: {name}" for name in unresolved(source, module)]
    assert complaints == []


def test_a_name_that_does_not_exist_is_seen() -> None:
    source = '":func:`to_codes` :func:`to_cods` :class:`~vlaquant.plan.Plan` :class:`vlaquant.plan.Plam`"'
    assert unresolved(source, "vlaquant.numerics") == ["to_cods", "vlaquant.plan.Plam"]
