"""The online phase: load a part of the FFN neurons, compute a part of those, on installed transformers classes."""

VERSION = "0.1.0"
