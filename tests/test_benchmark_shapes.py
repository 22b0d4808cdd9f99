"""Kernels side by side on tiny shapes: what is in the result, that wrong paths are left out, and bad input."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vlaquant import kernels
from vlaquant.benchmark import paths, shapes
from vlaquant.benchmark.limits import Limits
from vlaquant.benchmark.paths import BF16, FP32, PREPACKED, pack, peer_paths
from vlaquant.benchmark.peers import ADAPTERS, Peer, installed_peers
from vlaquant.benchmark.shapes import Settings, bench_shapes, parse_schemes, parse_shapes
from vlaquant.benchmark.tables import shapes_table
from vlaquant.cli import main
from vlaquant.errors import EvaluationError, PlanError, RecipeError
from vlaquant.kernels import Kernel, Query
from vlaquant.kernels.reference import REFERENCE
from vlaquant.numerics import QuantizedWeight
from vlaquant.scheme import get_scheme

LIMITS = Limits(10.0, 100.0, 50.0, 400.0, {})


@pytest.fixture(autouse=True)
def small_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "last_level_cache", lambda: 20_000)
    monkeypatch.setattr(shapes, "measure_limits", lambda *_, **__: LIMITS)


def settings(schemes: str = "w4a16,w8a8,w4a8", **changes: Any) -> Settings:
    chosen: dict[str, Any] = {"shapes": ((32, 64),), "tokens": (1, 70), "rounds": 3} | changes
    return Settings(schemes=parse_schemes(schemes, 32), **chosen)


def peer(name: str, change: Callable[[Tensor], Tensor], activations: str = "float") -> Peer:
    """One that multiplies with the dequantized weight, and then something happens."""

    def prepare(weight: QuantizedWeight, threads: int) -> Callable[[Tensor], Tensor]:
        assert threads == 1
        dense = weight.dequantize()
        return lambda x: change(x @ dense.T)

    return Peer(name, activations, lambda _: None, prepare)


def _slowly(y: Tensor) -> Tensor:
    time.sleep(0.01)
    return y


def _fails(_: Tensor) -> Tensor:
    raise RuntimeError("no such instruction")


def test_every_path_has_a_row_with_all_figures() -> None:
    result = bench_shapes(settings(), peers=(peer("honest", lambda y: y),))
    assert json.loads(json.dumps(result)) == result
    assert result["left_out"] == []
    assert result["settings"]["schemes"] == ["w4a16_g32", "w8a8", "w4a8_g32"]
    assert {"cpu", "cpu_flags", "commit", "versions"} <= result["machine"].keys()
    for tokens in (1, 70):
        rows = {(row["scheme"], row["path"]): row for row in result["rows"] if row["tokens"] == tokens}
        floats = [path for scheme, path in rows if scheme == ""]
        assert floats == [FP32, BF16] + ([PREPACKED] if torch.backends.mkl.is_available() else [])
        for scheme in result["settings"]["schemes"]:
            query = Query(parse_schemes(scheme.split("_")[0], 32)[0], 64, 32, torch.float32, "cpu")
            able = [name for name, reason in kernels.explain(query) if reason is None]
            assert [path for found, path in rows if found == scheme] == [*able, f"layer, {able[0]}", "honest"]
        for row in rows.values():
            assert 0.0 < row["min_ms"] <= row["median_ms"] <= row["p95_ms"]
            assert row["x_fp32"] == pytest.approx(rows["", FP32]["median_ms"] / row["median_ms"])
            assert row["x_bf16"] == pytest.approx(rows["", BF16]["median_ms"] / row["median_ms"])
            least = max(
                row["weight_bytes"] / 10e9,
                2 * tokens * 32 * 64 / {"fp32": 100e9, "int8": 400e9, "bf16": 100e9}[row["arithmetic"]],
            )
            assert row["fraction_of_limit"] == pytest.approx(1e3 * least / row["median_ms"])
            assert row["copies"] == 1 if tokens > 64 else row["copies"] * row["weight_bytes"] > 20_000
        assert rows["", FP32]["x_fp32"] == 1.0
        assert rows["", FP32]["weight_bytes"] == 4 * 32 * 64
        assert rows["w4a16_g32", "reference"]["error"] < 1e-6
        assert 1e-3 < rows["w8a8", "reference"]["error"] < 2e-2
        assert rows["w8a8", "reference"]["error_to_reference"] == 0.0
        assert rows["w8a8", "reference"]["rounds_activations"]
        assert not rows["w4a16_g32", "reference"]["rounds_activations"]


def test_a_slow_and_a_wrong_peer_are_reported_as_such() -> None:
    planted = (
        peer("slow", _slowly),
        peer("negated", lambda y: -y),
        peer("not finite", lambda y: y * float("nan")),
        peer("misshapen", lambda y: y.T.contiguous()),
        peer("broken", _fails),
        peer("a little off", lambda y: y * 1.03),
        peer("unrounded", lambda y: y, activations="int8"),
        peer("coarse", lambda y: y, activations="int8 per tensor"),
    )
    result = bench_shapes(settings("w4a8", tokens=(2,)), peers=planted, limits=LIMITS)
    rows = {row["path"]: row for row in result["rows"]}
    assert rows["slow"]["x_fp32"] < 0.5
    assert rows["slow"]["median_ms"] >= 10.0
    best = min(rows[name]["median_ms"] for name in ("slow", "unrounded"))
    assert rows["reference"]["x_best_peer"] == pytest.approx(best / rows["reference"]["median_ms"])
    assert rows[FP32]["x_best_peer"] is None
    reasons = {one["path"]: one["reason"] for one in result["left_out"]}
    assert reasons.keys() == {"negated", "not finite", "misshapen", "broken", "a little off"}
    assert not reasons.keys() & rows.keys()
    assert "error of 2.0e+00" in reasons["negated"]
    assert "shape [32, 2], wanted [2, 32]" in reasons["misshapen"]
    assert "RuntimeError: no such instruction" in reasons["broken"]
    text = shapes_table(result)
    assert "left out: negated for w4a8_g32 32x64, 2 tokens: wrong" in text
    assert "unrounded for w4a8_g32: its result shows no rounding of activations" in text
    assert max(map(len, text.splitlines())) <= 100


def test_a_busy_machine_is_warned_of() -> None:
    result = bench_shapes(settings("w4a16", tokens=(1,), rounds=1), peers=(), limits=LIMITS)
    for load, warned in ((0.9, False), (1.2, True), (None, False)):
        facts = result["machine"] | {"load_average": load, "cores": 2}
        assert ("WARNING: this machine was busy" in shapes_table(result | {"machine": facts})) == warned


def test_a_wrong_kernel_of_our_own_is_left_out_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(x: Tensor, *rest: Any) -> Tensor:
        return REFERENCE.run(x, *rest) + 1.0

    hasty = Kernel("hasty", lambda _: None, REFERENCE.prepare, run)
    monkeypatch.setattr(shapes, "KERNELS", (hasty, *kernels.KERNELS))
    result = bench_shapes(settings("w4a16", tokens=(1,)), peers=(), limits=LIMITS)
    assert [one["path"] for one in result["left_out"]] == ["hasty"]


def test_a_turn_uses_the_next_copies_and_the_last_weight_is_not_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[int] = []

    def prepare(weight: QuantizedWeight, _threads: int) -> Callable[[Tensor], Tensor]:
        dense = weight.dequantize()

        def run(x: Tensor) -> Tensor:
            used.append(id(dense))
            return x @ dense.T

        return run

    result = bench_shapes(
        settings("w4a16", tokens=(1,), rounds=4), peers=(Peer("p", "float", lambda _: None, prepare),), limits=LIMITS
    )
    (copies,) = [row["copies"] for row in result["rows"] if row["path"] == "p"]
    assert len(set(used)) == copies > 3
    check, warm, timed = used[:1], used[1 : 1 + copies], used[1 + copies :]
    assert check == warm[:1]
    assert timed == [warm[index % copies] for index in range(3 * 5)]


def test_layers_and_static_ranges_work_in_bfloat16() -> None:
    wanted = settings("w4a16,w8a16,w8a8_static", tokens=(3,), rounds=1, dtype=torch.bfloat16)
    result = bench_shapes(wanted, peers=(), limits=LIMITS)
    assert result["left_out"] == []
    assert {row["dtype"] for row in result["rows"] if row["scheme"]} == {"bfloat16"}
    assert {row["scheme"] for row in result["rows"]} == {"", "w4a16_g32", "w8a16_channel", "w8a8_static"}


def test_layers_have_the_weight_that_kernels_have() -> None:
    packed = pack(torch.randn(8, 32), get_scheme("w8a8_static"), torch.float32)
    x = torch.randn(4, 32)
    made = {path.kind: path.make()(x) for path in paths.packed_paths(packed, (REFERENCE,))}
    torch.testing.assert_close(made["layer"], made["kernel"])


@pytest.mark.parametrize("package", ADAPTERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_installed_peers_compute_the_product(package: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(package)
    monkeypatch.setattr("vlaquant.benchmark.peers.ADAPTERS", {package: ADAPTERS[package]})
    peers, missing = installed_peers()
    assert peers, missing
    ran = set()
    w4a16 = get_scheme("w4a16").with_weight(group_size=64)
    for scheme in (w4a16, w4a16.with_weight(symmetric=False), get_scheme("w8a8"), get_scheme("w4a8")):
        packed = pack(torch.randn(96, 256), scheme, dtype)
        x = torch.randn(5, 256).to(dtype)
        wanted = x.double() @ packed.codes.dequantize(torch.float64).T
        for path in peer_paths(packed, peers, 1):
            y = path.make()(x)
            assert y.dtype == dtype
            assert float((y.double() - wanted).norm() / wanted.norm()) < path.tolerance, (path.name, scheme.name)
            ran.add(path.name)
    assert ran == {one.name for one in peers}


def test_a_peer_that_is_missing_or_does_not_import_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "half_a_peer.py").write_text("raise ImportError('its library does not load')", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(
        "vlaquant.benchmark.peers.ADAPTERS", {"no_such_package": "never.imported", "half_a_peer": "half_a_peer"}
    )
    assert installed_peers() == (
        (),
        {"no_such_package": "not installed", "half_a_peer": "does not import: its library does not load"},
    )


def test_adapters_are_imported_only_if_their_package_is_there() -> None:
    absent = [adapter for package, adapter in ADAPTERS.items() if not _is_there(package)]
    installed_peers()
    assert not [adapter for adapter in absent if adapter in sys.modules]


def _is_there(package: str) -> bool:
    return any((Path(folder) / package).is_dir() for folder in sys.path)


@pytest.mark.parametrize("text", ["4096", "4096x", "x64", "64x0", "64y64", "64x64,", "", "-1x64", "64x64x64"])
def test_shapes_that_do_not_parse(text: str) -> None:
    with pytest.raises(RecipeError, match="is no shape; write OUTxIN"):
        parse_shapes(text)


def test_shapes_and_schemes_that_parse() -> None:
    assert parse_shapes("4096x11008, 64×32,8X16") == ((4096, 11008), (64, 32), (8, 16))
    assert [one.name for one in parse_schemes("w4a16,w8a8", 64)] == ["w4a16_g64", "w8a8"]
    with pytest.raises(RecipeError, match="did you mean 'w4a16'"):
        parse_schemes("w4a61", 64)
    with pytest.raises(RecipeError, match="must be positive"):
        parse_schemes("w4a16", 0)


def test_a_group_that_does_not_divide_is_refused_before_anything_is_measured() -> None:
    with pytest.raises(PlanError, match=r"shape 2560x960, w4a16_g128: in_features=960 .* divide it: 16, 32, 64"):
        Settings(((64, 128), (2560, 960)), (1,), parse_schemes("w4a16", 128))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there() -> None:
    with pytest.raises(EvaluationError, match="sees no CUDA device"):
        bench_shapes(settings(device="cuda"), peers=(), limits=LIMITS)


@pytest.mark.gpu
def test_shapes_on_a_gpu() -> None:
    result = bench_shapes(settings("w4a16", device="cuda", dtype=torch.bfloat16, shapes=((64, 128),)), peers=())
    assert {row["path"] for row in result["rows"]} >= {FP32, BF16, "reference"}


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", "--shapes", "32x64", "--tokens", "1,3", "--schemes", "w4a16", "--group-size", "32"]
    assert main([*arguments, "--rounds", "1", "--clock", "cpu", "--json", str(tmp_path / "r.json")]) == 0
    printed = capsys.readouterr().out
    assert "32x64, 3 tokens" in printed
    result = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert result["settings"] | {"tokens": [1, 3], "rounds": 1, "clock": "cpu", "threads": 1} == result["settings"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--shapes", "64"], 2, "'64' is no shape"),
        (["--shapes", "64x64", "--schemes", "w4"], 2, "unknown scheme 'w4'"),
        (["--shapes", "64x100"], 1, "in_features=100 is not a multiple of group_size=128"),
        (["--shapes", "64x64", "--rounds", "0"], 2, "must be positive"),
        (["--shapes", "64x64", "--reference", "x"], 2, "--reference goes with DIR only"),
        (["no_such_directory"], 1, "no such directory"),
        (["no_such_directory", "--group-size", "64"], 2, "--group-size goes with --shapes only"),
        (["no_such_directory", "--model-dtypes", "int8"], 2, "unknown dtype 'int8'"),
        (["no_such_directory", "--dtypes", "float32"], 2, "give --reference"),
    ],
)
def test_bad_input(arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == code
    printed = capsys.readouterr().err
    assert message in printed
    assert "Traceback" not in printed


@pytest.mark.parametrize("arguments", [[], ["DIR", "--shapes", "1x1"], ["--shapes", "1x1", "--tokens", "0"]])
def test_bad_usage(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["bench", *arguments])
    assert stop.value.code == 2
