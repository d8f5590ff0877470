"""What every Triton op refuses before it launches: another dtype, device, shape, stride or alignment than it takes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fastllama_kernels.attention import rotary
from fastllama_kernels.attention import triton as decode_attention
from fastllama_kernels.linear import rms_norm, silu_mul
from fastllama_kernels.linear import triton as gemv
from fastllama_kernels.sampling import ngrams
from fastllama_kernels.sampling import triton as sample

pytestmark = pytest.mark.triton


def ids(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.long)


# Of each op its function, and arguments that it takes; rows 2, tokens 1, 4 heads over 2 KV heads of 16, 8 slots.
TABLE, CACHE, PACKED = torch.randn(8, 16), torch.randn(2, 2, 8, 16), torch.randn(2, 1, 128)
OPS: dict[str, tuple[Callable[..., object], dict[str, torch.Tensor]]] = {
    "linear": (gemv.linear, {
        "x": torch.randn(2, 32), "weight": torch.randn(24, 32), "bias": torch.randn(24),
        "norm_weight": torch.randn(32), "residual": torch.randn(2, 24),
    }),
    "gate_up": (gemv.gate_up, {
        "x": torch.randn(2, 32), "weight": torch.randn(24, 32), "bias": torch.randn(24), "norm_weight": torch.randn(32),
    }),
    "rms_norm": (lambda **args: rms_norm.rms_norm(**args, eps=1e-5), {
        "x": torch.randn(2, 32), "weight": torch.randn(32),
    }),
    "ban_ngrams": (ngrams.ban_ngrams, {
        "logits_bv": torch.randn(2, 32), "tokens_bs": ids(2, 8), "size_b": ids(2), "position_b": ids(2),
    }),
    "silu_mul": (silu_mul.silu_mul, {"x": torch.randn(2, 32)}),
    "rotary_write": (rotary.rotary_write, {
        "qkv_btn": PACKED, "cos_sd": TABLE, "sin_sd": TABLE, "position_bt": ids(2, 1), "k_cache_bksd": CACHE,
        "v_cache_bksd": CACHE,
    }),
    "decode_attention": (decode_attention.decode_attention, {
        "q_bthd": torch.randn(2, 1, 4, 16), "position_bt": ids(2, 1), "k_cache_bksd": CACHE, "v_cache_bksd": CACHE,
        "start_b": ids(2),
    }),
    "rotary_attention": (decode_attention.rotary_attention, {
        "qkv_btn": PACKED, "cos_sd": TABLE, "sin_sd": TABLE, "position_bt": ids(2, 1), "k_cache_bksd": CACHE,
        "v_cache_bksd": CACHE, "arrived_p": torch.zeros(8, dtype=torch.int32),
    }),
    "sample": (sample.sample, {
        "logits_bv": torch.randn(2, 40), "temperature_b": torch.ones(2), "top_k_b": ids(2), "top_p_b": torch.ones(2),
        "min_p_b": torch.ones(2), "typical_p_b": torch.ones(2), "seed_b": ids(2), "position_b": ids(2),
    }),
}  # fmt: skip


def misaligned(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers, one element past an aligned address."""
    memory = tensor.new_empty(tensor.numel() + 1)
    memory[1:] = tensor.flatten()
    return memory[1:].view(tensor.shape)


CHANGES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "dtype": lambda tensor: tensor.to(torch.float64 if tensor.is_floating_point() else torch.int16),
    "device": lambda tensor: tensor.to("meta"),
    "dimensions": lambda tensor: tensor[..., None],
    "empty": lambda tensor: tensor[:0],
    "stride": lambda tensor: tensor.repeat_interleave(2, -1)[..., ::2],
    "alignment": misaligned,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(("name", "argument"), [(name, key) for name, (_, args) in OPS.items() for key in args])
def test_an_argument_that_an_op_would_misread_is_refused(name, argument, change) -> None:
    function, good = OPS[name]
    if change == "device" and len(good) == 1:
        pytest.skip("there is no other tensor whose device it should share")
    with pytest.raises(ValueError, match=r"expected|takes|call|convert"):
        function(**good | {argument: CHANGES[change](good[argument])})


@pytest.mark.parametrize("name", OPS)
def test_the_arguments_that_are_changed_here_are_good_ones(name, device) -> None:
    function, good = OPS[name]
    function(**{key: value.to(device, copy=True) for key, value in good.items()})


def test_more_tokens_than_slots_are_refused() -> None:
    q, cache = torch.randn(1, 5, 2, 16), torch.randn(1, 2, 4, 16)
    with pytest.raises(ValueError, match="5 query tokens a row, the cache has 4 slots"):
        decode_attention.decode_attention(q, ids(1, 5), cache, cache)
