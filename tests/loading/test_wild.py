"""Folders as they are found in the wild: what transformers loads, loads here with the same logits and tokens."""

from __future__ import annotations

import copy
import json
import logging
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from fastllama import GenerationConfig, LlamaConfig, LlamaForCausalLM, load_tokenizer
from fastllama.loading.stored import CheckpointError

SHAPE = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "eos_token_id": 2,
    "bos_token_id": 1,
}
IDS = torch.tensor([[1, 17, 5, 99, 64, 3, 70, 8]])
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def saved(folder: Path, **fields: Any) -> Path:
    """A tiny checkpoint as transformers writes it, with weights large enough that greedy tokens vary."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**copy.deepcopy(SHAPE | {"initializer_range": 0.3} | fields))
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def patch_json(file: Path, **keys: Any) -> None:
    """Set keys of a JSON file; those set to None go."""
    content = json.loads(file.read_text()) if file.exists() else {}
    content |= keys
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Rewrite the weights file after ``change`` was applied to its dict."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def renamed(rename: Callable[[str], str]) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for key in list(tensors):
            tensors[rename(key)] = tensors.pop(key)

    return change


def theirs(folder: Path) -> transformers.LlamaForCausalLM:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def agrees(ours: LlamaForCausalLM, reference: Any, **call: Any) -> None:
    """Equal logits and equal greedy tokens in float32."""
    with torch.no_grad():
        got, want = ours(IDS).logits, reference(IDS).logits
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    call = {"max_new_tokens": 12} | call
    assert ours.generate(IDS, **call).tolist() == reference.generate(IDS, **call).tolist()


def warnings_of(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(record.getMessage() for record in caplog.records if record.name.startswith("fastllama"))


# ---- config.json -------------------------------------------------------------------------------

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("keys", "warning"),
    [
        ({"_model_name_or_path": "x", "unk_token_id": 0, "mask_token_id": 3}, ""),
        (
            {"unsloth_tiled_mlp": False, "tensor_parallel_degree": 1, "license": "mit"},
            "tensor_parallel_degree, unsloth",
        ),
        ({"auto_map": {"AutoModelForCausalLM": "modeling_x.XForCausalLM"}}, "modeling_x.XForCausalLM"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling_llama.LlamaForCausalLM"}}, ""),
        ({"sliding_window": 4096}, ""),
        ({"sliding_window": 4096, "layer_types": ["full_attention"] * 2}, ""),
        ({"num_experts": 0, "logit_scale": 1.0, "qk_norm": False}, ""),
        ({"rope_parameters": None, "rope_theta": 1e4, "rope_scaling": YARN | {"finetuned": True}}, "finetuned"),
        (
            {
                "rope_parameters": None,
                "rope_theta": 1e4,
                "rope_scaling": LLAMA3 | {"type": "dynamic", "rope_type": "llama3"},
            },
            "rope_type is taken",
        ),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "rope_theta": 5e5},
            "rope_scaling is taken",
        ),
        ({"pretraining_tp": 3}, ""),
        ({"pretraining_tp": 1000}, ""),
        ({"dtype": "float32", "torch_dtype": "float16"}, "dtype is taken"),
        ({"dtype": None}, ""),
    ],
    ids=str,
)
def test_a_config_that_transformers_loads_gives_its_logits_and_one_warning(keys, warning, tmp_path, caplog):
    folder = saved(tmp_path)
    patch_json(folder / "config.json", **keys)
    with caplog.at_level(logging.WARNING):
        ours = LlamaForCausalLM.from_pretrained(folder)
    assert ours.dtype == torch.float32
    said = warnings_of(caplog)
    assert warning in said
    assert bool(said) == bool(warning)
    agrees(ours, theirs(folder))


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("qk_norm", True, "normalize queries and keys"),
        ("logit_scale", 0.5, "scale what the network computes"),
        ("residual_multiplier", 0.22, "scale what the network computes"),
        ("embedding_multiplier", 12.0, "scale what the network computes"),
        ("final_logit_softcapping", 30.0, "bound scores or logits"),
        ("no_rope_layers", [1, 0], "leave the rotary embedding out"),
        ("num_local_experts", 8, "choice of experts"),
        ("partial_rotary_factor", 0.5, "rotate a part of each head"),
        ("use_sliding_window", True, "hide tokens by their distance"),
        ("quantization_config", {"quant_method": "hqq"}, "quant_method 'hqq' is not read"),
        ("layer_types", ["sliding_attention", "full_attention"], "full_attention"),
    ],
    ids=str,
)
def test_a_key_that_changes_the_result_is_refused_by_name_and_with_what_it_changes(key, value, reason, tmp_path):
    folder = saved(tmp_path)
    patch_json(folder / "config.json", **{key: value})
    with pytest.raises((ValueError, NotImplementedError), match=rf"config\.json: {key}.*{reason}"):
        LlamaForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("name", "loaded"),
    [
        ("half", torch.float16),
        ("bf16", torch.bfloat16),
        ("float", torch.float32),
        ("torch.bfloat16", torch.bfloat16),
        ("double", torch.float64),
        ("auto", torch.float16),
        (None, torch.float16),
    ],
)
def test_a_dtype_has_many_names_and_auto_or_none_is_that_of_the_weights(name, loaded, tmp_path):
    folder = saved(tmp_path)
    edit_weights(folder, lambda tensors: tensors.update({key: tensor.half() for key, tensor in tensors.items()}))
    patch_json(folder / "config.json", dtype=name)
    ours = LlamaForCausalLM.from_pretrained(folder)
    assert (ours.dtype, ours.config.torch_dtype) == (loaded, loaded)
    assert LlamaForCausalLM.from_pretrained(folder, dtype="bf16").dtype == torch.bfloat16
    agrees(LlamaForCausalLM.from_pretrained(folder, dtype="float"), theirs(saved_half(folder)))


def saved_half(folder: Path) -> Path:
    """The folder, with a dtype that transformers knows."""
    patch_json(folder / "config.json", dtype="float16")
    return folder


def test_token_ids_mean_what_they_mean_elsewhere(tmp_path):
    folder = saved(tmp_path)
    patch_json(folder / "config.json", eos_token_id=-1, bos_token_id=[1], pad_token_id=-1)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": -1, "bos_token_id": [1, 5]}))
    ours = LlamaForCausalLM.from_pretrained(folder)
    assert (ours.config.eos_token_id, ours.config.bos_token_id, ours.config.pad_token_id) == (None, 1, None)
    assert (ours.generation_config.eos_token_id, ours.generation_config.bos_token_id) == ((), 1)
    patch_json(folder / "config.json", eos_token_id=None, bos_token_id=1, pad_token_id=None)
    patch_json(folder / "generation_config.json", eos_token_id=None, bos_token_id=1)
    agrees(ours, theirs(folder), max_new_tokens=40)


def test_a_pad_id_outside_the_vocabulary_is_written_and_never_embedded(tmp_path):
    folder = saved(tmp_path)
    reference = theirs(folder)
    patch_json(folder / "config.json", pad_token_id=500)
    patch_json(folder / "generation_config.json", pad_token_id=500, eos_token_id=2)
    ours = LlamaForCausalLM.from_pretrained(folder)
    alone = [
        reference.generate(row[None, :n], max_new_tokens=9, eos_token_id=None)[0, n:]
        for row, n in ((IDS[0], 8), (IDS[0], 5))
    ]
    eos = int(alone[0][3])
    assert eos not in alone[1][:4].tolist()
    prompts = torch.stack((IDS[0], torch.cat((torch.full((3,), 500), IDS[0, :5]))))
    new = ours.generate(prompts, max_new_tokens=9, eos_token_id=eos)[:, 8:]
    assert new[0].tolist() == [*alone[0][:4].tolist(), *[500] * (new.shape[1] - 4)]
    stop = alone[1].tolist().index(eos) + 1 if eos in alone[1].tolist() else 9
    assert new[1, :stop].tolist() == alone[1][:stop].tolist()


def test_a_byte_order_mark_is_accepted_and_a_trailing_comma_is_named(tmp_path):
    folder = saved(tmp_path)
    file = folder / "config.json"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    agrees(LlamaForCausalLM.from_pretrained(folder), theirs(saved(tmp_path / "plain")))
    file.write_text('{\n  "model_type": "llama",\n}')
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON: a comma before a closing bracket, in line"):
        LlamaForCausalLM.from_pretrained(folder)


def test_strict_refuses_what_is_otherwise_named_in_a_warning(tmp_path):
    folder = saved(tmp_path)
    LlamaForCausalLM.from_pretrained(folder, strict=True)
    rope = {"rope_type": "linear", "factor": 2.0, "beta_fast": 32}
    for file, keys in (
        ("config.json", {"some_key": 1}),
        ("config.json", {"rope_scaling": rope}),
        ("generation_config.json", {"best_of": 1.1}),
    ):
        before = (folder / file).read_text()
        patch_json(folder / file, **keys)
        with pytest.raises(ValueError, match=rf"{file}: .*({next(iter(keys))}|beta_fast).*strict"):
            LlamaForCausalLM.from_pretrained(folder, strict=True)
        (folder / file).write_text(before)
    edit_weights(folder, lambda tensors: tensors.update({"v_head.bias": torch.zeros(1)}))
    with pytest.raises(ValueError, match=r"v_head\.bias.*strict"):
        LlamaForCausalLM.from_pretrained(folder, strict=True)


# ---- generation_config.json --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "call", "neutral"),
    [
        ({"guidance_scale": 1.5, "stop_token_ids": [5], "best_of": 1}, {}, {"guidance_scale": 1.0}),
        ({"num_beams": 4, "early_stopping": True}, {}, {"num_beams": 1}),
        ({"epsilon_cutoff": 0.1}, {"do_sample": True}, {"epsilon_cutoff": 0.0}),
    ],
    ids=str,
)
def test_a_default_that_the_step_does_not_do_is_done_by_generate_and_refused_by_stream(keys, call, neutral, tmp_path):
    folder = saved(tmp_path)
    patch_json(folder / "generation_config.json", **keys)
    ours = LlamaForCausalLM.from_pretrained(folder)
    name = next(iter(neutral))
    with pytest.raises(NotImplementedError, match=rf"{name}=.*pass {name}={neutral[name]!r} to go without"):
        ours.stream(IDS, max_new_tokens=2, **call)
    agrees(ours, theirs(folder))
    agrees(ours, theirs(folder), **neutral)
    ours.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "generation_config.json").read_text())[name] == keys[name]


@pytest.mark.parametrize(
    "keys",
    [
        {"user_token_id": 5, "assistant_token_id": 6},
        {"temperature": 0, "do_sample": False},
        {"max_new_tokens": 6},
        {"max_length": 20},
        {"max_length": 15},
        {"do_sample": False, "top_k": None},
        {"seed": -3, "other": {"a": 1}},
        {"top_p": 7.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("call", [{}, {"max_length": 20, "max_new_tokens": None}, {"max_length": 20}], ids=str)
def test_defaults_and_lengths_give_the_tokens_of_transformers(keys, call, tmp_path):
    folder = saved(tmp_path)
    patch_json(folder / "generation_config.json", **keys)
    ours, reference = LlamaForCausalLM.from_pretrained(folder), theirs(folder)
    assert ours.generate(IDS, **call).tolist() == reference.generate(IDS, **call).tolist()


def test_top_k_minus_one_samples_from_all_tokens(tmp_path):
    folder = saved(tmp_path)
    patch_json(folder / "generation_config.json", do_sample=True, top_k=-1)
    ours = LlamaForCausalLM.from_pretrained(folder)
    assert ours.generate(IDS, seed=3).tolist() == ours.generate(IDS, seed=3, top_k=0).tolist()


def test_sampling_at_temperature_zero_is_an_error_of_the_call_that_says_greedy(tmp_path):
    folder = saved(tmp_path)
    patch_json(folder / "generation_config.json", do_sample=True, temperature=0.0)
    ours = LlamaForCausalLM.from_pretrained(folder)
    with pytest.raises(ValueError, match=r"temperature is 0.*do_sample=False"):
        ours.generate(IDS)
    agrees(ours, theirs(saved(tmp_path / "plain")), do_sample=False)


def test_a_value_out_of_range_is_an_error_of_the_calls_that_use_it(tmp_path, caplog):
    folder = saved(tmp_path)
    patch_json(folder / "generation_config.json", top_p=7.0)
    ours = LlamaForCausalLM.from_pretrained(folder)
    assert "top_p is 7.0; expected a number" in warnings_of(caplog)
    ours.generate(IDS, max_new_tokens=1)
    ours.generate(IDS, max_new_tokens=1, do_sample=True, top_p=0.9)
    with pytest.raises(ValueError, match=r"top_p is 7\.0"):
        ours.generate(IDS, max_new_tokens=1, do_sample=True)


def test_neutral_arguments_of_transformers_are_accepted(tmp_path):
    folder = saved(tmp_path)
    call = {
        "use_cache": True, "num_beams": 1, "repetition_penalty": 1.0, "num_return_sequences": 1, "output_scores": False,
    }  # fmt: skip
    agrees(LlamaForCausalLM.from_pretrained(folder), theirs(folder), **call)


# ---- tensors -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "extra",
    [
        {"v_head.summary.weight": (1, 64), "v_head.summary.bias": (1,)},
        {"score.weight": (2, 64)},
        {"model.layers.9.input_layernorm.weight": (64,)},
        {"model.layers.0.self_attn.rotary_emb.cos_cached": (1, 1, 4, 16)},
        {"model.layers.1.self_attn.masked_bias": (1,), "model.layers.1.self_attn.bias": (1, 1, 4, 4)},
        {"mtp.embed.weight": (4, 4)},
        {"model.layers.0.self_attn.k_proj.k_scale": (1,), "model.layers.0.self_attn.rotary_pos_emb.inv_freq": (8,)},
        {"model.layers.0.attn.bias": (1, 1, 4, 4), "model.layers.0.self_attn.rope.freqs": (8,)},
    ],
    ids=str,
)
def test_tensors_that_no_llama_uses_are_left_out_with_one_warning(extra, tmp_path, caplog):
    folder = saved(tmp_path)
    edit_weights(folder, lambda tensors: tensors.update({key: torch.ones(shape) for key, shape in extra.items()}))
    ours = LlamaForCausalLM.from_pretrained(folder)
    said = [record for record in caplog.records if record.name.startswith("fastllama")]
    assert len(said) == 1
    assert all(key in said[0].getMessage() for key in extra)
    agrees(ours, theirs(folder))


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("model.layers.0.self_attn.q_norm.weight", "would change the result"),
        ("model.layers.0.self_attn.q_proj.bias", '"attention_bias": true'),
        ("model.layers.1.mlp.up_proj.bias", '"mlp_bias": true'),
        ("model.layers.0.self_attn.q_proj.lora_A.weight", "LoRA adapter that is not merged"),
        ("model.layers.0.self_attn.q_proj.weight_scale", "quantized"),
        ("lm_head.bias", "no Llama has it"),
        ("model.embed_norm.weight", "no Llama has it"),
    ],
)
def test_a_tensor_inside_the_network_that_is_not_understood_is_refused(key, message, tmp_path):
    folder = saved(tmp_path)
    edit_weights(folder, lambda tensors: tensors.update({key: torch.ones(64)}))
    with pytest.raises(CheckpointError, match=rf"{re.escape(key)}: unexpected") as caught:
        LlamaForCausalLM.from_pretrained(folder)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "rename",
    [
        lambda key: f"_orig_mod.{key}",
        lambda key: f"module.{key}",
        lambda key: f"_orig_mod.module.{key}",
        lambda key: re.sub(r"layers\.(\d+)\.", r"layers.\1._orig_mod.", key),
        lambda key: re.sub(r"layers\.(\d+)\.", r"layers.\1._checkpoint_wrapped_module.", key),
        lambda key: f"base_model.model.{key}",
        lambda key: f"_forward_module.{key}",
        lambda key: f"model.{key}",
        lambda key: f"language_model.{key}",
        lambda key: key.replace("model.", "model.text_model.", 1),
        lambda key: f"student.net.{key}",
        lambda key: key.replace("model.", "model.language_model.", 1) if key.startswith("model.") else key,
    ],
    ids=[
        "compiled",
        "ddp",
        "both",
        "compiled layers",
        "checkpointed",
        "peft",
        "fabric",
        "lightning",
        "llava",
        "smolvlm",
        "nested",
        "llava 5",
    ],
)
def test_names_of_a_wrapped_model_are_unwrapped_with_a_line_that_says_so(rename, tmp_path, caplog):
    folder = saved(tmp_path)
    reference = theirs(folder)
    edit_weights(folder, renamed(rename))
    ours = LlamaForCausalLM.from_pretrained(folder)
    assert "names come from a wrapped model" in warnings_of(caplog)
    agrees(ours, reference)


def test_a_body_saved_alone_loads_if_its_head_is_tied(tmp_path):
    folder = saved(tmp_path, tie_word_embeddings=True)
    reference = theirs(folder)
    reference.model.save_pretrained(tmp_path / "body")
    patch_json(tmp_path / "body" / "config.json", architectures=["LlamaModel"])
    assert all(not key.startswith("model.") for key in load_file(tmp_path / "body" / "model.safetensors"))
    agrees(LlamaForCausalLM.from_pretrained(tmp_path / "body"), reference)


def test_an_absent_head_names_the_switch_that_ties_it(tmp_path):
    folder = saved(tmp_path)
    edit_weights(folder, lambda tensors: tensors.pop(HEAD))
    with pytest.raises(CheckpointError, match=r'lm_head\.weight: missing.*"tie_word_embeddings": true'):
        LlamaForCausalLM.from_pretrained(folder)


def test_of_two_whole_models_none_is_taken(tmp_path):
    folder = saved(tmp_path, tie_word_embeddings=True)
    edit_weights(folder, lambda t: t.update({f"teacher.{key}": t.pop(key) for key in list(t)}))
    assert LlamaForCausalLM.from_pretrained(folder).config.tie_word_embeddings
    edit_weights(folder, lambda t: t.update({k.replace("teacher", "student"): v + 1 for k, v in t.items()}))
    with pytest.raises(CheckpointError, match=r"model\.embed_tokens\.weight: missing"):
        LlamaForCausalLM.from_pretrained(folder)


def test_names_that_do_not_all_fit_are_not_half_taken(tmp_path):
    folder = saved(tmp_path)
    edit_weights(folder, renamed(lambda key: key if "layers.1" in key else f"student.{key}"))
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.self_attn\.q_proj\.weight: missing"):
        LlamaForCausalLM.from_pretrained(folder)


def test_a_head_that_differs_from_the_embedding_is_not_tied_whatever_the_config_says(tmp_path, caplog):
    folder = saved(tmp_path)
    patch_json(folder / "config.json", tie_word_embeddings=True)
    ours = LlamaForCausalLM.from_pretrained(folder)
    assert "they are not tied" in warnings_of(caplog)
    assert ours.lm_head.weight is not ours.model.embed_tokens.weight
    assert not ours.config.tie_word_embeddings
    agrees(ours, theirs(folder))
    ours.save_pretrained(tmp_path / "again")
    agrees(LlamaForCausalLM.from_pretrained(tmp_path / "again"), ours)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_without_scales_is_cast(dtype, tmp_path):
    folder = saved(tmp_path)
    edit_weights(folder, lambda tensors: tensors.update({Q_PROJ: tensors[Q_PROJ].to(dtype)}))
    ours = LlamaForCausalLM.from_pretrained(folder, dtype="float32")
    assert torch.equal(
        ours.model.layers[0].self_attn.q_proj.weight, load_file(folder / "model.safetensors")[Q_PROJ].float()
    )
    agrees(ours, theirs(folder))


@pytest.mark.parametrize("model_type", ["llava"])
def test_of_a_multimodal_folder_the_text_part_loads(model_type, tmp_path, caplog):
    torch.manual_seed(0)
    text = transformers.LlamaConfig(**SHAPE, initializer_range=0.3)
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=127)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path)
    ours = LlamaForCausalLM.from_pretrained(tmp_path)
    assert "only its text part" in warnings_of(caplog)
    with torch.no_grad():
        got, want = ours(IDS).logits, model(input_ids=IDS).logits
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


def test_a_folder_with_a_lora_adapter_alone_is_its_base_with_the_adapter_merged(tmp_path):
    folder = saved(tmp_path / "base")
    base = theirs(folder)
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(tmp_path / "adapter")
    patch_json(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path=str(folder))
    ours = LlamaForCausalLM.from_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        assert (ours(IDS).logits - theirs(folder)(IDS).logits).abs().max() > 0.1
    agrees(ours, adapted.merge_and_unload().eval())


def test_an_adapter_next_to_a_base_with_odd_names_is_merged_into_it(tmp_path):
    folder = saved(tmp_path / "base")
    adapted = peft.get_peft_model(
        theirs(folder), peft.LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False)
    )
    adapted.save_pretrained(tmp_path / "adapter")
    patch_json(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path="../base")
    edit_weights(folder, renamed(lambda key: f"_orig_mod.{key}"))
    (tmp_path / "adapter" / "config.json").write_text((folder / "config.json").read_text())
    (tmp_path / "adapter" / "generation_config.json").write_text(json.dumps({"max_new_tokens": 3}))
    ours = LlamaForCausalLM.from_pretrained(tmp_path / "adapter")
    assert ours.generation_config.max_new_tokens == 3
    agrees(ours, adapted.merge_and_unload().eval())


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_an_adapter_of_one_of_two_tied_weights_changes_that_one_alone(target, tmp_path):
    folder = saved(tmp_path / "base", tie_word_embeddings=True)
    adapted = peft.get_peft_model(
        theirs(folder), peft.LoraConfig(r=4, target_modules=[target, "q_proj"], init_lora_weights=False)
    )
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    patch_json(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path=str(folder))
    ours = LlamaForCausalLM.from_pretrained(tmp_path / "adapter")
    assert not ours.config.tie_word_embeddings
    agrees(ours, adapted.eval())


def test_an_adapter_without_a_tokenizer_has_its_base_models(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "demo"}))
    text = "def read(path):"
    assert load_tokenizer(tmp_path).encode(text) == load_tokenizer("demo").encode(text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "no adapter_model.safetensors"),
        (
            lambda folder: patch_json(folder / "adapter_config.json", base_model_name_or_path=None),
            "base_model_name_or_path",
        ),
        (
            lambda folder: patch_json(folder / "adapter_config.json", base_model_name_or_path=str(folder)),
            "expected the name",
        ),
        (lambda folder: patch_json(folder / "adapter_config.json", peft_type="XX"), "cannot be merged"),
        (lambda folder: patch_json(folder / "adapter_config.json", peft_type=None), "peft_type is None"),
        (lambda folder: patch_json(folder / "adapter_config.json", peft_type="PREFIX_TUNING"), "before a text"),
        (lambda folder: patch_json(folder / "adapter_config.json", layer_replication=[[0, 2]]), "adds layers"),
        (
            lambda folder: edit_adapter(
                folder, lambda t: t.update({"base_model.model.lm_head.weight": torch.zeros(97, 32)})
            ),
            "vocabulary of 97 tokens",
        ),
        (lambda folder: patch_json(folder / "adapter_config.json", base_model_name_or_path="."), "expected the name"),
        (
            lambda folder: (folder.parent / "base" / "adapter_config.json").write_text(
                json.dumps({"base_model_name_or_path": str(folder)})
            ),
            "holds an adapter too",
        ),
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"garbage!"), "cannot be merged"),
        (lambda folder: edit_adapter(folder, lambda t: t.pop(min(t))), "lora_A.weight: missing"),
        (lambda folder: edit_adapter(folder, renamed(lambda key: key.replace("model.model", "x"))), "unexpected"),
        (lambda folder: edit_adapter(folder, lambda t: t[min(t)].fill_(math.nan)), "holds NaN"),
    ],
    ids=[
        "no weights",
        "no base",
        "its own base",
        "another kind",
        "no kind",
        "prefix",
        "replicated",
        "resized",
        "here",
        "stacked",
        "garbage",
        "one less",
        "other names",
        "nan",
    ],
)
def test_an_adapter_that_cannot_be_merged_says_why(change, message, tmp_path):
    folder = saved(tmp_path / "base")
    adapted = peft.get_peft_model(theirs(folder), peft.LoraConfig(r=2, target_modules=["v_proj"]))
    adapted.save_pretrained(tmp_path / "adapter")
    patch_json(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path=str(folder))
    change(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=message):
        LlamaForCausalLM.from_pretrained(tmp_path / "adapter")


def edit_adapter(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


def test_an_adapter_that_is_left_over_in_its_own_checkpoint_is_not_merged(tmp_path):
    folder = saved(tmp_path)
    reference = theirs(folder)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(folder)}))
    agrees(LlamaForCausalLM.from_pretrained(folder), reference)


@pytest.mark.parametrize(("parent", "held"), [({"eos_token_id": 5}, (5,)), ({}, (2,))], ids=["parent", "nobody"])
def test_a_multimodal_config_without_eos_ids_in_its_text_part_has_the_parents_or_llamas(parent, held, tmp_path):
    text = {key: value for key, value in SHAPE.items() if "eos" not in key} | {"model_type": "llama"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava", "text_config": text} | parent))
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == held


def test_of_a_multimodal_config_the_eos_ids_of_the_text_part_hold(tmp_path):
    text = SHAPE | {"model_type": "llama", "eos_token_id": [7, 9], "rope_theta": 1e4}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava", "text_config": text}))
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == (7, 9)
    for parent in ({"model_type": "paligemma", "text_config": {"vocab_size": 8}}, {"model_type": "qwen2_vl"}):
        with pytest.raises(ValueError, match="expected 'llama'"):
            LlamaConfig.from_dict(parent)


def test_a_lora_adapter_without_peft_is_an_error_that_says_what_to_install(tmp_path, monkeypatch):
    folder = saved(tmp_path / "base")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(folder)}))
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(NotImplementedError, match="pip install peft"):
        LlamaForCausalLM.from_pretrained(tmp_path / "adapter")
