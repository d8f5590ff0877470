"""llama.cpp as a peer: the GGUF file holds our weights, and llama-bench is run and read as it should be."""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from pathlib import Path

import gguf
import pytest
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from fastllama import LlamaConfig, LlamaForCausalLM
from fastllama.config import RopeParameters
from fastllama.loading.gguf import write_gguf
from fastllama_benchmarks.harness import Unavailable, Workload
from fastllama_benchmarks.peers.llama_cpp import LlamaBench, find_llama_bench, open_llama_bench

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

# What llama-bench 0c1e570 printed for `-m demo.gguf -o json -r 1 -t 1 -ngl 0 -p 0 -n 8 -d 16`.
RECORDED = """\
[
  {
    "build_commit": "0c1e570",
    "build_number": 1,
    "cpu_info": "AMD EPYC",
    "gpu_info": "",
    "backends": "CPU",
    "model_filename": "demo.gguf",
    "model_type": "llama ?B all F32",
    "model_size": 21902336,
    "model_n_params": 5475584,
    "n_batch": 2048,
    "n_ubatch": 512,
    "n_threads": 1,
    "cpu_mask": "0x0",
    "cpu_strict": false,
    "poll": 50,
    "type_k": "f16",
    "type_v": "f16",
    "n_gpu_layers": 0,
    "n_cpu_moe": 0,
    "split_mode": "layer",
    "main_gpu": 0,
    "no_kv_offload": false,
    "flash_attn": -1,
    "devices": "auto",
    "tensor_split": "0.00",
    "tensor_buft_overrides": "none",
    "load_mode": "auto",
    "lazy_mode": "auto",
    "embeddings": false,
    "no_op_offload": 0,
    "no_host": false,
    "repack": true,
    "fit_target": 0,
    "fit_min_ctx": 0,
    "n_prompt": 0,
    "n_gen": 8,
    "n_depth": 16,
    "test_time": "2026-11-22T18:38:36Z",
    "avg_ns": 5720582,
    "stddev_ns": 0,
    "avg_ts": 1398.459108,
    "stddev_ts": 0.000000,
    "samples_ns": [ 5720582 ],
    "samples_ts": [ 1398.46 ]
  }
]
"""


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


def test_the_gguf_file_tells_the_constants_of_the_network(tmp_path: Path) -> None:
    write_gguf(random_llama(rope=RopeParameters(rope_theta=1234.0)), tmp_path / "model.gguf")
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    told = {name: field.contents() for name, field in fields.items() if not name.startswith("GGUF.")}
    assert told == {
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


def test_without_the_gguf_package_the_reason_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: Path
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(Unavailable, match="pip install gguf"):
        open_llama_bench(random_llama(), program, tmp_path)


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """A llama-bench that notes how it was called and prints what the real one does."""
    code = f"""\
        import json, os, sys
        arguments = dict(zip(sys.argv[1::2], sys.argv[2::2]))
        assert open(arguments["-m"], "rb").read(4) == b"GGUF"
        arguments["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES")
        with open({str(tmp_path / "calls")!r}, "a") as calls:
            print(json.dumps(arguments), file=calls)
        result, = json.loads({RECORDED!r})
        result["avg_ns"] = 3_000_000 if arguments["-n"] == "0" else 500_000 * int(arguments["-n"])
        print(json.dumps([result]))
        """
    return script(tmp_path / "llama-bench", code)


def script(path: Path, code: str) -> Path:
    """A program in Python."""
    lines = [line.removeprefix(" " * 8) for line in code.splitlines()]
    path.write_text("\n".join([f"#!{sys.executable}", *lines]))
    path.chmod(0o755)
    return path


def calls(tmp_path: Path) -> list[dict[str, str]]:
    """How the fake was called."""
    return [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]


def test_the_weights_are_written_once(tmp_path: Path, program: Path) -> None:
    contender = open_llama_bench(random_llama(), program, tmp_path)
    contender.run(Workload.random(96, 1, 8, 1))
    written = (tmp_path / "model.gguf").stat().st_mtime_ns
    contender.run(Workload.random(96, 1, 8, 1))
    assert (tmp_path / "model.gguf").stat().st_mtime_ns == written


def test_llama_bench_times_the_prompt_and_then_as_many_steps_as_others_take(tmp_path: Path, program: Path) -> None:
    workload = Workload.random(96, 1, 24, 9)
    contender = open_llama_bench(random_llama(), program, tmp_path)
    run = contender.run(workload)
    assert (run.tokens, run.ttft, run.tpot) == (None, pytest.approx(3e-3), pytest.approx((5e-4,)))
    threads = str(torch.get_num_threads())
    same = {"-m": str(tmp_path / "model.gguf"), "-o": "json", "-r": "1", "-t": threads, "-ngl": "0"}
    same |= {"CUDA_VISIBLE_DEVICES": ""}
    assert calls(tmp_path) == [same | {"-p": "24", "-n": "0"}, same | {"-p": "0", "-n": "8", "-d": "24"}]
    assert contender.name == "llama.cpp"
    assert contender.info["build_commit"] == "0c1e570"


def test_a_single_new_token_needs_no_decode(tmp_path: Path, program: Path) -> None:
    workload = Workload.random(96, 1, 24, 1)
    assert open_llama_bench(random_llama(), program, tmp_path).run(workload).tpot == ()
    assert len(calls(tmp_path)) == 1


def test_closing_removes_the_weights(tmp_path: Path, program: Path) -> None:
    contender = open_llama_bench(random_llama(), program, tmp_path)
    contender.run(Workload.random(96, 1, 8, 1))
    assert (tmp_path / "model.gguf").exists()
    contender.close()
    assert not (tmp_path / "model.gguf").exists()


def test_on_cuda_all_layers_run_on_one_gpu_and_a_build_without_one_is_told(tmp_path: Path, program: Path) -> None:
    device, write = torch.device("cuda:1"), partial(Path.write_bytes, data=b"GGUF")
    contender = LlamaBench(str(program), tmp_path / "model.gguf", device, write)
    with pytest.raises(Unavailable, match="built for the CPU alone; the model is on cuda:1"):
        contender.run(Workload.random(96, 1, 8, 4))
    (call,) = calls(tmp_path)
    assert (call["-ngl"], call["-sm"], call["-mg"]) == ("99", "none", "1")
    assert call["CUDA_VISIBLE_DEVICES"] == os.environ.get("CUDA_VISIBLE_DEVICES")


def test_a_batch_is_refused_before_weights_are_written(tmp_path: Path, program: Path) -> None:
    with pytest.raises(Unavailable, match="one sequence at a time, not 4"):
        open_llama_bench(random_llama(), program, tmp_path).run(Workload.random(96, 4, 8, 4))
    assert not (tmp_path / "model.gguf").exists()


def test_a_missing_program_is_named_with_the_option_that_gives_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    with pytest.raises(Unavailable, match="llama-bench not found on PATH; give it with --llama-bench PATH"):
        find_llama_bench()
    with pytest.raises(Unavailable, match="--llama-bench elsewhere/llama-bench: there is no program"):
        find_llama_bench("elsewhere/llama-bench")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_llama_bench() == str(program)


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("import sys; print('usage', file=sys.stderr); sys.exit('error: invalid parameter for argument: -d')",
         "ended with code 1: error: invalid parameter for argument: -d"),
        ("raise SystemExit(3)", "ended with code 3: it wrote nothing"),
        ("print('| model | t/s |')", "printed no result as JSON but"),
        ("print('[]')", "printed no result as JSON but"),
    ],
)  # fmt: skip
def test_what_goes_wrong_in_llama_bench_is_told_in_one_line(tmp_path: Path, code: str, told: str) -> None:
    contender = open_llama_bench(random_llama(), script(tmp_path / "broken", code), tmp_path)
    with pytest.raises(Unavailable, match=told) as raised:
        contender.run(Workload.random(96, 1, 8, 4))
    assert "\n" not in str(raised.value)
