"""Rope frequencies and cos/sin against transformers', exactly."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from fastllama.config import LlamaConfig
from fastllama.model.rope import inverse_frequencies, rope_tables, rotary_cos_sin, static_length

HEAD_DIM = 16
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.03 * i for i in range(HEAD_DIM // 2)],
    "long_factor": [1.5 + 2.0 * i for i in range(HEAD_DIM // 2)],
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
ROPES = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 3.7},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "dynamic by an odd factor": {"rope_type": "dynamic", "factor": 3.7},
    "yarn": YARN,
    "yarn without truncation": YARN | {"truncate": False},
    "yarn with betas": YARN | {"beta_fast": 16, "beta_slow": 2},
    "yarn with one beta for both": YARN | {"beta_fast": 2, "beta_slow": 2, "truncate": False},
    "yarn with mscale": YARN | {"mscale": 0.7, "mscale_all_dim": 1.2},
    "yarn with an attention factor": YARN | {"attention_factor": 0.9},
    "yarn with its factor from the lengths": YARN | {"factor": None},
    "yarn over the whole context": {"rope_type": "yarn", "factor": 2.0},
    "longrope": LONGROPE,
    "longrope with a factor": LONGROPE | {"factor": 5.0},
    "longrope with an attention factor": LONGROPE | {"attention_factor": 1.3},
    "llama3": LLAMA3,
    "llama3 with other factors": LLAMA3 | {"factor": 32.0, "low_freq_factor": 1.5, "high_freq_factor": 3.0},
}


V4 = int(transformers.__version__.split(".")[0]) < 5


def spelled(rope: dict, theta: float) -> dict:
    """Rope parameters as arguments of the installed transformers' config."""
    if not V4:
        return {"rope_parameters": {**rope, "rope_theta": theta}}
    if rope.get("rope_type") == "longrope" and "factor" in rope and "attention_factor" not in rope:
        pytest.skip("transformers 4 takes no factor of longrope where there is an original length")
    if "factor" in rope and rope["factor"] is None:
        pytest.skip("transformers 4 makes no factor of the lengths")
    original = (
        {"original_max_position_embeddings": rope["original_max_position_embeddings"]} if "short_factor" in rope else {}
    )
    return {"rope_scaling": None if rope["rope_type"] == "default" else dict(rope), "rope_theta": theta, **original}


def config_pair(rope: dict, theta: float = 10000.0, positions: int = 128):
    """Ours and transformers' config of the same tiny model."""
    hf = transformers.LlamaConfig(
        hidden_size=4 * HEAD_DIM,
        num_attention_heads=4,
        max_position_embeddings=positions,
        **spelled(rope, theta),
    )
    return LlamaConfig.from_hf(hf), hf


def remembers_lengths(hf) -> bool:
    """Whether transformers' module notes the length that it has grown to; versions 5.0 to 5.15 do not."""
    module = LlamaRotaryEmbedding(hf)
    module(torch.zeros(1), torch.arange(400)[None])
    return module.rope_type != "dynamic" or module.max_seq_len_cached == 400


@pytest.mark.parametrize("theta", [10000.0, 500000.0, 1234.5])
@pytest.mark.parametrize("name", ROPES)
@pytest.mark.parametrize("seq_len", [None, 1, 32, 33, 128, 129, 1000])
def test_frequencies_and_attention_factor_equal_transformers(name, theta, seq_len):
    ours, hf = config_pair(ROPES[name], theta)
    if ours.rope.rope_type == "default":
        module = LlamaRotaryEmbedding(hf)
        expected, factor = module.inv_freq, module.attention_scaling
    else:
        expected, factor = ROPE_INIT_FUNCTIONS[ours.rope.rope_type](hf, None, seq_len=seq_len)
    inv_freq, attention_factor = inverse_frequencies(ours, seq_len)
    assert inv_freq.dtype == torch.float32
    assert torch.equal(inv_freq, expected)
    assert attention_factor == factor


@pytest.mark.parametrize("head_dim", [4, 64, 128])
@pytest.mark.parametrize("rope_type", ["default", "dynamic", "yarn", "llama3"])
def test_frequencies_follow_the_head_dim_and_not_the_hidden_size(rope_type, head_dim):
    hf = transformers.LlamaConfig(
        hidden_size=96,
        num_attention_heads=4,
        head_dim=head_dim,
        **spelled(ROPES[rope_type], 1e4),
    )
    expected = LlamaRotaryEmbedding(hf).inv_freq
    assert torch.equal(inverse_frequencies(LlamaConfig.from_hf(hf))[0], expected)


@pytest.mark.parametrize("name", ROPES)
def test_cos_sin_equal_the_transformers_module_while_sequences_grow_and_start_over(name):
    ours, hf = config_pair(ROPES[name])
    module = LlamaRotaryEmbedding(hf)
    starts_over = remembers_lengths(hf)
    for first, last in [
        (0, 5),
        (5, 31),
        (31, 40),
        (40, 127),
        (127, 130),
        (130, 300),
        (0, 20),
        (0, 200),
        (200, 201),
    ]:
        position_bt = torch.stack([torch.arange(first, last), torch.arange(first, last) // 2])
        module = LlamaRotaryEmbedding(hf) if first == 0 and not starts_over else module
        expected = module(torch.zeros(1), position_bt)
        for got, want in zip(rotary_cos_sin(ours, position_bt), expected, strict=True):
            assert got.dtype == torch.float32
            assert torch.equal(got, want), (first, last)


def test_the_length_a_transformers_module_remembers_can_be_passed():
    ours, hf = config_pair(ROPES["dynamic"])
    if not remembers_lengths(hf):
        pytest.skip("this version of transformers does not remember the length")
    module = LlamaRotaryEmbedding(hf)
    module(torch.zeros(1), torch.arange(400)[None])
    position_bt = torch.arange(150)[None]  # shorter, but not so short that it is reset
    cos, _ = module(torch.zeros(1), position_bt)
    assert torch.equal(rotary_cos_sin(ours, position_bt, seq_len=torch.tensor(400))[0], cos)
    assert not torch.equal(rotary_cos_sin(ours, position_bt)[0], cos)


@pytest.mark.parametrize("name", ["dynamic", "longrope"])
def test_a_length_per_row_gives_each_row_what_it_gets_alone(name):
    ours, _ = config_pair(ROPES[name])
    lengths = [20, 100, 300]
    position_bt = torch.stack([torch.arange(n - 4, n) for n in lengths])
    together = rotary_cos_sin(ours, position_bt, seq_len=torch.tensor(lengths))
    for row, length in enumerate(lengths):
        alone = rotary_cos_sin(ours, position_bt[row : row + 1], seq_len=torch.tensor(length))
        assert torch.equal(together[0][row], alone[0][0])
        assert torch.equal(together[1][row], alone[1][0])


@pytest.mark.parametrize("name", ROPES)
def test_tables_hold_the_cos_and_sin_of_every_position(name):
    ours, _ = config_pair(ROPES[name])
    length = min(static_length(ours) or 300, 300)
    cos, sin = rope_tables(ours, length)
    assert cos.shape == sin.shape == (length, HEAD_DIM)
    expected = rotary_cos_sin(ours, torch.arange(length)[None])
    assert torch.equal(cos, expected[0][0])
    assert torch.equal(sin, expected[1][0])


@pytest.mark.parametrize(("name", "limit"), [("dynamic", 128), ("longrope", 32)])
def test_a_table_beyond_the_length_at_which_frequencies_change_is_refused(name, limit):
    ours, _ = config_pair(ROPES[name])
    assert static_length(ours) == limit
    with pytest.raises(ValueError, match=f"no table of {limit + 1} positions"):
        rope_tables(ours, limit + 1)


@pytest.mark.parametrize("name", ["default", "linear", "dynamic", "yarn", "longrope", "llama3"])
def test_frequencies_compile_into_one_graph_without_a_host_sync(name, fresh_dynamo):
    ours, _ = config_pair(ROPES[name])
    position_bt = torch.arange(120, 140)[None]
    compiled = torch.compile(lambda p: rotary_cos_sin(ours, p), fullgraph=True, backend="eager")
    for got, want in zip(compiled(position_bt), rotary_cos_sin(ours, position_bt), strict=True):
        assert torch.equal(got, want)


def test_the_last_positions_of_a_long_context_keep_float32_precision():
    ours, _ = config_pair(ROPES["llama3"], theta=500000.0)
    position_bt = torch.tensor([[131071]])
    inv_freq, _ = inverse_frequencies(ours)
    exact = (position_bt[..., None].double() * inv_freq.double()).cos()
    error = (rotary_cos_sin(ours, position_bt)[0][..., : HEAD_DIM // 2] - exact).abs().max()
    assert error <= 131072 * torch.finfo(torch.float32).eps  # one rounding of the largest angle
