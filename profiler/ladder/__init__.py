"""Makes byte ladders: what decoded tokens may leave out of all decoder layers, and what that costs (docs/whole_model.md)."""
