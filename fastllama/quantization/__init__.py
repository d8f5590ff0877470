"""A weight is an object: its tensors, its bytes, and what multiplies with it."""
