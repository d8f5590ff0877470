"""Codes by error feedback: against the least squares that they approximate, in float64; what a network gains."""

from __future__ import annotations

import re
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch

from fastllama import LlamaConfig, LlamaForCausalLM, QuantizationConfig, load_tokenizer, ops
from fastllama.quantization.calibration import DAMPING, calibrate, feedback_codes, feedback_factor
from fastllama.quantization.linear import packed_modules
from fastllama.quantization.quality import quality, windows

GROUP = 32


def correlated(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Inputs that lie near a quarter of the directions there are, as those of networks do."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns // 4, columns, generator=generator)
    few = torch.randn(rows, columns // 4, generator=generator)
    return few @ mix + 0.1 * torch.randn(rows, columns, generator=generator)


def weights(rows: int, columns: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def plain(weight_nk: torch.Tensor, has_offsets: bool) -> torch.Tensor:
    """What the codes stand for that are chosen without a text."""
    codes, scales, offsets = ops.quantize(weight_nk, 4, GROUP, has_offsets)
    return ops.dequantized(codes, scales, offsets if has_offsets else None, weight_nk.shape[1], torch.float32)


def meant(code_nk: torch.Tensor, scale_ng: torch.Tensor, offset_ng: torch.Tensor) -> torch.Tensor:
    scale_nk, offset_nk = (each.repeat_interleave(GROUP, dim=1) for each in (scale_ng, offset_ng))
    return code_nk.float() * scale_nk + offset_nk


def by_least_squares(weight_nk: torch.Tensor, gram_kk: torch.Tensor, has_offsets: bool) -> torch.Tensor:
    """Columns rounded one after the other; before each, all that remain are solved for again, in float64."""
    weight_nk, gram_kk = weight_nk.double(), gram_kk.double()
    gram_kk = gram_kk + DAMPING * gram_kk.diagonal().mean() * torch.eye(len(gram_kk), dtype=torch.float64)
    done_nk = torch.empty_like(weight_nk)
    for i in range(weight_nk.shape[1]):
        error = weight_nk[:, :i] - done_nk[:, :i]
        rest = weight_nk[:, i:] + torch.linalg.solve(gram_kk[i:, i:], gram_kk[i:, :i] @ error.T).T
        if i % GROUP == 0:
            _, scales, offsets = ops.quantize(rest[:, :GROUP].float().contiguous(), 4, GROUP, has_offsets)
            scale = scales.flatten().double()
            offset = offsets.flatten().double() if has_offsets else -8 * scale
        done_nk[:, i] = ((rest[:, 0] - offset) / scale).round().clamp(0, 15) * scale + offset
    return done_nk


@pytest.mark.parametrize("has_offsets", [False, True])
def test_each_column_is_rounded_where_least_squares_of_the_rest_put_it(has_offsets) -> None:
    x, weight = correlated(200, 96), weights(32, 96)
    gram = x.T @ x
    found = meant(*feedback_codes(weight, feedback_factor(gram), GROUP, has_offsets))
    expected = by_least_squares(weight, gram, has_offsets)
    # A number in the middle of two codes may go either way in float32, and the rest of its row with it.
    rows = (found - expected).abs().amax(dim=1) < 1e-4
    assert rows.float().mean() > 0.9


@pytest.mark.parametrize("has_offsets", [False, True])
def test_the_error_of_outputs_falls_on_inputs_that_were_not_seen(has_offsets) -> None:
    weight, seen, other = weights(48, 128), *correlated(2000, 128).split(1000)
    codes = feedback_codes(weight, feedback_factor(seen.T @ seen), GROUP, has_offsets)
    errors = [(other @ (each - weight).T).square().sum() for each in (meant(*codes), plain(weight, has_offsets))]
    assert errors[0] < 0.5 * errors[1]


@pytest.mark.parametrize("has_offsets", [False, True])
def test_inputs_without_correlation_change_nothing(has_offsets) -> None:
    weight = weights(32, 128)
    codes = feedback_codes(weight, feedback_factor(torch.eye(128)), GROUP, has_offsets)
    torch.testing.assert_close(meant(*codes), plain(weight, has_offsets), rtol=0, atol=1e-5)


def test_the_factor_is_that_of_the_inverse() -> None:
    x = correlated(300, 64).double()
    gram = x.T @ x
    factor = feedback_factor(gram)
    damped = gram + DAMPING * gram.diagonal().mean() * torch.eye(64, dtype=torch.float64)
    assert torch.equal(factor, factor.triu())
    torch.testing.assert_close(factor.T @ factor @ damped, torch.eye(64, dtype=torch.float64))


@pytest.fixture(scope="module")
def demo() -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained("demo", dtype="float32")


def texts(module: str, tokens: int) -> list[torch.Tensor]:
    tokenizer = load_tokenizer("demo")
    source = (Path(sysconfig.get_path("stdlib")) / module).read_text(encoding="utf-8")
    ids = tokenizer.encode(source, add_special_tokens=False)[:tokens]
    return list(windows(ids, 256, tokenizer.bos_token_id))


def test_a_calibrated_demo_is_nearer_on_a_text_that_was_not_seen(demo) -> None:
    read, model = texts("tarfile.py", 2048), LlamaForCausalLM.from_pretrained("demo", dtype="float32", quantize="int4")
    before, ids = quality(model, demo, read), read[0][:, :20]
    model.generate(ids, max_new_tokens=1)  # what the engine has joined takes the new codes too
    calibrate(model, demo, texts("argparse.py", 4096))
    after = quality(model, demo, read)
    assert after.divergence < 0.6 * before.divergence
    assert after.perplexity < before.perplexity
    greedy = model(ids).logits[:, -1].argmax(-1)
    assert model.generate(ids, max_new_tokens=1)[:, -1].tolist() == greedy.tolist()


def small(**changes: Any) -> LlamaForCausalLM:
    shape = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=4, **changes))


@pytest.mark.parametrize(
    "scheme",
    [
        QuantizationConfig(symmetric=True, exclude=("layers.0.mlp.down_proj", "layers.1.self_attn.o_proj")),
        QuantizationConfig(group_size=None, head_bits=None),
    ],
    ids=["with matrices left as they are", "a scale a row"],
)
@pytest.mark.parametrize("bias", [False, True])
def test_every_scheme_of_4_bits_is_calibrated(scheme, bias, tmp_path) -> None:
    source = small(attention_bias=bias, mlp_bias=bias)
    source.save_pretrained(tmp_path / "source")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "source", quantize=scheme)
    read = [torch.randint(64, (2, 40)) for _ in range(8)]
    dense = {n: p.clone() for n, p in model.named_parameters()}
    codes = {n: each.codes.clone() for n, each in packed_modules(model).items()}
    calibrate(model, source, read)
    assert all(torch.equal(p, dense[n]) for n, p in model.named_parameters())
    changed = [n for n, each in packed_modules(model).items() if not torch.equal(each.codes, codes[n])]
    assert changed == [n for n, each in packed_modules(model).items() if each.bits == 4]
    found = [quality(each, source, [ids[:1] for ids in read]).divergence for each in (model, small())]
    assert found[0] < 0.1 * found[1]


def test_what_cannot_be_calibrated_is_refused(tmp_path) -> None:
    source = small()
    source.save_pretrained(tmp_path / "source")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "source", quantize="int4")
    with pytest.raises(ValueError, match="no text to calibrate with"):
        calibrate(model, source, [])
    with pytest.raises(ValueError, match="the source of a calibration is quantized"):
        calibrate(model, model, [torch.ones(1, 4, dtype=torch.long)])
    for got, ids in {
        "int32 [1, 4]": torch.ones(1, 4, dtype=torch.int32), "int64 [4]": torch.ones(4, dtype=torch.long),
        "int64 [1, 0]": torch.ones(1, 0, dtype=torch.long),
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=re.escape(f"got {got} as a text, expected int64")):
            calibrate(model, source, [torch.ones(1, 4, dtype=torch.long), ids])
    for other in (source, LlamaForCausalLM.from_pretrained(tmp_path / "source", quantize="int8")):
        with pytest.raises(ValueError, match="the model has no layers of 4 bits"):
            calibrate(other, source, [torch.ones(1, 4, dtype=torch.long)])
    with pytest.raises(ValueError, match="matrices of other shapes"):
        calibrate(model, small(attention_bias=True, num_key_value_heads=2), [torch.ones(1, 4, dtype=torch.long)])


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("mlp.down_proj", float("nan"), "mlp.down_proj of a layer needs scales beyond float16"),
        ("mlp.down_proj", 1e8, "mlp.down_proj of a layer needs scales beyond float16"),
        ("self_attn.v_proj", float("inf"), "self_attn.v_proj of a layer needs scales"),
    ],
)
def test_a_source_that_is_not_finite_enough_is_refused(tmp_path, name, value, message) -> None:
    source = small()
    source.save_pretrained(tmp_path / "source")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "source", quantize="int4")
    with torch.no_grad():
        source.model.layers[1].get_submodule(name).weight[3, 5] = value
    with pytest.raises(ValueError, match=message):
        calibrate(model, source, [torch.randint(64, (2, 40))])
