"""Quantized models: made while loading, written, read again, decoded, changed."""

from __future__ import annotations

import copy
import json
import logging
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from shapes import IDS, SHAPE
from torch.nn import functional as F

from fastllama import CheckpointError, LlamaConfig, LlamaForCausalLM, QuantizationConfig
from fastllama.loading import safetensors as reading
from fastllama.measure import parameter_count, weight_bytes_per_step
from fastllama.quantization.linear import QuantizedEmbedding, QuantizedLinear, exact, packed_modules

SCHEMES: dict[str, Any] = {
    "int8": "int8",
    "int4": "int4",
    "int4, symmetric": QuantizationConfig(symmetric=True),
    "int4, whole rows": QuantizationConfig(group_size=None, head_bits=4),
    "int8 in groups": QuantizationConfig(bits=8, group_size=32),
    "plain activations": QuantizationConfig(activations=None),
    "head as it is": QuantizationConfig(head_bits=None),
    "some as they are": QuantizationConfig(exclude=("down_proj", "layers.0.self_attn.k_proj", "lm_head")),
}


@pytest.fixture(scope="module", params=[{}, {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}])
def folder(request, tmp_path_factory) -> Path:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE | request.param))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    return path


def quantized(folder: Path, scheme: str, **how: Any) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder, quantize=SCHEMES[scheme], **how)


def dense_twin(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """A model of float32 weights with the values that another's codes stand for."""
    twin = LlamaForCausalLM(model.config.replace(quantization=None, tie_word_embeddings=False, dtype="float32"))
    values = {name: parameter.float() for name, parameter in model.named_parameters(remove_duplicate=False)}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, (QuantizedLinear, QuantizedEmbedding)):
            values[f"{name}.weight"] = module.weight
    twin.load_state_dict(values)
    return twin.eval()


def close(got: torch.Tensor, want: torch.Tensor, bound: float) -> None:
    assert (got - want).abs().max() <= bound * want.abs().max()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_logits_are_those_of_the_weights_that_the_codes_stand_for(folder, scheme):
    model = quantized(folder, scheme)
    twin = dense_twin(model)
    with torch.no_grad():
        want = twin(IDS).logits
        with exact(model):
            close(model(IDS).logits, want, 1e-5)
        close(model(IDS).logits, want, 0.05)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_engine_decodes_what_the_forward_says(folder, scheme):
    model = quantized(folder, scheme)
    ids = IDS
    for step in range(12):
        with torch.no_grad():
            logits = model(ids).logits[:, -1]
        expected = logits.argmax(dim=-1)
        got = model.generate(IDS, max_new_tokens=step + 1, do_sample=False)[:, -1]
        best = logits.max(dim=-1).values
        gap = best - logits.gather(1, got[:, None])[:, 0]
        assert (gap <= 2e-3 * logits.abs().max()).all(), "a code of an activation may be its neighbour at a tie"
        ids = torch.cat([ids, torch.where(gap > 0, got, expected)[:, None]], dim=1)


@pytest.mark.parametrize("tokens", [1, 7, 40])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_prompts_of_any_length_and_dtype_decode(folder, dtype, tokens):
    model = quantized(folder, "int4", dtype=dtype)
    prompt = torch.randint(3, 90, (3, tokens), generator=torch.Generator().manual_seed(tokens))
    assert model.generate(prompt, max_new_tokens=5).shape == (3, tokens + 5)
    assert model.dtype == getattr(torch, dtype)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_written_folder_loads_as_it_was(folder, scheme, tmp_path):
    model = quantized(folder, scheme)
    model.save_pretrained(tmp_path, max_shard_size=20000)
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    assert again.config == model.config
    assert again.config.quantization is not None
    for (name, one), (other_name, other) in zip(state(model), state(again), strict=True):
        assert name == other_name
        assert torch.equal(one, other)
    assert torch.equal(model.generate(IDS, max_new_tokens=8), again.generate(IDS, max_new_tokens=8))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_written_folder_can_be_written_out_or_quantized_otherwise(folder, scheme, tmp_path, caplog):
    model = quantized(folder, scheme)
    model.save_pretrained(tmp_path)
    dense = LlamaForCausalLM.from_pretrained(tmp_path, quantize="none")
    assert not packed_modules(dense)
    assert dense.config.quantization is None
    for name, module in packed_modules(model).items():
        assert torch.equal(dense.get_submodule(name).weight, module.dequantized(dense.dtype))
    assert "rounds them twice" not in caplog.text
    other = LlamaForCausalLM.from_pretrained(tmp_path, quantize="int8")
    assert "its weights are codes already, and quantizing them again rounds them twice" in caplog.text
    assert {module.bits for module in packed_modules(other).values()} == {8}


def state(model: LlamaForCausalLM) -> list[tuple[str, torch.Tensor]]:
    return sorted((*model.named_parameters(), *model.named_buffers()), key=lambda pair: pair[0])


def test_blocks_of_any_size_become_the_same_codes(folder, monkeypatch):
    expected = state(quantized(folder, "int4"))
    monkeypatch.setattr(reading, "BLOCK_BYTES", 700)
    for (_, one), (_, other) in zip(expected, state(quantized(folder, "int4")), strict=True):
        assert torch.equal(one, other)


def test_it_takes_the_bytes_that_it_says(folder):
    dense, small = LlamaForCausalLM.from_pretrained(folder), quantized(folder, "int4")
    assert parameter_count(dense) == parameter_count(small)
    layers = [m for name, m in packed_modules(small).items() if ".layers." in name]
    assert all(module.nbytes * 8 == 5 * module.shape[0] * module.shape[1] for module in layers)
    assert weight_bytes_per_step(small) < 0.35 * weight_bytes_per_step(dense)
    assert small.model.layers[0].mlp.up_proj.codes.is_contiguous()


def test_the_engine_takes_the_memory_of_the_modules(folder):
    model = quantized(folder, "int4")
    before = {name: tensor.data_ptr() for name, tensor in state(model)}
    model.generate(IDS, max_new_tokens=2)
    assert {name: tensor.data_ptr() for name, tensor in state(model)} == before


def test_modules_that_are_multiplied_together_stay_together(folder):
    model = quantized(folder, "some as they are")
    names = packed_modules(model)
    assert not [name for name in names if "layers.0.self_attn" in name and "o_proj" not in name]
    assert "model.layers.0.self_attn.o_proj" in names
    assert "model.layers.1.self_attn.q_proj" in names
    assert not [name for name in names if "down_proj" in name or "lm_head" in name]


def test_rows_that_are_no_whole_panels_stay_as_they_are(tmp_path, caplog):
    LlamaForCausalLM(LlamaConfig(**SHAPE | {"num_key_value_heads": 1, "head_dim": 24})).save_pretrained(tmp_path)
    model = LlamaForCausalLM.from_pretrained(tmp_path, quantize=QuantizationConfig(exclude=("o_proj",)))
    assert not [name for name in packed_modules(model) if "self_attn" in name]
    assert model.generate(IDS, max_new_tokens=3).shape == (2, 9)
    assert "not quantized, because of their number of rows (panels of 16)" in caplog.text
    assert "layers.0.self_attn.q_proj" in caplog.text
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj"):
        LlamaForCausalLM.from_pretrained(tmp_path, quantize="int4", strict=True)


def test_copies_pickles_and_casts_keep_the_codes(folder):
    model = quantized(folder, "int4")
    expected = model.generate(IDS, max_new_tokens=6).tolist()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.generate(IDS, max_new_tokens=6).tolist() == expected
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert half.lm_head.scales.dtype == torch.float16
    assert torch.equal(half.model.layers[0].mlp.up_proj.codes, model.model.layers[0].mlp.up_proj.codes)
    assert half(IDS).logits.isfinite().all()


def test_ties_survive_a_move_and_a_change_of_one_side_is_refused(folder):
    model = quantized(folder, "int8")
    moved = copy.deepcopy(model).to("meta")
    assert (moved.lm_head.codes is moved.model.embed_tokens.codes) == model.config.tie_word_embeddings
    if model.config.tie_word_embeddings:
        with pytest.raises(ValueError, match="the head, a QuantizedLinear, is tied to the embedding, a Embedding"):
            model.set_input_embeddings(torch.nn.Embedding(90, 64))


def test_a_dense_model_with_a_quantized_config_is_written_as_it_is(folder, tmp_path):
    config = quantized(folder, "int4").config
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    assert LlamaForCausalLM.from_pretrained(tmp_path).config.quantization is None


def test_gradients_reach_what_is_before_a_quantized_layer(folder):
    model = quantized(folder, "int8")
    embeds = torch.randn(1, 4, 64, requires_grad=True)
    F.cross_entropy(model(inputs_embeds=embeds).logits[0], torch.tensor([1, 2, 3, 4])).backward()
    assert embeds.grad is not None
    assert embeds.grad.abs().sum() > 0


def test_ids_outside_the_vocabulary_are_named(folder):
    with pytest.raises(IndexError, match="input_ids hold 90; expected 0 to 89"):
        quantized(folder, "int8")(torch.tensor([[90]]))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(folder, value, tmp_path):
    damaged = _copied(folder, tmp_path)
    _edit(damaged, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"][3].fill_(value))
    with pytest.raises(CheckpointError, match=r"up_proj\.weight: holds NaN or infinity"):
        quantized(damaged, "int4")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t["model.layers.0.mlp.up_proj.scales"].fill_(float("nan")), "up_proj.scales: holds NaN"),
        (
            lambda t: t["model.layers.0.mlp.up_proj.scales"][0, 0].fill_(float("inf")),
            "up_proj.*: holds NaN or inf",
        ),
        (
            lambda t: t["model.layers.0.mlp.up_proj.offsets"][0, 0].fill_(float("inf")),
            "up_proj.*: holds NaN or inf",
        ),
        (lambda t: t.pop("model.layers.0.mlp.up_proj.codes"), "up_proj.codes: missing"),
        (lambda t: t.update({"model.layers.0.mlp.up_proj.weight": torch.zeros(96, 64)}), "up_proj.weight: unexpected"),
        (
            lambda t: t.update({"model.layers.0.mlp.up_proj.codes": torch.zeros(6, 16, 64, dtype=torch.uint8)}),
            "up_proj: its codes have 8 bits, but bits in quantization_config is 4; correct it",
        ),
        (
            lambda t: t.update({"model.layers.0.mlp.up_proj.scales": torch.zeros(6, 2, 16)}),
            "up_proj.scales: stored as F32, expected torch.float16",
        ),
    ],
    ids=["nan", "infinite scale", "infinite offset", "missing", "both", "other bits", "other dtype"],
)
def test_a_damaged_quantized_folder_says_what_is_wrong(folder, edit, message, tmp_path):
    quantized(folder, "int4").save_pretrained(tmp_path)
    _edit(tmp_path, edit)
    with pytest.raises(CheckpointError, match=message):
        LlamaForCausalLM.from_pretrained(tmp_path)


def test_a_config_that_contradicts_the_tensors_is_refused(folder, tmp_path):
    quantized(folder, "int4").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": None}))
    with pytest.raises(CheckpointError, match="the weights are quantized"):
        LlamaForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("scheme", "changes", "message"),
    [
        (
            "int4",
            {"bits": 8},
            r"_proj and 13 more: its codes have 4 bits, but bits in quantization_config is 8; corr",
        ),
        ("int8", {"bits": 4}, r"and 13 more: its codes have 8 bits, but bits in quantization_config is 4; correct it"),
        ("int4", {"head_bits": 4}, r"its codes have 8 bits, but head_bits in quantization_config is 4; correct it"),
        ("int4", {"head_bits": None}, r"it has codes, but quantization_config leaves it as it is \(exclude, head_bits"),
        (
            "int8 in groups",
            {"group_size": None},
            r"its groups have 32 columns, but group_size in .* makes them 64; corr",
        ),
    ],
)
def test_a_config_with_other_bits_or_groups_is_named_once(folder, scheme, changes, message, tmp_path):
    quantized(folder, scheme).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] |= changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message) as error:
        LlamaForCausalLM.from_pretrained(tmp_path)
    assert len(error.value.problems) <= 3


def test_a_group_that_does_not_divide_is_refused(folder):
    with pytest.raises(ValueError, match=r"down_proj has 96 columns, which groups of 64 do not divide"):
        LlamaForCausalLM.from_pretrained(folder, quantize=QuantizationConfig(group_size=64))


PEAK = """
import re, sys
from pathlib import Path
from fastllama import LlamaForCausalLM

def peak():  # of this program; getrusage's is no less than that of the process which started it
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

LlamaForCausalLM.from_pretrained(sys.argv[1], quantize="int4")  # builds and loads what the second one needs
before = peak()
model = LlamaForCausalLM.from_pretrained(sys.argv[2], quantize=sys.argv[3] or None)
print(peak() - before, sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())))
"""


def test_loading_takes_little_more_than_what_is_kept(tmp_path):
    small, large = tmp_path / "small", tmp_path / "large"
    LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(small)
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 6}
    LlamaForCausalLM(LlamaConfig(**SHAPE | sizes)).save_pretrained(large)

    def measured(scheme: str) -> tuple[int, int]:
        command = [sys.executable, "-c", PEAK, str(small), str(large), scheme]
        grown, kept = map(int, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
        return grown, kept

    grown, kept = measured("int4")
    allowed = kept + 6 * reading.BLOCK_BYTES  # a block as it is stored, in float32, and what quantizing it takes
    assert grown <= allowed, f"{grown / 2**20:.0f} MiB for {kept / 2**20:.0f}"
    assert measured("")[0] > 2 * allowed, "a model that is not quantized would be seen"


def test_nothing_is_said_where_there_is_nothing_to_say(folder, caplog):
    with caplog.at_level(logging.WARNING):
        quantized(folder, "int4").generate(IDS, max_new_tokens=2)
    assert not caplog.records


def _copied(folder: Path, to: Path) -> Path:
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def _edit(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
