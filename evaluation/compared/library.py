"""llama.cpp's library, told not to print."""

from __future__ import annotations

import ctypes

import llama_cpp


@llama_cpp.llama_log_callback
def _silent(level, text, user_data) -> None:
    pass


def silence() -> None:
    """Keep llama.cpp from printing."""
    llama_cpp.llama_log_set(_silent, ctypes.c_void_p(0))
