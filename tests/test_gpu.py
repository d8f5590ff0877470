"""What can only be seen on a CUDA device: no graph is recorded twice, no output is overwritten, nothing differs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from drafts import draft_always

from fastllama import LlamaConfig, LlamaForCausalLM
from fastllama.causal_lm import engine_of
from fastllama.engine import graphs
from fastllama.engine.decoder import FusedDecoder
from fastllama.generation.loop import decode
from fastllama.generation.request import Request
from fastllama_benchmarks.parity import check
from fastllama_kernels.common import pdl

pytestmark = pytest.mark.gpu

SMALL = LlamaConfig(
    vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=8,
    num_key_value_heads=2, max_position_embeddings=1024, initializer_range=0.1, bos_token_id=None, eos_token_id=None,
)  # fmt: skip


@pytest.fixture(scope="module", params=graphs.KINDS)
def model(request) -> Iterator[LlamaForCausalLM]:
    """One that records its graphs in each of the two ways."""
    torch.manual_seed(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(graphs.SWITCH, request.param)
        yield LlamaForCausalLM(SMALL).eval().cuda()


def greedy(model: LlamaForCausalLM, ids: torch.Tensor, new: int) -> torch.Tensor:
    with torch.no_grad():
        for _ in range(new):
            ids = torch.cat((ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)), dim=1)
    return ids


def test_greedy_tokens_equal_the_eager_forward(model) -> None:
    ids = torch.randint(0, 512, (3, 40), device="cuda")
    assert model.generate(ids, max_new_tokens=20).tolist() == greedy(model, ids, 20).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_drafts_change_no_token_but_near_ties(dtype, monkeypatch) -> None:
    draft_always(monkeypatch)
    torch.manual_seed(1)
    model, second = (LlamaForCausalLM(SMALL).eval().to(dtype).cuda() for _ in range(2))
    second.load_state_dict(model.state_dict())
    ids = torch.randint(0, 6, (2, 40), device="cuda")
    for how in ({"speculate": "auto"}, {"assistant_model": second, "assistant_confidence_threshold": 0}):
        tokens = model.generate(ids, max_new_tokens=60, **how)[:, 40:].tolist()
        assert check(model, ids.tolist(), tokens, 60).passed
    assert model.draft_counts.accepted[0] > 10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 4])
def test_a_16_bit_step_errs_no_more_than_twice_what_the_eager_forward_does(monkeypatch, dtype, rows) -> None:
    torch.manual_seed(2)
    exact = LlamaForCausalLM(SMALL).eval().cuda()
    ours = LlamaForCausalLM(SMALL).eval().to(dtype).cuda()
    ours.load_state_dict(exact.state_dict())
    exact.load_state_dict(ours.state_dict())  # the same weights, rounded
    seen, genuine = [], FusedDecoder.logits
    monkeypatch.setattr(FusedDecoder, "logits", lambda net, x: seen.append(genuine(net, x)) or seen[-1])
    plain = graphs.CompiledStep  # not compiled, so that every step's logits are seen
    monkeypatch.setattr("fastllama.engine.graphs._compile", lambda step, graphs: plain(step, step))
    monkeypatch.setenv(graphs.SWITCH, graphs.INDUCTOR)
    ids = torch.randint(0, 512, (rows, 33), device="cuda")
    tokens = ours.generate(ids, max_new_tokens=64)
    with torch.no_grad():
        true, eager = exact(tokens[:, :-1]).logits[:, 32:], ours(tokens[:, :-1]).logits[:, 32:]
    bound = 2 * (eager.double() - true).abs().max()
    steps = torch.stack(seen[-64:], dim=1)
    assert (steps.double() - true).abs().max() <= bound


def test_dependent_launches_change_no_token(monkeypatch) -> None:
    ids, texts = torch.randint(0, 512, (2, 20), device="cuda"), []
    for switch in ("1", "0"):
        monkeypatch.setenv(pdl.SWITCH, switch)
        pdl.used.cache_clear()
        torch.manual_seed(3)
        texts.append(LlamaForCausalLM(SMALL).eval().cuda().generate(ids, max_new_tokens=900).tolist())
    pdl.used.cache_clear()
    assert texts[0] == texts[1]


def test_replays_never_wait_for_the_device(model) -> None:
    requests = [Request(torch.randint(0, 512, (10,)), max_new_tokens=65)]
    list(decode(engine_of(model), requests, poll_every=8))
    bursts = decode(engine_of(model), requests, poll_every=8)
    tokens = [next(bursts)]
    try:
        torch.cuda.set_sync_debug_mode("error")  # raises at whatever waits for the device, but for events
        tokens += bursts
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cat(tokens, dim=1).shape == (1, 65)


def test_no_graph_is_recorded_after_warmup_and_held_outputs_stay(model, monkeypatch) -> None:
    model.warmup(max_batch_size=4, max_cache_len=512)
    recorded, genuine = [], torch.cuda.CUDAGraph.capture_begin

    def counting(self, *args, **kwargs):
        recorded.append(args)
        return genuine(self, *args, **kwargs)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "capture_begin", counting)
    random, held = torch.Generator().manual_seed(0), []
    with torch.compiler.set_stance("fail_on_recompile"):
        for call in range(200):
            length, rows, new = (int(torch.randint(1, n, (), generator=random)) for n in (301, 5, 20))
            settings = [{}, {"temperature": 0.7}, {"top_k": 20, "top_p": 0.9}, {"min_p": 0.1, "top_p": 0.95}][call % 4]
            settings |= {"do_sample": bool(settings)}
            out = model.generate(torch.randint(0, 512, (rows, length), device="cuda"), max_new_tokens=new, **settings)
            held.append((out, out.tolist()))
    assert recorded == []
    assert all(out.tolist() == before for out, before in held)


def test_other_threads_can_decode(model) -> None:
    import threading

    ids, results = torch.randint(0, 512, (1, 10), device="cuda"), []
    thread = threading.Thread(target=lambda: results.append(model.generate(ids, max_new_tokens=5)))
    thread.start()
    thread.join()
    assert torch.equal(results[0], model.generate(ids, max_new_tokens=5))


def test_release_gives_the_cache_back(model) -> None:
    model.generate(torch.randint(0, 512, (1, 10), device="cuda"), max_new_tokens=5)
    cache, before = model.engine.cache.nbytes, torch.cuda.memory_allocated()
    model.release()
    assert before - torch.cuda.memory_allocated() >= cache
