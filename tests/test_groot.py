"""GR00T's banks, and the family on a look-alike of the policy: smaller, and refused by whoever does not know them."""

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lookalikes.groot import CategorySpecificLinear, Gr00tN1d7
from safetensors.torch import load_file
from staged import files_of, killed_after, skip_verification
from tiny_groot import ACTION, CHUNK, ROBOTS, batches, groot, install_package, save_groot
from torch import Tensor, nn

import vlaquant
from vlaquant.checkpoint import write_json
from vlaquant.errors import CalibrationError, CheckpointError, PlanError
from vlaquant.families import FAMILIES, family_of_config, family_of_model, find_folds
from vlaquant.families import groot as groot_family
from vlaquant.linear import CategoryBank, pack_table, table_kind
from vlaquant.plan import make_plan
from vlaquant.recipe import load_recipe
from vlaquant.scheme import Scheme, get_scheme

FAMILY = FAMILIES["groot"]
W8 = get_scheme("w8a16")
BANKS = {"part": "action", "scheme": "w8a16", "modules": "bank"}
ONE = BANKS | {"embodiment": 1}
ONE_FLOAT = ONE | {"scheme": "float"}
PARTS = ("vision", "language", "fusion", "expert")
W4 = [{"part": part, "scheme": "w4a16", "group_size": 32} for part in PARTS]
W8A8 = [{"part": part, "scheme": "w8a8"} for part in PARTS]


def bank(categories: int = 3, k: int = 6, n: int = 5) -> CategorySpecificLinear:
    torch.manual_seed(0)
    return CategorySpecificLinear(categories, k, n).requires_grad_(requires_grad=False)


def packed(module: nn.Module, scheme: Scheme | None, kept: int | None) -> CategoryBank:
    result = pack_table(module, dict(module.named_parameters()), scheme, kept)
    assert isinstance(result, CategoryBank)
    return result


def naive(weight: Tensor) -> Tensor:
    """Category by category, output by output: the largest weight becomes 127."""
    rounded = weight.clone()
    for category in rounded:
        for column in category.T:
            scale = column.abs().max() / 127
            column.copy_(scale * (column / scale).round())
    return rounded


def test_each_robot_and_output_has_a_scale() -> None:
    module = bank()
    quantized = packed(module, W8, None)
    ids, x = torch.tensor([2, 0, 2]), torch.randn(3, 4, 6)
    assert torch.allclose(quantized.dequantize(), naive(module.W), rtol=1e-6)
    expected = torch.bmm(x, naive(module.W)[ids]) + module.b[ids].unsqueeze(1)
    assert torch.allclose(quantized(x, ids), expected, atol=1e-6)
    assert not torch.allclose(quantized(x, ids), module(x, ids), atol=1e-6)
    assert quantized.state_dict()["W"].dtype == torch.int8


@pytest.mark.parametrize("scheme", [None, W8], ids=["float", "w8"])
def test_one_robot_is_left_and_no_other_is_answered(scheme: Scheme | None) -> None:
    module = bank()
    whole: Any = module if scheme is None else packed(module, scheme, None)
    one = packed(module, scheme, 1)
    ids, x = torch.tensor([1, 1]), torch.randn(2, 4, 6)
    assert torch.equal(one(x, ids), whole(x, ids))
    assert sum(tensor.nbytes for tensor in one.state_dict().values()) * 3 == sum(
        tensor.nbytes for tensor in whole.state_dict().values()
    )
    for other in (0, 2):
        with pytest.raises(ValueError, match=r"embodiment 1 only, and was asked for \[1, \d\]"):
            one(x, torch.tensor([1, other]))
        compiled = torch.compile(one, backend="eager", fullgraph=True)
        assert torch.equal(compiled(x, ids), one(x, ids))
        with pytest.raises(Exception, match=r"out of range|out of bounds"):
            compiled(x, torch.tensor([1, other]))


def test_what_users_do_to_it() -> None:
    one = packed(bank(), W8, 1)
    x, ids = torch.randn(1, 4, 6), torch.tensor([1])
    assert torch.equal(copy.deepcopy(one)(x, ids), one(x, ids))
    again = packed(bank(), W8, 1)
    again.state_dict()["W"].zero_()
    again.load_state_dict(one.state_dict())
    assert torch.equal(again(x, ids), one(x, ids))
    half = copy.deepcopy(one).to(torch.bfloat16)
    assert half(x.bfloat16(), ids).dtype == torch.bfloat16
    assert torch.allclose(half(x.bfloat16(), ids).float(), one(x, ids), atol=0.02)


def test_known_by_structure() -> None:
    class CategorySpecificLinear(nn.Module):
        """Another one of that name, with other tensors."""

        def __init__(self) -> None:
            super().__init__()
            self.num_categories = 2
            self.weight = nn.Parameter(torch.zeros(2, 3, 4))

    assert table_kind(bank()) == "bank"
    assert table_kind(CategorySpecificLinear()) is None


@pytest.mark.parametrize(("scheme", "kept"), [(W8, None), (W8, 1), (None, 1)])
def test_loaders_that_know_nothing_of_it_stop(scheme: Scheme | None, kept: int | None) -> None:
    stored = packed(bank(), scheme, kept).state_dict()
    with pytest.raises(RuntimeError, match="size mismatch for W"):
        bank().load_state_dict(stored, strict=False)


def test_rules_for_banks() -> None:
    model = groot()
    made = make_plan(model, FAMILY, load_recipe({"rules": [ONE_FLOAT]}))
    names = {table.name for table in made.tables}
    assert names == {name for name, module in model.named_modules() if type(module) is CategorySpecificLinear}
    assert len(names) == 7
    for table in made.tables:
        assert (table.stored, table.bytes_after * ROBOTS) == (f"float, 1 of {ROBOTS}", table.bytes_before)
    with pytest.raises(PlanError, match=r"keeps embodiment 3, and the bank has the numbers 0 to 2; see embodiment_id"):
        make_plan(model, FAMILY, load_recipe({"rules": [ONE | {"embodiment": 3}]}))
    everything = made.bytes_before
    assert everything == sum(parameter.nbytes for parameter in model.parameters())


def test_without_a_rule_banks_are_named_as_not_covered() -> None:
    made = make_plan(groot(), FAMILY, load_recipe({"rules": W4}))
    numbers = sum(parameter.numel() for name, parameter in groot().named_parameters() if name.endswith((".W", ".b")))
    assert sum(other.parameters for other in made.not_covered["CategorySpecificLinear"]) == numbers
    assert f"not covered: CategorySpecificLinear, {numbers:,} parameters" in " ".join(str(made).split())


def test_one_robot_in_float_acts_bit_for_bit_the_same() -> None:
    model = groot()
    inputs = FAMILY.inputs(model, batches(1)[0])
    assert FAMILY.act is not None
    before = FAMILY.act(model, inputs)
    vlaquant.quantize(model, {"rules": [ONE_FLOAT]})
    assert torch.equal(FAMILY.act(model, inputs), before)
    assert before.shape == (CHUNK, ACTION)


def test_what_the_family_knows() -> None:
    model = groot()
    assert family_of_model(model) is FAMILY
    assert family_of_config({"model_type": "Gr00tN1d7"}) is FAMILY
    assert {FAMILY.part_of(name) for name, module in model.named_modules() if type(module) is nn.Linear} == {
        *PARTS,
        "head",
    }
    assert FAMILY.dead(model).keys() == {"backbone.model.lm_head"}
    made = make_plan(model, FAMILY, load_recipe({"rules": W4}))
    kept = {layer.name.rpartition(".transformer_blocks.")[2] for layer in made.layers if layer.scheme is None}
    assert {"0.norm1.linear", "action_head.model.proj_out_1", "action_head.model.proj_out_2"} <= kept
    adaptive = {group.source: len(group.targets) for group in find_folds(model, FAMILY.folds) if group.chunks}
    assert adaptive == {f"action_head.model.transformer_blocks.{n}.norm1.linear": 1 + 2 * (n % 2) for n in range(3)}


def test_noise_is_part_of_the_inputs() -> None:
    model = groot()
    first, second = (FAMILY.inputs(model, batch) for batch in batches(2))
    assert first["seed"] != second["seed"]
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    once = FAMILY.run(model, first)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(FAMILY.run(model, first), once)
    assert once.shape == (1, 2 * CHUNK, ACTION)
    other = FAMILY.run(model, {**first, "seed": second["seed"]})
    assert not torch.equal(other[:, :CHUNK], once[:, :CHUNK])
    assert FAMILY.run(model, FAMILY.inputs(model, batches(1, shown=False)[0])).shape == (1, CHUNK, ACTION)


def test_padding_does_not_count() -> None:
    inputs = FAMILY.inputs(groot(), batches(1)[0])
    (mask,) = FAMILY.token_masks(groot(), inputs).values()
    assert mask.tolist() == [[True] * 11 + [False]]


def test_samples_of_another_kind_are_refused() -> None:
    with pytest.raises(CalibrationError, match="mapping of the tensors that its collator makes"):
        FAMILY.inputs(groot(), "a picture")
    batch = batches(1)[0]
    del batch["state"]
    with pytest.raises(CalibrationError, match="has no state"):
        FAMILY.inputs(groot(), batch)


def test_a_blind_policy_is_refused() -> None:
    model: Any = groot()
    FAMILY.check(model, FAMILY.example(model))
    model.action_head.vlln.weight.data.zero_()
    with pytest.raises(CalibrationError, match="the picture does not reach it"):
        FAMILY.check(model, FAMILY.example(model))


def test_without_their_package_a_directory_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, groot_family._PACKAGE, None)
    write_json(tmp_path / "config.json", {"model_type": "Gr00tN1d7"})
    with pytest.raises(CheckpointError, match="needs the package Isaac-GR00T"):
        vlaquant.plan(tmp_path, {"rules": W4})


@pytest.mark.parametrize(
    ("rules", "more"),
    [
        ([*W4, ONE], {"transforms": [{"kind": "awq", "grid": 3}], "quantizer": {"kind": "gptq"}}),
        ([*W8A8, BANKS], {"transforms": [{"kind": "smoothquant"}]}),
    ],
    ids=["w4a16 awq gptq", "w8a8 smoothquant"],
)
def test_from_directory_to_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rules: list[dict[str, Any]], more: dict[str, Any]
) -> None:
    install_package(tmp_path / "theirs", monkeypatch)
    policy = groot()
    source = save_groot(tmp_path / "source", policy)
    result = vlaquant.quantize(source, {"rules": rules, **more}, samples=batches(4), output=tmp_path / "packed")
    assert result.manifest["verification"]["output"] == "equal bit for bit"
    for name in ("statistics.json", "embodiment_id.json", "processor_config.json"):
        assert (tmp_path / "packed" / name).read_bytes() == (source / name).read_bytes()
    tried = {record.source for record in result.transforms}
    assert "action_head.vl_self_attention.transformer_blocks.0.norm1" in tried
    assert "action_head.model.transformer_blocks.1.norm1.linear" in tried
    assert result.plan.bytes_after == sum(
        tensor.nbytes for tensor in load_file(tmp_path / "packed" / "model.safetensors").values()
    )
    loaded = vlaquant.load(tmp_path / "packed")
    inputs = FAMILY.inputs(loaded, batches(8)[7])
    assert FAMILY.act is not None
    found, wanted = FAMILY.act(loaded, inputs), FAMILY.act(policy, inputs)
    assert torch.nn.functional.cosine_similarity(found.flatten(), wanted.flatten(), dim=0) > 0.98
    assert not torch.equal(found, wanted)
    with pytest.raises(RuntimeError, match="mismatch"):
        Gr00tN1d7.from_pretrained(tmp_path / "packed")


def test_the_same_files_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_package(tmp_path / "theirs", monkeypatch)
    skip_verification(monkeypatch)
    source = save_groot(tmp_path / "source", groot())
    recipe = {"rules": [W4[1], ONE], "quantizer": {"kind": "gptq"}}
    vlaquant.quantize(source, recipe, samples=batches(4), output=tmp_path / "whole")
    with killed_after(5):
        vlaquant.quantize(source, recipe, samples=batches(4), output=tmp_path / "again")
    vlaquant.quantize(source, recipe, samples=batches(4), output=tmp_path / "again", resume=True)
    assert files_of(tmp_path / "again") == files_of(tmp_path / "whole")


def test_samples_of_another_robot_are_blamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_package(tmp_path / "theirs", monkeypatch)
    source = save_groot(tmp_path / "source", groot())
    recipe = {"rules": [*W4, ONE], "quantizer": {"kind": "gptq"}}
    with pytest.raises(CalibrationError, match=r"sample 0 does not go through.*embodiment 1 only"):
        vlaquant.quantize(source, recipe, samples=batches(4, robot=2), output=tmp_path / "packed")
