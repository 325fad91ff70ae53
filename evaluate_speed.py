#!/usr/bin/env python3
"""evaluation/evaluate_speed.py, from the repository's root too."""

import runpy
from pathlib import Path

if __name__ == "__main__":
    runpy.run_path(str(Path(__file__).parent / "evaluation" / "evaluate_speed.py"), run_name="__main__")
