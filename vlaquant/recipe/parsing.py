"""YAML to Recipe. Every problem becomes one line of the message: where, got, wanted, what to do next."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from vlaquant.errors import RecipeError
from vlaquant.recipe.base import Section
from vlaquant.recipe.goals import Budget, Require
from vlaquant.recipe.sections import KINDS, Recipe, Rule
from vlaquant.recipe.words import did_you_mean, shown

#: ``1e-2`` is a number in YAML 1.2, but a string in the YAML 1.1 that PyYAML reads.
_EXPONENT_NUMBER = re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+$")

#: pydantic's error type -> what was wanted, in the words of YAML and not of Python.
_WANTED = {
    "bool_type": "true or false",
    "float_type": "a number",
    "int_type": "a whole number",
    "invalid_key": "a key in letters",
    "model_attributes_type": "a mapping with a 'kind'",
    "model_type": "a mapping",
    "path_type": "a path",
    "string_type": "text",
    "tuple_type": "a list",
}


def load_recipe(source: Recipe | Mapping[str, Any] | str | Path) -> Recipe:
    """A recipe from a YAML file, from a mapping, or as it is.

    Relative paths in a file are relative to its folder; in a mapping they are left alone.

    Raises:
        RecipeError: the file cannot be read or is not a valid recipe; the message lists every problem.
    """
    if isinstance(source, Recipe):
        return source
    if isinstance(source, Mapping):
        return _validated(dict(source), "recipe", folder=None, tree=None)
    path = Path(source)
    tree, data = _read_yaml(path)
    return _validated(data, str(path), folder=path.parent.resolve(), tree=tree)


class _StrictLoader(yaml.SafeLoader):
    """Plain YAML in which no mapping has a key twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:  # noqa: FBT001, FBT002
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for position, key in enumerate(keys):
            if any(key.value == earlier.value for earlier in keys[:position]):
                raise yaml.constructor.ConstructorError(problem=f"key {key.value!r} twice", problem_mark=key.start_mark)
        return super().construct_mapping(node, deep=deep)


_StrictLoader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT_NUMBER, list("-+0123456789"))


def _read_yaml(path: Path) -> tuple[yaml.Node | None, Any]:
    """The file as a tree of nodes, which know their lines, and as values."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise RecipeError(f"{path}: no such recipe file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read as text: {error}") from error
    try:
        loader = _StrictLoader(text)
        tree = loader.get_single_node()
        return tree, None if tree is None else loader.construct_document(tree)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise RecipeError(f"{where}: not valid YAML: {error.problem or error.context}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise RecipeError(f"{path}: not valid YAML: {error}") from error


def _validated(data: Any, where: str, *, folder: Path | None, tree: yaml.Node | None) -> Recipe:
    if data is None:
        raise RecipeError(f"{where}: is empty; a recipe needs at least 'rules'")
    if not isinstance(data, dict):
        raise RecipeError(f"{where}: must be a mapping with keys such as 'rules', got {shown(data)}")
    try:
        return Recipe.model_validate(data, context={"folder": folder})
    except ValidationError as error:
        problems = [_problem(details, data, where, tree) for details in error.errors()]
        raise RecipeError("\n".join(problems)) from error


def _problem(details: ErrorDetails, data: Any, where: str, tree: yaml.Node | None) -> str:
    keys = _present_keys(details["loc"], data)
    line = "" if tree is None else f":{_line(tree, keys)}"
    if details["type"] == "missing":
        keys.append(details["loc"][-1])
    elif details["type"].startswith("union_tag"):
        keys.append("kind")
    place = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys).removeprefix(".")
    return ": ".join(part for part in (f"{where}{line}", place, _complaint(details)) if part)


def _present_keys(location: Sequence[int | str], data: Any) -> list[int | str]:
    """``location`` without what the recipe does not hold: pydantic puts the kind of a section between the keys."""
    keys: list[int | str] = []
    for key in location:
        inside = isinstance(key, int) if isinstance(data, list | tuple) else isinstance(data, Mapping) and key in data
        if inside:
            keys.append(key)
            data = data[key]
    return keys


def _line(node: yaml.Node, keys: list[int | str]) -> int:
    """The line, from 1, on which ``keys`` lead to."""
    line = node.start_mark.line
    for key in keys:
        if isinstance(node, yaml.SequenceNode) and isinstance(key, int):
            node = node.value[key]
            line = node.start_mark.line
        elif isinstance(node, yaml.MappingNode):
            for key_node, value_node in node.value:
                if key_node.value == str(key):
                    line, node = key_node.start_mark.line, value_node
    return line + 1


def _complaint(details: ErrorDetails) -> str:
    kind, context, got = details["type"], details.get("ctx", {}), details["input"]
    if kind == "value_error":
        return str(context["error"])
    if kind == "missing":
        return "missing"
    if kind == "extra_forbidden":
        known = _section(details["loc"]).model_fields
        return f"unknown key; legal keys here: {', '.join(known)}{did_you_mean(details['loc'][-1], known)}"
    if kind.startswith("union_tag"):
        known_kinds = KINDS[str(details["loc"][0])]
        got = got.get("kind") if isinstance(got, Mapping) else got
        return f"must be one of {', '.join(known_kinds)}, got {shown(got)}{did_you_mean(got, known_kinds)}"
    if kind == "literal_error":
        legal = re.findall(r"'(\w+)'", context["expected"])
        return f"must be one of {', '.join(legal)}, got {shown(got)}{did_you_mean(got, legal)}"
    wanted = f"must be {_WANTED[kind]}" if kind in _WANTED else details["msg"].replace("Input should be", "must be")
    return f"{wanted}, got {shown(got)}"


def _section(location: Sequence[int | str]) -> type[Section]:
    """The class that was asked for a key it does not have."""
    if len(location) == 1:
        return Recipe
    plain: dict[object, type[Section]] = {"rules": Rule, "budget": Budget, "require": Require}
    return plain.get(location[0]) or KINDS[str(location[0])][str(location[-2])]
