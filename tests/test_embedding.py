"""Lookup tables in 8 bits: what they answer, which rules reach them, and what a directory of them holds."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from staged import WINDOWS, files_of, killed_after, skip_verification, streamed
from tiny import llama, openvla, save_llama
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.gemma.modeling_gemma import GemmaTextScaledWordEmbedding

import vlaquant
from vlaquant.checkpoint import read_config, read_manifest
from vlaquant.errors import CheckpointError, PackedWeightError, PlanError, RecipeError
from vlaquant.families import FAMILIES
from vlaquant.linear import QuantEmbedding, pack_table, table_kind
from vlaquant.plan import Plan, make_plan, plan_from_dict
from vlaquant.recipe import load_recipe
from vlaquant.scheme import get_scheme

W8 = get_scheme("w8a16")
TABLES = {"part": "language", "scheme": "w8a16", "modules": "embedding"}
BY_NAME = {"pattern": "model.embed_tokens", "scheme": "w8a16", "modules": "embedding"}
W4 = {"part": "language", "scheme": "w4a16", "group_size": 32}


def table(n: int = 11, k: int = 10, *, dtype: torch.dtype = torch.float32) -> nn.Embedding:
    torch.manual_seed(0)
    return nn.Embedding(n, k, dtype=dtype)


def packed(module: nn.Module) -> QuantEmbedding:
    result = pack_table(module, dict(module.named_parameters()), W8, None)
    assert isinstance(result, QuantEmbedding)
    return result


def naive(weight: Tensor) -> Tensor:
    """Row by row: the largest value becomes 127, everything else the nearest multiple of a 127th of it."""
    rows = []
    for row in weight.float():
        scale = (row.abs().max() / 127).to(weight.dtype).float().clamp(min=1e-30)
        rows.append((scale * (row / scale).round().clamp(-127, 127)).to(weight.dtype))
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ids", [torch.tensor(3), torch.tensor([[0, 10], [5, 5]]), torch.zeros(0, dtype=torch.long)])
def test_rows_are_those_of_the_rounded_table(dtype: torch.dtype, ids: Tensor) -> None:
    float_table = table(dtype=dtype)
    quantized = packed(float_table)
    wanted = naive(float_table.weight.detach())
    assert torch.equal(quantized.dequantize(), wanted)
    rows = quantized(ids)
    assert rows.dtype == dtype
    assert torch.equal(rows, wanted[ids])
    assert not torch.equal(wanted, float_table.weight)


def test_another_code_is_another_row() -> None:
    quantized = packed(table())
    before = quantized(torch.arange(11))
    quantized.state_dict()["weight"][4, 1] ^= 1
    changed = (quantized(torch.arange(11)) != before).nonzero().tolist()
    assert changed == [[4, 1]]


def test_ids_without_a_row_are_refused() -> None:
    quantized = packed(table())
    for bad in (-1, 11):
        with pytest.raises(IndexError):
            quantized(torch.tensor([bad]))


def test_scaled_tables_keep_their_factor() -> None:
    module = GemmaTextScaledWordEmbedding(6, 8, 0, embed_scale=3.0)
    quantized = packed(module)
    ids = torch.arange(6)
    assert torch.equal(quantized(ids), quantized.dequantize() * 3.0)
    assert torch.allclose(quantized(ids), module(ids), atol=3.0 * float(quantized.weight_scale.max()))
    assert quantized.state_dict().keys() == {"weight", "weight_scale"}


def test_other_classes_are_not_taken_for_tables() -> None:
    class Bag(nn.Embedding):
        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids).sum(-2)

    assert table_kind(Bag(3, 4)) is None
    assert table_kind(nn.EmbeddingBag(3, 4)) is None
    assert table_kind(table()) == "embedding"


def test_it_answers_for_a_float_weight_and_survives_what_users_do() -> None:
    quantized = packed(table())
    assert (quantized.weight.dtype, tuple(quantized.weight.shape)) == (torch.float32, (11, 10))
    with pytest.raises(PackedWeightError):
        quantized.weight + 1
    ids = torch.arange(11)
    wanted = quantized(ids)
    again = packed(table()).requires_grad_(requires_grad=False)
    again.state_dict()["weight"].zero_()
    again.load_state_dict(quantized.state_dict())
    assert torch.equal(again(ids), wanted)
    assert torch.equal(copy.deepcopy(quantized)(ids), wanted)
    half = copy.deepcopy(quantized).to(torch.bfloat16)
    assert half(ids).dtype == half.weight.dtype == torch.bfloat16
    assert torch.allclose(half(ids).float(), wanted, rtol=2e-2)
    assert torch.equal(torch.compile(quantized, backend="eager", fullgraph=True)(ids), wanted)


def make(model: nn.Module, *rules: dict[str, Any], family: str = "hf") -> Plan:
    return make_plan(model, FAMILIES[family], load_recipe({"rules": list(rules)}))


def test_a_rule_for_linears_never_reaches_a_table() -> None:
    made = make(llama(), W4, {"pattern": "*", "scheme": "w8a16"})
    assert made.tables == ()
    assert [other.name for other in made.not_covered["Embedding"]] == ["model.embed_tokens.weight"]
    assert f"not covered: Embedding, {128 * 64:,} parameters" in str(made)


def test_a_rule_for_tables_reaches_only_them() -> None:
    made = make(llama(), BY_NAME)
    (only,) = made.tables
    assert (only.name, only.scheme, only.reason) == ("model.embed_tokens", W8, "rule 'model.embed_tokens'")
    assert made.quantized == {}
    assert only.bytes_before == 128 * 64 * 4
    assert only.bytes_after == 128 * 64 + 128 * 4
    assert "Embedding" not in made.not_covered
    assert plan_from_dict(made.to_dict()) == made
    assert made.bytes_before == sum(parameter.nbytes for parameter in llama().parameters())


def test_tied_tables_stay_float_and_count_once() -> None:
    model = llama(tied=True)
    made = make(model, {"part": "head", "scheme": "w8a16"}, BY_NAME)
    (only,) = made.tables
    assert only.scheme is None
    assert "shared with lm_head" in only.reason
    assert made.bytes_before == sum(parameter.nbytes for parameter in model.parameters())


def test_refusals() -> None:
    with pytest.raises(PlanError, match=r"matches none of the 15 Linear.*it matches model\.embed_tokens"):
        make(llama(), {"pattern": "model.embed_tokens", "scheme": "w8a16"})
    with pytest.raises(PlanError, match=r"matches none of the 1 modules.*nearest: model\.embed_tokens"):
        make(llama(), {"pattern": "model.embed", "scheme": "w8a16", "modules": "embedding"})
    for scheme in ({"scheme": "w4a16"}, {"scheme": "w8a8"}, {"scheme": "w8a16", "group_size": 32}):
        with pytest.raises(RecipeError, match="modules 'embedding' can be stored as w8a16"):
            load_recipe({"rules": [BY_NAME | scheme]})
    with pytest.raises(RecipeError, match="'embodiment' is about modules 'bank'"):
        load_recipe({"rules": [BY_NAME | {"embodiment": 3}]})


def test_tables_that_change_while_they_are_read_stay_float() -> None:
    model = nn.Sequential(nn.Embedding(5, 4, max_norm=1.0), nn.Linear(4, 4))
    made = make(model, {"part": "model", "scheme": "w8a16", "modules": "embedding"}, family="module")
    assert made.tables[0].scheme is None
    assert "max_norm" in made.tables[0].reason


def test_openvla_in_memory_acts_through_it() -> None:
    model = openvla()
    before = model.language_model.model.embed_tokens.weight.detach().clone()
    vlaquant.quantize(model, {"rules": [TABLES]})
    now = model.language_model.model.embed_tokens
    assert isinstance(now, QuantEmbedding)
    assert torch.equal(now.dequantize(), naive(before))


def test_a_directory_is_verified_and_transformers_reads_it(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    source = save_llama(tmp_path / "source", llama(dtype=torch.bfloat16))
    result = vlaquant.quantize(source, {"rules": [BY_NAME, W4]}, samples=WINDOWS, output=tmp_path / "packed")
    assert result.manifest["verification"]["output"] == "equal bit for bit"
    written = load_file(tmp_path / "packed" / "model.safetensors")
    assert written["model.embed_tokens.weight"].dtype == torch.int8
    float_table = load_file(source / "model.safetensors")["model.embed_tokens.weight"]
    ours: Any = vlaquant.load(tmp_path / "packed")
    assert torch.equal(ours.model.embed_tokens.dequantize(), naive(float_table))
    groups = read_config(tmp_path / "packed")["quantization_config"]["config_groups"].values()
    assert [r"re:^model\.embed_tokens$"] in [group["targets"] for group in groups]
    theirs: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.bfloat16).eval()
    ids = torch.arange(20).reshape(1, 20)
    with torch.inference_mode():
        expected = theirs(input_ids=ids).logits
        assert torch.equal(theirs.model.embed_tokens.weight, ours.model.embed_tokens.dequantize())
        found = ours(input_ids=ids).logits
    assert torch.allclose(found.float(), expected.float(), atol=2e-2)


def test_predicted_bytes_are_the_written_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    skip_verification(monkeypatch)
    source = save_llama(tmp_path / "source", llama(dtype=torch.bfloat16))
    result = vlaquant.quantize(source, {"rules": [BY_NAME, W4]}, output=tmp_path / "packed")
    written = load_file(tmp_path / "packed" / "model.safetensors").values()
    assert result.plan.bytes_after == sum(tensor.nbytes for tensor in written)


@pytest.mark.parametrize("quantizer", ["gptq", "rtn"])
def test_the_same_files_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantizer: str) -> None:
    skip_verification(monkeypatch)
    source = save_llama(tmp_path / "source", llama())
    recipe = {"rules": [BY_NAME, W4], "quantizer": {"kind": quantizer}}
    samples = list(WINDOWS) if quantizer == "gptq" else None
    streamed(source, recipe, samples, tmp_path / "whole")
    assert list(read_manifest(tmp_path / "whole")["plan"]["tables"])
    with killed_after(1):
        streamed(source, recipe, samples, tmp_path / "again")
    streamed(source, recipe, samples, tmp_path / "again", resume=True)
    assert files_of(tmp_path / "again") == files_of(tmp_path / "whole")


def test_calibration_sees_the_rounded_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a directory's run and in one in memory: the codes of the first layer are the same, and not those without."""
    skip_verification(monkeypatch)
    source = save_llama(tmp_path / "source", llama())
    recipe = {"rules": [BY_NAME, W4], "quantizer": {"kind": "gptq"}}
    streamed(source, recipe, list(WINDOWS), tmp_path / "both")
    streamed(source, {**recipe, "rules": [W4]}, list(WINDOWS), tmp_path / "linears")
    model: Any = llama()
    vlaquant.quantize(model, recipe, samples=list(WINDOWS))
    name = "model.layers.0.self_attn.q_proj.weight_packed"
    both, linears = (load_file(tmp_path / run / "model.safetensors")[name] for run in ("both", "linears"))
    assert torch.equal(both, model.state_dict()[name])
    assert not torch.equal(both, linears)


def test_the_loader_refuses_another_table(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Embedding(6, 8), nn.Linear(8, 8))
    recipe = {"rules": [{"part": "model", "scheme": "w8a16", "modules": "embedding"}]}
    vlaquant.quantize(net, recipe, output=tmp_path / "packed")
    fresh = nn.Sequential(nn.Embedding(6, 8), nn.Linear(8, 8))
    loaded = vlaquant.load(tmp_path / "packed", model=fresh)
    assert torch.equal(loaded(torch.arange(6)), net(torch.arange(6)))
    with pytest.raises(CheckpointError, match=r"0: the checkpoint holds a packed embedding \(6, 8\)"):
        vlaquant.load(tmp_path / "packed", model=nn.Sequential(nn.Embedding(7, 8), nn.Linear(8, 8)))
