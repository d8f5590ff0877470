"""The operations of a decode step, one a file: formula, reference, and the kernels that implement it."""
