"""How fast this machine runs packed layers and whole policies, and how fast it could.

Timings are wall time unless CPU time is asked for. Paths that are compared run in turn in one process, so that they
share the machine's mood; the median of the rounds counts.
"""
