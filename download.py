#!/usr/bin/env python3
"""downloads/command.py, from the repository's root."""

from downloads.command import main, run

__all__ = ["main"]

if __name__ == "__main__":
    run()
