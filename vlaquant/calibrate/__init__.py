"""What the Linears of a model really read, measured while the caller runs real observations through it.

``probe`` runs one sample: which Linears run, in which order, who reads the same tensor, and which *units* (the blocks
that are calibrated one after the other) may answer from stored outputs once they are finished. ``StageRunner`` takes a
sample as far as one stage needs, with an ``ActivationCache`` for those outputs. ``observe`` collects statistics
meanwhile.

Only ``nn.Linear`` modules and units are watched, because hooks on decoder layers never fire in policies that call their
layers by hand; and the model is left as it was found.
"""

from vlaquant.calibrate.cache import ActivationCache
from vlaquant.calibrate.flow import Flow
from vlaquant.calibrate.observation import Observation, observe
from vlaquant.calibrate.probing import ProbeResult, probe
from vlaquant.calibrate.running import StageRunner
from vlaquant.calibrate.statistics import ActStats
from vlaquant.calibrate.units import Stage, find_units

__all__ = [
    "ActStats",
    "ActivationCache",
    "Flow",
    "Observation",
    "ProbeResult",
    "Stage",
    "StageRunner",
    "find_units",
    "observe",
    "probe",
]
