"""Stands in for LeRobot where that is not installed: as much of it as vlaquant calls, over the look-alikes."""
