"""Linear layers, embeddings and output layers over plain or quantized weights."""
