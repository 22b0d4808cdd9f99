"""What a recipe does to a model: every weight has a verdict and a reason before any work is done."""

from vlaquant.plan.making import legal_groups, make_plan, packed_bytes
from vlaquant.plan.verdicts import (
    MIXED,
    LayerPlan,
    OtherTensor,
    Plan,
    TablePlan,
    plan_from_dict,
    with_dead,
    without,
)

__all__ = [
    "MIXED",
    "LayerPlan",
    "OtherTensor",
    "Plan",
    "TablePlan",
    "legal_groups",
    "make_plan",
    "packed_bytes",
    "plan_from_dict",
    "with_dead",
    "without",
]
