"""Episodes in a small simulator: pairs, outcomes, videos of those that differ, and their film strip on a page."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from html_checks import Document
from made_reports import evaluated, manifest
from PIL import Image
from tiny import openvla, save_openvla
from torch import nn

from vlaquant.errors import EvaluationError
from vlaquant.evaluate.metaworld import INSTRUCTIONS
from vlaquant.evaluate.results import Outcome, Rollouts, to_dict
from vlaquant.evaluate.rollouts import (
    FIRST_SEED,
    ClosedLoop,
    Job,
    default_workers,
    outcomes_of,
    plan_jobs,
    roll_out,
    run_jobs,
    summarize,
)
from vlaquant.evaluate.simulators import Simulator
from vlaquant.evaluate.videos import Recording, read_frames, spread
from vlaquant.report.data import make_report
from vlaquant.report.evaluated import read_evaluation
from vlaquant.report.page import render

pytest.importorskip("gymnasium")
REACH = Simulator("gymnasium", "made_gym:Reach-v0", (("image", "views.top"), ("action", "unit")))


class Pusher(nn.Module):
    """Stands for a policy: it always does the same chunk of two actions."""

    def __init__(self, push: float) -> None:
        super().__init__()
        self.push, self.config = push, None


@pytest.fixture
def policies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Directories of a policy that solves every task, and of one whose push is too weak for far starts."""
    known = {tmp_path / "strong": Pusher(0.5), tmp_path / "weak": Pusher(0.24)}

    def ask(model: Any, _: Any) -> Any:
        class Answer:
            actions = np.full((1, 2, 4), model.push)

        return Answer

    monkeypatch.setattr("vlaquant.evaluate.rollouts._policy", known.__getitem__)
    monkeypatch.setattr("vlaquant.evaluate.rollouts.ask", ask)
    strong, weak = known
    return strong, weak


def driven(policies: tuple[Path, Path], **changes: Any) -> Rollouts:
    strong, weak = policies
    return roll_out(weak, strong, ClosedLoop(12, REACH, **changes), lambda _: None)


def test_outcomes_are_those_of_the_simulator(policies: tuple[Path, Path]) -> None:
    """The spot starts at 4 to 10 and is solved beyond 12; 0.24 · 2 a step moves it by 5.76 in 12 steps."""
    found = driven(policies)
    assert (found.environment, found.max_steps) == ("gymnasium:made_gym:Reach-v0", 12)
    assert [pair.seed for pair in found.episodes] == list(range(FIRST_SEED, FIRST_SEED + 12))
    for pair in found.episodes:
        start = np.random.Generator(np.random.PCG64(np.random.SeedSequence(pair.seed))).uniform(4, 10, 2)
        steps = {push: int(np.floor((12 - start.min()) / (2 * push))) + 1 for push in (0.5, 0.24)}
        assert (pair.reference.success, pair.reference.steps) == (True, steps[0.5])
        assert pair.candidate.success == (steps[0.24] <= 12)
        assert pair.candidate.steps == min(steps[0.24], 12)
    lost = sum(not pair.candidate.success for pair in found.episodes)
    assert 2 < lost < 11
    assert (found.only_reference, found.only_candidate) == (lost, 0)
    assert found.success.reference.value == 1.0
    assert found.success.difference.value == pytest.approx(-lost / 12)
    assert found.p_value.value == pytest.approx(min(1.0, 2 * 0.5**lost))
    assert found.p_value.count == lost


def test_equal_policies_have_no_difference(policies: tuple[Path, Path]) -> None:
    strong, _ = policies
    found = roll_out(strong, strong, ClosedLoop(5, REACH), lambda _: None)
    assert (found.success.difference.value, found.success.ratio.value, found.p_value.value) == (0.0, 1.0, 1.0)
    assert not any(pair.differs for pair in found.episodes)


def test_videos_of_pairs_that_differ(policies: tuple[Path, Path], tmp_path: Path) -> None:
    folder = tmp_path / "videos"
    found = driven(policies, videos=folder)
    apart = [pair for pair in found.episodes if pair.differs]
    named = {one.video for pair in apart for one in (pair.reference, pair.candidate)}
    assert {path.name for path in folder.iterdir()} == named, "and nothing else is left"
    assert len(named) == 2 * len(apart) > 4
    assert all(one.video is None for pair in found.episodes if not pair.differs for one in (pair.reference,))
    pair = apart[0]
    assert pair.candidate.video is not None
    frames = read_frames(folder / pair.candidate.video, 100)
    # One each time that the policy was asked, every two steps, and one of the end; equal ones in a row become one
    assert 4 <= len(frames) <= 7
    assert "failed" in pair.candidate.video
    assert read_frames(folder / str(pair.reference.video), 3)[0].size == (28, 28)


def test_a_film_strip_on_the_page(policies: tuple[Path, Path], tmp_path: Path) -> None:
    found = driven(policies, videos=tmp_path / "videos")
    data = to_dict(replace(evaluated(), rollouts=replace(found, videos="videos")))
    shown = read_evaluation(data, folder=tmp_path)
    assert len(shown.films) == 3
    assert not any(film.pair.candidate.success for film in shown.films), "what was lost comes first"
    page = Document(render(make_report("x", manifest(), evaluation=shown)))
    assert page.complaints == []
    pictures = [attributes["href"] for name, attributes in page.elements if name == "image"]
    strips = [one for one in pictures if one and one.startswith("data:image/jpeg;base64,")]
    both = [frames for film in shown.films for frames in (film.before, film.after)]
    films = sum(min(len(frames), most) for most in (8, 4) for frames in both)
    assert len(strips) == films
    pair = shown.films[0].pair
    assert f"seed {pair.seed}: float solved it in {pair.reference.steps} steps, quantized failed" in page.text
    shutil.rmtree(tmp_path / "videos")
    without = read_evaluation(data, folder=tmp_path)
    assert without.films == ()
    text = Document(render(make_report("x", manifest(), evaluation=without))).text
    assert "Film strips of episodes that ended differently" in text


def test_policies_drive_in_other_processes(tmp_path: Path) -> None:
    """A real (tiny) policy, loaded there."""
    policy = save_openvla(tmp_path / "policy", openvla())
    jobs = plan_jobs([policy], 2, Job(policy, "", (), simulator=REACH, max_steps=4), seeds_a_job=1)
    told: list[int] = []
    apart = run_jobs(jobs, workers=1, advance=told.append)
    here = run_jobs(jobs, workers=0, advance=told.append)
    assert apart == here
    assert told == [1, 1, 1, 1]
    assert {outcome.steps for outcomes in here.values() for outcome in outcomes} <= {1, 2, 3, 4}


def test_jobs_pair_policies_and_outcomes_keep_the_order_of_seeds() -> None:
    first, second = Path("a"), Path("b")
    jobs = plan_jobs([first, second], episodes=12)
    for task in INSTRUCTIONS:
        seeds = {
            policy: [s for job in jobs if job.policy == policy and job.task == task for s in job.seeds]
            for policy in (first, second)
        }
        assert seeds[first] == seeds[second] == list(range(FIRST_SEED, FIRST_SEED + 12))
    outcomes = {job: tuple(Outcome(seed % 3 == 0, 7) for seed in job.seeds) for job in reversed(jobs)}
    found = outcomes_of(first, outcomes)
    expected = [(seed, Outcome(seed % 3 == 0, 7)) for seed in range(FIRST_SEED, FIRST_SEED + 12)]
    assert list(found) == list(INSTRUCTIONS)
    assert all(found[task] == expected for task in INSTRUCTIONS)
    summary = summarize(outcomes_of(second, outcomes), found)
    assert summary.success.candidate.count == 12 * len(INSTRUCTIONS)
    assert summary.p_value.value == 1.0
    assert 1 <= default_workers() <= 4


def test_frames_of_a_video(tmp_path: Path) -> None:
    recording = Recording([np.full((16, 16, 3), 20 * i, np.uint8) for i in range(10)])
    recording.write(tmp_path / "a.webp")
    frames = read_frames(tmp_path / "a.webp", 4)
    assert [round(np.asarray(frame).mean() / 20) for frame in frames] == [0, 3, 6, 9]
    with Image.open(tmp_path / "a.webp") as video:
        assert getattr(video, "is_animated", False)
    assert list(spread(3, 8)) == [0, 1, 2]
    (tmp_path / "b.webp").write_bytes(b"nothing")
    with pytest.raises(EvaluationError, match="cannot be read as a video"):
        read_frames(tmp_path / "b.webp", 4)
