"""The recipes of ``configs/`` on policies at their published sizes: every rule finds layers, every width its groups."""

import re
from functools import lru_cache
from pathlib import Path

import pytest
from full_size_models import build
from torch import nn

from vlaquant.families import family_of_model
from vlaquant.plan import make_plan
from vlaquant.recipe import load_recipe
from vlaquant.terminal import WIDTH

CONFIGS = Path(__file__).parent.parent / "configs"
#: File names begin with these; the demo policy and language models have other sizes.
MODELS = {
    "openvla_oft": "OpenVLA-OFT",
    "openvla": "OpenVLA-7B",
    "pi0": "π0",
    "lerobot_pi05": "π0.5",
    "lerobot_smolvla": "SmolVLA",
    "groot": "GR00T N1.7",
}
_OUTPUTS = {"action", "action_head", "head"}
STEMS = sorted(path.stem for path in CONFIGS.glob("*.yaml") if not path.stem.startswith(("demo_", "hf_")))


@lru_cache(maxsize=1)
def model(name: str) -> nn.Module:
    return build(name)


@pytest.mark.parametrize("stem", STEMS)
def test_a_recipe_fits_the_published_sizes(stem: str) -> None:
    policy = model(next(name for start, name in MODELS.items() if stem.startswith(f"{start}_")))
    family, recipe = family_of_model(policy), load_recipe(CONFIGS / f"{stem}.yaml")
    assert recipe.family == family.name
    made = make_plan(policy, family, recipe)
    assert made.bytes_after < made.bytes_before / 1.5
    wanted = {layer.part for layer in made.layers if family.why_float(layer.name) is None} - _OUTPUTS
    floats = {layer.part for layer in made.layers if layer.scheme is None and family.why_float(layer.name) is None}
    eight = {layer.part for layer in made.quantized.values() if layer.scheme and layer.scheme.activation}
    for text in (str(made), made.layer_table()):
        assert max(map(len, text.splitlines())) <= WIDTH
    listed = [line.split()[0] for line in made.layer_table().splitlines() if re.match(r"  \S", line)]
    assert len(set(listed)) == len(listed) == len(made.covered) + len(made.others)
    assert floats <= _OUTPUTS
    assert eight == (wanted if "w8a8" in stem else set())
