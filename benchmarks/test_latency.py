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

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PROMPT, NEW_TOKENS = 128, 64
TEXT = 'def read(path: str) -> dict[str, str]:\n    """Read ``key = value`` lines."""\n' * 8


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    """The demo checkpoint."""
    return LlamaForCausalLM.from_pretrained("demo", device=DEVICE, progress=False)


@pytest.fixture(scope="module", params=[FASTLLAMA, EAGER])
def contender(request: pytest.FixtureRequest, model: LlamaForCausalLM) -> Iterator[Contender]:
    """A way to decode it."""
    opened = make(request.param)
    opened.load(Task("demo", str(model.dtype).removeprefix("torch."), str(DEVICE), lent=model))
    yield opened
    opened.close()


@pytest.fixture
def timed(benchmark: Any, request: pytest.FixtureRequest) -> Callable[[Callable[[], object]], None]:
    """Times a function in the group of its test, and says on which revision."""

    def run(function: Callable[[], object]) -> None:
        benchmark.group = request.node.originalname
        benchmark.extra_info.update(commit(), device=str(DEVICE), threads=torch.get_num_threads())
        benchmark(function)

    return run


@pytest.mark.parametrize(("batch", "new"), [(1, 1), (1, NEW_TOKENS), (4, NEW_TOKENS)], ids=["prefill", "1", "4"])
def test_decode(contender: Contender, model: LlamaForCausalLM, timed: Any, batch: int, new: int) -> None:
    workload = Workload.random(model.config.vocab_size, batch, PROMPT, new)
    tokens = contender.run(workload).tokens
    assert tokens is not None
    parity = check(model, workload.prompts, tokens, new)
    assert parity.passed, parity.note
    timed(lambda: contender.run(workload))


@pytest.mark.parametrize("vocab_size", [4096, 128256])
@pytest.mark.parametrize("temperature", [0.0, 0.8], ids=["greedy", "top-p"])
def test_sampling(timed: Any, temperature: float, vocab_size: int) -> None:
    logits_bv = torch.randn(1, vocab_size, generator=torch.Generator().manual_seed(0)).mul(4).to(DEVICE)
    settings = {"temperature": temperature, "top_k": 0, "top_p": 0.9, "min_p": 0.0}
    params = SamplingParams(
        **{name: torch.tensor([value], device=DEVICE) for name, value in settings.items()},
        seed=row_seeds(7, 1).to(DEVICE),
    )
    position_b = torch.tensor([PROMPT], device=DEVICE)
    assert torch.equal(sample(logits_bv, params, position_b), sample_ref(logits_bv, params, position_b))
    timed(lambda: int(sample(logits_bv, params, position_b)))


@pytest.mark.parametrize("batch", [1, 4])
def test_cache_write(model: LlamaForCausalLM, timed: Any, batch: int) -> None:
    config = model.config
    cache = StaticCache(config, batch, 1024, DEVICE, model.dtype)
    kv_bktd = torch.randn(batch, config.num_key_value_heads, 1, config.head_dim, dtype=model.dtype, device=DEVICE)
    where = {"cache_position": torch.tensor([PROMPT], device=DEVICE)}
    cache.update(kv_bktd, kv_bktd, 0, where)
    assert torch.equal(cache.key_cache[0][:, :, PROMPT : PROMPT + 1], kv_bktd)
    assert cache.value_cache[0].count_nonzero() == kv_bktd.count_nonzero(), "other slots were written too"
    timed(lambda: cache.update(kv_bktd, kv_bktd, 0, where))


def test_tokenizer(timed: Any) -> None:
    tokenizer = load_tokenizer("demo")
    assert tokenizer.decode(tokenizer(TEXT).input_ids, skip_special_tokens=True) == TEXT
    timed(lambda: tokenizer.decode(tokenizer(TEXT).input_ids, skip_special_tokens=True))
