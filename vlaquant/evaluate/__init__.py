"""Measuring a quantized checkpoint against its float original: bytes, latency, error, closed-loop success."""
