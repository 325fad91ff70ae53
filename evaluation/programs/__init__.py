"""Runs programs that a model has written, each in a process of its own with limits."""
