"""Readers of recorded episodes. Each gives :class:`~vlaquant.families.observation.Observation` objects."""

from vlaquant.families.data.jsonl import load_jsonl
from vlaquant.families.data.lerobot import load_lerobot
from vlaquant.families.data.table import load_observations

__all__ = ["load_jsonl", "load_lerobot", "load_observations"]
