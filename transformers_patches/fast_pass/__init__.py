"""One token through all layers in one native call, and its KV cache."""
