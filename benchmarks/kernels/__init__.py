"""``bench kernels``: each operation of a decode step, beside torch's."""
