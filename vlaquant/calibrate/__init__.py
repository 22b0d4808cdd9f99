"""What the Linears of a model really read, measured while the caller runs real observations through it.

``probe`` runs one sample and says which Linears run, in which order and who reads the same tensor. ``observe``
collects statistics over many samples. Both hook ``nn.Linear`` modules only, because layer-level hooks never fire in
policies that call their layers by hand, and both leave the model as they found it.

Staged calibration (one block at a time, earlier blocks already quantized) plugs in here by calling ``observe`` once a
stage with that stage's share of ``ProbeResult.order`` as ``names``.
"""

from vlaquant.calibrate.observation import Observation, observe
from vlaquant.calibrate.probing import ProbeResult, probe
from vlaquant.calibrate.statistics import ActStats

__all__ = ["ActStats", "Observation", "ProbeResult", "observe", "probe"]
