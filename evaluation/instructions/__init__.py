"""Instructions whose following can be verified by a program, after IFEval (arXiv 2311.07911)."""
