"""The operations of a decode step, one a file: formula, reference, and the kernels that implement it."""

from fastllama_kernels.common.folders import use_writable_inductor_cache

use_writable_inductor_cache()  # before anything in this package makes torch look for it
