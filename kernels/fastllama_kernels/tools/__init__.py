"""The kernels seen without running a model: machine code, a model of the step, tile sizes."""
