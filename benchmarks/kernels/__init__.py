"""``bench kernels``: each operation of a decode step, compared with the torch operators it replaces and the bandwidth."""
