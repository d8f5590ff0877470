"""Loading and saving checkpoints: both ways with transformers, faults, names, and memory."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub import constants
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file

import fastllama
from fastllama.causal_lm import LlamaForCausalLM
from fastllama.config import GenerationConfig, LlamaConfig, RopeParameters
from fastllama.loading import names, random, save
from fastllama.loading import safetensors as reading
from fastllama.loading.load import load_model
from fastllama.loading.names import RANDOM_SHAPES, resolve, resolve_path
from fastllama.loading.save import save_model
from fastllama.loading.stored import CheckpointError, CheckpointNotFoundError
from fastllama.quantization.matrix import Matrix

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
VARIANTS = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "wide heads": {"head_dim": 16, "num_key_value_heads": 1},
}
IDS = torch.arange(20).view(2, 10)
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
NORM = "model.layers.0.input_layernorm.weight"


@pytest.fixture
def model() -> LlamaForCausalLM:
    """A tiny untied model."""
    return LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()


@pytest.fixture
def folder(model, tmp_path) -> Path:
    """It, saved in one file."""
    save_model(model, tmp_path / "saved")
    return tmp_path / "saved"


def load(folder, **options) -> LlamaForCausalLM:
    return load_model(LlamaForCausalLM, folder, **options)


def edit_weights(folder: Path, change) -> None:
    """Rewrite the single weights file after ``change`` was applied to its dict."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def same_parameters(one: torch.nn.Module, other: torch.nn.Module) -> None:
    left, right = dict(one.named_parameters()), dict(other.named_parameters())
    assert list(left) == list(right)
    for name, parameter in left.items():
        assert torch.equal(parameter, right[name]), name


def same_logits(ours: LlamaForCausalLM, theirs: torch.nn.Module) -> None:
    with torch.no_grad():
        got, want = ours(IDS).logits, theirs(IDS).logits
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


# ---- both ways with transformers ---------------------------------------------------------------


@pytest.mark.parametrize("shard", ["5GB", 9000])
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_we_save_loads_here_and_in_transformers_with_equal_logits(variant, shard, tmp_path):
    ours = LlamaForCausalLM(LlamaConfig(**SHAPE | VARIANTS[variant])).eval()
    ours.generation_config = GenerationConfig(eos_token_id=(2, 3), temperature=0.5, do_sample=True)
    save_model(ours, tmp_path, max_shard_size=shard)
    back = load(tmp_path)
    same_parameters(ours, back)
    assert (back.config, back.generation_config) == (ours.config, ours.generation_config)
    hf, report = transformers.LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert hf.generation_config.eos_token_id == [2, 3]
    same_logits(ours, hf)
    same_logits(back, hf)


@pytest.mark.parametrize("shard", ["5GB", "9KB"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_transformers_saves_loads_here_with_equal_logits(variant, shard, tmp_path):
    hf = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE | VARIANTS[variant])).eval()
    hf.save_pretrained(tmp_path, max_shard_size=shard)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1 or shard == "9KB"
    ours = load(tmp_path)
    same_parameters(hf, ours)
    same_logits(ours, hf)


def test_half_precision_is_kept_from_transformers_and_back(tmp_path):
    hf = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)).to(torch.bfloat16)
    hf.save_pretrained(tmp_path / "theirs")
    ours = load(tmp_path / "theirs")
    assert (ours.dtype, ours.config.dtype) == (torch.bfloat16, "bfloat16")
    same_parameters(hf, ours)
    save_model(ours, tmp_path / "ours")
    same_parameters(transformers.LlamaForCausalLM.from_pretrained(tmp_path / "ours"), ours)


# ---- what a loaded model is --------------------------------------------------------------------


def test_a_loaded_model_is_in_eval_mode_and_wants_no_gradients(folder):
    model = load(folder)
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16, "torch.float64", "auto", None])
def test_the_dtype_asked_for_is_that_of_the_weights_and_the_config(dtype, model, folder):
    name = "float32" if dtype in ("auto", None) else str(dtype).removeprefix("torch.")
    loaded = load(folder, dtype=dtype)
    assert loaded.config == model.config.replace(dtype=name)
    for got, want in zip(loaded.parameters(), model.parameters(), strict=True):
        assert got.dtype == getattr(torch, name)
        assert torch.equal(got, want.to(got.dtype))


@pytest.mark.parametrize("dtype", ["int8", torch.int32, "fp9"])
def test_a_dtype_that_is_not_supported_is_an_error(dtype, folder):
    with pytest.raises(ValueError, match="expected None, 'auto' or one of float32"):
        load(folder, dtype=dtype)


def test_dtype_and_device_go_by_their_names_in_transformers_too(folder):
    best = "cuda" if torch.cuda.is_available() else "cpu"
    for device, kind in (("cpu", "cpu"), ("auto", best), ({"": "cpu"}, "cpu"), (torch.device("cpu"), "cpu")):
        model = LlamaForCausalLM.from_pretrained(folder, torch_dtype="bfloat16", device_map=device)
        assert (model.dtype, model.device.type) == (torch.bfloat16, kind)
    with pytest.raises(NotImplementedError, match="device_map names cpu, cuda:0: fastllama keeps a model on one"):
        LlamaForCausalLM.from_pretrained(folder, device_map={"model": "cpu", "lm_head": "cuda:0"})


@pytest.mark.parametrize("block_bytes", [1, 100, 1000])
def test_the_size_of_the_blocks_read_does_not_change_the_weights(block_bytes, model, folder, monkeypatch):
    monkeypatch.setattr(reading, "BLOCK_BYTES", block_bytes)
    same_parameters(model, load(folder))


def test_no_progress_bar_is_drawn_where_there_is_no_terminal(folder, capsys):
    load(folder, progress=True)
    assert capsys.readouterr() == ("", "")


def test_rotary_frequencies_that_old_checkpoints_store_are_ignored(model, folder):
    edit_weights(folder, lambda w: w.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    same_parameters(model, load(folder))


# ---- tied weights ------------------------------------------------------------------------------


@pytest.fixture
def tied_folder(tmp_path) -> Path:
    save_model(LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=True)), tmp_path / "tied")
    return tmp_path / "tied"


def test_a_tied_weight_is_saved_once_and_shared_again_after_loading(tied_folder):
    assert "lm_head.weight" not in load_file(tied_folder / "model.safetensors")
    model = load(tied_folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_checkpoint_with_only_the_head_of_a_tied_pair_loads(tied_folder):
    before = load(tied_folder)
    edit_weights(tied_folder, lambda w: w.update({"lm_head.weight": w.pop("model.embed_tokens.weight")}))
    same_parameters(before, load(tied_folder))


def test_both_names_of_a_tied_weight_are_accepted_if_they_hold_the_same(tied_folder):
    edit_weights(tied_folder, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()}))
    load(tied_folder)
    assert load(tied_folder).config.tie_word_embeddings


def test_one_tensor_under_two_names_of_an_untied_model_is_saved_under_both(model, tmp_path):
    model.lm_head.weight = model.model.embed_tokens.weight
    save_model(model, tmp_path)
    loaded = load(tmp_path)
    assert torch.equal(loaded.lm_head.weight, model.model.embed_tokens.weight)
    assert loaded.lm_head.weight is not loaded.model.embed_tokens.weight


# ---- faults ------------------------------------------------------------------------------------


def test_every_tensor_that_does_not_fit_is_listed_in_one_error(folder):
    def spoil(weights):
        del weights["model.norm.weight"], weights[NORM]
        weights["model.layers.1.mlp.router.weight"] = torch.zeros(2, 2)
        weights[Q_PROJ] = torch.zeros(3, 32)
        weights["lm_head.weight"] = torch.zeros(96, 32, dtype=torch.int8)

    edit_weights(folder, spoil)
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    assert sorted(caught.value.problems) == [
        "lm_head.weight: stored as I8, which is not read",
        f"{NORM}: missing, expected [32]",
        "model.layers.1.mlp.router.weight: unexpected: no Llama has it, and it would change the result",
        f"{Q_PROJ}: shape [3, 32], expected [32, 32]",
        "model.norm.weight: missing, expected [32]",
    ]
    for problem in caught.value.problems:
        assert problem in str(caught.value)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_tensor_that_holds_nan_is_named(dtype, folder, monkeypatch):
    def spoil(weights):
        weights.update({key: tensor.to(dtype) for key, tensor in weights.items()})
        weights[Q_PROJ][-1, -1] = math.nan
        weights[NORM][0] = math.nan
        weights["lm_head.weight"][3, 3] = math.inf

    edit_weights(folder, spoil)
    monkeypatch.setattr(reading, "BLOCK_BYTES", 256)
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    assert sorted(caught.value.problems) == [f"{NORM}: holds NaN", f"{Q_PROJ}: holds NaN"]


@pytest.mark.parametrize("left", [0, 7, 100, -1], ids="{} bytes left".format)
def test_a_truncated_file_is_named(left, folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:left])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: truncated or not a safetensors file"):
        load(folder)


def test_all_shards_that_are_missing_or_truncated_are_named(model, tmp_path):
    save_model(model, tmp_path, max_shard_size=9000)
    first, second, *_ = sorted(tmp_path.glob("model-*"))
    first.unlink()
    second.write_bytes(second.read_bytes()[:-4])
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path)
    assert [problem.split(":")[0] for problem in caught.value.problems] == [first.name, second.name]
    assert "missing, though model.safetensors.index.json names it" in str(caught.value)


def test_a_tensor_in_two_shards_is_named(model, tmp_path):
    save_model(model, tmp_path, max_shard_size=9000)
    first, second, *_ = sorted(tmp_path.glob("model-*"))
    (key, tensor), *_ = load_file(first).items()
    save_file(load_file(second) | {key: tensor}, second)
    with pytest.raises(CheckpointError, match=f"{key}: in {first.name} and again in {second.name}"):
        load(tmp_path)


@pytest.mark.parametrize(
    "shard",
    [
        "../outside.safetensors",
        "/etc/outside.safetensors",
        "inside/../../outside.safetensors",
        "..\\outside.safetensors",
        "C:\\outside.safetensors",
        "C:outside.safetensors",
        "pytorch_model.bin",
        "",
    ],
)
def test_an_index_may_only_name_safetensors_files_inside_its_folder(shard, folder):
    shutil.copy(folder / "model.safetensors", folder.parent / "outside.safetensors")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {Q_PROJ: shard}}))
    with pytest.raises(CheckpointError, match="not a safetensors file inside its folder") as caught:
        load(folder)
    assert caught.value.problems == (repr(shard),)


def test_shards_in_a_folder_below_the_index_are_found(model, folder):
    weights = load_file(folder / "model.safetensors")
    (folder / "parts").mkdir()
    (folder / "model.safetensors").rename(folder / "parts/all.safetensors")
    index = {"weight_map": dict.fromkeys(weights, "parts/all.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    same_parameters(model, load(folder))


@pytest.mark.parametrize("content", ["{}", '{"weight_map": {}}', '{"weight_map": []}', "nonsense"])
def test_an_index_without_a_weight_map_is_an_error_that_names_it(content, folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json"):
        load(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth"])
def test_a_folder_with_pickle_files_only_is_refused_with_the_reason(name, folder):
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(b"never read")
    with pytest.raises(CheckpointError, match=rf"{name}.* refused because reading one can run any code"):
        load(folder)


def test_a_folder_without_weights_says_what_is_expected(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointNotFoundError, match=r"holds no weights; expected model\.safetensors"):
        load(folder)


def test_a_config_fastllama_does_not_support_is_an_error_before_any_weights_are_read(folder):
    (folder / "config.json").write_text(json.dumps({"model_type": "mistral"}))
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="model_type is 'mistral'"):
        load(folder)


# ---- names -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["./absent", "/absent/folder", "~/absent", "two/slashes/here", Path("a/b")])
def test_a_name_that_is_no_folder_and_no_hub_id_says_what_names_there_are(name):
    with pytest.raises(
        CheckpointNotFoundError, match=r"no folder .*expected a folder, a .gguf file, a Hugging Face id"
    ):
        resolve(name)


def test_a_hub_id_that_is_not_cached_says_so_when_offline():
    with pytest.raises(CheckpointNotFoundError, match=r"no folder 'some/model', .*HF_HUB_OFFLINE"):
        load("some/model")


def test_a_hub_id_in_the_cache_loads_offline(model, folder):
    cached = Path(constants.HF_HUB_CACHE) / "models--some--cached-model"
    (cached / "refs").mkdir(parents=True, exist_ok=True)
    (cached / "refs/main").write_text("c0ffee")
    shutil.copytree(folder, cached / "snapshots/c0ffee", dirs_exist_ok=True)
    same_parameters(model, load("some/cached-model"))
    assert resolve_path("some/cached-model") == cached / "snapshots/c0ffee"


def test_a_file_or_a_folder_without_config_is_no_checkpoint(folder):
    with pytest.raises(CheckpointNotFoundError, match="is a file; expected the folder"):
        load(folder / "model.safetensors")
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"it has no config\.json"):
        load(folder)


def test_a_folder_may_be_given_as_text_or_path_or_relative(model, folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    for name in (str(folder), folder, folder.name):
        same_parameters(model, load(name))


def test_demo_is_the_folder_shipped_with_the_package_even_beside_another_demo(tmp_path, monkeypatch):
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve_path("demo") == Path(fastllama.__file__).parent / "data" / "demo"
    assert resolve_path("./demo") == Path("demo")


# ---- random weights ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "parameters"),
    [
        ("llama-2-7b", 6738415616),
        ("llama-3.2-1b", 1235814400),
        ("llama-3.2-3b", 3212749824),
        ("llama-3.1-8b", 8030261248),
        ("llama-3.1-70b", 70553706496),
    ],
)
def test_the_published_shapes_have_the_published_number_of_parameters(shape, parameters):
    with torch.device("meta"):
        model = LlamaForCausalLM(RANDOM_SHAPES[shape])
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


@pytest.fixture
def tiny_shape(monkeypatch) -> str:
    shape = LlamaConfig(**SHAPE, attention_bias=True, dtype="bfloat16").replace(vocab_size=6000, hidden_size=64)
    monkeypatch.setitem(RANDOM_SHAPES, "tiny", shape)
    return "random:tiny"


def test_random_weights_are_normal_with_norms_of_one_and_biases_of_zero(tiny_shape):
    model = load(tiny_shape, dtype="float32")
    weight = model.lm_head.weight
    assert weight.std().item() == pytest.approx(0.02, rel=0.01)
    assert weight.mean().item() == pytest.approx(0, abs=2e-4)
    assert weight.unique(dim=0).shape == weight.shape
    assert not torch.equal(weight, model.model.embed_tokens.weight)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert parameter.eq(0 if name.endswith("bias") else 1).all(), name


def test_random_weights_are_the_same_every_time_and_in_the_dtype_of_the_shape(tiny_shape):
    one, other = load(tiny_shape), load(tiny_shape)
    assert one.dtype == torch.bfloat16
    assert one.generation_config.eos_token_id == (2,)
    same_parameters(one, other)


def test_weights_beyond_the_pool_of_random_numbers_repeat_without_equal_rows(tiny_shape, monkeypatch):
    monkeypatch.setattr(random, "POOL", 9973)
    weight = load(tiny_shape, dtype="float32").lm_head.weight  # 6000 x 64 from 9973 numbers
    assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert weight.unique(dim=0).shape == weight.shape


def test_an_unknown_random_shape_lists_the_known_ones():
    with pytest.raises(CheckpointNotFoundError, match=r"no shape 'gpt-2'.*random:llama-3\.2-1b"):
        load("random:gpt-2")
    with pytest.raises(CheckpointNotFoundError, match="no folder"):
        resolve_path("random:llama-2-7b")


LLAMA3 = {
    "vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
    "bos_token_id": 128000, "eos_token_id": 128001, "dtype": "bfloat16",
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "factor", "fields"),
    [
        ("llama-2-7b", None, {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "dtype": "float16"}),
        ("llama-3.2-1b", 32.0, {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}),
        (
            "llama-3.2-3b",
            32.0,
            {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24},
        ),
        ("llama-3.1-8b", 8.0, {"hidden_size": 4096, "intermediate_size": 14336}),
        (
            "llama-3.1-70b",
            8.0,
            {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
        ),
    ],
)
def test_a_published_shape_has_the_config_of_its_checkpoint(name, factor, fields):
    if factor is not None:
        rope = RopeParameters(
            rope_type="llama3", rope_theta=500000.0, factor=factor, low_freq_factor=1.0, high_freq_factor=4.0,
            original_max_position_embeddings=8192,
        )  # fmt: skip
        fields = LLAMA3 | fields | {"rope": rope, "tie_word_embeddings": factor == 32.0}
    assert RANDOM_SHAPES[name] == LlamaConfig(**fields)
    assert len(RANDOM_SHAPES) == 5


# ---- saving ------------------------------------------------------------------------------------


def test_parameters_that_are_views_of_a_fused_matrix_are_saved_right(model, tmp_path):
    reference = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for layer in model.model.layers:
        attention = layer.self_attn
        Matrix.joined((attention.q_proj, attention.k_proj, attention.v_proj))
    attention.o_proj.weight.data = attention.o_proj.weight.data.t().contiguous().t()
    for shard in ("5GB", 5000):
        save_model(model, tmp_path, max_shard_size=shard)
        for name, parameter in load(tmp_path).named_parameters():
            assert torch.equal(parameter, reference[name]), name
        stored = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
        assert stored < 1.5 * sum(tensor.nbytes for tensor in reference.values())


@pytest.mark.parametrize(("size", "limit"), [(9000, 9000), ("9KB", 9000), ("8.5 KiB", 8704), ("9000", 9000)])
def test_no_shard_is_larger_than_asked_for_unless_one_tensor_is(size, limit, model, tmp_path):
    save_model(model, tmp_path, max_shard_size=size)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = [load_file(tmp_path / shard) for shard in sorted(set(index["weight_map"].values()))]
    assert len(shards) > 2
    for shard in shards:
        assert len(shard) == 1 or sum(tensor.nbytes for tensor in shard.values()) <= limit
    assert index["metadata"]["total_size"] == sum(parameter.nbytes for parameter in model.parameters())


@pytest.mark.parametrize("size", ["many", "5 cats", 0, "-1GB", "GB"])
def test_a_shard_size_that_is_none_is_an_error(size, model, tmp_path):
    with pytest.raises(ValueError, match="max_shard_size is"):
        save_model(model, tmp_path, max_shard_size=size)


def test_saving_again_leaves_no_weights_of_the_earlier_checkpoint(model, tmp_path):
    (tmp_path / "notes.safetensors").write_bytes(b"not ours")
    for size in (9000, "5GB", 20000, 9000):
        save_model(model, tmp_path, max_shard_size=size)
        names = {file.name for file in tmp_path.glob("model*")}
        index = tmp_path / "model.safetensors.index.json"
        if size == "5GB":
            assert names == {"model.safetensors"}
        else:
            assert names == {index.name, *json.loads(index.read_text())["weight_map"].values()}
        same_parameters(model, load(tmp_path))
    assert (tmp_path / "notes.safetensors").exists()


def test_a_save_that_fails_leaves_the_earlier_checkpoint_as_it_was(model, folder, monkeypatch):
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    calls = []

    def full_disk(tensors, file, metadata):
        calls.append(file)
        if len(calls) == 2:
            raise OSError("no space left on device")
        save_file(tensors, file, metadata)

    monkeypatch.setattr(save, "save_file", full_disk)
    with pytest.raises(OSError, match="no space left"):
        save_model(LlamaForCausalLM(model.config), folder, max_shard_size=9000)
    assert len(calls) == 2
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_saved_files_have_the_usual_permissions(folder):
    assert (folder / "model.safetensors").stat().st_mode == (folder / "config.json").stat().st_mode


def test_a_checkpoint_can_be_saved_over_the_one_it_was_loaded_from(folder):
    loaded = load(folder, dtype="bfloat16")
    save_model(loaded, folder)
    again = load(folder)
    assert again.dtype == torch.bfloat16
    same_parameters(loaded, again)


# ---- memory ------------------------------------------------------------------------------------

MEASURE = """
import gc, sys, torch
from fastllama.loading.load import load_model
from fastllama.causal_lm import LlamaForCausalLM

def status(field):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field))

small, large = sys.argv[1:]
load_model(LlamaForCausalLM, small)  # everything is imported
gc.collect()
try:
    open("/proc/self/clear_refs", "w").write("5")  # starts a new peak
except OSError:
    pass  # the peak so far counts: a stricter bound
before = status("VmRSS")
model = load_model(LlamaForCausalLM, large)
print((status("VmHWM") - before) / sum(parameter.nbytes for parameter in model.parameters()))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads the peak from /proc")
@pytest.mark.parametrize("shard", ["5GB", "60MB"], ids=["one file", "sharded"])
def test_loading_takes_at_most_115_percent_of_the_memory_of_the_weights(shard, folder, tmp_path, monkeypatch):
    large = LlamaConfig(
        vocab_size=32000,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=5,
        num_attention_heads=8,
        dtype="bfloat16",
    )
    monkeypatch.setitem(RANDOM_SHAPES, "large", large)
    model = load("random:large")
    assert sum(parameter.nbytes for parameter in model.parameters()) > 250e6
    save_model(model, tmp_path / "large", max_shard_size=shard)
    del model
    command = [sys.executable, "-c", MEASURE, folder, tmp_path / "large"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) <= 1.15, done.stdout


def test_what_the_hub_is_asked_for_is_what_is_read() -> None:
    read = [
        "config.json", "generation_config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json",
        "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
        "chat_template.jinja", "additional_chat_templates/rag.jinja", "adapter_config.json",
        "adapter_model.safetensors",
    ]  # fmt: skip
    other = [
        "original/consolidated.00.pth", "original/params.json", "original/tokenizer.model", "onnx/config.json",
        "consolidated.safetensors", "pytorch_model.bin", "README.md", "q4/model.safetensors", "model-q4.gguf",
    ]  # fmt: skip
    kept = filter_repo_objects(read + other, allow_patterns=names.HUB_FILES, ignore_patterns=names.HUB_IGNORED)
    assert sorted(kept) == sorted(read)
