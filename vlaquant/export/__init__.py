"""Writing and reading packed checkpoints."""

from vlaquant.export.loading import load
from vlaquant.export.writing import write

__all__ = ["load", "write"]
