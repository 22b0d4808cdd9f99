"""The recipe file: what it accepts, and that each refusal says where, what, and what to do."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from vlaquant.errors import RecipeError
from vlaquant.families import FAMILIES
from vlaquant.recipe import (
    Awq,
    Episodes,
    Gptq,
    Recipe,
    Rtn,
    Rule,
    SmoothQuant,
    Text,
    load_recipe,
    needs_calibration,
    require_calibration,
)
from vlaquant.scheme import PRESETS, Granularity

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
RULE = {"part": "language", "scheme": "w4a16"}


@pytest.fixture
def load_text(tmp_path):
    """Write text as a recipe file and load it."""

    def load(text: str) -> Recipe:
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return load_recipe(path)

    return load


def make(**changes) -> Recipe:
    return load_recipe({"rules": [RULE], **changes})


def test_full_recipe(load_text, tmp_path):
    recipe = load_text(
        """
family: hf
model: ../model
output: /absolute/output
rules:
  - {part: language, scheme: w4a16, group_size: 64, bits: 3, symmetric: false}
  - {pattern: 're:.*head', scheme: float}
on_indivisible: nearest
transforms: [{kind: smoothquant, alpha: 0.7}, {kind: awq}]
quantizer: {kind: gptq, damp: 1e-2, act_order: off}
calibration: {kind: text, path: calibration.txt, samples: 8}
seed: 7
"""
    )
    assert recipe.model == tmp_path.parent / "model"
    assert recipe.output == Path("/absolute/output")
    assert recipe.rules[0] == Rule(part="language", scheme="w4a16", group_size=64, bits=3, symmetric=False)
    assert recipe.transforms == (SmoothQuant(alpha=0.7), Awq(grid=20))
    assert recipe.quantizer == Gptq(clip="minmax", damp=0.01, block_size=128, act_order=False)
    assert recipe.calibration == Text(path=tmp_path / "calibration.txt", samples=8, sequence_length=512, min_tokens=32)
    assert (recipe.family, recipe.on_indivisible, recipe.seed) == ("hf", "nearest", 7)


def test_defaults():
    recipe = make()
    assert (recipe.family, recipe.on_indivisible, recipe.seed) == ("auto", "error", 0)
    assert (recipe.model, recipe.output, recipe.calibration, recipe.transforms) == (None, None, None, ())
    assert recipe.quantizer == Rtn(clip="minmax")
    assert make(calibration={"kind": "episodes", "path": "x"}).calibration == Episodes(
        path=Path("x"), split="calibration", samples=64, min_tokens=32
    )


def test_recipe_is_frozen_and_passes_through():
    recipe = make()
    assert load_recipe(recipe) is recipe
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 3  # type: ignore[misc]


def test_paths_of_a_mapping_are_left_alone():
    assert make(model="../x").model == Path("../x")
    assert make(model=Path("../x")).model == Path("../x")


@pytest.mark.parametrize("family", ["auto", *FAMILIES])
def test_all_families_are_legal(family):
    assert make(family=family).family == family


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_recipes_load(path):
    recipe = load_recipe(path)
    assert recipe.family in path.stem or (recipe.family == "openvla" and path.stem.startswith("demo"))
    first = recipe.rules[0].resolve_scheme()
    assert first is not None
    assert first.weight.bits == (8 if "w8a8" in path.stem else 4)
    assert (first.activation is not None) == ("w8a8" in path.stem)
    algorithms = {recipe.quantizer.kind, *(transform.kind for transform in recipe.transforms)}
    assert path.stem.rpartition("_")[2] in algorithms | {"small"}
    if recipe.family == "groot":  # its samples are batches, given in Python
        recipe = recipe.model_copy(update={"calibration": Text(path=Path("text"))})
    require_calibration(recipe)


def test_every_kind_of_model_has_three_recipes():
    kinds = ["w4a16_awq", "w4a16_gptq", "w8a8_smoothquant"]
    models = ["demo", "openvla", "openvla_oft", "pi0", "lerobot_smolvla", "lerobot_pi05", "hf"]
    wanted = {f"{model}_{kind}" for model in models for kind in kinds}
    assert wanted <= {path.stem for path in CONFIGS}


def complaint(text: str, load) -> str:
    with pytest.raises(RecipeError) as caught:
        load(text)
    return str(caught.value)


GOOD = "rules: [{part: language, scheme: w4a16}]\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "recipe.yaml: is empty"),
        ("- a", "recipe.yaml: must be a mapping with keys such as 'rules', got ['a']"),
        ("just text", "must be a mapping with keys such as 'rules', got 'just text'"),
        ("seed: 1\nrules: [", "recipe.yaml:2: not valid YAML"),
        ("a: b: c", "recipe.yaml:1: not valid YAML"),
        ("a: *b", "recipe.yaml:1: not valid YAML: found undefined alias 'b'"),
        ("? [a]\n: 3", "recipe.yaml:1: not valid YAML: found unhashable key"),
        ("a: !!python/object:os.system x", "recipe.yaml:1: not valid YAML: could not determine a constructor"),
        ("a: 2024-99-99", "recipe.yaml: not valid YAML: month must be in 1..12"),
        (f"{GOOD}---\n{GOOD}", "recipe.yaml:2: not valid YAML"),
        (f"{GOOD}seed: 1\nseed: 2", "recipe.yaml:3: not valid YAML: key 'seed' twice"),
        ("rules:\n - part: a\n   scheme: w4a16\n   part: b", "recipe.yaml:4: not valid YAML: key 'part' twice"),
        ("seed: 1", "recipe.yaml:1: rules: missing"),
        ("rules: []", "recipe.yaml:1: rules: is empty, so nothing would be quantized; add one such as"),
        ("rules:", "recipe.yaml:1: rules: must be a list, got None"),
        ("rules: {part: a}", "recipe.yaml:1: rules: must be a list, got {'part': 'a'}"),
        ("rules: [4]", "recipe.yaml:1: rules[0]: must be a mapping, got 4"),
        (f"{GOOD}modle: x", "recipe.yaml:2: modle: unknown key; legal keys here: family, model, output"),
        (f"{GOOD}modle: x", "; did you mean 'model'?"),
        (f"{GOOD}7: x", "recipe.yaml:2: [7]: must be a key in letters, got 7"),
        (f"{GOOD}seed: '3'", "recipe.yaml:2: seed: must be a whole number, got '3'"),
        (f"{GOOD}seed: true", "recipe.yaml:2: seed: must be a whole number, got True"),
        (f"{GOOD}seed: -1", "recipe.yaml:2: seed: must be greater than or equal to 0, got -1"),
        (f"{GOOD}model: 3", "recipe.yaml:2: model: must be a path, got 3"),
        (f"{GOOD}family: openvlaa", "recipe.yaml:2: family: unknown family 'openvlaa'; known families: auto, openvla"),
        (
            f"{GOOD}on_indivisible: chanel",
            "must be one of error, nearest, channel, keep, got 'chanel'; did you mean 'channel'?",
        ),
        (f"{GOOD}transforms:", "recipe.yaml:2: transforms: must be a list, got None"),
        (
            f"{GOOD}transforms: [{{alpha: 1}}]",
            "transforms[0].kind: must be one of smoothquant, awq, layerscale, rotation, got None",
        ),
        (f"{GOOD}transforms: [awq]", "transforms[0]: must be a mapping with a 'kind', got 'awq'"),
        (
            f"{GOOD}transforms:\n- kind: awk",
            "recipe.yaml:3: transforms[0].kind: must be one of smoothquant, awq, layerscale, rotation, got 'awk'",
        ),
        (
            f"{GOOD}transforms:\n- kind: awq\n  gird: 2",
            "recipe.yaml:4: transforms[0].gird: unknown key; legal keys here: parts, kind, grid; did you mean",
        ),
        (f"{GOOD}transforms: [{{kind: awq, grid: 0}}]", "transforms[0].grid: must be greater than 0, got 0"),
        (f"{GOOD}transforms: [{{kind: smoothquant, alpha: 2}}]", "alpha: must be from 0 to 1, or 'search', got 2"),
        (
            f"{GOOD}transforms: [{{kind: smoothquant, alpha: .nan}}]",
            "alpha: must be from 0 to 1, or 'search', got nan",
        ),
        (f"{GOOD}transforms: [{{kind: awq, parts: []}}]", "transforms[0].parts: "),
        (f"{GOOD}transforms: [{{kind: awq, parts: a}}]", "transforms[0].parts: must be a list, got 'a'"),
        (f"{GOOD}quantizer: {{kind: gptq, damp: much}}", "quantizer.damp: must be a number, got 'much'"),
        (f"{GOOD}quantizer: {{kind: gptq, act_order: 1}}", "quantizer.act_order: must be true or false, got 1"),
        (
            f"{GOOD}quantizer: {{kind: gptq, clip: mze}}",
            "quantizer.clip: must be one of minmax, mse, awq, got 'mze'; did you mean 'mse'?",
        ),
        (f"{GOOD}quantizer: {{kind: gptaq, alpha: 1.5}}", "alpha: must be less than or equal to 1, got 1.5"),
        (f"{GOOD}quantizer: {{kind: gptq, alpha: 0.5}}", "quantizer.alpha: unknown key"),
        (f"{GOOD}propagate: float\nquantizer: {{kind: gptaq}}", "use gptq, or 'propagate: quantized'"),
        (f"{GOOD}quantizer: {{kind: gptaq, refit: true}}", "gptaq does not go with 'refit'"),
        (
            f"{GOOD}quantizer: {{kind: rtn, damp: 0.1}}",
            "quantizer.damp: unknown key; legal keys here: kind, clip, refit",
        ),
        (f"{GOOD}calibration: {{kind: text}}", "recipe.yaml:2: calibration.path: missing"),
        (
            f"{GOOD}calibration: {{kind: episodes, path: a, sequence_length: 2}}",
            "calibration.sequence_length: unknown key",
        ),
    ],
)
def test_refusals(text, message, load_text):
    assert message in complaint(text, load_text)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("{part: a, scheme: w4a61}", "rules[0].scheme: unknown scheme 'w4a61'"),
        ("{part: a, scheme: w4a61}", "did you mean 'w4a16'?"),
        ("{part: a, scheme: w4a61}", "'float' keeps layers as they are"),
        ("{part: a}", "rules[0].scheme: missing"),
        (
            "{part: a, scheme: w4a16, gruop_size: 3}",
            "rules[0].gruop_size: unknown key; legal keys here: part, pattern, scheme",
        ),
        ("{part: a, scheme: w4a16, gruop_size: 3}", "did you mean 'group_size'?"),
        ("{scheme: w4a16}", "rules[0]: needs exactly one of 'part' and 'pattern'"),
        ("{part: a, pattern: b, scheme: w4a16}", "rules[0]: needs exactly one of 'part' and 'pattern'"),
        ("{part: '', scheme: w4a16}", "rules[0].part: String should have at least 1 character"),
        ("{pattern: 're:(', scheme: w4a16}", "rules[0].pattern: 're:(' is not a regular expression: missing )"),
        (
            "{part: a, scheme: float, bits: 4, group_size: 32}",
            "scheme 'float' keeps weights as they are; remove bits, group_size",
        ),
        ("{part: a, scheme: w4a16, bits: 9}", "rules[0]: bits=9 is not supported; use 2 to 8"),
        (
            "{part: a, scheme: w4a16, group_size: 0}",
            "rules[0].group_size: must be a positive number of columns, 'channel'",
        ),
        ("{part: a, scheme: w4a16, group_size: token}", "'channel' or 'tensor', got 'token'"),
        ("{part: a, scheme: w4a16, group_size: true}", "'channel' or 'tensor', got True"),
        ("{part: a, scheme: w4a16, symmetric: 1}", "rules[0].symmetric: must be true or false, got 1"),
    ],
)
def test_rule_refusals(rule, message, load_text):
    assert message in complaint(f"rules:\n- {rule}", load_text)


def test_every_problem_is_reported_with_its_line(load_text):
    text = "seeed: 1\nrules:\n  - part: a\n    scheme: w4\n  - part: b\n    scheme: w8a8\n    bit: 4\n"
    lines = [line.partition("recipe.yaml:")[2] for line in complaint(text, load_text).splitlines()]
    assert [line.partition(": ")[0] for line in lines] == ["4", "7", "1"]


def test_problems_of_a_mapping_have_no_line():
    with pytest.raises(RecipeError, match=r"^recipe: rules\[0\]\.bits: must be a whole number, got 4\.5$"):
        load_recipe({"rules": [{**RULE, "bits": 4.5}]})


def test_long_values_are_cut_in_messages(load_text):
    assert "xxx…" in complaint(f"{GOOD}seed: {'x' * 500}", load_text)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(RecipeError, match=r"nowhere\.yaml: no such recipe file"):
        load_recipe(tmp_path / "nowhere.yaml")
    with pytest.raises(RecipeError, match="cannot be read as text"):
        load_recipe(str(tmp_path))
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="cannot be read as text"):
        load_recipe(tmp_path / "binary.yaml")


@pytest.mark.parametrize(
    ("rule", "name", "part", "expected"),
    [
        ({"part": "vision"}, "tower.blocks.0", "vision", True),
        ({"part": "vision"}, "vision", "language", False),
        ({"pattern": "*.q_proj"}, "model.layers.0.q_proj", "language", True),
        ({"pattern": "*.q_proj"}, "model.layers.0.q_proj.base", "language", False),
        ({"pattern": "model.layers.0.q_proj"}, "model.layers.0.q_proj", "language", True),
        ({"pattern": "model.layers.0.q_proj"}, "modelXlayersX0Xq_proj", "language", False),
        ({"pattern": r"re:.*\.\d+\.(q|k)_proj"}, "model.layers.10.k_proj", "language", True),
        ({"pattern": r"re:layers"}, "model.layers.10", "language", False),
    ],
)
def test_matching(rule, name, part, expected):
    assert Rule(**rule, scheme="w4a16").matches(name, part) is expected


def test_schemes_of_rules():
    assert Rule(part="a", scheme="float").resolve_scheme() is None
    assert Rule(part="a", scheme="w4a16").resolve_scheme() == PRESETS["w4a16"]
    grouped = Rule(part="a", scheme="w8a8", group_size=32, bits=4, symmetric=False).resolve_scheme()
    assert grouped is not None
    assert (grouped.weight.group_size, grouped.weight.bits, grouped.weight.symmetric) == (32, 4, False)
    assert grouped.activation == PRESETS["w8a8"].activation
    whole = Rule(part="a", scheme="w4a16", group_size="channel").resolve_scheme()
    assert whole is not None
    assert whole.weight.granularity is Granularity.CHANNEL


@pytest.mark.parametrize(
    ("changes", "reasons"),
    [
        ({}, []),
        ({"rules": [{"part": "a", "scheme": "w8a8"}]}, []),
        ({"quantizer": {"kind": "rtn", "clip": "mse"}}, []),
        ({"quantizer": {"kind": "rtn", "clip": "awq"}}, ["quantizer (clip awq"]),
        ({"quantizer": {"kind": "gptq"}}, ["quantizer (gptq"]),
        ({"quantizer": {"kind": "gptaq"}}, ["quantizer (gptaq"]),
        (
            {"transforms": [{"kind": "awq"}, {"kind": "smoothquant"}]},
            ["transforms[0] (awq", "transforms[1] (smoothquant"],
        ),
        ({"rules": [RULE, {"part": "b", "scheme": "w8a8_static"}]}, ["rules[1] (w8a8_static"]),
        ({"quantizer": {"kind": "rtn", "refit": True}}, ["quantizer (refit"]),
    ],
)
def test_what_needs_data(changes, reasons):
    recipe = make(**changes)
    found = needs_calibration(recipe)
    assert [reason[: len(start)] for reason, start in zip(found, reasons, strict=True)] == reasons
    with_data = make(**changes, calibration={"kind": "text", "path": "x"})
    require_calibration(with_data)
    if reasons:
        with pytest.raises(RecipeError, match="calibration: missing, but data is needed by") as caught:
            require_calibration(recipe)
        assert all(reason in str(caught.value) for reason in found)
    else:
        require_calibration(recipe)


def rules():
    targets = st.one_of(
        st.fixed_dictionaries({"part": st.sampled_from(["vision", "language"])}),
        st.fixed_dictionaries({"pattern": st.sampled_from(["*", "a.*.b", r"re:a\.\d+"])}),
    )
    overrides = st.fixed_dictionaries(
        {"scheme": st.sampled_from(sorted(PRESETS))},
        optional={
            "bits": st.integers(2, 8),
            "symmetric": st.booleans(),
            "group_size": st.sampled_from([32, 64, "channel", "tensor"]),
            "on_indivisible": st.sampled_from(["error", "nearest", "channel", "keep"]),
        },
    )
    return st.builds(lambda target, rest: target | rest, targets, overrides)


def recipes():
    awq = st.fixed_dictionaries({"kind": st.just("awq")}, optional={"grid": st.integers(1, 99)})
    smooth = st.fixed_dictionaries(
        {"kind": st.just("smoothquant")}, optional={"alpha": st.floats(0, 1) | st.just("search")}
    )
    rtn = st.fixed_dictionaries({"kind": st.just("rtn")}, optional={"clip": st.sampled_from(["minmax", "mse", "awq"])})
    gptq = st.fixed_dictionaries(
        {"kind": st.just("gptq")}, optional={"damp": st.floats(1e-6, 1), "act_order": st.booleans()}
    )
    data = st.fixed_dictionaries({"kind": st.sampled_from(["text", "episodes"]), "path": st.just("some/where")})
    return st.fixed_dictionaries(
        {"rules": st.lists(rules(), min_size=1, max_size=3)},
        optional={
            "transforms": st.lists(awq | smooth, max_size=2),
            "quantizer": rtn | gptq,
            "calibration": data,
            "seed": st.integers(0, 2**31),
        },
    )


@given(recipes())
def test_resolved_recipe_is_plain_and_means_the_same(data):
    recipe = load_recipe(data)
    plain = recipe.resolved()
    assert load_recipe(plain) == recipe
    assert load_recipe(yaml.safe_load(yaml.safe_dump(plain))) == recipe
    assert plain.keys() == Recipe.model_fields.keys()
