"""What is loaded and what is computed, decided before a weight is read."""
