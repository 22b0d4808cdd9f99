"""Single frames of a video file, by PyAV."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from vlaquant.errors import CalibrationError


def read_frames(path: Path, times: Sequence[float], *, tolerance: float) -> list[Image.Image]:
    """The frames that are shown at ``times``, RGB.

    Args:
        path: of a video file.
        times: in seconds from the start of the file.
        tolerance: how far a frame's time may be away, in seconds; half the distance of two frames finds each of them.

    Raises:
        CalibrationError: no such file, PyAV is missing, the file is damaged or ends before a time.
    """
    if not path.is_file():
        raise CalibrationError(f"{path}: no such video file; name the cameras that are recorded under 'cameras'")
    av = _import_av(path)
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise CalibrationError(f"{path}: holds no video")
            return [_frame(path, container, time, tolerance) for time in times]
    except av.error.FFmpegError as error:
        raise CalibrationError(f"{path}: cannot be decoded: {error}") from error


def _import_av(path: Path) -> Any:
    try:
        import av
        import av.error
    except ImportError as error:
        raise CalibrationError(
            f"{path}: reading video needs PyAV; install it with: pip install 'vlaquant[video]'"
        ) from error
    return av


def _frame(path: Path, container: Any, time: float, tolerance: float) -> Image.Image:
    """Decode from the key frame before ``time`` on."""
    stream = container.streams.video[0]
    container.seek(max(int((time - tolerance) / stream.time_base), 0), stream=stream, backward=True)
    last = None
    for frame in container.decode(stream):
        last = frame.time
        if last is not None and last >= time - tolerance:
            break
    if last is None or abs(last - time) > tolerance:
        nearest = "there is none" if last is None else f"the nearest is at {last:.3f} s"
        raise CalibrationError(f"{path}: no frame at {time:.3f} s ({nearest}); the video and the table do not agree")
    image: Image.Image = frame.to_image()
    return image
