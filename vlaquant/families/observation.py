"""What a policy is shown: one recorded moment of a robot's episode, whatever family the policy is of."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vlaquant.errors import CalibrationError


@dataclass(frozen=True, slots=True, eq=False)
class Observation:
    """One recorded moment: what the cameras saw, what was asked for, and what the demonstrator did.

    Attributes:
        images: one for each camera, in the order of the policy's cameras; None where a camera is missing.
        instruction: in words.
        state: of the robot's joints, [state dimension]; None where it was not recorded.
        action: [action dimension] or [chunk, action dimension], in the units of the robot; None where it was not
            recorded.
        episode: its number.
        task: its name.
        unnorm_key: dataset whose statistics apply to state and action; None where the checkpoint knows only one.
    """

    images: tuple[Image.Image | None, ...]
    instruction: str
    state: NDArray[np.float64] | None = None
    action: NDArray[np.float64] | None = None
    episode: int = 0
    task: str = ""
    unnorm_key: str | None = None

    @property
    def image(self) -> Image.Image:
        """The first image.

        Raises:
            CalibrationError: the first camera is missing.
        """
        first = self.images[0] if self.images else None
        if first is None:
            raise CalibrationError(
                f"episode {self.episode}, {self.instruction!r}: the first camera has no image, and this policy needs it"
            )
        return first
