"""The parts of evaluate_speed.py: engines, each in its own process, measured in turn, and the rows of the result."""
