"""A name to a model, and a model to files."""
