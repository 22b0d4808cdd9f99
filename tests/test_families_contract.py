"""Every family × every scheme: from a directory to one that another process loads, and that acts the same."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_families import SCHEMES, TINY, answers, family_of, quantized, recipe_for

import vlaquant
from vlaquant.errors import PlanError
from vlaquant.families import FAMILIES, MODULE

#: Largest error of the answer, as a share of it: about twice the worst that any family has.
LARGEST = {"W4A16 AWQ + GPTQ": 0.2, "W8A8 SmoothQuant": 0.05}
#: Opened by transformers in tests of their own; here they would only take time.
LATER = {"hf: paligemma", "hf: qwen2_5_vl", "hf: idefics3"}
NAMES = [pytest.param(name, marks=pytest.mark.slow) if name in LATER else name for name in TINY]
#: Blocks that run again once they are finished: for every denoising step, or layer by layer.
RUN_AGAIN = {"pi0: π0", "lerobot: SmolVLA look-alike", "lerobot: π0.5 look-alike", "groot: GR00T N1.7 look-alike"}
OURS = [name for name, family in FAMILIES.items() if family.load.__module__.startswith("vlaquant.")]


@pytest.fixture(scope="module")
def patch() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory, patch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Of every model, made once."""
    folder = tmp_path_factory.mktemp("families")
    return {name: tiny.save(folder / str(number), patch) for number, (name, tiny) in enumerate(TINY.items())}


def test_every_family_is_here(directories: dict[str, Path]) -> None:
    for name, directory in directories.items():
        assert family_of(directory).name == name.partition(":")[0]
    assert {name.partition(":")[0] for name in TINY} == set(OURS) - {MODULE.name}


@pytest.mark.parametrize("name", TINY)
def test_the_plan_accounts_for_every_parameter(name: str, directories: dict[str, Path]) -> None:
    model = family_of(directories[name]).build(directories[name])
    plan = vlaquant.plan(directories[name], recipe_for(name, "W8A8 SmoothQuant"))
    named = dict(model.named_parameters(remove_duplicate=False))
    covered = {layer.name for layer in plan.layers} | {table.name for table in plan.tables}
    accounted = {other.name for other in plan.others}
    accounted |= {parameter for parameter in named if parameter.rpartition(".")[0] in covered}
    unique = {id(parameter): parameter for parameter in named.values()}
    assert {id(named[parameter]) for parameter in accounted} == unique.keys()
    assert plan.bytes_before == sum(parameter.nbytes for parameter in unique.values())
    assert all(layer.reason for layer in plan.layers)
    assert {layer.part for layer in plan.layers} >= set(TINY[name].parts)
    assert "other" not in {layer.part for layer in plan.layers}


@pytest.mark.parametrize("name", NAMES)
def test_gptaq_or_the_block_that_is_in_its_way(name: str, directories: dict[str, Path], tmp_path: Path) -> None:
    family, samples = family_of(directories[name]), TINY[name].samples()
    recipe = recipe_for(name, "W4A16 AWQ + GPTQ") | {"transforms": [], "quantizer": {"kind": "gptaq"}}
    if name in RUN_AGAIN:
        with pytest.raises(PlanError, match=r"gptaq needs what later layers read .* use the quantizer gptq"):
            vlaquant.quantize(directories[name], recipe, samples=samples, output=tmp_path / "packed")
        return
    output = tmp_path / "packed"
    written = vlaquant.quantize(directories[name], recipe, samples=samples, output=output)
    in_memory = vlaquant.quantize(family.load(directories[name]), recipe, samples=samples)
    mine, loaded = (answers(family, model, samples[0])[0] for model in (in_memory.model, vlaquant.load(output)))
    assert torch.equal(mine, loaded)
    assert any(layer.quantizer == "gptaq minmax" for layer in written.layers)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", NAMES)
def test_contract(name: str, scheme: str, directories: dict[str, Path], tmp_path: Path) -> None:
    outcome = quantized(name, scheme, directories[name], tmp_path / "packed")
    assert outcome.verified == "equal bit for bit"
    assert outcome.same, "the directory acts as the model that was quantized in memory"
    assert 0.0 < outcome.error < LARGEST[scheme]
    for layer in outcome.plan.layers:
        wanted = layer.part in TINY[name].parts
        assert wanted or layer.scheme is None, layer
        assert not (wanted and layer.reason == "no rule matches"), layer
