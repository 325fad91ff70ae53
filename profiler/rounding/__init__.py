"""Rounding weights to few bits by what that does to a layer's output on texts, not weight by weight."""
