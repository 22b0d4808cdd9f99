"""Transforms for some parts of a model: where they are done, and what is refused."""

import pytest
from tiny import observations, openvla

from vlaquant.engine import stage
from vlaquant.errors import PlanError
from vlaquant.pipeline import plan, quantize
from vlaquant.recipe import load_recipe

RULES = [{"part": part, "scheme": "w4a16", "group_size": 16} for part in ("vision", "language")]


def recipe(*transforms: dict[str, object]) -> dict[str, object]:
    return {"family": "openvla", "rules": RULES, "transforms": list(transforms)}


def transformed(*transforms: dict[str, object]) -> set[tuple[str, str]]:
    """{(kind, first name of the source)} of all folds that were tried."""
    result = quantize(openvla(), recipe(*transforms), samples=observations(10))
    return {(record.kind, record.source.split(".")[0]) for record in result.transforms}


def check_parts() -> None:
    found = transformed({"kind": "awq", "grid": 4, "parts": ["language"]}, {"kind": "smoothquant", "parts": ["vision"]})
    assert found == {("awq", "language_model"), ("smoothquant", "vision_backbone")}


def test_each_part_has_its_own() -> None:
    check_parts()


def test_without_parts_everywhere() -> None:
    assert transformed({"kind": "awq", "grid": 4}) == {("awq", "language_model"), ("awq", "vision_backbone")}


def test_parts_that_are_ignored_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    suits = vars(stage)["suits"]
    monkeypatch.setattr(
        stage, "suits", lambda transform, fold, _: suits(transform.model_copy(update={"parts": None}), fold, "")
    )
    with pytest.raises(AssertionError):
        check_parts()


@pytest.mark.parametrize("part", ["langauge", "projector"])
def test_a_part_without_quantized_layers_is_refused(part: str) -> None:
    with pytest.raises(PlanError, match=rf"transforms\[1\] \(awq\): no layer of part '{part}' is quantized") as caught:
        plan(openvla(), recipe({"kind": "smoothquant"}, {"kind": "awq", "parts": ["language", part]}))
    assert "parts with quantized layers: language, vision" in str(caught.value)
    assert ("did you mean 'language'?" in str(caught.value)) == (part == "langauge")


def test_parts_survive_resolving() -> None:
    made = load_recipe(recipe({"kind": "awq", "parts": ["language"]}))
    assert load_recipe(made.resolved()) == made
