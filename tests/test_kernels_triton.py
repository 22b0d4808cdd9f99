"""The Triton kernels: under the interpreter, through the compiler without a GPU, and on one where there is one.

Triton decides for good when it is imported whether it interprets, so ``triton_checks.py`` runs in its own process.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_kernels import layer_of, relative_error
from torch import Tensor

from vlaquant.kernels import Kernel, Query, triton_common, triton_w4a16, triton_w8a8
from vlaquant.kernels.reference import REFERENCE
from vlaquant.kernels.triton_common import Config, bucket, cache_file, choose, split_to_fill
from vlaquant.kernels.triton_w4a16 import TRITON_W4A16, Packed
from vlaquant.kernels.triton_w8a8 import TRITON_W8A8, Weight
from vlaquant.linear import QuantLinear
from vlaquant.scheme import PRESETS, Scheme

TESTS = Path(__file__).parent
ASYMMETRIC = PRESETS["w4a16"].with_weight(group_size=64, symmetric=False)
#: The most shared memory that an instance can have, in bytes: on 8.6, 8.9 and 12.0 less than on 8.0, and on 9.0.
SHARED = {80: 99 * 1024, 90: 227 * 1024}

needs_triton = pytest.mark.skipif(triton_common.triton is None, reason="needs triton")


def run_checks(**environment: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(TESTS.parent)]
    done = subprocess.run(
        [*command, str(TESTS / "triton_checks.py")],
        cwd=TESTS.parent,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-5_000:]
    assert int(re.findall(r"(\d+) passed", done.stdout)[0]) > 50, done.stdout


@needs_triton
def test_under_the_interpreter() -> None:
    run_checks(TRITON_INTERPRET="1")


@pytest.mark.gpu
@needs_triton
def test_on_the_device() -> None:
    run_checks(TRITON_INTERPRET="0")


@needs_triton
def test_the_benchmark_takes_all_steps(tmp_path: Path) -> None:
    script = TESTS.parent / "bench" / "cuda_kernels.py"
    file = tmp_path / "rows.json"
    subprocess.run(
        [sys.executable, str(script), "--dry-run", "--tokens", "1", "--rounds", "1", "--json", str(file)],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(TESTS.parent)},
        capture_output=True,
        check=True,
    )
    found = json.loads(file.read_text())
    assert found["facts"]["dry_run"]
    assert {row["path"] for row in found["rows"]} == {"bf16 F.linear", TRITON_W4A16.name, TRITON_W8A8.name}
    for row in found["rows"]:
        assert row["error"] < 0.01
        assert row["median_us"] > 0


def test_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = {TRITON_W4A16: PRESETS["w4a16"], TRITON_W8A8: PRESETS["w8a8"]}
    for kernel, scheme in kernels.items():
        on_cpu, on_cuda = (Query(scheme, 256, 64, torch.bfloat16, device) for device in ("cpu", "cuda"))
        assert kernel.why_not(on_cpu) == "runs on cuda, not on cpu"
        with monkeypatch.context() as patch:
            patch.setattr(triton_common, "triton", None)
            assert kernel.why_not(on_cuda) == "needs triton"
        with monkeypatch.context() as patch:
            patch.setattr(triton_common, "triton", object())
            patch.setattr(torch.cuda, "is_available", lambda: False)
            assert kernel.why_not(on_cuda) == "finds no CUDA device"
            patch.setattr(torch.cuda, "is_available", lambda: True)
            patch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
            assert kernel.why_not(on_cuda) == "needs compute capability 8.0, and the device has 7.5"
            patch.setattr(torch.cuda, "get_device_capability", lambda: (12, 0))
            assert kernel.why_not(on_cuda) is None


def test_buckets_and_splits() -> None:
    assert [bucket(tokens) for tokens in (1, 2, 3, 16, 17, 256)] == [1, 2, 4, 16, 32, 256]
    assert split_to_fill(512, 16) == 1
    assert split_to_fill(128, 16) == 4
    assert split_to_fill(1, 16) == 16
    assert split_to_fill(1, 3) == 2  # no instance without work


@pytest.mark.parametrize("tokens", [1, 4, 16, 64, 256, 1024])
def test_the_choice_is_small(tokens: int) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        assert 1 <= len(triton_w4a16.candidates(tokens, 4096, 16, dtype)) <= 12
    assert 1 <= len(triton_w8a8.candidates(tokens, 4096, 4096)) <= 12


FIRST, SECOND, THIRD = Config("first"), Config("second"), Config("third", split=2)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[Config]]:
    """A device on which ``SECOND`` is fastest and ``THIRD`` does not fit; what was timed on it, in order."""
    timed: list[Config] = []
    milliseconds = {FIRST: 2.0, SECOND: 1.0}

    def do_bench(call: Callable[[], Config], **_: object) -> float:
        timed.append(call())
        if timed[-1] not in milliseconds:
            raise torch.cuda.OutOfMemoryError
        return milliseconds[timed[-1]]

    fake = SimpleNamespace(
        __version__="0",
        testing=SimpleNamespace(do_bench=do_bench),
        errors=SimpleNamespace(TritonError=ZeroDivisionError),
    )
    monkeypatch.setattr(triton_common, "triton", fake)
    monkeypatch.setattr(triton_common, "_chosen", {})
    monkeypatch.setattr(triton_common, "_known", {})
    monkeypatch.setattr(triton_common, "_read", set())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("VLAQUANT_AUTOTUNE", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a device")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    yield timed
    timed.clear()


def choice(key: tuple[object, ...] = ("w4a16", 64, 32), configs: tuple[Config, ...] = (FIRST, SECOND, THIRD)) -> Config:
    return choose(key, lambda: configs, lambda config: config)


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a new process knows."""
    monkeypatch.setattr(triton_common, "_chosen", {})
    monkeypatch.setattr(triton_common, "_known", {})
    monkeypatch.setattr(triton_common, "_read", set())


def test_the_fastest_is_remembered(monkeypatch: pytest.MonkeyPatch, measured: list[Config]) -> None:
    assert choice() == SECOND
    assert measured == [FIRST, SECOND, THIRD]
    assert choice() == SECOND
    forget(monkeypatch)
    assert choice() == SECOND
    assert len(measured) == 3
    assert choice(("w4a16", 64, 48)) == SECOND
    assert len(measured) == 6
    assert len(json.loads(cache_file().read_text())) == 2
    assert [path.name for path in cache_file().parent.iterdir()] == [cache_file().name]


def test_nothing_is_timed_where_it_must_not(monkeypatch: pytest.MonkeyPatch, measured: list[Config]) -> None:
    monkeypatch.setenv("VLAQUANT_AUTOTUNE", "0")
    assert choice() == FIRST
    monkeypatch.delenv("VLAQUANT_AUTOTUNE")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert choice() == FIRST
    assert choice(configs=(THIRD,)) == THIRD
    assert measured == []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert choice() == SECOND
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert choice() == SECOND


@pytest.mark.parametrize("content", ["", "[1]", '{"a": {"path": "x", "unknown": 1}}', '{"a": 1}'])
def test_a_broken_cache_is_ignored(measured: list[Config], content: str) -> None:
    cache_file().parent.mkdir(parents=True)
    cache_file().write_text(content)
    assert choice() == SECOND
    assert len(measured) == 3


def test_a_choice_that_is_none_of_the_list_is_made_again(
    monkeypatch: pytest.MonkeyPatch, measured: list[Config]
) -> None:
    assert choice() == SECOND
    forget(monkeypatch)
    assert choice(configs=(FIRST, THIRD)) == FIRST
    assert measured == [FIRST, SECOND, THIRD, FIRST, THIRD]


def test_a_cache_that_cannot_be_written_is_no_error(
    monkeypatch: pytest.MonkeyPatch, measured: list[Config], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert choice() == SECOND
    assert choice() == SECOND
    assert len(measured) == 3


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[int], list[Any]]:
    """Makes launches compile for an architecture and go no further; the compiled kernels, in order."""
    triton = triton_common.triton
    jit_function = triton.runtime.jit.JITFunction
    kernels: list[Any] = []
    launch = jit_function.run

    def compile_only(self: Any, *args: Any, **kwargs: Any) -> None:
        kernels.append(launch(self, *args, **{**kwargs, "warmup": True}))

    def target(architecture: int) -> list[Any]:
        device = SimpleNamespace(
            get_current_target=lambda: triton.backends.compiler.GPUTarget("cuda", architecture, 32),
            get_current_device=lambda: architecture,
            get_current_stream=lambda _device: 0,
        )
        monkeypatch.setattr(triton.runtime.driver, "_active", device)
        return kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(jit_function, "run", compile_only)
    return target


def w4a16_launches(tokens: int, config: Config, dtype: torch.dtype = torch.bfloat16) -> None:
    words = torch.empty(4096, 512, dtype=torch.int32)
    scale = torch.empty(32, 4096, dtype=dtype)
    weight = Packed(words, scale, None, group=128)
    triton_w4a16.multiply(torch.empty(tokens, 4096, dtype=dtype), weight, None, config)


def w8a8_launches(tokens: int, config: Config) -> None:
    x = torch.empty(tokens, 4096, dtype=torch.bfloat16)
    activations = triton_w8a8.quantize(x, None, None, symmetric=True)
    weight = Weight(torch.empty(4096, 4096, dtype=torch.int8), torch.empty(4096), torch.empty(4096, dtype=torch.int32))
    triton_w8a8.multiply(activations, weight, None, torch.bfloat16, config)


@needs_triton
@pytest.mark.parametrize("architecture", SHARED)
def test_first_configs_compile(compiled: Callable[[int], list[Any]], architecture: int) -> None:
    """The compiler refuses what the interpreter lets pass, and needs no GPU: the arguments are those of real calls."""
    kernels = compiled(architecture)
    for tokens in (1, 16, 64):
        w4a16_launches(tokens, triton_w4a16.candidates(tokens, 4096, 16, torch.bfloat16)[0])
        w8a8_launches(tokens, triton_w8a8.candidates(tokens, 4096, 4096)[0])
    for kernel in kernels:
        assert kernel.metadata.shared <= SHARED[architecture], kernel.metadata
    assert {kernel.metadata.name for kernel in kernels} == {
        "gemv_kernel", "gemm_kernel", "add_parts_kernel", "quantize_tokens_kernel"
    }  # fmt: skip
    code = "".join(kernel.asm["ptx"] for kernel in kernels if kernel.metadata.name == "gemm_kernel")
    for instruction in {80: ("mma.sync", "bf16", "s8"), 90: ("wgmma", "bf16", "s8")}[architecture]:
        assert instruction in code


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("architecture", SHARED)
def test_every_config_compiles(
    monkeypatch: pytest.MonkeyPatch, compiled: Callable[[int], list[Any]], architecture: int
) -> None:
    monkeypatch.setenv("VLAQUANT_AUTOTUNE", "0")
    kernels = compiled(architecture)
    for tokens in (1, 16, 64):
        for config in triton_w4a16.candidates(tokens, 4096, 16, torch.bfloat16):
            w4a16_launches(tokens, config)
        for dtype in (torch.float16, torch.float32):
            w4a16_launches(tokens, triton_w4a16.candidates(tokens, 4096, 16, dtype)[0], dtype)
        for config in triton_w8a8.candidates(tokens, 4096, 4096):
            w8a8_launches(tokens, config)
    for scheme, asymmetric in ((ASYMMETRIC, True), (PRESETS["w8a8_static"], False)):
        layer = layer_of(scheme, 48, 320, dtype=torch.bfloat16)
        kernel = TRITON_W4A16 if asymmetric else TRITON_W8A8
        for tokens in (1, 17, 300):
            run_unchecked(kernel, layer, torch.empty(tokens, 320, dtype=torch.bfloat16))
    assert max(kernel.metadata.shared for kernel in kernels) <= SHARED[architecture]


def run_unchecked(kernel: Kernel, layer: QuantLinear, x: Tensor) -> Tensor:
    stored, query = layer.stored(), layer.query(x.dtype)
    return kernel.run(x, stored, kernel.prepare(stored, query), query)


CASES = [(TRITON_W4A16, PRESETS["w4a16"]), (TRITON_W4A16, ASYMMETRIC), (TRITON_W8A8, PRESETS["w8a8"])]


def prepared_call(kernel: Kernel, scheme: Scheme) -> tuple[QuantLinear, Callable[[Tensor], Tensor]]:
    layer = layer_of(scheme, 512, 1024, dtype=torch.bfloat16).cuda()
    stored, query = layer.stored(), layer.query()
    prepared = kernel.prepare(stored, query)
    return layer, lambda x: kernel.run(x, stored, prepared, query)


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("tokens", [1, 16, 100, 600])
@pytest.mark.parametrize(("kernel", "scheme"), CASES)
def test_captured_calls_are_replayed(kernel: Kernel, scheme: Scheme, tokens: int) -> None:
    layer, call = prepared_call(kernel, scheme)
    x = torch.randn(tokens, 1024, dtype=torch.bfloat16, device="cuda")
    call(x)  # chooses block sizes and compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call(x)
    for seed in range(3):
        x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        assert torch.equal(y, call(x))
        assert relative_error(y, run_unchecked(REFERENCE, layer, x)) < 2**-7


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize(("kernel", "scheme"), CASES)
def test_torch_compile(kernel: Kernel, scheme: Scheme) -> None:
    layer, call = prepared_call(kernel, scheme)
    function = torch.compile(lambda x: call(torch.nn.functional.silu(x)) * 2, fullgraph=True)
    for tokens in (1, 16, 100):
        x = torch.randn(tokens, 1024, dtype=torch.bfloat16, device="cuda")
        wanted = run_unchecked(REFERENCE, layer, torch.nn.functional.silu(x)) * 2
        assert relative_error(function(x), wanted) < 2**-6
