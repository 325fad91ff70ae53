"""Evaluation: lm-eval tasks, perplexity and reports, every method through the path that it decodes with."""
