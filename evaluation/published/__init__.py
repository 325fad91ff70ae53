"""Baselines as their papers publish them: CATS, TEAL and WINA, computed as masked dense products of decoded tokens."""
