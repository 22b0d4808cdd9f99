"""Hidden states and velocities against sums by hand, in every family that acts; and a policy that lost its sight."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_benchmark_action import ACTING
from tiny import observations, openvla
from tiny_families import TINY, family_of
from tiny_pi0 import ACTION, CHUNK, STEPS, pi0, robot_observations
from torch import Tensor

from vlaquant.evaluate.actions import episodes_of
from vlaquant.evaluate.figures import Groups
from vlaquant.evaluate.hidden import ends_of_parts, look_inside, relative_error, sqnr_db, watched
from vlaquant.families import FAMILIES

#: Family -> parts that an action runs through, in order.
PARTS = {
    "openvla: OpenVLA": ["vision", "projector", "language", "action"],
    "openvla: OpenVLA-OFT": ["vision", "projector", "proprio", "language", "action_head"],
    "pi0: π0": ["vision", "projector", "language", "expert", "action"],
    "lerobot: SmolVLA look-alike": ["vision", "projector", "language", "expert", "action"],
    "lerobot: π0.5 look-alike": ["vision", "projector", "language", "expert", "action"],
    "groot: GR00T N1.7 look-alike": ["vision", "language", "fusion", "expert", "action"],
}


def still(items: Any) -> Any:
    return items


@pytest.mark.parametrize("name", ACTING)
def test_equal_policies_are_equal_inside(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = TINY[name].save(tmp_path / "model", monkeypatch)
    family, samples = family_of(directory), TINY[name].samples()[:2]
    sqnr, velocity = look_inside(family.load(directory), family.load(directory), samples, episodes_of(samples), still)
    assert list(sqnr) == PARTS[name]
    assert {figure.value for figure in sqnr.values()} == {np.inf}
    assert {(figure.unit, figure.count) for figure in sqnr.values()} == {("dB", 2)}
    if family.velocity is None:
        assert velocity is None
    else:
        assert velocity is not None
        assert len(velocity) > 1
        assert {figure.value for figure in velocity} == {0.0}


def noisy(model: Any, place: str) -> Any:
    """A copy one of whose Linears is off by a constant."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.get_submodule(place).weight.mul_(1.01)
    return other


def test_the_error_starts_where_it_was_planted() -> None:
    model = openvla(parallel=False)
    sqnr, _ = look_inside(noisy(model, "projector.fc3"), model, observations(3), Groups.of([0, 1, 2]), still)
    assert sqnr["vision"].value == np.inf
    assert 20 < sqnr["projector"].value < 60
    assert all(np.isfinite(sqnr[part].value) for part in ("projector", "language", "action"))


def test_sqnr_by_hand() -> None:
    """What the projector hands over, recorded by a hook of our own."""
    model, seen = openvla(parallel=False), observations(2)
    other = noisy(model, "projector.fc1")
    family, kept = FAMILIES["openvla"], dict[str, list[Tensor]]()
    for who, policy in (("float", model), ("other", other)):
        rows: list[Tensor] = []
        handle = policy.projector.register_forward_hook(lambda _m, _a, out, rows=rows: rows.append(out.double()))
        for one in seen:
            family.act(policy, family.inputs(policy, one))  # type: ignore[misc]
        handle.remove()
        kept[who] = rows
    signal = sum(float((x**2).sum()) for x in kept["float"])
    noise = sum(float(((y - x) ** 2).sum()) for x, y in zip(kept["float"], kept["other"], strict=True))
    sqnr, _ = look_inside(other, model, seen, Groups.of([0, 1]), still)
    assert sqnr["projector"].value == pytest.approx(10 * np.log10(signal / noise), rel=1e-6)


def test_velocities_by_hand() -> None:
    """π0: the head's output in each denoising step, of the numbers that are the action; the error grows along them."""
    model, seen = pi0(), robot_observations(2)
    other = noisy(model, "model.dit.layers.0.mlp.down_proj")
    family, sums = FAMILIES["pi0"], np.zeros((STEPS, 2))
    for one in seen:
        speeds = []
        for policy in (model, other):
            with watched(policy, ["action_out_proj"]) as outputs:
                family.act(policy, family.inputs(policy, one))  # type: ignore[misc]
            speeds.append([v[0, -CHUNK:, :ACTION].double() for v in outputs["action_out_proj"]])
        for step in range(STEPS):
            sums[step] += [float((speeds[0][step] ** 2).sum()), float(((speeds[1][step] - speeds[0][step]) ** 2).sum())]
    _, velocity = look_inside(other, model, seen, Groups.of([0, 1]), still)
    assert velocity is not None
    assert [figure.value for figure in velocity] == pytest.approx(np.sqrt(sums[:, 1] / sums[:, 0]).tolist(), rel=1e-5)
    assert velocity[0].value > 0.0


def test_the_end_of_a_part_is_what_it_hands_over() -> None:
    model = openvla(parallel=False)
    family = FAMILIES["openvla"]
    ends = ends_of_parts(model, family, family.inputs(model, observations(1)[0]))
    assert ends["vision"] == "vision_backbone"
    assert ends["projector"] == "projector"
    assert ends["action"] == "language_model.lm_head"
    assert not any(module._forward_hooks for module in model.modules())


def test_padding_does_not_count() -> None:
    """Hidden states at the prompt's padding differ as they like."""
    model = pi0()
    family = FAMILIES["pi0"]
    inputs = family.inputs(model, robot_observations(1)[0])
    padded = dict(inputs)
    padded["input_ids"] = torch.nn.functional.pad(inputs["input_ids"], (0, 3), value=3)
    padded["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (0, 3), value=0)

    class Family:
        """The same, but for what its samples are."""

        act, part_of, velocity = family.act, family.part_of, None
        dead = staticmethod(family.dead)
        token_masks = staticmethod(family.token_masks)

        @staticmethod
        def inputs(policy: Any, sample: Any) -> Any:
            del policy
            return sample

    other = copy.deepcopy(model)
    with torch.no_grad():
        embeddings: Any = other.get_input_embeddings()
        embeddings.weight[3] += 5.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vlaquant.evaluate.hidden.family_of_model", lambda _: Family)
        sqnr, _ = look_inside(other, model, [padded], Groups.of([0]), still)
    assert sqnr["language"].value > 80


def test_figures_of_powers() -> None:
    powers, episodes = np.array([[90.0, 1.0], [10.0, 0.0]]), Groups.of(["a", "b"])
    assert sqnr_db(powers, episodes).value == pytest.approx(20.0)
    assert sqnr_db(powers, episodes).high == np.inf  # both times the episode without noise
    assert relative_error(powers, episodes).value == pytest.approx(0.1)
    assert relative_error(powers, episodes).low == 0.0
    nothing = np.zeros((2, 2))
    assert (sqnr_db(nothing, episodes).value, relative_error(nothing, episodes).value) == (np.inf, 0.0)
