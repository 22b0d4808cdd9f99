"""Timing, the facts of the machine, its limits, and what the doctor says of machines that are made up."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from vlaquant import kernels
from vlaquant.benchmark import doctor, limits
from vlaquant.benchmark.doctor import diagnose, report
from vlaquant.benchmark.limits import Limits, best_of, measure_limits, prepacked_fp32
from vlaquant.cli import main
from vlaquant.evaluate import machine
from vlaquant.evaluate.timing import interleave, ratio, summary_ms, threads
from vlaquant.kernels import Kernel
from vlaquant.kernels.reference import REFERENCE

XEON = {"fpu", "avx2", "avx512f", "avx512bw", "avx512_vnni"}


def test_every_round_runs_every_path_once_and_begins_with_another() -> None:
    order: list[tuple[int, str]] = []

    def path(name: str) -> Any:
        def turn(number: int) -> float:
            order.append((number, name))
            return float(number)

        return turn

    seconds = interleave({name: path(name) for name in "abc"}, rounds=4, warm_up=2)
    assert seconds == {name: [2.0, 3.0, 4.0, 5.0] for name in "abc"}
    rounds = ["".join(name for number, name in order if number == turn) for turn in range(6)]
    assert rounds == ["abc", "bca", "cab", "abc", "bca", "cab"]
    assert [number for number, _ in order] == sorted(number for number, _ in order)


def test_statistics_by_hand() -> None:
    found = summary_ms([0.001, 0.002, 0.003, 0.004, 0.1])
    assert found == pytest.approx({"median_ms": 3.0, "p95_ms": 4.0 + 0.8 * 96.0, "min_ms": 1.0})
    assert ratio({"median_ms": 6.0}, found) == pytest.approx(2.0)
    assert ratio(None, found) is None


def test_threads_are_put_back() -> None:
    before = torch.get_num_threads()
    with threads(2) as count:
        assert count == torch.get_num_threads() == 2
    assert torch.get_num_threads() == before
    with threads(None) as count:
        assert count == before


@pytest.mark.parametrize(
    ("flags", "architecture", "there"),
    [
        (XEON, "x86_64", ["AVX2", "AVX-512", "VNNI"]),
        (XEON | {"avx512_bf16", "amx_int8", "amx_bf16"}, "x86_64", ["AVX2", "AVX-512", "VNNI", "AVX512_BF16", "AMX"]),
        ({"avx2", "avx_vnni"}, "AMD64", ["AVX2", "VNNI"]),
        ({"avx512f", "amx_int8"}, "x86_64", []),
        ({"asimd", "asimddp"}, "aarch64", ["NEON dot product"]),
        ({"asimd"}, "arm64", []),
    ],
)
def test_instruction_sets(flags: set[str], architecture: str, there: list[str]) -> None:
    assert [name for name, has in machine.instruction_sets(flags, architecture).items() if has] == there


def test_cache_sizes_are_read_in_their_units(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_CACHES", tmp_path)
    assert machine.last_level_cache() == 32 * 2**20
    for index, size in enumerate(["48K", "2M\n", "512K"]):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(size, encoding="utf-8")
    assert machine.last_level_cache() == 2 * 2**20


def test_cpu_facts_come_from_the_system(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nmodel name\t: Made Up 3000\nflags\t\t: fpu AVX2\n", encoding="utf-8")
    monkeypatch.setattr(machine, "_CPUINFO", cpuinfo)
    assert machine.cpu_model() == "Made Up 3000"
    assert machine.cpu_flags() == {"fpu", "avx2"}


def test_facts_are_plain_values() -> None:
    facts = machine.machine()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["torch_threads"] == torch.get_num_threads()
    assert machine.versions(["torch", "no-such-package"])["no-such-package"] is None


def test_a_machine_without_compiler_or_git(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert machine.compiler() is None
    assert machine.commit() is None


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_commit_is_that_of_the_checkout_that_the_code_is_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "machine.py"
    source.write_text("pass", encoding="utf-8")
    monkeypatch.setattr(machine, "__file__", str(source))

    def git(*arguments: str) -> str:
        who = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
        command = ["git", "-C", str(tmp_path), *who, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init")
    assert machine.commit() is None  # installed into somebody else's checkout
    git("add", "machine.py")
    git("commit", "--no-gpg-sign", "-m", "first")
    assert machine.commit() == git("rev-parse", "HEAD")
    source.write_text("...", encoding="utf-8")
    assert machine.commit() == git("rev-parse", "HEAD") + "-dirty"


def test_limits_are_of_the_machine_and_the_slower_bound_decides() -> None:
    found = measure_limits("cpu", 2**16, size=64, repeats=2)
    assert min(found.read_gb_per_s, found.fp32_gop_per_s) > 0.0
    assert {"read", "fp32"} <= found.seen_in.keys()
    known = Limits(10.0, 100.0, 50.0, 400.0, {})
    assert known.least_seconds(10**9, 10**9, "fp32") == pytest.approx(0.1)
    assert known.least_seconds(1, 10**11, "fp32") == pytest.approx(1.0)
    assert known.least_seconds(1, 10**11, "bf16") == pytest.approx(1.0)  # emulated, so float32 is what can be reached
    assert known.least_seconds(1, 10**11, "int8") == pytest.approx(0.25)
    other = Limits(5.0, 120.0, 60.0, None, {"fp32": "seen later"})
    assert best_of(known, other) == Limits(10.0, 120.0, 60.0, 400.0, {"fp32": "seen later"})


def test_hopelessly_slow_formats_are_not_measured_further(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def naive(_device: str, size: int) -> dict[str, Any]:
        def product() -> None:
            sizes.append(size)
            torch.zeros(2_000_000).cos()

        return {"naive loop": product}

    monkeypatch.setattr(limits, "_integer_products", naive)
    monkeypatch.setattr(limits, "_TRIAL", 8)
    assert measure_limits("cpu", 2**16, size=16, repeats=1).int8_gop_per_s is None
    assert set(sizes) == {8}


def test_float32_is_measured_however_the_trial_went(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_TOO_SLOW", 0.0)
    found = measure_limits("cpu", 2**16, size=16, repeats=1)
    assert (found.bf16_gop_per_s, found.int8_gop_per_s) == (0.0, None)
    assert found.fp32_gop_per_s > 0.0


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="this torch has no MKL")
def test_prepacked_product_is_the_product() -> None:
    weight, x = torch.randn(24, 40), torch.randn(3, 40)
    run = prepacked_fp32(weight, 3)
    assert run is not None
    torch.testing.assert_close(run(x), x @ weight.T)


def _kernels(monkeypatch: pytest.MonkeyPatch, *kinds: Kernel) -> None:
    monkeypatch.setattr(kernels, "KERNELS", kinds)
    monkeypatch.setattr(doctor, "KERNELS", kinds)


def _kernel(name: str, why_not: Any) -> Kernel:
    return Kernel(name, why_not, REFERENCE.prepare, REFERENCE.run)


def test_the_doctor_tells_the_kernel_the_reasons_and_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLAQUANT_KERNEL", raising=False)
    no_compiler = _kernel("native", lambda _: "was not built: no C compiler; install one and vlaquant again")
    narrow = _kernel(
        "narrow", lambda q: None if q.dtype == torch.bfloat16 and q.scheme.weight.bits == 4 else "is narrow"
    )
    _kernels(monkeypatch, no_compiler, narrow, REFERENCE)
    diagnosis = diagnose()
    rows = {(row["scheme"], row["dtype"]): row for row in diagnosis["kernels"] if row["device"] == "cpu"}
    assert len(rows) == 12
    assert rows["w4a16_g64", "bfloat16"]["kernel"] == "narrow"
    assert [one["kernel"] for one in rows["w4a16_g64", "bfloat16"]["refused"]] == ["native"]
    assert rows["w8a8", "float32"]["kernel"] == "reference"
    assert [one["reason"] for one in rows["w8a8", "float32"]["refused"]][1] == "is narrow"
    text = report(diagnosis)
    assert max(map(len, text.splitlines())) <= 100
    assert "native: was not built: no C compiler; install one and vlaquant again" in text
    joined = " ".join(text.split())
    assert "w4a16_g128 float32, w4a16_g64 float32, w4a8_g128 float32: use the model in bfloat16, where narrow" in joined
    assert "w8a8 float32, w8a8 bfloat16" in joined


def test_nothing_is_advised_where_all_is_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLAQUANT_KERNEL", raising=False)
    _kernels(monkeypatch, _kernel("quick", lambda _: None), REFERENCE)
    diagnosis = diagnose()
    assert {row["kernel"] for row in diagnosis["kernels"]} == {"quick"}
    assert diagnosis["advice"] == []
    assert "What to do" not in report(diagnosis)


def test_a_forced_kernel_is_named_as_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLAQUANT_KERNEL", "reference")
    diagnosis = diagnose()
    assert {row["kernel"] for row in diagnosis["kernels"]} == {"reference"}
    assert diagnosis["advice"] == ["unset VLAQUANT_KERNEL: it forces 'reference' on every layer"]


def test_the_doctor_shows_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = machine.machine() | {
        "cpu": "Made Up 3000",
        "instruction_sets": {"AVX2": True, "AMX": False},
        "gpus": [{"name": "Made Up GPU", "capability": "8.7", "memory_bytes": 16 * 2**30}],
        "compiler": None,
        "native_kernels": "was not built",
    }
    monkeypatch.setattr(doctor, "machine", lambda: facts)
    diagnosis = diagnose()
    assert {row["device"] for row in diagnosis["kernels"]} == {"cpu", "cuda"}
    text = report(diagnosis)
    for told in ("Made Up 3000", "AVX2 yes, AMX no", "Made Up GPU, compute capability 8.7, 16 GiB", "none found (cc"):
        assert told in text
    assert max(map(len, text.splitlines())) <= 100


def test_doctor_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    assert "Kernel of a layer" in capsys.readouterr().out
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {row["scheme"] for row in found["kernels"]} >= {
        "w4a16_g128",
        "w4a16_g64",
        "w8a16_channel",
        "w8a8",
        "w4a8_g128",
    }


def test_doctor_refuses_a_kernel_that_cannot_be_forced(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLAQUANT_KERNEL", "nothing")
    assert main(["doctor"]) == 1
    assert "VLAQUANT_KERNEL='nothing'" in capsys.readouterr().err
