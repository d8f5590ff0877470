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
from fastllama.loading.gguf_blocks import SCHEMES
from fastllama.loading.gguf_writer import write_gguf
from fastllama.loading.names import resolve
from fastllama.loading.stored import CheckpointError
from fastllama.quantization.linear import exact, packed_modules

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


def requantized(source: Path, target: Path, kind: str, **more: np.ndarray) -> Path:
    """A GGUF file with the same values, its matrices in another type, and more tensors."""
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
    for name, values in more.items():
        writer.add_tensor(name, values)
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
    ours = LlamaForCausalLM.from_pretrained(file, dtype="float32", quantize="none")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32)
    agree(ours, theirs.eval())
    ours.save_pretrained(tmp_path / "folder")
    agree(LlamaForCausalLM.from_pretrained(tmp_path / "folder"), theirs)
    stored = {"F16": torch.float16, "BF16": torch.bfloat16}
    assert LlamaForCausalLM.from_pretrained(file).dtype == stored.get(kind, torch.float32)


@pytest.mark.parametrize("kind", SCHEMES)
def test_blocks_stay_codes_where_panels_hold_them(kind, tmp_path, caplog):
    write_gguf(model_of(), tmp_path / "plain.gguf")
    file = requantized(tmp_path / "plain.gguf", tmp_path / "model.gguf", kind)
    dense = LlamaForCausalLM.from_pretrained(file, "float32", quantize="none")
    model = LlamaForCausalLM.from_pretrained(file)
    modules = packed_modules(model)
    assert len(modules) == 1 + 7 * model.config.num_hidden_layers + (not model.config.tie_word_embeddings)
    is_exact = not kind.endswith("K")  # the scales of K types are products, which float16 does not hold
    for name, module in modules.items():
        assert (module.bits, module.group) == SCHEMES[kind][:2]
        weight = dense.get_submodule(name).weight
        step = module.scales.float().abs().max()
        assert (module.weight - weight).abs().max() <= (1e-6 if is_exact else 2.0 ** (module.bits - 11)) * step
    assert ("of codes are kept in float16" in caplog.text) is not is_exact
    with torch.no_grad(), exact(model):
        got, want = model(IDS).logits, dense(IDS).logits
    assert (got - want).abs().max() <= (1e-5 if is_exact else 2e-3) * want.abs().max()
    assert model.generate(IDS, max_new_tokens=2).shape[1] == IDS.shape[1] + 2


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


def with_fields(model: LlamaForCausalLM, path: Path, **fields: Any) -> Path:
    """The model in a GGUF file that says more: ``fields`` by name, ``.`` written as ``__``."""
    write_gguf(model, path.with_suffix(".plain"))
    reader, writer = gguf.GGUFReader(path.with_suffix(".plain")), gguf.GGUFWriter(path, "llama")
    for key, field in reader.fields.items():
        if key.startswith("llama."):
            writer.add_key_value(key, field.contents(), field.types[0])
    for name, value in fields.items():
        kinds = {int: gguf.GGUFValueType.UINT32, float: gguf.GGUFValueType.FLOAT32, str: gguf.GGUFValueType.STRING}
        kind = kinds.get(type(value), gguf.GGUFValueType.ARRAY)
        writer.add_key_value(name.replace("__", "."), value, kind)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_token_ids_with_a_role_become_generation_settings(tmp_path):
    none = 2**32 - 1  # llama.cpp's
    ids = {"bos_token_id": 1, "eos_token_id": 2, "eot_token_id": 7, "padding_token_id": none}
    fields = {f"tokenizer__ggml__{name}": token for name, token in ids.items()}
    generation = resolve(with_fields(model_of(), tmp_path / "model.gguf", **fields)).generation_config
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (1, (2, 7), None)


def test_tokens_that_end_a_turn_by_their_name_end_a_row(tmp_path):
    names = {"tokenizer__ggml__tokens": ["a", "<|eot_id|>", "<|im_end|>"], "tokenizer__ggml__token_type": [1, 3, 1]}
    file = with_fields(model_of(), tmp_path / "model.gguf", tokenizer__ggml__eos_token_id=0, **names)
    assert resolve(file).generation_config.eos_token_id == (0, 1)  # the last one is an ordinary word here


LLAMA3_ROPE = RopeParameters(
    rope_type="llama3", rope_theta=5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=32,
)  # fmt: skip


@pytest.mark.parametrize(("kind", "factor"), [("linear", 4.0), (None, 4.0), ("none", 1.0)])
def test_a_scale_counts_unless_the_file_says_that_there_is_none(kind, factor, tmp_path):
    said = {} if kind is None else {"llama__rope__scaling__type": kind}
    file = with_fields(model_of(), tmp_path / "model.gguf", llama__rope__scaling__factor=4.0, **said)
    rope = RopeParameters() if factor == 1.0 else RopeParameters("linear", factor=factor)
    assert resolve(file).config.rope == rope


def test_a_file_of_several_types_is_read_into_float32(tmp_path):
    write_gguf(model_of().half(), tmp_path / "half.gguf")
    assert resolve(tmp_path / "half.gguf").config.dtype == "float16"
    reader, writer = gguf.GGUFReader(tmp_path / "half.gguf"), gguf.GGUFWriter(tmp_path / "mixed.gguf", "llama")
    for key, field in reader.fields.items():
        if key.startswith("llama."):
            writer.add_key_value(key, field.contents(), field.types[0])
    for tensor in reader.tensors:
        if tensor.name == "blk.0.attn_output.weight":
            blocks = gguf.quants.quantize(np.array(tensor.data, np.float32), gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(tensor.name, blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert resolve(tmp_path / "mixed.gguf").config.dtype == "float32"


@pytest.mark.parametrize("kind", ["linear", None])
def test_rope_factors_and_a_linear_scale_are_both_applied(kind, tmp_path):
    scale: dict[str, Any] = {"llama__rope__scaling__factor": 4.0}
    scale |= {} if kind is None else {"llama__rope__scaling__type": kind}
    plain = resolve(with_fields(model_of(rope=LLAMA3_ROPE), tmp_path / "plain.gguf")).config.rope.short_factor
    both = resolve(with_fields(model_of(rope=LLAMA3_ROPE), tmp_path / "both.gguf", **scale)).config.rope.short_factor
    assert both == pytest.approx([4 * factor for factor in plain])


@pytest.mark.parametrize(
    ("rope", "fields", "message"),
    [
        (LLAMA3_ROPE, {"llama__rope__scaling__type": "yarn"}, "with rope scaling 'yarn'"),
        (RopeParameters(), {"llama__rope__scaling__yarn_attn_factor": 3.0}, "yarn_attn_factor=3.0"),
        (RopeParameters(), {"llama__attention__scale": 0.5}, "attention.scale=0.5"),
        (RopeParameters(), {"llama__attention__value_scale": 2.0}, "attention.value_scale=2.0"),
        (RopeParameters(), {"llama__rope__scaling__attn_factor": 3.0}, "attn_factor=3.0"),
    ],
    ids=["both", "yarn", "scale", "value scale", "attention factor"],
)
def test_values_that_would_change_the_result_are_refused(rope, fields, message, tmp_path):
    file = with_fields(model_of(rope=rope), tmp_path / "model.gguf", **fields)
    with pytest.raises(CheckpointError, match=message):
        resolve(file)


def test_tensors_of_another_network_are_refused(tmp_path):
    file = tmp_path / "model.gguf"
    write_gguf(model_of(), file)
    other = requantized(file, tmp_path / "other.gguf", "F32", **{"token_embd_norm.weight": np.ones(256, np.float32)})
    with pytest.raises(CheckpointError, match=r"token_embd_norm\.weight: unexpected: no Llama has it"):
        LlamaForCausalLM.from_pretrained(other)


def test_unknown_values_are_one_warning_and_an_error_if_strict(tmp_path, caplog):
    file = with_fields(model_of(), tmp_path / "model.gguf", llama__some__value=2.0)
    resolve(file)
    assert "unknown values llama.some.value" in caplog.text
    with pytest.raises(ValueError, match=r"llama\.some\.value"):
        resolve(file, strict=True)


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
