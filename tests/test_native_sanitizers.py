"""The C kernels under AddressSanitizer and UndefinedBehaviorSanitizer, and for ARM in an emulator; takes minutes."""

import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [*sorted((ROOT / "vlaquant/kernels/native").glob("*.c")), ROOT / "tests/native_fuzz.c"]
FLAGS = ["-std=c11", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
#: Of each instruction set that this CPU has; 200,000 make a million on one with AVX512-BF16.
CALLS = int(os.environ.get("VLAQUANT_FUZZ_CALLS", "20000"))
SEED = os.environ.get("VLAQUANT_FUZZ_SEED", "1")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("gcc") is None or platform.system() != "Linux", reason="needs gcc on Linux"),
]


def gcc(*arguments: str) -> None:
    done = subprocess.run(["gcc", *FLAGS, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def objects(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("native")
    made = [str(folder / f"{path.stem}.o") for path in SOURCES]
    with ThreadPoolExecutor(2) as pool:
        include = f"-I{ROOT / 'vlaquant/kernels/native'}"
        list(pool.map(lambda pair: gcc(include, "-c", "-o", pair[1], str(pair[0])), zip(SOURCES, made, strict=True)))
    return made


def fuzz(objects: list[str], program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    gcc("-o", str(program), *objects, "-pthread", "-lm")
    return subprocess.run([str(program), *arguments], capture_output=True, text=True, check=False)


def test_random_calls_are_right_and_clean(objects, tmp_path):
    done = fuzz(objects, tmp_path / "fuzz", str(CALLS), SEED)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"portable: {CALLS} calls" in done.stdout


@pytest.mark.parametrize(
    ("right", "wrong", "complaint"),
    [
        (
            "const int64_t row = aligned(layer->columns",
            "const int64_t row = -aligned(-16 + 0 * layer->columns",
            "AddressSanitizer",
        ),
        ("packed.start = start;", "packed.start = 0;", "wanted"),
    ],
    ids=["too little scratch", "chunks that overwrite the first"],
)
def test_planted_mistakes_are_found(objects, tmp_path, right, wrong, complaint):
    folder = ROOT / "vlaquant/kernels/native"
    text = (folder / "library.c").read_text(encoding="utf-8")
    assert right in text
    (tmp_path / "library.c").write_text(text.replace(right, wrong), encoding="utf-8")
    broken = str(tmp_path / "library.o")
    gcc(f"-I{folder}", "-c", "-o", broken, str(tmp_path / "library.c"))
    others = [one for one in objects if not one.endswith("/library.o")]
    done = fuzz([*others, broken], tmp_path / "fuzz", "2000", "1")
    assert done.returncode != 0
    assert complaint in done.stdout + done.stderr


@pytest.mark.skipif(
    shutil.which("aarch64-linux-gnu-gcc") is None or shutil.which("qemu-aarch64-static") is None,
    reason="needs the packages gcc-aarch64-linux-gnu and qemu-user-static",
)
def test_arm(tmp_path):
    program = str(tmp_path / "fuzz")
    include = f"-I{ROOT / 'vlaquant/kernels/native'}"
    command = ["aarch64-linux-gnu-gcc", "-std=c11", "-O2", include, "-static", "-o", program, *map(str, SOURCES)]
    subprocess.run([*command, "-pthread", "-lm"], check=True)
    done = subprocess.run(
        ["qemu-aarch64-static", "-cpu", "max", program, "1000", "3"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split() == ["neon_dot:", "1000", "calls", "portable:", "1000", "calls"]
