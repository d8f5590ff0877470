"""Latencies of decodes and their parts for pytest-benchmark: a thin face of the contenders that everything else uses.

    pytest benchmarks/test_latency.py --benchmark-autosave      # keep the figures, in .benchmarks
    pytest benchmarks/test_latency.py --benchmark-compare       # compare with those kept last

Outputs are checked before anything is timed. Whether a change made anything slower is for ``fastllama-regress`` to say,
which interleaves both revisions: two runs of this suite differ by what else the machine did.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from fastllama import LlamaForCausalLM, StaticCache, load_tokenizer
from fastllama.sampling import SamplingParams, row_seeds, sample
from fastllama_kernels.sampling.op import sample_ref

from .contenders import EAGER, FASTLLAMA, Task, make
from .environment import commit
from .parity import check
from .workload import Contender, Workload

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROMPT, NEW_TOKENS, SLOTS = 128, 64, 1024
TEXT = 'def read(path: str) -> dict[str, str]:\n    """Read ``key = value`` lines."""\n' * 8


def grouped(group: str) -> pytest.MarkDecorator:
    """Compared with the others of its group, without collections of garbage and after a warm-up."""
    return pytest.mark.benchmark(group=group, disable_gc=True, warmup=True)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    """The demo checkpoint."""
    return LlamaForCausalLM.from_pretrained("demo", device=DEVICE, progress=False)


@pytest.fixture(scope="module", params=[FASTLLAMA, EAGER])
def contender(request: pytest.FixtureRequest, model: LlamaForCausalLM) -> Iterator[Contender]:
    """A way to decode it."""
    opened = make(request.param)
    opened.load(Task("demo", str(model.dtype).removeprefix("torch."), DEVICE, lent=model))
    yield opened
    opened.close()


@pytest.fixture
def timed(benchmark: Any) -> Callable[[Callable[[], object], int], None]:
    """Times a function that handles a number of tokens a call, and says on which revision."""

    def run(function: Callable[[], object], tokens: int) -> None:
        benchmark.extra_info.update(commit(), device=DEVICE, threads=torch.get_num_threads())
        benchmark(function)
        if benchmark.stats is not None:  # None with --benchmark-disable
            benchmark.extra_info["tokens_per_second"] = tokens / benchmark.stats.stats.median

    return run


@pytest.mark.parametrize(
    ("batch", "new_tokens"), [(1, 1), (1, NEW_TOKENS), (4, NEW_TOKENS)], ids=["prefill", "batch 1", "batch 4"]
)
@grouped("decode")
def test_decode(contender: Contender, model: LlamaForCausalLM, timed: Any, batch: int, new_tokens: int) -> None:
    workload = Workload.random(model.config.vocab_size, batch, PROMPT, new_tokens)
    tokens = contender.run(workload).tokens
    assert tokens is not None
    parity = check(model, workload.prompts, tokens, new_tokens)
    assert parity.passed, parity.note
    timed(lambda: contender.run(workload), tokens=batch * (new_tokens if new_tokens > 1 else PROMPT))


@pytest.mark.parametrize("vocab_size", [4096, 128256])
@pytest.mark.parametrize("temperature", [0.0, 0.8], ids=["greedy", "top-p"])
@grouped("sampling")
def test_sampling(timed: Any, temperature: float, vocab_size: int) -> None:
    logits_bv = torch.randn(1, vocab_size, generator=torch.Generator().manual_seed(0)).mul(4).to(DEVICE)
    params = SamplingParams(
        temperature=torch.tensor([temperature], device=DEVICE),
        top_k=torch.zeros(1, dtype=torch.long, device=DEVICE),
        top_p=torch.tensor([0.9], device=DEVICE),
        min_p=torch.zeros(1, device=DEVICE),
        seed=row_seeds(7, 1).to(DEVICE),
    )
    position_b = torch.tensor([PROMPT], device=DEVICE)
    assert torch.equal(sample(logits_bv, params, position_b), sample_ref(logits_bv, params, position_b))
    timed(lambda: int(sample(logits_bv, params, position_b)), tokens=1)


@pytest.mark.parametrize("batch", [1, 4])
@grouped("cache write")
def test_cache_write(model: LlamaForCausalLM, timed: Any, batch: int) -> None:
    config = model.config
    cache = StaticCache(config, batch, SLOTS, torch.device(DEVICE), model.dtype)
    shape = (batch, config.num_key_value_heads, 1, config.head_dim)
    key_bktd, value_bktd = (torch.randn(shape, dtype=model.dtype, device=DEVICE) for _ in range(2))
    where = {"cache_position": torch.tensor([PROMPT], device=DEVICE)}

    def write() -> None:
        cache.update(key_bktd, value_bktd, 0, where)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    write()
    assert torch.equal(cache.key_cache[0][:, :, PROMPT : PROMPT + 1], key_bktd)
    assert cache.value_cache[0].count_nonzero() == value_bktd.count_nonzero(), "other slots were written too"
    timed(write, tokens=batch)


@grouped("tokenizer")
@pytest.mark.parametrize("way", ["encode", "decode"])
def test_tokenizer(timed: Any, way: str) -> None:
    tokenizer = load_tokenizer("demo")
    ids = tokenizer(TEXT).input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == TEXT
    calls = {"encode": lambda: tokenizer(TEXT), "decode": lambda: tokenizer.decode(ids, skip_special_tokens=True)}
    timed(calls[way], tokens=len(ids))
