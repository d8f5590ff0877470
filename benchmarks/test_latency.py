"""Latencies of decodes for pytest-benchmark: a thin face of the contenders that everything else uses.

    pytest benchmarks/test_latency.py --benchmark-autosave      # keep the figures, in .benchmarks
    pytest benchmarks/test_latency.py --benchmark-compare       # compare with those kept last

Outputs are checked before anything is timed. Whether a change made anything slower is for ``fastllama-regress`` to say,
which interleaves both revisions: two runs of this suite differ by what else the machine did.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fastllama import LlamaForCausalLM

from .contenders import EAGER, FASTLLAMA, Task, make
from .environment import commit
from .parity import check
from .workload import Contender, Workload

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROMPT, NEW_TOKENS = 128, 64


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


@pytest.mark.benchmark(group="decode")
@pytest.mark.parametrize(("batch", "new"), [(1, 1), (1, NEW_TOKENS), (4, NEW_TOKENS)], ids=["prefill", "1", "4"])
def test_decode(contender: Contender, model: LlamaForCausalLM, benchmark: Any, batch: int, new: int) -> None:
    workload = Workload.random(model.config.vocab_size, batch, PROMPT, new)
    tokens = contender.run(workload).tokens
    assert tokens is not None
    parity = check(model, workload.prompts, tokens, new)
    assert parity.passed, parity.note
    benchmark.extra_info.update(commit(), device=DEVICE, threads=torch.get_num_threads())
    benchmark(contender.run, workload)
