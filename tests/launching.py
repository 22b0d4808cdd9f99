"""Processes that are forked from one that has imported everything: importing takes seconds."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vlaquant.export import fresh

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["staged", "vlaquant.cli"])

#: Nothing here takes so long; who waits for a dead process waits longer.
_SECONDS = 60.0


@dataclass(frozen=True)
class Ended:
    """What became of one process: exit code (negative: the signal), and what it printed."""

    code: int | None
    out: str
    err: str


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def together(folder: Path, size: int, work: Callable[..., None], *arguments: Any) -> list[Ended]:
    """Run ``work(*arguments)`` in ``size`` processes that find each other, as torchrun starts them.

    One that is still running after a minute is killed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = [(folder / f"out-{rank}", folder / f"err-{rank}") for rank in range(size)]
    port = free_port()
    started = [
        _context.Process(target=_child, args=(rank, size, port, *files[rank], work, arguments)) for rank in range(size)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(_SECONDS)
    hanging = [rank for rank, process in enumerate(started) if process.is_alive()]
    for rank in hanging:
        started[rank].kill()
        started[rank].join()
    assert not hanging, f"processes {hanging} wait for ever: {[err.read_text(encoding='utf-8') for _, err in files]}"
    return [
        Ended(process.exitcode, out.read_text(encoding="utf-8"), err.read_text(encoding="utf-8"))
        for process, (out, err) in zip(started, files, strict=True)
    ]


def _child(
    rank: int, size: int, port: int, out: Path, err: Path, work: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    with out.open("w", encoding="utf-8") as sys.stdout, err.open("w", encoding="utf-8") as sys.stderr:
        try:
            work(*arguments)
        except BaseException as error:
            traceback.print_exc()
            raise SystemExit(error.code if isinstance(error, SystemExit) else 1) from None


def signalled(number: signal.Signals, work: Callable[..., Any], *arguments: Any) -> Ended:
    """Run ``work(ready, *arguments)`` in another process, and send it a signal once it calls ``ready.set()``."""
    ready = _context.Event()
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder, "out"), Path(folder, "err")
        process = _context.Process(target=_signalled, args=(ready, *files, work, arguments))
        process.start()
        reached = ready.wait(_SECONDS)
        os.kill(process.pid or 0, number if reached else signal.SIGKILL)
        process.join(_SECONDS)
        if process.is_alive():
            process.kill()
            process.join()
        out, err = (file.read_text(encoding="utf-8") if file.is_file() else "" for file in files)
    assert reached, f"the process did not get as far as it should: {err}"
    return Ended(process.exitcode, out, err)


def _signalled(ready: Any, out: Path, err: Path, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a server of forks ignores it
    torch.set_num_threads(1)
    with out.open("w", encoding="utf-8") as sys.stdout, err.open("w", encoding="utf-8") as sys.stderr:
        code = work(ready, *arguments)
    sys.exit(code)


def run_fresh(
    command: Sequence[str], *, env: Mapping[str, str], check: bool, text: bool, capture_output: bool
) -> "subprocess.CompletedProcess[str]":
    """As :func:`subprocess.run` for the command of :mod:`vlaquant.export.verify`, without the seconds of its imports.

    The process knows what the one that it is forked from has imported: no model, no tensor, and nothing of this one but
    the command line, the environment and the folder.
    """
    assert [*command[:3]] == [sys.executable, "-m", "vlaquant.export.fresh"], command
    assert (check, text, capture_output) == (False, True, True)
    with tempfile.NamedTemporaryFile() as errors:
        process = _context.Process(target=_fresh, args=(list(command[3:]), dict(env), os.getcwd(), errors.name))
        process.start()
        process.join()
        assert process.exitcode is not None
        return subprocess.CompletedProcess(list(command), process.exitcode, "", errors.read().decode())


def _fresh(arguments: list[str], environment: dict[str, str], folder: str, errors: str) -> None:
    os.dup2(os.open(errors, os.O_WRONLY), 2)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    # As an interpreter does: the folder and PYTHONPATH come first
    first = [folder, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    sys.path[:] = list(dict.fromkeys([*first, *sys.path]))
    sys.argv[1:] = arguments
    fresh.main()
