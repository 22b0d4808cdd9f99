"""Several processes that find each other, as torchrun starts them, but forked from one that has imported everything."""

import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

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
    """Run ``work(*arguments)`` in ``size`` processes; one that is still running after a minute is killed."""
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
