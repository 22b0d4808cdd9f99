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
from vlaquant.evaluate.actions import Predictions, action_error, compare
from vlaquant.evaluate.language import compare_text
from vlaquant.evaluate.metaworld import INSTRUCTIONS
from vlaquant.evaluate.rollouts import FIRST_SEED, outcomes_of, plan_jobs, summarize
from vlaquant.evaluate.statistics import paired_difference, success_rate
from vlaquant.models.openvla import action_statistics


def test_equal_policies_have_no_error() -> None:
    model = openvla()
    error, latency = compare(model, copy.deepcopy(model), observations(3), lambda items: items)
    assert error.l1 == [0.0] * 4
    assert error.token_agreement == 1.0
    assert error.l1_to_demonstration == error.reference_l1_to_demonstration > 0.0
    assert latency["candidate"]["p50_ms"] > 0.0


def test_different_policies_differ() -> None:
    error, _ = compare(openvla(seed=1), openvla(), observations(3), lambda items: items)
    assert error.token_agreement != 1.0
    assert max(error.l1) > 0.0


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
    error = action_error(Predictions(other, bins(moved), [0.1]), Predictions(actions, bins(tokens), [0.1]), actions)
    assert error.bin_distance == pytest.approx(3 / 8)
    assert error.token_agreement == pytest.approx(7 / 8)
    assert error.l1 == pytest.approx([0.1, 0.0, 0.0, 0.5])
    assert error.mse == pytest.approx([0.02, 0.0, 0.0, 0.5])
    assert error.gripper_flips == pytest.approx(0.5)


def test_a_policy_without_tokens(tmp_path: Path) -> None:
    source, seen = save_oft(tmp_path / "oft"), oft_observations(3)
    policies: list[Any] = [vlaquant.load(source) for _ in range(2)]
    with torch.no_grad():
        policies[0].action_head.model.fc2.bias[0] += 0.1
    error, _ = compare(policies[0], policies[1], seen, lambda items: items)
    assert error.token_agreement is None
    assert error.bin_distance is None
    stats = action_statistics(policies[0].config.norm_stats, seen[0].unnorm_key)
    assert error.l1[0] == pytest.approx(0.1 * (stats["high"] - stats["low"])[0] / 2, rel=1e-3)
    assert error.l1[1:] == [0.0] * (len(error.l1) - 1)
    wanted = [policies[1].predict_action(list(one.images), one.instruction, state=one.state) for one in seen]
    given = np.stack([one.action for one in seen if one.action is not None])
    assert error.reference_l1_to_demonstration == pytest.approx(np.abs(np.stack(wanted) - given).mean())


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
    assert error.perplexity == pytest.approx(float(loss.exp()), rel=1e-4)
    assert error.divergence == pytest.approx(0.0, abs=1e-6)
    assert (error.top1_agreement, error.tokens) == (1.0, 29)


def test_divergence_is_positive_and_directed() -> None:
    ids = torch.arange(30).reshape(1, 30)
    other = llama()
    torch.nn.init.normal_(other.lm_head.weight, std=0.5)
    forward, _ = compare_text(other, llama(), [ids], lambda items: items)
    backward, _ = compare_text(llama(), other, [ids], lambda items: items)
    assert forward.divergence > 0.0
    assert forward.divergence != pytest.approx(backward.divergence, rel=1e-3)


def test_wilson_interval_of_a_textbook_case() -> None:
    pytest.importorskip("scipy")
    rate = success_rate(np.array([True] * 45 + [False] * 5))
    assert rate.low == pytest.approx(0.786, abs=1e-3)
    assert rate.high == pytest.approx(0.957, abs=1e-3)


def test_mcnemar_by_hand() -> None:
    pytest.importorskip("scipy")
    reference = np.array([True] * 10 + [False] * 2 + [True] * 8)
    candidate = np.array([False] * 10 + [True] * 2 + [True] * 8)
    paired = paired_difference(reference, candidate)
    assert (paired.only_reference, paired.only_candidate) == (10, 2)
    assert paired.p_value == pytest.approx(2 * (1 + 12 + 66) / 2**12)
    assert paired.difference == pytest.approx(-0.4)
    assert paired.low < -0.4 < paired.high
    assert paired_difference(reference, reference).p_value == 1.0


def test_jobs_pair_policies_and_outcomes_keep_the_order_of_seeds() -> None:
    pytest.importorskip("scipy")
    first, second = Path("a"), Path("b")
    jobs = plan_jobs([first, second], episodes=12)
    for task in INSTRUCTIONS:
        seeds = {
            policy: [s for job in jobs if job.policy == policy and job.task == task for s in job.seeds]
            for policy in (first, second)
        }
        assert seeds[first] == seeds[second] == list(range(FIRST_SEED, FIRST_SEED + 12))
    outcomes = {job: np.array([seed % 3 == 0 for seed in job.seeds]) for job in reversed(jobs)}
    found = outcomes_of(first, outcomes)
    expected = [seed % 3 == 0 for seed in range(FIRST_SEED, FIRST_SEED + 12)]
    assert all(found[task].tolist() == expected for task in INSTRUCTIONS)
    summary = summarize(outcomes_of(second, outcomes), found)
    assert summary["candidate"]["all"]["episodes"] == 12 * len(INSTRUCTIONS)
    assert summary["paired"]["p_value"] == 1.0
