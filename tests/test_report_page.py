"""The page: whole, well-formed, harmless, with every figure in it, and honest about what is missing."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from html_checks import Document
from made_reports import benchmark, evaluated, evaluation, manifest, measured, report, words

from vlaquant.cli import main
from vlaquant.errors import EvaluationError
from vlaquant.evaluate.results import Inside, to_dict
from vlaquant.report.data import Report, make_report
from vlaquant.report.evaluated import read_evaluation
from vlaquant.report.measured import Measured
from vlaquant.report.page import render, render_comparison, script_json
from vlaquant.report.sections import cards, verdict
from vlaquant.report.svg import number, percent, size

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</script><b>",
    "{{ 7 * 7 }}",
    "&lt;i&gt; ' \\u003c",
)


def document(one: Report) -> Document:
    return Document(render(one))


def test_the_page_is_well_formed_and_has_every_section() -> None:
    page = document(report())
    assert page.complaints == []
    sections = {attributes.get("id") for name, attributes in page.elements if name == "section"}
    wanted = {"bytes", "layers", "outliers", "weights", "actions", "success", "latency", "scales", "plan", "again"}
    assert sections - {None} == wanted
    assert "Not in this report" not in page.text


def test_the_check_sees_what_is_wrong() -> None:
    wrong = "<p id=a><b></p></b><i id=a></i><a href='#b'></a><label for=c></label>"
    complaints = " ".join(Document(wrong).complaints)
    for one in ("</p>", "'a' is there 2 times", "'b', which is not there", "'c', which", "<p> is never closed"):
        assert one in complaints


def test_every_drawing_has_words_and_a_table() -> None:
    page = document(report())
    drawings = [attributes for name, attributes in page.elements if name == "svg"]
    assert drawings
    assert all(one.get("role") == "img" and len(one.get("aria-label", "")) > 20 for one in drawings)
    assert page.count("figure") == len(drawings) / 2  # for a desk, and for a phone
    figures = render(report()).split("<figure>")[1:]
    assert all("<table>" in one.split("</figure>")[0] for one in figures)


def test_every_layer_is_there_with_its_figures() -> None:
    shown = report()
    text = document(shown).text
    for layer in shown.layers:
        row = [layer.name, layer.stored, layer.reason]
        row += [percent(loss) for loss in (layer.loss, layer.loss_rtn) if loss is not None]
        row += [size(layer.bytes_before), size(layer.bytes_after)]
        assert re.search(r".{0,60}".join(map(re.escape, row)), text), row


def test_every_number_of_an_evaluation_is_there() -> None:
    text, found = document(report()).text, evaluated()
    actions, system = found.actions, found.system
    assert actions.token_agreement is not None
    assert actions.bin_distance is not None
    assert actions.jerk is not None
    assert system.rate is not None
    pairs = [actions.demonstration, actions.jerk, system.latency.p50, system.latency.p99, system.rate.median]
    shown = [number(figure.value, 4) for of in pairs for figure in (of.reference, of.candidate)]
    shown += [number(figure.value) for figure in actions.whole_chunk.l1_by_dimension]
    shown += [number(figure.value) for figure in actions.whole_chunk.mse_by_dimension]
    shown += [percent(actions.token_agreement.value), percent(actions.gripper_flips.value)]
    shown += [number(actions.first_step.l1.value, 4), number(actions.bin_distance.value, 4), "31.4 dB", "27.2 dB"]
    shown += [f"{number(0.9 * 0.004104, 4)} to {number(1.1 * 0.004104, 4)} 347 observations"]
    assert [one for one in shown if f" {one} " not in text] == []
    success = read_evaluation(evaluation()).success
    assert success is not None
    for task in (*success.tasks, success.overall):
        for rate in (task.before, task.after):
            ends = f"[{100 * rate.low:.0f}, {100 * rate.high:.0f}]"
            assert f"{100 * rate.rate:.1f} % of {rate.episodes} {ends}" in text
    for one in ("89.7 %", "1.23 %", "−6.7 points", "p = 0.12", "9.88 ms", "5.93 (6 calls)"):
        assert one in text
    assert "per token" not in text  # it is contained in the whole of that part


@pytest.mark.parametrize("name", HOSTILE)
def test_names_are_text_and_nothing_else(name: str) -> None:
    data = manifest(names={0: name})
    data["recipe"]["family"] = data["layers"][1]["notes"] = [name]
    data["plan"]["layers"][2]["reason"] = data["plan"]["family"] = name
    found = evaluation()
    found["rollouts"]["tasks"][name] = found["rollouts"]["tasks"]["open"]
    shown = make_report(name, data, evaluation=read_evaluation(found), measured=measured([name, "other"]), origin=name)
    page, tame = document(shown), document(report())
    assert page.complaints == []
    assert page.count("script") == tame.count("script") == 2
    assert page.count("img") == 0
    assert not [key for _, attributes in page.elements for key in attributes if key.startswith("on")]
    assert " ".join(name.split()) in page.text
    both = render_comparison([shown, replace(shown, name="other")])
    assert Document(both).complaints == []
    assert Document(both).count("script") == 1


def test_json_in_a_script_cannot_end_it() -> None:
    written = script_json(["</script>", "<!--", "&"])
    assert not set("<>&") & set(written)
    assert json.loads(written) == ["</script>", "<!--", "&"]


def test_nothing_comes_from_the_network() -> None:
    page = document(report())
    inside = ("#", "data:image/png;base64,", "data:image/jpeg;base64,")
    for name, attributes in page.elements:
        for key in ("src", "href", "srcset", "action", "data"):
            assert attributes.get(key, "#").startswith(inside), (
                name,
                attributes,
            )
    policy = next(a["content"] for n, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    assert "http" not in policy
    assert "@import" not in render(report())


def test_a_manifest_alone_makes_a_page_that_says_what_is_missing() -> None:
    data = manifest(transforms=[], layers=[])
    page = document(make_report("bare", data))
    assert page.complaints == []
    assert "not measured" in page.text
    for command in ("--reference FLOAT", "--episodes EPISODES", "vlaquant eval", "vlaquant bench", "calibration data"):
        assert command in page.text.partition("Not in this report")[2]
    assert {"success", "latency", "weights", "outliers", "actions", "layers"}.isdisjoint(
        attributes.get("id") for _, attributes in page.elements
    )


def test_an_evaluation_may_lack_what_not_every_policy_has() -> None:
    found = evaluated()
    actions = replace(found.actions, token_agreement=None, bin_distance=None, boundary_jump=None, jerk=None)
    inside = Inside({}, (found.actions.gripper_flips,), None)
    bare = evaluation(
        actions=actions, inside=inside, system=replace(found.system, memory=None, parts={}), rollouts=None
    )
    page = document(replace(report(), evaluation=read_evaluation(bare)))
    assert page.complaints == []
    assert "error of the velocity, denoising step 1" in page.text


@pytest.mark.parametrize(
    ("of", "words"),
    [("files", "1 file"), ("processes", "1 process"), ("chunk boundaries", "1 chunk boundary"), ("robot", "1 robot")],
)
def test_one_is_no_plural(of: str, words: str) -> None:
    found = evaluated()
    disk = replace(found.system.disk, candidate=replace(found.system.disk.candidate, count=1, of=of))
    bare = evaluation(system=replace(found.system, disk=disk))
    assert f" {words} " in document(replace(report(), evaluation=read_evaluation(bare))).text


def test_an_evaluation_with_nonsense_is_refused() -> None:
    found = evaluation()
    found["actions"]["jerk"]["ratio"]["value"] = "fast"
    with pytest.raises(EvaluationError, match=r"e\.json: is no result .* \(policy\.actions\.jerk\.ratio\.value"):
        read_evaluation(found, "e.json")


def test_rollouts_that_were_skipped_say_why() -> None:
    found = evaluation(rollouts=None, skipped="the EGL library is missing")
    text = document(replace(report(), evaluation=read_evaluation(found))).text
    assert text.count("the EGL library is missing") == 2  # at the top, and among what is missing


def test_a_language_model_has_words_in_the_place_of_success() -> None:
    page = document(replace(report(), evaluation=read_evaluation(to_dict(words()))))
    for one in ("Perplexity", "27.5 → 33.54", "+22.0 %", "0.178", "81.2 %", "4088"):
        assert one in page.text


def test_the_five_figures_at_the_top() -> None:
    shown = {card.label: card for card in cards(report())}
    assert (shown["Size on disk"].before, shown["Size on disk"].after) == ("8.68 MiB", "2.91 MiB")
    assert shown["Time of one action"].before == "9.88 ms"  # the faster of both float versions
    assert (shown["Task success"].before, shown["Task success"].after) == ("96.7 %", "90.0 %")
    assert "too few to tell them apart" in shown["Task success"].note
    worst = max(manifest()["layers"], key=lambda record: record["loss"])
    assert shown["Worst layer"].after == worst["name"]
    assert (shown["Kept in float"].after, shown["Kept in float"].note) == (
        "1 of 8 layers",
        "model.layers.7.proj: rule 'action'",
    )


@pytest.mark.parametrize(
    ("require", "words"),
    [
        ({}, "No gates set"),
        ({"action_l1": 0.01, "success_drop": 0.07, "image_sensitivity": 0.8}, "All 3 gates passed"),
        ({"action_l1": 0.001, "success_drop": 0.07}, "1 of 2 gates failed"),
        ({"action_l1": 0.01, "success_drop": 0.04}, "1 of 2 gates failed"),
        ({"action_l1": 0.01, "perplexity_ratio": 1.1}, "1 of 2 gates were not measured"),
    ],
)
def test_gates_of_the_recipe(require: dict[str, float], words: str) -> None:
    data = manifest()
    data["recipe"]["require"] = require | {"samples": 64, "rollouts": 20}
    assert verdict(make_report("x", data, evaluation=read_evaluation(evaluation()))).words == words


def test_gates_that_the_run_measured_itself() -> None:
    for value, mood in ((0.9, "good"), (0.5, "bad"), (1.5, "bad")):
        found = {"require": {"image_sensitivity": 0.8}, "image_sensitivity": value, "passed": mood == "good"}
        assert verdict(make_report("x", manifest(measured=found))).mood == mood


def test_a_thousand_layers_stay_small() -> None:
    shown = report(1000)
    page = render(shown)
    assert len(page.encode()) < 3e6
    assert all(layer.name in page for layer in shown.layers)


def test_measurements_survive_their_file(tmp_path: Path) -> None:
    found = measured(["a", "b"])
    found.write(tmp_path / "m.json")
    again = Measured.read(tmp_path / "m.json")
    assert again.trace is not None
    assert found.trace is not None
    assert again.trace.original[3] == pytest.approx(found.trace.original[3], rel=1e-4)
    assert again.outliers is not None
    assert (again.outliers.layers, again.weights[0].name) == (("a", "b"), "a")
    again.write(tmp_path / "n.json")
    assert (tmp_path / "m.json").read_bytes() == (tmp_path / "n.json").read_bytes()
    for wrong in ("[]", "{}", "nothing", json.dumps({"kind": "report", "version": 1, "weights": [{"x": 1}]})):
        (tmp_path / "m.json").write_text(wrong, encoding="utf-8")
        with pytest.raises(EvaluationError):
            Measured.read(tmp_path / "m.json")


def written(folder: Path, **changes: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}", encoding="utf-8")
    (folder / "vlaquant.json").write_text(json.dumps(manifest(**changes)), encoding="utf-8")
    return folder


def test_the_command_writes_one_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = written(tmp_path / "out")
    (tmp_path / "e.json").write_text(json.dumps(evaluation()), encoding="utf-8")
    (tmp_path / "b.json").write_text(json.dumps(benchmark()), encoding="utf-8")
    measured(["a"]).write(tmp_path / "m.json")
    log = '{"event": "stage", "seconds": 2.5, "peak_memory": 1048576}\n{"event": "sta'  # killed while it wrote
    (tmp_path / "out.log.jsonl").write_text(log, encoding="utf-8")
    files = {f"--{name}": str(tmp_path / f"{name[0]}.json") for name in ("eval", "bench", "measured")}
    assert main(["report", str(output), *(one for pair in files.items() for one in pair)]) == 0
    assert "out.report.html" in capsys.readouterr().out
    page = Document((tmp_path / "out.report.html").read_text(encoding="utf-8"))
    assert page.complaints == []
    assert "The run took 2.5 s and at most 1.00 MiB of memory" in page.text
    assert "Closed-loop success" in page.text


def test_the_command_compares(tmp_path: Path) -> None:
    outputs, files = [], []
    for i, error in enumerate((0.004, 0.001)):
        outputs.append(str(written(tmp_path / f"out{i}", bytes_on_disk={"weights": 10**6 * (1 + i)})))
        found = evaluation()
        found["actions"]["whole_chunk"]["l1"]["value"] = error
        files.append(str(tmp_path / f"e{i}.json"))
        Path(files[-1]).write_text(json.dumps(found), encoding="utf-8")
    target = tmp_path / "deep" / "c.html"
    assert main(["report", "--compare", *outputs, "--eval", *files, "--output", str(target)]) == 0
    page = Document(target.read_text(encoding="utf-8"))
    assert page.complaints == []
    assert "No other model beats out0, out1" in page.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--eval", "a", "b"], "--eval names 2 files for 1 outputs"),
        (["--episodes", "x"], "need --reference"),
        (["--measured", "x", "--reference", "y"], "give one of them"),
        (["--eval", "nowhere.json"], "cannot be read as JSON"),
    ],
)
def test_the_command_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["report", str(written(tmp_path / "out")), *arguments]) in {1, 2}
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("*.html"))


def test_a_comparison_of_one_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "--compare", str(written(tmp_path / "out"))]) == 1
    assert "two or more" in capsys.readouterr().err
