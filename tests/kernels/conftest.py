"""What the kernels' tests share: a device, a bound on errors, random operands with poison around them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # without a GPU, Triton's interpreter runs the kernels


@pytest.fixture(scope="session")
def device() -> str:
    """Where Triton's kernels run."""
    return DEVICE


@pytest.fixture(scope="session")
def assert_as_exact() -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]:
    """Asserts that an error against float64 is at most one rounding of the result, or twice torch's where that is more.

    The one bound of every kernel, on a CPU and on a GPU. One rounding to nearest is half an epsilon of the result;
    before it come float32 sums, a few epsilons of float32. Torch's operators round more often (norm, product, bias and
    residual each for itself), and where a kernel reads what torch rounded too (keys in the cache), it errs likewise.
    """

    def check(ours: torch.Tensor, torchs: torch.Tensor, exact: torch.Tensor) -> None:
        assert ours.dtype == torchs.dtype
        assert ours.shape == torchs.shape == exact.shape
        unit = torch.finfo(ours.dtype).eps / 2 + 16 * torch.finfo(torch.float32).eps
        rounding = unit * exact.abs().max().clamp(min=1)  # operands are of unit size
        bound = (2 * (torchs.double() - exact).abs().max()).clamp(min=rounding)
        assert (ours.double() - exact).abs().max() <= bound

    return check


@pytest.fixture(scope="session")
def assert_same_keys() -> Callable[[torch.Tensor, torch.Tensor], None]:
    """Asserts that keys or values in a cache, of unit size, differ by no more than one rounding of each of the two."""

    def check(ours: torch.Tensor, torchs: torch.Tensor) -> None:
        unit = torch.finfo(ours.dtype).eps + 16 * torch.finfo(torch.float32).eps
        assert (ours.double() - torchs.double()).abs().max() <= unit * torchs.double().abs().max().clamp(min=1)

    return check


@pytest.fixture
def triton_on_cpu() -> Iterator[None]:
    """The operations that are there for GPUs alone run in the interpreter, on tensors of the CPU."""
    from fastllama_kernels.attention import rotary
    from fastllama_kernels.attention import triton as decode_attention
    from fastllama_kernels.linear import rms_norm, silu_mul
    from fastllama_kernels.sampling import ngrams

    functions = {
        "rms_norm": rms_norm.rms_norm,
        "silu_mul": silu_mul.silu_mul,
        "ban_ngrams": ngrams.ban_ngrams,
        "rotary_write": rotary.rotary_write,
        "rotary_attention_split": decode_attention.rotary_attention,
    }
    with torch.library._scoped_library("fastllama", "IMPL") as library:
        for name, function in functions.items():
            library.impl(name, function, "CPU")
        yield


@pytest.fixture(scope="session", autouse=True)
def rounding_to_nearest() -> Iterator[None]:
    """The interpreter cuts off the bits that bfloat16 has not; hardware rounds to nearest even. So do tests."""
    if DEVICE == "cuda":
        yield
        return
    from triton.runtime import interpreter

    genuine = interpreter._convert_float

    def rounded(values, source, target, mode):
        if source.is_fp32() and target.is_bf16():
            return torch.from_numpy(np.ascontiguousarray(values)).bfloat16().view(torch.uint16).numpy()
        return genuine(values, source, target, mode)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_convert_float", rounded)
        yield
