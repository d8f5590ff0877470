"""The GGUF file holds our weights, as llama.cpp reads them."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from fastllama import LlamaConfig, LlamaForCausalLM
from fastllama.config import RopeParameters
from fastllama.loading.gguf_writer import write_gguf
from fastllama.quantization.linear import packed_modules

SHAPE = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512, "rms_norm_eps": 2e-5,
}  # fmt: skip
LLAMA3 = RopeParameters(
    "llama3", 10000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
)
NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "model.layers.": "blk.",
}  # fmt: skip


def random_llama(dtype: torch.dtype = torch.float32, **overrides) -> LlamaForCausalLM:
    """A tiny Llama with nothing in it that is zero or one."""
    model = LlamaForCausalLM(LlamaConfig(**(SHAPE | overrides)))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model.to(dtype).eval()


def gguf_name(key: str) -> str:
    """The GGUF name of a Hugging Face tensor."""
    for ours, theirs in NAMES.items():
        key = key.replace(ours, theirs)
    return key


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of a GGUF file, bfloat16 too, in which the package gives bytes."""
    tensors = {}
    for tensor in gguf.GGUFReader(path).tensors:
        values = torch.from_numpy(tensor.data.copy())
        tensors[tensor.name] = values.view(torch.bfloat16) if tensor.tensor_type.name == "BF16" else values
    return tensors


def halves_from_neighbours(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Row by row: of a head, the even rows first, then the odd ones."""
    size = weight.shape[0] // heads
    rows = [head * size + row for head in range(heads) for row in (*range(0, size, 2), *range(1, size, 2))]
    return torch.stack([weight[row] for row in rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_the_gguf_file_holds_every_weight_bit_for_bit(tmp_path: Path, dtype: torch.dtype, tied: bool) -> None:
    model = random_llama(dtype, tie_word_embeddings=tied, attention_bias=True, mlp_bias=True)
    write_gguf(model, tmp_path / "model.gguf")
    stored = read_tensors(tmp_path / "model.gguf")
    for key, parameter in model.named_parameters():
        tensor = stored.pop(gguf_name(key))
        if "q_proj" in key:
            tensor = halves_from_neighbours(tensor, 4)
        if "k_proj" in key:
            tensor = halves_from_neighbours(tensor, 2)
        assert tensor.dtype == (torch.float32 if parameter.dim() == 1 else dtype), key
        assert torch.equal(tensor.to(dtype), parameter), key
    assert stored == {}


def test_the_gguf_file_has_the_constants_of_the_network(tmp_path: Path) -> None:
    write_gguf(random_llama(rope=RopeParameters(rope_theta=1234.0)), tmp_path / "model.gguf")
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    found = {name: field.contents() for name, field in fields.items() if not name.startswith("GGUF.")}
    assert found == {
        "general.architecture": "llama",
        "general.file_type": 0,
        "llama.block_count": 2,
        "llama.context_length": 512,
        "llama.embedding_length": 32,
        "llama.feed_forward_length": 56,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 16,
        "llama.attention.value_length": 16,
        "llama.attention.layer_norm_rms_epsilon": pytest.approx(2e-5),
        "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 1234.0,
        "llama.vocab_size": 96,
        "tokenizer.ggml.model": "no_vocab",
    }


@pytest.mark.parametrize("rope", [LLAMA3, RopeParameters("linear", 10000.0, factor=4.0)], ids=["llama3", "linear"])
def test_rope_factors_slow_the_plain_frequencies_down_to_those_of_transformers(
    tmp_path: Path, rope: RopeParameters
) -> None:
    import transformers

    model = random_llama(torch.bfloat16, rope=rope)
    write_gguf(model, tmp_path / "model.gguf")
    factors = read_tensors(tmp_path / "model.gguf")["rope_freqs.weight"]
    plain = 10000.0 ** -(torch.arange(0, 16, 2) / 16)
    config = transformers.LlamaConfig(**model.config.to_dict())
    expected, _ = ROPE_INIT_FUNCTIONS[rope.rope_type](config, torch.device("cpu"))
    torch.testing.assert_close(plain / factors, expected)
    assert factors.max() > 1


@pytest.mark.parametrize(
    ("overrides", "dtype", "named"),
    [
        ({"hidden_act": "gelu"}, torch.float32, "gelu"),
        ({"rope": RopeParameters("dynamic", 10000.0, factor=2.0)}, torch.float32, "dynamic"),
        ({}, torch.float64, "float64"),
    ],
)
def test_what_llama_cpp_cannot_compute_is_refused_by_name(
    tmp_path: Path, overrides: dict, dtype: torch.dtype, named: str
) -> None:
    with pytest.raises(NotImplementedError, match=named):
        write_gguf(random_llama(dtype, **overrides), tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("scheme", "worst"), [("int8", 0.01), ("int4", 0.15)])
@pytest.mark.parametrize("tied", [False, True])
def test_quantized_weights_become_blocks_of_as_many_bits(scheme, worst, tied, tmp_path) -> None:
    torch.manual_seed(0)
    shape = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    config = LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "folder")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "folder", quantize=scheme)
    write_gguf(model, tmp_path / "model.gguf")
    read = LlamaForCausalLM.from_pretrained(tmp_path / "model.gguf", dtype="float32")
    assert read.config.tie_word_embeddings == tied
    for name, module in packed_modules(model).items():
        wanted = module.weight
        error = (read.get_submodule(name).weight - wanted).abs().max() / wanted.abs().max()
        assert error < (worst if module.bits == 4 or scheme == "int8" else 0.01), name
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert kinds["blk.0.attn_q.weight"] == {"int8": "Q8_0", "int4": "Q4_0"}[scheme]
    assert kinds["token_embd.weight"] == "Q8_0"
