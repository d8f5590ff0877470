"""Weights that are used where they lie in a safetensors file: which, what may be done with them, and what it saves."""

from __future__ import annotations

import copy
import gc
import json
import math
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from shapes import IDS, SHAPE

from fastllama import CheckpointError, LlamaConfig, LlamaForCausalLM, QuantizationConfig
from fastllama.engine.decoder import FusedDecoder
from fastllama.loading import safetensors_writer
from fastllama.quantization.matrix import Matrix

MAPS = Path("/proc/self/maps")
pytestmark = pytest.mark.skipif(not MAPS.exists(), reason="reads what is mapped from /proc")

SCHEMES: dict[str, Any] = {
    "dense": None,
    "int4": "int4",
    "int8": "int8",
    "some as they are": QuantizationConfig(exclude=("down_proj", "layers.0.self_attn.k_proj", "lm_head")),
}
QKV = ("q_proj", "k_proj", "v_proj")


def written(folder: Path, scheme: str, max_shard_size: int | str = "5GB", **config: Any) -> Path:
    """A folder with random weights, in a scheme."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE | config)).save_pretrained(folder / "plain")
    model = LlamaForCausalLM.from_pretrained(folder / "plain", quantize=SCHEMES[scheme])
    model.save_pretrained(folder / "model", max_shard_size=max_shard_size)
    return folder / "model"


def logits(model: LlamaForCausalLM) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def state(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


def mappings() -> list[tuple[int, int, str, str]]:
    """First address, end, permissions and file of all that this process has mapped from files."""
    fields = [line.split(maxsplit=5) for line in MAPS.read_text().splitlines()]
    ranges = [([int(end, 16) for end in line[0].split("-")], line) for line in fields if len(line) == 6]
    return [(first, end, line[1], line[5]) for (first, end), line in ranges]


def is_in_a_file(tensor: torch.Tensor, folder: Path) -> bool:
    """Whether all of a tensor lies in a file of the folder that is mapped for this process alone."""
    first, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    found = [each for each in mappings() if each[0] <= first < each[1] and each[3].startswith(str(folder))]
    assert all(permissions.endswith("p") and end <= last for _, last, permissions, _ in found)
    return bool(found)


def copied(model: LlamaForCausalLM, folder: Path) -> set[str]:
    """The matrices of a model that do not lie in a file of the folder."""
    return {name for name, each in state(model).items() if each.dim() > 1 and not is_in_a_file(each, folder)}


def in_the_order_of_safetensors(folder: Path) -> None:
    """Write a folder's file again, as the package does and as we did."""
    tensors, file = load_file(folder / "model.safetensors"), folder / "model.safetensors"
    file.unlink()
    save_file(tensors, file, metadata={"format": "pt"})


# ---- which, and where --------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("config", [{}, {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}])
def test_the_engine_reads_every_matrix_in_the_file_that_we_wrote(scheme, config, tmp_path):
    folder = written(tmp_path, scheme, **config)
    model = LlamaForCausalLM.from_pretrained(folder)
    matrices = [module for module in FusedDecoder(model).modules() if isinstance(module, Matrix)]
    tensors = [tensor for matrix in matrices for tensor in matrix.tensors if tensor.dim() > 1]
    assert len(matrices) >= 2 * 4 + 1
    assert all(is_in_a_file(tensor, folder) for tensor in tensors)
    assert not copied(model, folder)
    assert torch.equal(
        logits(model), logits(LlamaForCausalLM.from_pretrained(tmp_path / "plain", quantize=SCHEMES[scheme]))
    )


def test_codes_are_whole_lines_of_64_bytes_in_the_file_too(tmp_path):
    model = LlamaForCausalLM.from_pretrained(written(tmp_path, "int4"))
    assert not [name for name, tensor in state(model).items() if name.endswith(".codes") and tensor.data_ptr() % 64]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_of_several_files_only_products_that_are_cut_are_copied(scheme, tmp_path):
    folder = written(tmp_path, scheme, max_shard_size=20000)
    model = LlamaForCausalLM.from_pretrained(folder)
    files = {name: file for file in folder.glob("*.safetensors") for name in load_file(file)}
    assert len(set(files.values())) > 2
    names = copied(model, folder)
    products = [[f"self_attn.{part}" for part in QKV], ["mlp.gate_proj", "mlp.up_proj"]]
    for layer in range(2):
        for modules in products:
            for part in ("weight", "codes", "scales", "offsets"):
                keys = [f"model.layers.{layer}.{module}.{part}" for module in modules]
                is_cut = len({files.get(key) for key in keys}) > 1
                assert is_cut == bool(names.intersection(keys))
    assert not [name for name in names if name.split(".")[-2] not in (*QKV, "gate_proj", "up_proj")]
    assert torch.equal(
        logits(model), logits(LlamaForCausalLM.from_pretrained(tmp_path / "plain", quantize=SCHEMES[scheme]))
    )


@pytest.mark.parametrize("scheme", SCHEMES)
def test_files_in_the_order_of_names_give_the_same_and_only_joined_matrices_are_copied(scheme, tmp_path):
    folder = written(tmp_path, scheme)
    expected = LlamaForCausalLM.from_pretrained(folder)
    tokens, values = expected.generate(IDS, max_new_tokens=6, do_sample=False), logits(expected)
    in_the_order_of_safetensors(folder)
    model = LlamaForCausalLM.from_pretrained(folder)
    assert torch.equal(logits(model), values)
    assert torch.equal(model.generate(IDS, max_new_tokens=6, do_sample=False), tokens)
    names = copied(model, folder)
    assert {name for name in state(model) if name.endswith(("q_proj.weight", "q_proj.codes"))} <= names
    assert not [name for name in names if "o_proj" in name or "down_proj" in name or "lm_head" in name]


def test_a_file_that_starts_its_numbers_at_an_odd_byte_is_copied(tmp_path):
    folder = written(tmp_path, "dense")
    file = folder / "model.safetensors"
    expected = logits(LlamaForCausalLM.from_pretrained(folder))
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    file.unlink()
    file.write_bytes((size + 1).to_bytes(8, "little") + content[8 : 8 + size] + b" " + content[8 + size :])
    model = LlamaForCausalLM.from_pretrained(folder)
    assert copied(model, folder) == {name for name, tensor in state(model).items() if tensor.dim() > 1}
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("how", [{"dtype": "bfloat16"}, {"quantize": "int8"}], ids=str)
def test_a_file_whose_matrices_are_kept_as_something_else_is_not_kept_mapped(how, tmp_path):
    folder = written(tmp_path, "dense")
    model = LlamaForCausalLM.from_pretrained(folder, **how)
    assert not [file for *_, file in mappings() if file.startswith(str(folder))]
    assert logits(model).isfinite().all()


def test_a_file_is_mapped_as_long_as_one_of_its_matrices_is_there(tmp_path):
    folder = written(tmp_path, "int4")
    model = LlamaForCausalLM.from_pretrained(folder)
    model.generate(IDS, max_new_tokens=2)
    codes = model.lm_head.codes
    expected = codes.clone()
    del model
    gc.collect()
    assert is_in_a_file(codes, folder)
    assert torch.equal(codes, expected)
    del codes
    gc.collect()
    assert not [file for *_, file in mappings() if file.startswith(str(folder))]


# ---- what may be done with them ----------------------------------------------------------------


def _to_zero(model: LlamaForCausalLM) -> None:
    for tensor in state(model).values():
        tensor.data.zero_()


def _by_load_state_dict(model: LlamaForCausalLM) -> None:
    model.load_state_dict({key: torch.zeros_like(tensor) for key, tensor in model.state_dict().items()})


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("edit", [_to_zero, _by_load_state_dict])
def test_a_change_of_the_weights_does_not_reach_the_file(edit: Callable, scheme, tmp_path):
    folder = written(tmp_path, scheme)
    before = (folder / "model.safetensors").read_bytes()
    model, other = (LlamaForCausalLM.from_pretrained(folder) for _ in range(2))
    expected = logits(other)
    edit(model)
    assert not any(tensor.any() for tensor in state(model).values())
    assert not copied(model, folder)
    assert torch.equal(logits(other), expected)
    assert (folder / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_changed_model_can_be_saved_over_the_file_that_it_lies_in(scheme, tmp_path):
    folder = written(tmp_path, scheme)
    model, other = (LlamaForCausalLM.from_pretrained(folder) for _ in range(2))
    unchanged = logits(other)
    model.model.norm.weight.data.mul_(2)
    part = next(
        tensor for name, tensor in state(model).items() if "1.mlp.down_proj" in name and tensor.dtype.is_floating_point
    )
    part.data.mul_(2)
    expected = logits(model)
    for _ in range(2):
        model.save_pretrained(folder)
        assert torch.equal(logits(model), expected)
        assert torch.equal(logits(LlamaForCausalLM.from_pretrained(folder)), expected)
    assert not torch.equal(expected, unchanged)
    assert torch.equal(logits(other), unchanged)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_copies_and_pickles_hold_their_own_weights_once(scheme, tmp_path):
    folder = written(tmp_path, scheme)
    model = LlamaForCausalLM.from_pretrained(folder)
    pickled = pickle.dumps(model)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    held = sum(tensor.nbytes for tensor in state(model).values())
    assert held < (tmp_path / "state.pt").stat().st_size < 1.5 * held
    for again in (copy.deepcopy(model), pickle.loads(pickled)):
        assert copied(again, folder) == {name for name, tensor in state(model).items() if tensor.dim() > 1}
        assert torch.equal(logits(again), logits(model))


# ---- damage ------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["dense", "int4"])
@pytest.mark.parametrize("left", [0, 7, 100, -1], ids="{} bytes left".format)
def test_a_truncated_file_is_named_and_not_mapped(scheme, left, tmp_path):
    folder = written(tmp_path, scheme)
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:left])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: truncated or not a safetensors file"):
        LlamaForCausalLM.from_pretrained(folder)
    assert not [file for *_, file in mappings() if file.startswith(str(folder))]


@pytest.mark.parametrize(
    ("scheme", "name"),
    [
        ("dense", "model.layers.1.mlp.down_proj.weight"),
        ("dense", "model.layers.0.self_attn.k_proj.weight"),
        ("int4", "model.layers.1.mlp.up_proj.scales"),
        ("int4", "model.layers.0.self_attn.o_proj.offsets"),
        ("int4", "model.norm.weight"),
    ],
)
def test_what_is_no_number_is_found_where_nothing_is_copied(scheme, name, tmp_path):
    folder = written(tmp_path, scheme)
    model = LlamaForCausalLM.from_pretrained(folder)
    state(model)[name].data.view(-1)[-1] = math.nan
    model.save_pretrained(folder)
    with pytest.raises(CheckpointError, match=rf"{name}: holds NaN"):
        LlamaForCausalLM.from_pretrained(folder)


def test_a_matrix_of_another_dtype_is_refused_before_it_is_used(tmp_path):
    folder = written(tmp_path, "int4")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.scales"] = tensors["model.layers.0.mlp.up_proj.scales"].bfloat16()
    (folder / "model.safetensors").unlink()  # the tensors lie in it
    safetensors_writer.save_file(tensors, folder / "model.safetensors", {})
    with pytest.raises(CheckpointError, match=r"up_proj.scales: stored as BF16, expected torch.float16"):
        LlamaForCausalLM.from_pretrained(folder)


# ---- the writer --------------------------------------------------------------------------------


def test_the_package_reads_what_is_written_in_the_order_in_which_it_was_given(tmp_path):
    tensors = {
        "v": torch.randn(3, 5).bfloat16(), "q": torch.randn(4, 6).t(), "k": torch.arange(7, dtype=torch.uint8)[1:],
        "é": torch.randn(2, 1, 3).half(), "d": torch.randn(1).double(),
    }  # fmt: skip
    file = tmp_path / "model.safetensors"
    safetensors_writer.save_file(tensors, file, {"format": "pt", "note": "ü"})
    for key, tensor in load_file(file).items():
        assert torch.equal(tensor, tensors[key])
        assert tensor.dtype == tensors[key].dtype
    with safe_open(file, framework="pt") as content:
        assert content.metadata() == {"format": "pt", "note": "ü"}
        assert list(content.offset_keys()) == list(tensors)
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    assert (8 + size) % 64 == 0
    assert json.loads(content[8 : 8 + size])["q"]["shape"] == [6, 4]


def test_a_dtype_that_checkpoints_are_not_read_in_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"ids is torch\.int64, expected one of torch\.float64"):
        safetensors_writer.save_file({"ids": torch.arange(3)}, tmp_path / "model.safetensors", {})


# ---- memory ------------------------------------------------------------------------------------

GROWTH = """
import re, sys
from pathlib import Path
from fastllama import LlamaForCausalLM

def own():  # memory that is no file's
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

LlamaForCausalLM.from_pretrained(sys.argv[1])  # loads what the second one needs
before = own()
model = LlamaForCausalLM.from_pretrained(sys.argv[2])
print((own() - before) / sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())))
"""


@pytest.mark.parametrize(
    ("scheme", "order", "most"), [("int4", "ours", 0.1), ("dense", "ours", 0.1), ("dense", "names", 0.3)]
)
def test_what_lies_in_a_file_takes_no_memory_of_this_process(scheme, order, most, tmp_path):
    small = written(tmp_path / "small", scheme)
    sizes = {"vocab_size": 1000, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6}
    large = written(tmp_path / "large", scheme, **sizes)
    if order == "names":
        in_the_order_of_safetensors(large)

    def growth(*folders: Path) -> float:
        command = [sys.executable, "-c", GROWTH, *map(str, folders)]
        return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    assert growth(small, large) < most
    content = (large / "model.safetensors").read_bytes()
    size = int.from_bytes(content[:8], "little")
    odd = (size + 1).to_bytes(8, "little") + content[8 : 8 + size] + b" " + content[8 + size :]
    (large / "model.safetensors").write_bytes(odd)
    assert growth(small, large) > (0.5 if scheme == "dense" else 0.1), "weights that are copied would be seen"
