"""The offline phase: which FFN neurons matter for a task. `python -m profiler --help` lists the commands."""
