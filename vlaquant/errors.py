"""Everything vlaquant raises on purpose.

A message says where, what was found, what was wanted and what to do next.

    VlaquantError
    ├── RecipeError        the recipe itself: unknown key, unknown scheme, wrong type
    ├── CheckpointError    a model directory that cannot be read: missing, truncated, pickled, NaN weights
    ├── PlanError          recipe and model do not fit: a rule that matches nothing, a group that does not divide
    ├── CalibrationError   the data: none, NaN activations, a layer that saw no token, a policy that ignores its image
    ├── ExportError        writing: the output exists, the disk is full, the written file differs from the model
    ├── PackedWeightError  somebody computes with ``linear.weight`` of a packed layer
    ├── EvaluationError    measuring: no simulator, policies that cannot be compared
    └── GateError          the written model misses what the recipe requires
"""


class VlaquantError(Exception):
    """Base of all errors that a user can cause and mend."""


class RecipeError(VlaquantError):
    """The recipe is not valid, whatever the model."""


class CheckpointError(VlaquantError):
    """A model directory cannot be read."""


class PlanError(VlaquantError):
    """The recipe does not fit this model."""


class CalibrationError(VlaquantError):
    """The calibration data, or what the model made of them, cannot be used."""


class ExportError(VlaquantError):
    """The result could not be written, or does not read back as it was written."""


class PackedWeightError(VlaquantError):
    """A packed weight was used as if it were a float tensor."""


class EvaluationError(VlaquantError):
    """A measurement cannot be made."""


class GateError(VlaquantError):
    """The written model misses what the recipe requires of it; it was set aside."""
