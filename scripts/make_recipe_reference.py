"""Write docs/recipes.md, the reference of all keys of a recipe, from the classes that read it.

python scripts/make_recipe_reference.py [--check]
"""

import argparse
import inspect
import json
import re
import sys
import types
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from vlaquant.recipe.base import Section
from vlaquant.recipe.sections import Recipe
from vlaquant.scheme import PRESETS, Granularity, QuantSpec

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "recipes.md"
EXAMPLE = ROOT / "configs" / "demo_w4a16_awq.yaml"

_WORDS = {bool: "true or false", int: "whole number", float: "number", str: "text"}
_LIMITS = {"gt": "more than {}", "ge": "at least {}", "lt": "less than {}", "le": "at most {}"}

_INTRODUCTION = """\
# Recipes

A recipe is a YAML file. It says which layers are quantized, how, and with which data. This page is written by
`python scripts/make_recipe_reference.py` from the classes that read recipes; a test fails when it is out of date.

Reading is strict. An unknown key, a value of the wrong type or a scheme that does not exist is an error; it names the
line, the place and the nearest legal word. Paths in a file are relative to the file. `vlaquant.json` in the output of a
run holds its recipe with all defaults written out.

A whole recipe, [`configs/{example}`](../configs/{example}):

```yaml
{text}```

## Schemes

`w4a16` means weights of 4 bits, and activations that stay float (16 bits). [`concepts.md`](concepts.md) explains the
columns. A rule can change `bits`, `symmetric` and `group_size` of a scheme. `float` keeps layers as they are.

"""


def page() -> str:
    """All of docs/recipes.md."""
    text = _INTRODUCTION.format(example=EXAMPLE.name, text=EXAMPLE.read_text(encoding="utf-8"))
    text += _schemes()
    for title, section in sections():
        summary, meanings = described(section)
        text += f"\n## {title}\n\n{summary}\n\n{_keys(section, meanings)}"
    return text


def sections() -> list[tuple[str, type[Section]]]:
    """(heading, class), each class once, from the recipe downwards and in the order of the keys."""
    found: dict[type[Section], str] = {Recipe: "The recipe"}
    waiting: list[tuple[str, type[Section]]] = [("", Recipe)]
    while waiting:
        above, section = waiting.pop(0)
        for key, field in section.model_fields.items():
            inner = [one for one in _sections_in(field.annotation) if one not in found]
            for one in inner:
                place = f"{above}{key}"
                kind = one.model_fields.get("kind")
                found[one] = f"`{place}`" if kind is None else f"`{place}`, kind `{kind.default}`"
            waiting += [(f"{above}{key}.", one) for one in inner]
    return [(title, section) for section, title in found.items()]


def described(section: type[Section]) -> tuple[str, dict[str, str]]:
    """What a class's docstring says of it, and of each key, in Markdown.

    Raises:
        LookupError: a key of which it says nothing, or one that the class does not have.
    """
    prose, meanings = _own_words(section)
    keys = [key for key in section.model_fields if key != "kind"]
    for parent in section.__mro__[1:]:
        if issubclass(parent, Section):
            inherited = _own_words(parent)[1]
            meanings |= {key: text for key, text in inherited.items() if key in keys and key not in meanings}
    if missing := [key for key in keys if key not in meanings]:
        raise LookupError(f"{section.__name__}: say in its docstring, under Attributes, what {', '.join(missing)} mean")
    if unknown := [key for key in meanings if key not in keys]:
        raise LookupError(f"{section.__name__}: its docstring speaks of {', '.join(unknown)}, which it does not have")
    return _markdown(prose), meanings


def _own_words(section: type[Section]) -> tuple[str, dict[str, str]]:
    prose, _, listed = inspect.cleandoc(section.__doc__ or "").partition("\n\nAttributes:\n")
    entries = re.findall(r"^    (\w+): (.*(?:\n {5,}.*)*)", listed, flags=re.MULTILINE)
    return prose, {key: _markdown(re.sub(r"\s+", " ", text)) for key, text in entries}


def in_words(annotation: Any) -> str:
    """What may stand in the file: ``list of text``, ``whole number, more than 0``."""
    if annotation in _WORDS:
        return _WORDS[annotation]
    origin, inside = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return ", ".join([in_words(inside[0]), *_limits(inside[1:])])
    if origin is Literal:
        return " or ".join(f"`{one}`" for one in inside)
    if origin in {Union, types.UnionType}:
        parts = [in_words(one) for one in inside if one is not type(None)]
        return " or ".join(dict.fromkeys(parts)) + (", may be `null`" if type(None) in inside else "")
    if origin in {tuple, list}:
        return f"list of {in_words(inside[0])}"
    if origin is dict:
        return f"mapping of {in_words(inside[0])} to {in_words(inside[1])}"
    if isinstance(annotation, type) and issubclass(annotation, PurePath):
        return "path"
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return _link(annotation)
    return f"`{getattr(annotation, '__name__', annotation)}`"


def _type(field: FieldInfo) -> str:
    annotation: Any = field.annotation
    if field.default is None:  # that the key may be left out is in the column of defaults
        rest = [one for one in get_args(annotation) if one is not type(None)]
        annotation = Union[tuple(rest)] if rest else annotation  # noqa: UP007  there is no other way to write it
    return ", ".join([in_words(annotation), *_limits(field.metadata)])


def _limits(metadata: Any) -> Iterator[str]:
    for one in metadata:
        if isinstance(one, FieldInfo):
            yield from _limits(one.metadata)
            continue
        for name, words in _LIMITS.items():
            if getattr(one, name, None) is not None:
                yield words.format(f"{getattr(one, name):g}")


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return "must be given"
    if value is None:
        return "–"
    if isinstance(value, Section):
        return f"`kind: {value.kind}`" if hasattr(value, "kind") else "its defaults"
    return f"`{value}`" if isinstance(value, str) else f"`{json.dumps(value, default=str)}`"


def _keys(section: type[Section], meanings: dict[str, str]) -> str:
    rows = [("key", "value", "default", "meaning")]
    for key, field in section.model_fields.items():
        if key == "kind":
            rows.append(("`kind`", f"`{field.default}`", "must be given", "chooses this section"))
        else:
            rows.append((f"`{key}`", _type(field), _default(field), meanings[key]))
    return _table(rows)


def _schemes() -> str:
    rows = [("scheme", "weights", "a scale for", "activations")]
    for name, scheme in PRESETS.items():
        rows.append((f"`{name}`", _bits(scheme.weight), _sharing(scheme.weight), _activation(scheme.activation)))
    return _table(rows)


def _bits(spec: QuantSpec) -> str:
    return f"{spec.bits} bits, {'symmetric' if spec.symmetric else 'asymmetric'}"


def _sharing(spec: QuantSpec) -> str:
    words = {Granularity.TENSOR: "the whole weight", Granularity.CHANNEL: "each row"}
    return words.get(spec.granularity, f"{spec.group_size} columns of a row")


def _activation(spec: QuantSpec | None) -> str:
    if spec is None:
        return "float"
    return f"{_bits(spec)}, " + ("a scale for each token" if spec.dynamic else "one scale for all, from calibration")


def _sections_in(annotation: Any) -> list[type[Section]]:
    """The classes of sections that a type is made of, in their order."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for inside in get_args(annotation) for section in _sections_in(inside)]


def _link(section: type[Section]) -> str:
    title = {one: title for title, one in sections()}[section]
    anchor = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
    kind = section.model_fields.get("kind")
    return f"[`{kind.default if kind else title.strip('`')}`](#{anchor})"


def _markdown(text: str) -> str:
    """Of a docstring: ``x`` and roles become `x`, and pages under docs/ become links."""
    text = re.sub(r":\w+:`~?(?:[\w.]+\.)?(\w+)`", r"`\1`", text).replace("``", "`")
    return re.sub(r"\bdocs/([\w-]+\.md)", r"[`\1`](\1)", text)


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the page is out of date")
    args = parser.parse_args()
    if not args.check:
        PAGE.write_text(page(), encoding="utf-8")
    elif PAGE.read_text(encoding="utf-8") != page():
        sys.exit(f"{PAGE.name} is out of date: python scripts/make_recipe_reference.py")


if __name__ == "__main__":
    main()
