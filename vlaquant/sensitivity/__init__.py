"""What rounding a group of layers does to the action, and the mixture of schemes that does least under a budget.

``sensitivity`` scans: every group of layers × every candidate scheme, measured or estimated. ``mix`` chooses, and
``with_rules`` writes the choice into a recipe.
"""

from vlaquant.sensitivity.mixing import Mixture, mix, with_rules
from vlaquant.sensitivity.scan import Method, Scan, sensitivity, write_scan

__all__ = ["Method", "Mixture", "Scan", "mix", "sensitivity", "with_rules", "write_scan"]
