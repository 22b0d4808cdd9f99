"""Figures on cases whose answer is known, and the comparison of real (tiny) policies."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import llama, observations, openvla
from tiny_oft import oft_observations, save_oft

import vlaquant
from vlaquant.errors import EvaluationError
from vlaquant.evaluate.action_figures import Predictions, action_figures, boundary_jump, jerk
from vlaquant.evaluate.actions import compare
from vlaquant.evaluate.figures import Figure, Groups
from vlaquant.evaluate.language import compare_text
from vlaquant.models.openvla import action_statistics


def value(figure: Figure | None) -> float:
    assert figure is not None
    return figure.value


def test_equal_policies_have_no_error() -> None:
    model = openvla()
    found = compare(model, copy.deepcopy(model), observations(3), lambda items: items)
    figures = found.figures
    for errors in (figures.whole_chunk, figures.first_step):
        assert [value(one) for one in (errors.l1, errors.mse, *errors.l1_by_dimension)] == [0.0] * 6
    assert (value(figures.token_agreement), value(figures.bin_distance), value(figures.gripper_flips)) == (
        1.0,
        0.0,
        0.0,
    )
    assert (figures.demonstration.ratio.value, figures.demonstration.difference.value) == (1.0, 0.0)
    assert figures.demonstration.candidate.value > 0.0
    assert min(found.candidate.seconds) > 0.0


def test_different_policies_differ() -> None:
    error = compare(openvla(seed=1), openvla(), observations(3), lambda items: items).figures
    assert value(error.token_agreement) != 1.0
    assert error.whole_chunk.l1.value > 0.0


def test_action_error_by_hand() -> None:
    model = openvla()
    top = model.action_tokens.vocab_size
    tokens = np.array([[top - 1, top - 128, top - 256, top - 200] * 2])
    moved = tokens.copy()
    moved[0, 0] -= 3  # three bins up in the first dimension of the first step
    actions = np.zeros((1, 2, 4))
    actions[..., 3] = 0.5
    other = actions.copy()
    other[0, 0, 0] += 0.2
    other[0, 1, 3] = -0.5
    bins = model.action_tokens.bins
    one = Groups.of(["episode"])
    error = action_figures(
        Predictions(other, bins(moved), [0.1]), Predictions(actions, bins(tokens), [0.1]), actions, one
    )
    assert value(error.bin_distance) == pytest.approx(3 / 8)
    assert value(error.token_agreement) == pytest.approx(7 / 8)
    assert [value(one) for one in error.whole_chunk.l1_by_dimension] == pytest.approx([0.1, 0.0, 0.0, 0.5])
    assert [value(one) for one in error.whole_chunk.mse_by_dimension] == pytest.approx([0.02, 0.0, 0.0, 0.5])
    assert [value(one) for one in error.first_step.l1_by_dimension] == pytest.approx([0.2, 0.0, 0.0, 0.0])
    assert value(error.whole_chunk.l1) == pytest.approx(0.15)
    assert value(error.first_step.mse) == pytest.approx(0.01)
    assert value(error.gripper_flips) == pytest.approx(0.5)
    assert value(error.demonstration.candidate) == pytest.approx(0.15)
    assert error.boundary_jump is error.jerk is None  # one chunk of two actions


def test_jumps_and_jerk_by_hand() -> None:
    """Two episodes of two chunks of two actions; the quantized policy overshoots at the end of each chunk."""
    smooth = np.array([[0.0, 1.0], [2.0, 3.0], [5.0, 5.0], [5.0, 5.0]])[..., None]
    rough = np.array([[0.0, 1.5], [2.0, 3.5], [5.0, 5.0], [5.0, 5.0]])[..., None]
    episodes = Groups.of(["first", "first", "second", "second"])
    jump, shaking = boundary_jump(smooth, rough, episodes), jerk(smooth, rough, episodes)
    assert jump is not None
    assert shaking is not None
    # In the first episode from 1 to 2, and from 1.5 to 2; in the second none; nothing between episodes
    assert (jump.reference.value, jump.candidate.value, jump.ratio.value) == (0.5, 0.25, 0.5)
    assert (jump.reference.count, jump.reference.of) == (2, "chunk boundaries")
    # 3.5 − 3·2 + 3·1.5 − 0 = 2, and 3 − 3·2 + 3·1 − 0 = 0
    assert (shaking.reference.value, shaking.candidate.value, shaking.ratio.value) == (0.0, 1.0, np.inf)
    same = jerk(smooth, smooth, episodes)
    assert same is not None
    assert (same.ratio.value, same.difference.value) == (1.0, 0.0)
    assert boundary_jump(smooth[:1], rough[:1], Groups.of(["first"])) is None


def test_a_policy_without_tokens(tmp_path: Path) -> None:
    source, seen = save_oft(tmp_path / "oft"), oft_observations(3)
    policies: list[Any] = [vlaquant.load(source) for _ in range(2)]
    with torch.no_grad():
        policies[0].action_head.model.fc2.bias[0] += 0.1
    error = compare(policies[0], policies[1], seen, lambda items: items).figures
    assert error.token_agreement is None
    assert error.bin_distance is None
    l1 = [value(one) for one in error.whole_chunk.l1_by_dimension]
    stats = action_statistics(policies[0].config.norm_stats, seen[0].unnorm_key)
    assert l1[0] == pytest.approx(0.1 * (stats["high"] - stats["low"])[0] / 2, rel=1e-3)
    assert l1[1:] == [0.0] * (len(l1) - 1)
    wanted = [policies[1].predict_action(list(one.images), one.instruction, state=one.state) for one in seen]
    given = np.stack([one.action for one in seen if one.action is not None])
    assert error.demonstration.reference.value == pytest.approx(np.abs(np.stack(wanted) - given).mean())


def test_recordings_of_another_robot_are_refused() -> None:
    wrong = [replace(one, action=np.zeros((2, 3))) for one in observations(2)]
    with pytest.raises(EvaluationError, match="give 4 numbers an action, the recordings hold 3"):
        compare(openvla(), openvla(), wrong, lambda items: items)


def test_policies_with_other_actions_are_refused() -> None:
    with pytest.raises(EvaluationError, match="action_chunk"):
        compare(openvla(parallel=False), openvla(), observations(1), lambda items: items)


def test_nothing_to_compare() -> None:
    with pytest.raises(EvaluationError, match="no observations"):
        compare(openvla(), openvla(), [], lambda items: items)
    with pytest.raises(EvaluationError, match="no text"):
        compare_text(llama(), llama(), [], lambda items: items)


def test_perplexity_matches_the_models_own_loss() -> None:
    model, ids = llama(), torch.arange(30).reshape(1, 30)
    error, _ = compare_text(model, model, [ids], lambda items: items)
    with torch.inference_mode():
        loss = model(input_ids=ids, labels=ids).loss
    assert error.perplexity.candidate.value == pytest.approx(float(loss.exp()), rel=1e-4)
    assert (error.perplexity.ratio.value, error.perplexity.difference.value) == (1.0, 0.0)
    assert error.divergence.value == 0.0
    assert (error.top1_agreement.value, error.tokens) == (1.0, 29)


def test_divergence_is_positive_and_directed() -> None:
    ids = torch.arange(30).reshape(1, 30)
    other = llama()
    torch.nn.init.normal_(other.lm_head.weight, std=0.5)
    forward, _ = compare_text(other, llama(), [ids], lambda items: items)
    backward, _ = compare_text(llama(), other, [ids], lambda items: items)
    assert forward.divergence.value > 0.0
    assert forward.divergence.value != pytest.approx(backward.divergence.value, rel=1e-3)


def test_perplexity_over_windows_by_hand() -> None:
    """The mean is over tokens, not over windows, and the interval comes from drawing windows."""
    other = llama()
    torch.nn.init.normal_(other.lm_head.weight, std=0.5)
    windows = [torch.arange(start, start + length).reshape(1, -1) for start, length in ((0, 30), (5, 10), (40, 20))]
    error, seconds = compare_text(other, llama(), windows, lambda items: items)
    each = [compare_text(other, llama(), [one], lambda items: items)[0] for one in windows]
    logs = [np.log(one.perplexity.candidate.value) * one.tokens for one in each]
    assert error.perplexity.candidate.value == pytest.approx(np.exp(sum(logs) / (29 + 9 + 19)))
    assert error.perplexity.candidate.count == error.tokens == 57
    assert error.perplexity.candidate.low is not None
    assert error.perplexity.candidate.low == pytest.approx(min(one.perplexity.candidate.value for one in each))
    assert [len(one) for one in seconds.values()] == [3, 3]
