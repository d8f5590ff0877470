"""Refuses tensors that a kernel would misread, before it is launched: what was got, what was expected."""

from collections.abc import Sequence

import torch

from fastllama_kernels.common.activations import FUNCTIONS

ALIGNMENT = 16  # bytes
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check(
    name: str,
    tensor: torch.Tensor,
    like: torch.Tensor,
    shape: Sequence[int | None] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Check one argument of a kernel.

    Args:
        name: of the argument.
        tensor: the argument.
        like: another argument, whose device it must share, and whose dtype unless another is given.
        shape: expected sizes; None stands for any.
        dtype: expected, where it is not that of ``like``.

    Raises:
        ValueError: it is on another device, of another dtype or shape, empty, strided, or not aligned to 16 bytes.
    """
    expected = dtype or like.dtype
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}, expected {like.device} like the other tensors")
    if tensor.dtype != expected:
        raise ValueError(f"{name} is {tensor.dtype}, expected {expected}; convert it with .to()")
    if shape is not None:
        fits = tensor.dim() == len(shape) and all(
            want in (None, got) for got, want in zip(tensor.shape, shape, strict=False)
        )
        if not fits:
            wanted = ", ".join("any" if size is None else str(size) for size in shape)
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected ({wanted})")
    if not tensor.dim() or not tensor.numel():
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected at least one dimension and no empty one")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} has strides {tensor.stride()}, expected a contiguous tensor; call .contiguous()")
    if not tensor.is_meta and tensor.data_ptr() % ALIGNMENT:
        raise ValueError(f"{name} starts at an address that is no multiple of {ALIGNMENT} bytes; call .clone()")


def check_dtype(name: str, tensor: torch.Tensor) -> None:
    """Raise ValueError unless the tensor is of a dtype that the kernels compute in."""
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{name} is {tensor.dtype}, expected float32, bfloat16 or float16")


def check_activation(number: int) -> None:
    """Raise ValueError unless there is an activation of this number."""
    if number not in FUNCTIONS:
        raise ValueError(f"activation is number {number}, expected 0 to {max(FUNCTIONS)}")
