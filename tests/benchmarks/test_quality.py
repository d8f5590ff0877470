"""What quantization costs: figures by their definitions, gates on the demo, the command."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from fastllama import LlamaForCausalLM, load_tokenizer
from fastllama.quantization.quality import quality, windows
from fastllama_benchmarks.quality import held_out_text
from fastllama_benchmarks.records import read


@pytest.fixture(scope="module")
def demo() -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained("demo", dtype="float32")


def texts(tokens: int) -> list[torch.Tensor]:
    tokenizer = load_tokenizer("demo")
    ids = tokenizer.encode(held_out_text(docstrings=False), add_special_tokens=False)[:tokens]
    return list(windows(ids, 256, tokenizer.bos_token_id))


def test_figures_are_those_of_their_definitions(demo) -> None:
    other = LlamaForCausalLM.from_pretrained("demo", dtype="float32", quantize="int4")
    (ids,) = texts(256)
    found = quality(other, demo, [ids])
    with torch.no_grad():
        ours, theirs = (model(ids).logits[0, :-1].double().softmax(-1) for model in (other, demo))
    targets = ids[0, 1:]
    loss = -ours[torch.arange(len(targets)), targets].log().mean()
    assert found.tokens == len(targets) == 255
    assert found.perplexity == pytest.approx(math.exp(loss), rel=1e-4)
    assert found.divergence == pytest.approx(float((theirs * (theirs / ours).log()).sum(-1).mean()), rel=1e-3)
    assert found.agreement == pytest.approx(float((ours.argmax(-1) == theirs.argmax(-1)).double().mean()))


@pytest.mark.parametrize(("scheme", "cost"), [("int8", 0.005), ("int4", 0.06)])
def test_quantization_of_the_demo_stays_within_its_gate(demo, scheme, cost) -> None:
    read = texts(4096)
    plain = quality(demo, demo, read)
    assert (plain.divergence, plain.agreement) == (pytest.approx(0, abs=1e-6), 1.0)
    found = quality(LlamaForCausalLM.from_pretrained("demo", dtype="float32", quantize=scheme), demo, read)
    assert found.perplexity <= (1 + cost) * plain.perplexity
    assert found.agreement > {"int8": 0.95, "int4": 0.85}[scheme]


def test_an_int8_kv_cache_of_the_demo_stays_within_its_gate(demo) -> None:
    read = texts(2048)
    plain, found = quality(demo, demo, read), quality(demo, demo, read, torch.int8)
    assert found.perplexity <= 1.005 * plain.perplexity
    assert found.agreement > 0.97
    assert found.divergence > 1e-6


def test_windows_cover_the_text_once_after_bos() -> None:
    found = list(windows(range(10, 20), 4, bos=1))
    assert [window.tolist() for window in found] == [[[1, 10, 11, 12]], [[1, 13, 14, 15]], [[1, 16, 17, 18]]]
    assert [window.tolist() for window in windows([5, 6, 7], 2)] == [[[5, 6]]]
    assert [window.tolist() for window in windows([5, 6], 8, bos=1)] == [[[1, 5, 6]]]
    with pytest.raises(ValueError, match="no text to read"):
        quality(None, None, [])  # type: ignore[arg-type]


def test_the_command_writes_a_record(bench, memory, tmp_path: Path) -> None:
    sizes, file = ("--tokens", "300", "--window", "64"), str(tmp_path / "r.jsonl")
    done = bench("quality", *sizes, "--schemes", "int8,none", "--quiet", "--record", file)
    assert done.exit_code == 0, done.output
    (record,) = read(file)
    assert list(record["schemes"]) == ["none", "int8"]
    assert (record["memory_bandwidth_gb_s"], record["text"]) == (10, "the standard library")
    assert record["schemes"]["int8"]["bytes_per_step"] < 0.55 * record["schemes"]["none"]["bytes_per_step"]
    assert "same token" in done.output
    wrong = bench("quality", *sizes, "--schemes", "int8,int3")
    assert (wrong.exit_code, "quantize is 'int3'" in wrong.output, "reading" in wrong.output) == (1, True, False)


def test_a_decode_of_quantized_weights_passes_parity(bench, memory) -> None:
    sizes = ("--peers", "none", "--rounds", "1", "--new-tokens", "8")
    done = bench("decode", "--quantize", "none,int4", *sizes, "--quiet", "--json", "-")
    assert done.exit_code == 0, done.output
    points = json.loads(done.stdout.splitlines()[-1])["points"]
    assert [point["quantize"] for point in points] == [None, "int4"]
    assert all(point["parity"] for point in points)
    assert points[1]["bytes_per_step"] < 0.5 * points[0]["bytes_per_step"]
