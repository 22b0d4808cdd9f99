"""Two chains: each sample goes through the model as it was, and through the model as quantized as it is by now.

A quantizer that corrects for inputs that earlier quantized layers changed has to see both inputs of a stage, each taken
through the stage's own float weights. Finished units answer from the outputs that the float chain stored before they
were quantized. Their float weights are gone, so a unit that has to run again once it is finished cannot be part of it.

Embeddings and banks are packed before the first stage and are the same in both chains.
"""

from vlaquant.calibrate.flow import Flow
from vlaquant.calibrate.running import Mode
from vlaquant.errors import PlanError
from vlaquant.plan import Plan

#: Name of the float chain's outputs in the cache, in front of the unit's.
FLOAT_CHAIN = "float chain: "


def require_float_chain(flow: Flow, plan: Plan, mode: Mode) -> None:
    """Refuse a run whose float chain would meet quantized units.

    Raises:
        PlanError: names the first unit that is quantized and then runs again for a later stage.
    """
    observed = [
        index
        for index, stage in enumerate(flow.stages)
        if any(name in plan.quantized and not plan.quantized[name].dead for name in stage.linears)
    ]
    for index in observed[:-1]:
        unit = flow.stages[index].unit
        if mode == "replay" and unit in flow.replayable:
            continue
        if mode == "rerun":
            why, advice = "in mode rerun every block runs again", "use the mode replay, or the quantizer gptq"
        else:
            why, advice = flow.reasons[unit], "keep it in float with a rule, or use the quantizer gptq"
        raise PlanError(
            f"{unit}: the quantizer gptaq needs what later layers read in the float model, but this block runs again "
            f"for them and is quantized by then ({why}); {advice}"
        )
