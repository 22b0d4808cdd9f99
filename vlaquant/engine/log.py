"""What a run tells while it works: one progress bar, and a log of JSON lines for those who want to know later."""

import json
import resource
import sys
import time
from contextlib import nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from tqdm import tqdm

from vlaquant.errors import ExportError
from vlaquant.terminal import bar, say

_GIB = 2**30


def peak_memory() -> int:
    """Most bytes of memory that this process ever held at once."""
    # Not ru_maxrss if it can be helped, which a new process inherits from the one that started it
    told = _of_linux("VmHWM")
    if told is not None:
        return told
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_memory() -> int | None:
    """Bytes of memory that this process holds now; None on systems other than Linux."""
    return _of_linux("VmRSS")


def _of_linux(name: str) -> int | None:
    """A size in bytes that Linux tells of this process."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    facts = dict(line.split(":", 1) for line in status.read_text(encoding="utf-8").splitlines())
    return int(facts[name].split()[0]) * 1024


class RunLog:
    """A progress bar over stages, and one JSON object a line in a file.

    Every line has ``event``, ``time`` (seconds since the epoch) and what the event brings along.

    Args:
        path: of the file, which is appended to; None writes none.
        show: whether to draw the bar, which goes to standard error.
    """

    def __init__(self, path: Path | None, *, show: bool) -> None:
        self._path = path
        try:
            self._file = None if path is None else path.open("a", encoding="utf-8")
        except OSError as error:
            raise ExportError(f"{path}: the log cannot be written: {error}") from error
        self._show = show
        self._bar: tqdm[Any] | None = None
        self._tokens = 0
        self._started = time.perf_counter()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()
        # What cannot be written must not hide what went wrong before
        if error is not None:
            with suppress(ExportError):
                self.write("failed", error=f"{type(error).__name__}: {error}")
        if self._file is not None:
            with nullcontext() if error is None else suppress(OSError):
                self._file.close()

    def write(self, event: str, **values: Any) -> None:
        """One line of the log."""
        if self._file is not None:
            try:
                self._file.write(json.dumps({"event": event, "time": round(time.time(), 3), **values}) + "\n")
                self._file.flush()
            except OSError as error:
                raise ExportError(f"{self._path}: the log cannot be written: {error}") from error

    def say(self, text: str) -> None:
        """A line for whoever watches, and one in the log."""
        self.write("note", text=text)
        if self._show:
            say(text)

    def begin(self, stages: int, *, done: int) -> None:
        """Draw the bar."""
        self._started = time.perf_counter()
        self._bar = bar(total=stages, done=done, unit="stage", show=self._show)

    def doing(self, what: str, tokens: int = 0) -> None:
        """Show what is being worked on; ``tokens`` went through it since the last call."""
        self._tokens += tokens
        if self._bar is None:
            return
        rate = self._tokens / max(time.perf_counter() - self._started, 1e-9)
        memory = f"{peak_memory() / _GIB:.1f} GiB"
        if torch.cuda.is_available():
            memory += f" + {torch.cuda.max_memory_allocated() / _GIB:.1f} GiB on the GPU"
        self._bar.set_postfix_str(f"{what}, {rate:,.0f} tokens/s, {memory}", refresh=False)
        self._bar.refresh()

    def stage(self, unit: str, **values: Any) -> None:
        """A stage is finished."""
        self.write("stage", unit=unit, peak_memory=peak_memory(), **values)
        if self._bar is not None:
            self._bar.update()
