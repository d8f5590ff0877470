"""GGUF files: every type of block, names, orders of rows and rope factors, against transformers; damaged files."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers

from fastllama import LlamaConfig, LlamaForCausalLM
from fastllama.config import RopeParameters
from fastllama.loading.gguf import READ_TYPES, read_gguf
from fastllama.loading.gguf_writer import write_gguf
from fastllama.loading.names import resolve
from fastllama.loading.stored import CheckpointError

SHAPE: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.1,
}  # fmt: skip
IDS = torch.tensor([[1, 17, 5, 60, 33, 3]])
#: Where in a block the 16-bit scales are, of the types that the gguf package reads and does not write.
SCALES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}


def model_of(**fields: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE | fields)).eval()


def blocks_of(values: np.ndarray, kind: str, draw: np.random.Generator) -> np.ndarray:
    """The values as blocks of a type; random blocks with small scales of those that nothing writes."""
    ggml_type = gguf.GGMLQuantizationType[kind]
    if kind not in SCALES:
        return gguf.quants.quantize(values, ggml_type)
    _, size = gguf.GGML_QUANT_SIZES[ggml_type]
    blocks = draw.integers(0, 256, (values.size // 256, size), dtype=np.uint8)
    for offset in SCALES[kind]:
        blocks[:, offset : offset + 2] = np.full((len(blocks), 1), 0.001, np.float16).view(np.uint8)
    return blocks.reshape(values.shape[0], -1)


def requantized(source: Path, target: Path, kind: str) -> Path:
    """A GGUF file with the same values and its matrices in another type."""
    reader, draw = gguf.GGUFReader(source), np.random.default_rng(0)
    writer = gguf.GGUFWriter(target, "llama")
    for name, field in reader.fields.items():
        if name.startswith(("llama.", "tokenizer.")):
            writer.add_key_value(name, field.contents(), field.types[0])
    for tensor in reader.tensors:
        if len(tensor.shape) == 1:
            writer.add_tensor(tensor.name, tensor.data)
        else:
            blocks = blocks_of(np.array(tensor.data, np.float32), kind, draw)
            writer.add_tensor(tensor.name, blocks, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def agree(ours: LlamaForCausalLM, theirs: Any) -> None:
    with torch.no_grad():
        got, want = ours(IDS).logits, theirs(IDS).logits
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    greedy = {"max_new_tokens": 8, "eos_token_id": None, "do_sample": False}
    assert ours.generate(IDS, **greedy).tolist() == theirs.generate(IDS, **greedy).tolist()


@pytest.mark.parametrize("kind", [kind for kind in READ_TYPES if kind != "F64"])
def test_every_type_of_block_gives_the_logits_of_transformers(kind, tmp_path):
    write_gguf(model_of(), tmp_path / "plain.gguf")
    file = requantized(tmp_path / "plain.gguf", tmp_path / "model.gguf", kind)
    ours = LlamaForCausalLM.from_pretrained(file, dtype="float32")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32)
    agree(ours, theirs.eval())
    ours.save_pretrained(tmp_path / "folder")
    agree(LlamaForCausalLM.from_pretrained(tmp_path / "folder"), theirs)
    stored = {"F16": torch.float16, "BF16": torch.bfloat16}
    assert LlamaForCausalLM.from_pretrained(file).dtype == stored.get(kind, torch.float32)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"tie_word_embeddings": True},
        {"attention_bias": True, "mlp_bias": True},
        {"head_dim": 32, "num_key_value_heads": 1},
        {"rope": RopeParameters(rope_theta=5e5)},
        {"rope": RopeParameters(rope_type="linear", factor=4.0)},
        {
            "rope": RopeParameters(
                rope_type="llama3", rope_theta=5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                original_max_position_embeddings=32,
            )
        },
    ],
    ids=str,
)  # fmt: skip
def test_what_is_written_reads_back_as_the_same_network(fields, tmp_path):
    model = model_of(**fields)
    write_gguf(model, tmp_path / "model.gguf")
    back = LlamaForCausalLM.from_pretrained(tmp_path / "model.gguf", dtype="float32", strict=True)
    agree(back, model)
    assert LlamaForCausalLM.from_pretrained(tmp_path).config == back.config  # the only file of its folder


def test_a_model_that_was_split_is_put_together(tmp_path):
    model = model_of()
    write_gguf(model, tmp_path / "whole.gguf")
    reader = gguf.GGUFReader(tmp_path / "whole.gguf")
    names = [tmp_path / f"model-0000{i}-of-00002.gguf" for i in (1, 2)]
    for index, name in enumerate(names):
        writer = gguf.GGUFWriter(name, "llama")
        for key, field in reader.fields.items():
            if index == 0 and key.startswith("llama."):
                writer.add_key_value(key, field.contents(), field.types[0])
        writer.add_uint16("split.count", 2)
        for tensor in reader.tensors[index::2]:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    agree(LlamaForCausalLM.from_pretrained(names[0]), model)
    names[1].unlink()
    with pytest.raises(CheckpointError, match=r"one of 2 files.*\n *model-00002-of-00002\.gguf"):
        LlamaForCausalLM.from_pretrained(names[0])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"general.architecture": "qwen2"}, "architecture 'qwen2'; expected 'llama'"),
        ({"llama.expert_count": 8}, "llama.expert_count=8"),
        ({"llama.rope.dimension_count": 32}, "heads of 64 of which 32 turn"),
        ({"llama.attention.head_count_kv": [2, 1]}, "differs by layer"),
        ({"llama.block_count": "two"}, "llama.block_count is 'two'; expected a number"),
        ({"llama.block_count": 3}, "num_hidden_layers is 3, the weights have 2"),
        ({"llama.vocab_size": None, "llama.embedding_length": 128}, "shape \\[64, 256\\], expected \\[64, 128\\]"),
    ],
    ids=str,
)
def test_what_the_file_says_and_fastllama_does_not_compute_is_one_error(fields, message, tmp_path, monkeypatch):
    write_gguf(model_of(), tmp_path / "model.gguf")
    file = read_gguf(tmp_path / "model.gguf")
    changed = {key: value for key, value in (dict(file.fields) | fields).items() if value is not None}
    monkeypatch.setattr("fastllama.loading.gguf.read_gguf", lambda path: type(file)(path, changed, file.tensors))
    with pytest.raises(CheckpointError, match=message):
        LlamaForCausalLM.from_pretrained(tmp_path / "model.gguf")


def test_token_ids_with_a_role_become_generation_settings(tmp_path):
    write_gguf(model_of(), tmp_path / "plain.gguf")
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    reader = gguf.GGUFReader(tmp_path / "plain.gguf")
    for key, field in reader.fields.items():
        if key.startswith("llama."):
            writer.add_key_value(key, field.contents(), field.types[0])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_eot_token_id(7)
    writer.add_pad_token_id(2**32 - 1)  # llama.cpp's none
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    generation = resolve(tmp_path / "model.gguf").generation_config
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (1, (2, 7), None)


@pytest.mark.parametrize("left", [0, 3, 23, 100, 500, -1], ids="{} bytes left".format)
def test_a_truncated_file_is_one_error_that_names_it(left, tmp_path):
    file = tmp_path / "model.gguf"
    write_gguf(model_of(), file)
    file.write_bytes(file.read_bytes()[:left])
    with pytest.raises(CheckpointError, match=r"model\.gguf .*fetch it again"):
        LlamaForCausalLM.from_pretrained(file)


def test_a_length_beyond_the_file_is_one_error_and_takes_no_memory(tmp_path):
    file = tmp_path / "model.gguf"
    write_gguf(model_of(), file)
    content = bytearray(file.read_bytes())
    content[8:16] = struct.pack("<Q", 2**60)  # the count of tensors
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        LlamaForCausalLM.from_pretrained(file)


def test_several_files_in_a_folder_are_listed(tmp_path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"several GGUF files: a\.gguf, b\.gguf; name one"):
        LlamaForCausalLM.from_pretrained(tmp_path)
