"""The network as it runs on a GPU: Triton's kernels, in the interpreter, chosen as on a chip that has them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch._inductor.utils import run_and_get_code

from fastllama import LlamaConfig, LlamaForCausalLM, ops
from fastllama.engine.decoder import FusedDecoder
from fastllama.model.cache import StaticCache
from fastllama.model.rope import rope_tables
from fastllama_kernels.linear import triton as gemv

pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(torch.cuda.is_available(), reason="tests/test_gpu.py runs the network on the GPU itself"),
    pytest.mark.usefixtures("as_on_a_gpu"),
]
SHAPE = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "initializer_range": 0.3,
    "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
SLOTS, CACHE_ROWS = 52, 3


@pytest.fixture
def as_on_a_gpu(monkeypatch, triton_on_cpu) -> Iterator[None]:
    ops.rules.without_triton.cache_clear()
    genuine = ops._index
    choose = torch.compiler.assume_constant_result(lambda op, _, *case: genuine(op, "cuda:0", *case))
    monkeypatch.setattr(ops, "_index", choose)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device=None: (9, 0))
    with torch.library._scoped_library("fastllama", "IMPL") as library, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # in place of the C++ kernels, where another test has loaded them
        library.impl("linear", gemv.linear, "CPU", allow_override=True)
        library.impl("gate_up", gemv.gate_up, "CPU", allow_override=True)
        yield


def network(**changes) -> tuple[LlamaForCausalLM, FusedDecoder, tuple]:
    """A model, its network, and what the network takes after ids and positions; more rows in the cache than run."""
    model = LlamaForCausalLM(LlamaConfig(**SHAPE | changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "norm.weight")):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    cache = StaticCache(model.config, CACHE_ROWS, SLOTS)
    arrived = torch.zeros(CACHE_ROWS * model.config.num_attention_heads, dtype=torch.int32)
    return model, FusedDecoder(model), (*rope_tables(model.config, SLOTS), cache.key_cache, cache.value_cache, arrived)


def positions(start: int, ids_bt: torch.Tensor) -> torch.Tensor:
    return torch.arange(start, start + ids_bt.shape[1]).expand(ids_bt.shape).contiguous()


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu_new"}], ids=str)
@torch.no_grad()
def test_a_prefill_and_the_steps_after_it_give_the_eager_forwards_logits(fresh_dynamo, changes) -> None:
    model, net, memory = network(**changes)
    ids_bt = torch.randint(0, 96, (2, 22))
    expected = model(ids_bt).logits
    run = torch.compile(lambda *args: net.logits(net(*args)), fullgraph=True, dynamic=False, backend="aot_eager")
    chunks = [ids_bt[:, :19].contiguous(), ids_bt[:, 19:21].contiguous(), ids_bt[:, 21:].contiguous()]
    found, start = [], 0
    for chunk_bt in chunks:
        found.append(run(chunk_bt, positions(start, chunk_bt), *memory))
        start += chunk_bt.shape[1]
    assert (torch.cat(found, dim=1) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert not memory[-1].any(), "the counters are zeros again"


@pytest.mark.slow
@torch.no_grad()
def test_a_compiled_prefill_writes_to_the_caches_in_place(fresh_dynamo) -> None:
    _, net, memory = network()
    ids_bt = torch.randint(0, 96, (2, 19))
    compiled = torch.compile(net, fullgraph=True, dynamic=False)
    _, codes = run_and_get_code(compiled, ids_bt, positions(0, ids_bt), *memory)
    code = "\n".join(codes)
    assert code.count("fastllama.rotary_write.default(") == SHAPE["num_hidden_layers"]
    allocated = [re.findall(r"\d+", sizes) for sizes in re.findall(r"empty_strided\w*\(\(([\d, ]+)\)", code)]
    assert allocated
    assert all(str(SLOTS) not in sizes or sizes[-1] == str(SLOTS) for sizes in allocated), "only masks have all slots"
    assert "aten.clone" not in code
