"""What a transformers model is made of, found by looking at its modules: for architectures without an entry in families.py."""
