"""Latencies of a decode and of its parts, for pytest-benchmark; outputs are checked before anything is timed.

    pytest benchmarks/test_latency.py --benchmark-autosave      # keep the figures, in .benchmarks
    pytest benchmarks/test_latency.py --benchmark-compare       # beside those kept last
    pytest benchmarks/test_latency.py --benchmark-compare --benchmark-compare-fail=median:10%
    pytest benchmarks/test_latency.py -k sampling --benchmark-histogram

It takes a minute or two on two cores. It shows where the time of one machine goes and whether that has moved since; a
shared machine moves by itself, so whether a change made anything slower is for ``fastllama-regress`` to say, which runs
both revisions by turns.

Shape suffixes: ``b`` batch, ``t`` tokens, ``k`` KV heads, ``d`` head dim, ``v`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from typing import Any

import pytest
import torch

from fastllama import LlamaConfig, LlamaForCausalLM, StaticCache, load_tokenizer
from fastllama.causal_lm import engine_of
from fastllama.sampling import SamplingParams, row_seeds, sample
from fastllama_kernels.sampling.op import sample_ref

from .environment import commit
from .harness import Workload
from .parity import check

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
STEPS, WARMUP_STEPS = 300, 30
LARGEST_BATCH, SLOTS = 4, 1024
PROMPT, NEW_TOKENS = 128, 64
VOCABULARIES = (4096, 128256)
TEMPERATURE, TOP_P = 0.8, 0.9
TEXT = '''\
def read_config(path: str) -> dict[str, str]:
    """Read ``key = value`` lines; what follows a # is a comment."""
    found = {}
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            key, separator, value = line.partition("#")[0].partition("=")
            if separator:
                found[key.strip()] = value.strip()
            elif key.strip():
                raise ValueError(f"{path}, line {number}: expected key = value, got {line!r}")
    return found
'''


def grouped(group: str) -> pytest.MarkDecorator:
    """Compared with the others of its group, without collections of garbage and after a warm-up."""
    return pytest.mark.benchmark(group=group, disable_gc=True, warmup=True)


@pytest.fixture(scope="module")
def model() -> Iterator[LlamaForCausalLM]:
    """The demo checkpoint, with memory for every decode here, so that the cache never grows."""
    loaded = LlamaForCausalLM.from_pretrained("demo", device=DEVICE, progress=False)
    runner = engine_of(loaded)
    with runner.session():
        runner.reserve(LARGEST_BATCH, SLOTS)
    yield loaded
    loaded.release()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """The demo checkpoint's."""
    return load_tokenizer("demo")


@pytest.fixture
def timed(benchmark: Any, request: pytest.FixtureRequest) -> Callable[..., None]:
    """Times a function that handles so many tokens a call, and says on which revision; ``rounds`` fixes how often."""

    def run(function: Callable[[], object], tokens: int, rounds: int | None = None) -> None:
        benchmark.extra_info.update(commit(), device=str(DEVICE), threads=torch.get_num_threads())
        if rounds is None:
            benchmark(function)
        else:
            benchmark.pedantic(function, rounds=rounds, warmup_rounds=WARMUP_STEPS)
        if benchmark.stats is not None:  # None with --benchmark-disable
            benchmark.extra_info["tokens_per_second"] = tokens / benchmark.stats.stats.median

    return run


def finished() -> None:
    """Wait for the device."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def decode_of(model: LlamaForCausalLM, workload: Workload) -> Generator[torch.Tensor, None, None]:
    """The engine's greedy tokens ``[b]``, step by step, past any EOS."""
    ids_bt = workload.input_ids(DEVICE)
    settings = {"max_new_tokens": workload.new_tokens, "do_sample": False, "eos_token_id": ()}
    return model.stream(ids_bt, torch.ones_like(ids_bt), **settings)


def assert_right(model: LlamaForCausalLM, workload: Workload) -> None:
    """The engine's tokens pass the parity gate."""
    tokens_bn = torch.stack(list(decode_of(model, workload)), dim=1)
    parity = check(model, workload.prompts, tokens_bn.tolist(), workload.new_tokens)
    assert parity.passed, parity.note


@pytest.mark.parametrize("batch", [1, LARGEST_BATCH])
@grouped("decode step")
def test_decode_step(model: LlamaForCausalLM, timed: Callable[..., None], batch: int) -> None:
    vocab = model.config.vocab_size
    assert_right(model, Workload.random(vocab, batch, PROMPT, NEW_TOKENS))
    steps = 1 + WARMUP_STEPS + STEPS
    with closing(decode_of(model, Workload.random(vocab, batch, PROMPT, steps + 1))) as tokens:
        next(tokens)  # the prefill
        timed(lambda: next(tokens), tokens=batch, rounds=STEPS)


@grouped("prefill")
def test_prefill(model: LlamaForCausalLM, timed: Callable[..., None]) -> None:
    workload = Workload.random(model.config.vocab_size, 1, PROMPT, 1)
    assert_right(model, workload)
    timed(lambda: list(decode_of(model, workload)), tokens=PROMPT)


@grouped("generate")
def test_generate(model: LlamaForCausalLM, timed: Callable[..., None]) -> None:
    workload = Workload.random(model.config.vocab_size, 1, PROMPT, NEW_TOKENS)
    assert_right(model, workload)
    ids_bt = workload.input_ids(DEVICE)
    expected = torch.stack(list(decode_of(model, workload)), dim=1).tolist()

    def generate() -> torch.Tensor:
        settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": ()}
        return model.generate(ids_bt, torch.ones_like(ids_bt), **settings)

    assert generate()[:, PROMPT:].tolist() == expected
    timed(generate, tokens=NEW_TOKENS)


@pytest.mark.parametrize("vocab_size", VOCABULARIES)
@pytest.mark.parametrize("way", ["greedy", "top-p"])
@grouped("sampling")
def test_sampling(timed: Callable[..., None], way: str, vocab_size: int) -> None:
    logits_bv = torch.randn(1, vocab_size, generator=torch.Generator().manual_seed(0)).mul(4).to(DEVICE)
    temperature = 0.0 if way == "greedy" else TEMPERATURE
    params = SamplingParams(
        temperature=torch.tensor([temperature], device=DEVICE),
        top_k=torch.zeros(1, dtype=torch.long, device=DEVICE),
        top_p=torch.tensor([TOP_P], device=DEVICE),
        min_p=torch.zeros(1, device=DEVICE),
        seed=row_seeds(7, 1).to(DEVICE),
    )
    position_b = torch.tensor([PROMPT], device=DEVICE)

    def draw() -> int:
        return int(sample(logits_bv, params, position_b))

    assert draw() == (int(logits_bv.argmax()) if way == "greedy" else int(sample_ref(logits_bv, params, position_b)))
    timed(draw, tokens=1)


@pytest.mark.parametrize("batch", [1, LARGEST_BATCH])
@grouped("cache write")
def test_cache_write(model: LlamaForCausalLM, timed: Callable[..., None], batch: int) -> None:
    config: LlamaConfig = model.config
    cache = StaticCache(config, batch, SLOTS, DEVICE, model.dtype)
    shape = (batch, config.num_key_value_heads, 1, config.head_dim)
    key_bktd, value_bktd = (torch.randn(shape, dtype=model.dtype, device=DEVICE) for _ in range(2))
    where = {"cache_position": torch.tensor([PROMPT], device=DEVICE)}

    def write() -> None:
        cache.update(key_bktd, value_bktd, 0, where)
        finished()

    write()
    for held, written in ((cache.key_cache[0], key_bktd), (cache.value_cache[0], value_bktd)):
        assert torch.equal(held[:, :, PROMPT : PROMPT + 1], written)
        assert held.count_nonzero() == written.count_nonzero(), "other slots were written too"
    timed(write, tokens=batch)


@grouped("tokenizer")
def test_encode(tokenizer: Any, timed: Callable[..., None]) -> None:
    ids = tokenizer(TEXT).input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == TEXT
    timed(lambda: tokenizer(TEXT), tokens=len(ids))


@grouped("tokenizer")
def test_decode(tokenizer: Any, timed: Callable[..., None]) -> None:
    ids = tokenizer(TEXT).input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == TEXT
    timed(lambda: tokenizer.decode(ids, skip_special_tokens=True), tokens=len(ids))
