"""Staged quantization: one unit of the model at a time, bounded in memory, resumable, on one or several processes."""
