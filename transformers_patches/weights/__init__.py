"""Where weights come from and how they lie there: safetensors folders, GGUF files, packs."""
