"""Matrix products on the tensor cores."""

import triton
import triton.language as tl
from triton import knobs

# The interpreter multiplies the bits of bfloat16 numbers as if they were integers.
INTERPRETED = tl.constexpr(knobs.runtime.interpret)


@triton.jit
def dot(a, b, acc):
    """``acc + a @ b`` with float32 sums; float32 operands are multiplied as such, not in TF32."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")
