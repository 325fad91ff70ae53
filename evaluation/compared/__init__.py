"""llama.cpp's types of the same weights: which there are, their files, and their loss."""
