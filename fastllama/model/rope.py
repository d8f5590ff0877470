"""Rotary position embedding: inverse frequencies of every rope type, and the cos/sin they give.

The frequencies equal those of transformers (``modeling_rope_utils.ROPE_INIT_FUNCTIONS``) to the last bit. By
type, with d the head dim and θ_i = rope_theta^(-2i/d):

- ``default`` (arXiv 2104.09864): θ_i.
- ``linear``: θ_i / factor, that is positions interpolated so much closer.
- ``dynamic`` (NTK): default up to max_position_embeddings; in a longer sequence rope_theta grows with its
  length.
- ``yarn`` (arXiv 2309.00071): linear for the slow dimensions, default for the fast ones, a ramp between; cos
  and sin are scaled by the attention factor.
- ``longrope`` (arXiv 2402.13753): θ_i / short_factor_i up to original_max_position_embeddings, in a longer
  sequence θ_i / long_factor_i; cos and sin are scaled by the attention factor.
- ``llama3`` (Llama 3.1): linear for wavelengths above original_max_position_embeddings / low_freq_factor,
  default for those below original_max_position_embeddings / high_freq_factor, smooth between.

So for ``dynamic`` and ``longrope`` the frequencies depend on the sequence length. Keys that were cached
before a threshold was passed keep the rotation they were given, as in transformers.

Shape suffixes: ``b`` batch, ``t`` tokens, ``d`` head dim.
"""

from __future__ import annotations

import math

import torch

from fastllama.config import LlamaConfig, RopeParameters

Device = torch.device | str | None
SeqLen = int | torch.Tensor | None


def static_length(config: LlamaConfig) -> int | None:
    """The longest sequence, in tokens, up to which the frequencies do not depend on its length; None: any."""
    if config.rope.rope_type == "dynamic":
        return config.max_position_embeddings
    if config.rope.rope_type == "longrope":
        return config.rope.original_max_position_embeddings
    return None


def inverse_frequencies(
    config: LlamaConfig, seq_len: SeqLen = None, device: Device = None
) -> tuple[torch.Tensor, float]:
    """Rotation per token of each pair of head dimensions, for a sequence of ``seq_len`` tokens.

    Args:
        config: gives the rope parameters, head_dim and max_position_embeddings.
        seq_len: length in tokens, read by ``dynamic`` and ``longrope`` alone; None means a short sequence. A
            tensor (0-dim, or one length per row ``[b]``) is not read on the host, so a compiled step can hold
            it.
        device: of the result.

    Returns:
        The inverse frequencies in radians per token, float32 ``[head_dim / 2]`` (``[b, head_dim / 2]`` for
        lengths per row), and the attention factor by which cos and sin are multiplied.
    """
    return _FREQUENCIES[config.rope.rope_type](config, seq_len, device)


def rotary_cos_sin(
    config: LlamaConfig, position_bt: torch.Tensor, seq_len: SeqLen = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of the rotation at given positions, as in transformers' ``LlamaRotaryEmbedding``.

    That module remembers the longest sequence it has seen and keeps ``dynamic`` frequencies of that length
    until a call stays below max_position_embeddings; this function remembers nothing. Pass the remembered
    length as ``seq_len`` where that matters.

    Args:
        config: gives the rope parameters, head_dim and max_position_embeddings.
        position_bt: integer positions ``[b, t]``, on the device of the result.
        seq_len: length in tokens that picks the frequencies, for the batch or (tensor ``[b]``) for each row;
            the largest position plus one when None.

    Returns:
        cos and sin, float32 ``[b, t, head_dim]``, the two halves of the last dimension equal, already
        multiplied by the attention factor.
    """
    if seq_len is None and static_length(config) is not None:
        seq_len = position_bt.max() + 1
    inv_freq, attention_factor = inverse_frequencies(config, seq_len, position_bt.device)
    return _cos_sin(position_bt, inv_freq, attention_factor)


def rope_tables(config: LlamaConfig, length: int, device: Device = None) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of positions 0 to ``length - 1``, for lookup by position.

    Returns:
        cos and sin, float32 ``[length, head_dim]``, as :func:`rotary_cos_sin` gives them.

    Raises:
        ValueError: if the frequencies are not the same for all sequences of up to ``length`` tokens: then no
            table can hold them.
    """
    limit = static_length(config)
    if limit is not None and length > limit:
        raise ValueError(
            f"rope_type {config.rope.rope_type!r} has no table of {length} positions: beyond {limit} its "
            "frequencies change with the sequence length; use rotary_cos_sin"
        )
    inv_freq, attention_factor = inverse_frequencies(config, None, device)
    return _cos_sin(torch.arange(length, device=device), inv_freq, attention_factor)


def _cos_sin(
    position: torch.Tensor, inv_freq: torch.Tensor, attention_factor: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of the angles of ``[..., t]`` positions, ``[..., t, head_dim]``."""
    angle = position[..., None].float() * inv_freq[..., None, :]
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos() * attention_factor, angle.sin() * attention_factor


def _exponents(config: LlamaConfig, device: Device) -> torch.Tensor:
    """2i / d for each pair i of dimensions."""
    return torch.arange(0, config.head_dim, 2, dtype=torch.int64, device=device).float() / config.head_dim


def _default(config: LlamaConfig, seq_len: SeqLen, device: Device) -> tuple[torch.Tensor, float]:
    return 1.0 / config.rope.rope_theta ** _exponents(config, device), 1.0


def _linear(config: LlamaConfig, seq_len: SeqLen, device: Device) -> tuple[torch.Tensor, float]:
    inv_freq, _ = _default(config, seq_len, device)
    return inv_freq / _required(config.rope, "factor"), 1.0


def _dynamic(config: LlamaConfig, seq_len: SeqLen, device: Device) -> tuple[torch.Tensor, float]:
    trained, d = config.max_position_embeddings, config.head_dim
    factor = _required(config.rope, "factor")

    def grown(length: int | torch.Tensor) -> torch.Tensor:
        stretch = (factor * length / trained) - (factor - 1)
        return 1.0 / (config.rope.rope_theta * stretch ** (d / (d - 2))) ** _exponents(config, device)

    if not isinstance(seq_len, torch.Tensor):
        return grown(max(seq_len or 0, trained)), 1.0
    length = seq_len[..., None]
    return torch.where(length > trained, grown(length.clamp(min=trained)), grown(trained)), 1.0


def _yarn(config: LlamaConfig, seq_len: SeqLen, device: Device) -> tuple[torch.Tensor, float]:
    rope, d = config.rope, config.head_dim
    original = int(_required(rope, "original_max_position_embeddings"))
    factor = config.max_position_embeddings / original if rope.factor is None else rope.factor
    wavelengths = rope.rope_theta ** _exponents(config, device)
    low, high = _yarn_ramp(rope, d, original)
    ramp = (torch.arange(d // 2, dtype=torch.float32, device=device) - low) / (high - low)
    keep = 1 - ramp.clamp(0, 1)
    return 1.0 / (factor * wavelengths) * (1 - keep) + 1.0 / wavelengths * keep, _yarn_scale(rope, factor)


def _yarn_ramp(rope: RopeParameters, d: int, original: int) -> tuple[float, float]:
    """The pairs of dimensions that turn beta_fast and beta_slow times over the original context."""

    def pair(turns: float) -> float:
        return d * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope.rope_theta))

    low, high = pair(rope.beta_fast or 32), pair(rope.beta_slow or 1)
    if rope.truncate is not False:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, d - 1)
    return low, high + 0.001 if low == high else high


def _yarn_scale(rope: RopeParameters, factor: float) -> float:
    """The attention factor: given, or 0.1 · mscale · ln(factor) + 1."""

    def scale(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return scale(rope.mscale) / scale(rope.mscale_all_dim)
    return scale(1.0)


def _longrope(config: LlamaConfig, seq_len: SeqLen, device: Device) -> tuple[torch.Tensor, float]:
    rope = config.rope
    original = int(_required(rope, "original_max_position_embeddings"))
    wavelengths = rope.rope_theta ** _exponents(config, device)
    short = 1.0 / (torch.tensor(rope.short_factor, dtype=torch.float32, device=device) * wavelengths)
    long = 1.0 / (torch.tensor(rope.long_factor, dtype=torch.float32, device=device) * wavelengths)
    if isinstance(seq_len, torch.Tensor):
        inv_freq = torch.where(seq_len[..., None] > original, long, short)
    else:
        inv_freq = long if (seq_len or 0) > original else short
    return inv_freq, _longrope_scale(config, original)


def _longrope_scale(config: LlamaConfig, original: int) -> float:
    """The attention factor: given, or sqrt(1 + ln(factor) / ln(original length))."""
    rope = config.rope
    factor = config.max_position_embeddings / original if rope.factor is None else rope.factor
    if rope.attention_factor is not None:
        return rope.attention_factor
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0


def _llama3(config: LlamaConfig, seq_len: SeqLen, device: Device) -> tuple[torch.Tensor, float]:
    inv_freq, _ = _default(config, seq_len, device)
    rope = config.rope
    original, factor = _required(rope, "original_max_position_embeddings"), _required(rope, "factor")
    low, high = _required(rope, "low_freq_factor"), _required(rope, "high_freq_factor")
    wavelength = 2 * math.pi / inv_freq
    scaled = torch.where(wavelength > original / low, inv_freq / factor, inv_freq)
    smooth = (original / wavelength - low) / (high - low)
    smoothed = (1 - smooth) * scaled / factor + smooth * scaled
    between = ~(wavelength < original / high) * ~(wavelength > original / low)
    return torch.where(between, smoothed, scaled), 1.0


def _required(rope: RopeParameters, name: str) -> float:
    value = getattr(rope, name)
    assert value is not None, f"LlamaConfig lets no {rope.rope_type} without {name} through"
    return value


_FREQUENCIES = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "longrope": _longrope,
    "llama3": _llama3,
}
