"""Programmatic dependent launch: a kernel starts while the one before it still runs.

Launched with ``launch_pdl=True`` on an NVIDIA chip of compute capability 9.0 or later, a kernel may start as soon as
every program of the kernel before has said so or ended. It fetches what no kernel writes (weights) and then waits until
all that came before is done and visible. So the stream of weights does not pause between kernels.

Rules: let the next start first of all; before the wait read nothing but weights, and write nothing; every program
waits, or the kernel could be done before the one before it is, and the next one would rely on both. Elsewhere, and in
the interpreter, the constant ``PDL`` is False and all of this is nothing.
"""

import functools
import os

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda

MIN_CAPABILITY = (9, 0)
SWITCH = "FASTLLAMA_PDL"


@functools.cache
def used(device: torch.device, chip: tuple[int, int] | None = None) -> bool:
    """Whether a kernel is launched so: on this device, or where one is given, on a chip of this compute capability.

    Never where the environment variable ``FASTLLAMA_PDL`` is 0: to find out whether an error comes from these launches.
    """
    if os.environ.get(SWITCH) == "0":
        return False
    if chip is None:
        if device.type != "cuda" or torch.version.hip:
            return False
        chip = torch.cuda.get_device_capability(device)
    return chip >= MIN_CAPABILITY


@triton.jit
def let_next_start(PDL: tl.constexpr):
    """The next kernel may start from here on."""
    if PDL:
        cuda.gdc_launch_dependents()


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    """What earlier kernels wrote can be read, and what they read can be overwritten, from here on."""
    if PDL:
        cuda.gdc_wait()


@triton.jit
def prefetch(pointers, mask):
    """Bring the lines of memory that these point into to the L2 cache; nothing waits for them."""
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.b32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.b32 $0, 0; }",
        "=r,l,r",
        [pointers, mask.to(tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
