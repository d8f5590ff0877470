"""``bench kernels``: each operation of a decode step, what it replaces, and the memory's bandwidth."""
