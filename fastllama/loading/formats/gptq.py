"""GPTQ and AWQ: 2-, 4- and 8-bit codes in words of 32 bits, with a scale and a zero point a group.

Layouts: GPTQModel's ``nn_modules/qlinear/__init__.py`` and ``utils/model.py``; AutoAWQ's ``modules/linear/gemm.py``,
``gemv.py`` and ``utils/packing_utils.py``.

    GPTQ       qweight [k · bits / 32, n], along k    qzeros [g, n · bits / 32]   scales [g, n]   g_idx [k]
    AWQ gemm   qweight [k, n · bits / 32], along n    qzeros likewise             scales [g, n]   both in AWQ_ORDER
    AWQ gemv   qweight [n, k · bits / 32], along k    qzeros [n, words]           scales [n, >= g]

All stand for scale · (code - zero).
"""

from __future__ import annotations

import math

import torch

from fastllama.config.quantization import Scheme
from fastllama.loading.coded import CodedTensor, Codes, unpacked_words
from fastllama.loading.formats.parts import FLOATS, Parts
from fastllama.loading.stored import Stored

GPTQ_BITS, AWQ_BITS = (2, 4, 8), (4,)
AWQ_ORDER = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])  # the place in a word of each of 8 columns
REFUSED = ("gemv_fast", "llm-awq", "marlin", "gptq_p", "exllama")
GPTQ_ORDERS = ("", "gptq", "gptq_v2")
GEMV_GROUPS = {128: 1, 64: 2, 32: 4}  # columns of a group, and words of which its zero points take a multiple


def tensor(parts: Parts) -> Stored:
    """A matrix of GPTQ or AWQ; its shapes say of which.

    Raises:
        CheckpointError: it is damaged, contradicts the config, or lies in an order that is not read.
    """
    declared = parts.declared
    order = str(declared.get("checkpoint_format", "format", "version", default="")).lower()
    if parts.dtype("qweight") != "I32" or order in REFUSED or declared.get("is_marlin_format"):
        raise parts.error(
            f"its codes are in an order for GPUs ({order or parts.dtype('qweight')}), which is not read; "
            "load a checkpoint in the format 'gptq' or AWQ's 'gemm'"
        )
    rows, columns = parts.shape("qweight")
    if parts.shape("scales")[0] == rows and declared.method != "gptq":
        return _awq_gemv(parts, rows)
    if parts.shape("scales")[-1] == columns:
        return _gptq(parts, columns, order)
    return _awq_gemm(parts, rows)


def _bits(parts: Parts, allowed: tuple[int, ...], stored: int | None) -> int:
    """Bits of a code: what the config says, which those that the tensors have do not contradict."""
    override = parts.declared.override(parts.module)
    bits = (override or {}).get("bits") or parts.declared.get("bits", "w_bit", default=stored or 4)
    if bits != stored and stored in allowed:
        raise parts.error(f"its codes have {stored} bits, but the config's bits is {bits!r}; correct the config")
    if bits not in allowed:
        raise parts.error(f"codes of {bits!r} bits are not read; expected {' or '.join(map(str, allowed))}")
    return bits


def _group(parts: Parts, columns: int, groups: int) -> int:
    """Columns of a group, which the config does not contradict."""
    override = parts.declared.override(parts.module)
    size = (override or {}).get("group_size") or parts.declared.get("group_size", "q_group_size")
    if columns % groups:
        raise parts.error(f"scales of {groups} groups do not fit {columns} columns")
    if size is not None and size not in (columns // groups, -1 if groups == 1 else None):
        found = columns // groups
        raise parts.error(f"its groups have {found} columns, but the config's group_size is {size!r}; correct it")
    return columns // groups


def _gptq(parts: Parts, n: int, order: str) -> CodedTensor:
    parts.check_method("gptq", "auto-round")
    if order not in GPTQ_ORDERS:
        raise parts.error(f"checkpoint_format is {order!r}; expected 'gptq' or 'gptq_v2'")
    has_zeros, stored = "qzeros" in parts and parts.shape("qzeros") != (0,), None
    if has_zeros:
        stored = parts.shape("qzeros")[-1] * 32 // n
    elif "g_idx" in parts:
        stored = parts.shape("qweight")[0] * 32 // max(1, parts.shape("g_idx")[0])
    bits = _bits(parts, GPTQ_BITS, stored)
    k, groups = parts.shape("qweight")[0] * 32 // bits, parts.shape("scales")[0]
    parts.check("qweight", (k * bits // 32, n), ("I32",))
    parts.check("scales", (groups, n), FLOATS)
    is_symmetric = (parts.declared.override(parts.module) or {}).get("sym", parts.declared.get("sym", default=False))
    if not isinstance(is_symmetric, bool):
        raise parts.error(f"sym is {is_symmetric!r}; expected true or false")
    if not is_symmetric or has_zeros:
        parts.check("qzeros", (groups, n * bits // 32), ("I32",))
    group_k = _columns_out_of_order(parts, k, groups)
    if group_k is None:
        _group(parts, k, groups)

    def read() -> Codes:
        code_nk = unpacked_words(parts.whole("qweight"), bits, 0).T.contiguous()
        if is_symmetric and has_zeros:
            _say_zeros_that_are_not_read(parts, bits)
        zero_ng = 2.0 ** (bits - 1) if is_symmetric else _gptq_zeros(parts, bits, order).T.contiguous()
        return Codes.around(code_nk, parts.whole("scales").T.contiguous(), zero_ng, group_k)

    return _coded(parts, "GPTQ", (n, k), groups, bits, is_symmetric, group_k is None, read)


def _columns_out_of_order(parts: Parts, k: int, groups: int) -> torch.Tensor | None:
    """The group of each column where columns of a group do not lie next to each other; else None."""
    if "g_idx" not in parts:
        if parts.declared.get("desc_act") and groups > 1 and not parts.declared.get("static_groups"):
            raise parts.error("g_idx is missing, and desc_act is true")
        return None
    parts.check("g_idx", (k,), ("I32", "I64"))
    group_k = parts.whole("g_idx").long()
    if group_k.min() < 0 or group_k.max() >= groups:
        raise parts.error(f"g_idx names groups from {group_k.min()} to {group_k.max()}, there are {groups}")
    return None if k % groups == 0 and torch.equal(group_k, torch.arange(k) // (k // groups)) else group_k


def _say_zeros_that_are_not_read(parts: Parts, bits: int) -> None:
    """Warn where ``sym`` is true and zero points are neither version's 2^(bits - 1)."""
    stored, middle = unpacked_words(parts.whole("qzeros"), bits, 1), 2 ** (bits - 1)
    if not bool(((stored == middle) | (stored == middle - 1)).all()):
        parts.warn(f"its zero points are not read, as the config says sym; {middle} is taken")


def _gptq_zeros(parts: Parts, bits: int, order: str) -> torch.Tensor:
    """The zero points ``[g, n]``: stored as they are in version 2, less 1 in version 1.

    GPTQModel takes 1 from whole words, so that a field that was 0 borrows from its neighbour; others from each field.
    Without a config nothing says which version it is.
    """
    words, middle = parts.whole("qzeros"), 2 ** (bits - 1)
    if order == "gptq_v2" or (not order and bool((unpacked_words(words, bits, 1) == middle).all())):
        return unpacked_words(words, bits, 1).float()  # symmetric codes are written so in version 2 alone
    if parts.declared.method is None:
        parts.warn(
            "no config says whether its zero points are stored less 1 (GPTQ's version 1) or as they are (version 2); "
            "version 1 is assumed. If that is wrong, put quant_method 'gptq' and checkpoint_format 'gptq_v2' into "
            "config.json's quantization_config"
        )
    meta = parts.declared.get("meta")
    quantizer = meta.get("quantizer", "") if isinstance(meta, dict) else ""
    if str(quantizer[0] if isinstance(quantizer, list) and quantizer else quantizer).startswith("gptqmodel"):
        ones = sum(1 << shift for shift in range(0, 32, bits))
        return unpacked_words(words + (ones - (1 << 32) * (ones >> 31)), bits, 1).float()
    stored = unpacked_words(words, bits, 1)
    if bool((stored == 2**bits - 1).any()):
        parts.warn(
            f"zero points of {2**bits - 1} before 1 is added, which readers of GPTQ understand differently; taken as 0"
        )
    return ((stored.int() + 1) & (2**bits - 1)).float()


def _awq_gemm(parts: Parts, k: int) -> CodedTensor:
    parts.check_method("awq", "auto-round")
    groups, n = parts.shape("scales")
    bits = _bits(parts, AWQ_BITS, parts.shape("qweight")[1] * 32 // n)
    parts.check("qweight", (k, n * bits // 32), ("I32",))
    parts.check("scales", (groups, n), FLOATS)
    _group(parts, k, groups)
    has_zeros = bool(parts.declared.get("zero_point", default="qzeros" in parts))
    if has_zeros:
        parts.check("qzeros", (groups, n * bits // 32), ("I32",))

    def read() -> Codes:
        code_nk = unpacked_words(parts.whole("qweight"), bits, 1, AWQ_ORDER).T.contiguous()
        zero_ng = unpacked_words(parts.whole("qzeros"), bits, 1, AWQ_ORDER).T.float() if has_zeros else 8.0
        return Codes.around(code_nk, parts.whole("scales").T.contiguous(), zero_ng, None)

    return _coded(parts, "AWQ", (n, k), groups, bits, not has_zeros, True, read)


def _awq_gemv(parts: Parts, n: int) -> CodedTensor:
    parts.check_method("awq")
    bits = _bits(parts, AWQ_BITS, None)
    k, words = parts.shape("qweight")[1] * 32 // bits, parts.shape("qzeros")[1]
    parts.check("scales", (n, words * 8), FLOATS)
    parts.check("qzeros", (n, words), ("I32",))
    fitting = [group for group in (*GEMV_GROUPS, k) if k % group == 0 and _gemv_words(k // group, group) == words]
    group = parts.declared.get("group_size", "q_group_size", default=fitting[0] if fitting else None)
    group = k if group == -1 else group
    if group not in fitting:
        sizes = " or ".join(map(str, fitting)) or "no size"
        raise parts.error(
            f"qzeros of {words} words a row fit {k} columns in groups of {sizes}, "
            f"and the config's group_size is {group!r}"
        )
    groups = k // group

    def read() -> Codes:
        zero_ng = unpacked_words(parts.whole("qzeros"), bits, 1)[:, :groups].float()
        scale_ng = parts.whole("scales")[:, :groups]
        return Codes.around(unpacked_words(parts.whole("qweight"), bits, 1), scale_ng, zero_ng, None)

    return _coded(parts, "AWQ gemv", (n, k), groups, bits, False, True, read)


def _gemv_words(groups: int, group: int) -> int:
    """Words that AutoAWQ gives the zero points of a row."""
    step = GEMV_GROUPS.get(group, 1)
    return math.ceil(groups / (8 * step)) * step


def _coded(parts, name, shape, groups, bits, is_symmetric, is_in_order, read) -> CodedTensor:
    # 2-bit codes take the place of 4-bit ones, whose middle is another.
    scheme = Scheme(max(4, bits), shape[1] // groups, not is_symmetric or bits == 2) if is_in_order else None
    return CodedTensor(shape, f"{name} with {bits} bits", parts.natural_dtype("scales"), scheme, read)
