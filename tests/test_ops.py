"""Which implementation of an operation runs, and why: decided without the device at hand."""

from __future__ import annotations

import itertools
import logging
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from shapes import SHAPE
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastllama_kernels.attention
from fastllama import LlamaConfig, LlamaForCausalLM, ops
from fastllama_kernels.common import levels
from fastllama_kernels.linear import op as linear_op
from fastllama_kernels.linear import packed as packed_op

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
TILES = "amx_tile amx_int8 amx_bf16"
BF16 = " ".join(levels.BF16.needs)
HEADS, KV_HEADS, SLOTS, VOCABULARY = 4, 2, 64, 40


@pytest.fixture(autouse=True)
def forgotten() -> None:
    """Every test asks again what a device can do."""
    ops.rules.without_triton.cache_clear()
    ops._log_heads.cache_clear()


def on_chip(monkeypatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device=None: capability)


def implementations(*args, **kwargs) -> dict[str, str]:
    return {choice.op: choice.implementation for choice in ops.report(*args, **kwargs)}


# ---- what is said ----------------------------------------------------------------------------------------------------


def test_triton_kernels_run_on_gpus_that_have_what_they_need(monkeypatch) -> None:
    on_chip(monkeypatch, (8, 0))
    choices = implementations("cuda:0", torch.bfloat16)
    assert {choices[op] for op in ("linear", "gate_up", "rotary_attention", "sample")} == {"Triton kernel"}
    assert not {"layers", "step"} & choices.keys()
    assert choices["embedding, bookkeeping"] == "Inductor"
    assert ops.kernels_per_step("cuda:0", torch.bfloat16, layers=16) == 83


def test_a_step_has_as_many_kernels_as_its_launches_are_planned_to_be(monkeypatch) -> None:
    from fastllama_kernels.tools.step import SHAPES, parts

    on_chip(monkeypatch, (9, 0))
    for shape in SHAPES.values():
        planned = sum(part.times for part in parts(shape, (9, 0)))
        assert ops.kernels_per_step("cuda:0", torch.bfloat16, shape.num_hidden_layers, shape.head_dim) == planned


def test_limits_and_what_runs_beyond_them_are_reported(monkeypatch) -> None:
    on_chip(monkeypatch, (9, 0))
    reasons = {choice.op: choice.reason for choice in ops.report("cuda:0", torch.bfloat16)}
    assert reasons["linear"] == "up to 16 rows; Triton norm, cuBLAS above"
    assert reasons["rotary_attention"] == (
        "up to 8 tokens a row; Triton rotary and KV write, torch's masked attention above"
    )
    assert reasons["sample"] == "without sorting the vocabulary"
    reasons = {choice.op: choice.reason for choice in ops.report("cpu", torch.float32)}
    assert reasons["linear"] == "up to 32 rows; C++ norm, torch's GEMM above"
    assert reasons["rotary_attention"] == "up to 8 tokens a row; C++ kernel for prompts above"
    reasons = {choice.op: choice.reason for choice in ops.report("cpu", torch.float32, rows=36, tokens=9)}
    assert reasons["linear"] == "above 32 rows"
    assert reasons["rotary_attention"] == "above 8 tokens a row"


def test_heads_that_the_kernels_do_not_take_are_reported(monkeypatch) -> None:
    on_chip(monkeypatch, (9, 0))
    for tokens in (1, 99):
        choices = {choice.op: choice for choice in ops.report("cuda:0", torch.bfloat16, head_dim=20, tokens=tokens)}
        assert choices["rotary_attention"][1:] == ("torch", "head_dim 20: the kernel takes multiples of 8 up to 256")
        assert choices["linear"].implementation == "Triton kernel"
    assert ops.kernels_per_step("cuda:0", torch.bfloat16, layers=16, head_dim=20) == 83 - 16


def test_on_a_cpu_a_step_is_one_operation() -> None:
    report = ops.report("cpu", torch.float32, head_dim=20)
    limits = "up to 32 rows and 8 tokens a row"
    assert report[0] == (
        "step",
        "C++ kernel",
        f"from ids to ids in one operation, nothing compiled at the start, {limits}",
    )
    assert report[1] == ("layers", "C++ kernel", f"all in one operation, {limits}")
    assert "embedding, bookkeeping" not in {choice.op for choice in report}
    assert ops.kernels_per_step("cpu", torch.float32, layers=16, head_dim=20) == 1
    for op in ("step", "layers"):
        assert op in implementations("cpu", torch.float32, rows=32)
        assert op not in implementations("cpu", torch.float32, rows=33)


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Lets the choice see a CPU with these features, and torch multiply 16-bit numbers on it or not."""
    caches = (linear_op.max_rows_cpu, packed_op.max_rows_cpu, ops.rules.first_rule)

    def of(features: str, multiplies: bool = True) -> None:
        monkeypatch.delenv(levels.SWITCH, raising=False)
        monkeypatch.setattr(levels.platform, "machine", lambda: "x86_64")
        monkeypatch.setattr(linear_op.levels, "features", lambda: features)
        for module in (linear_op, packed_op):
            monkeypatch.setattr(module, "multiplies", lambda dtype: multiplies)
        for cache in caches:
            cache.cache_clear()

    yield of
    for cache in caches:
        cache.cache_clear()


@pytest.mark.parametrize(
    ("features", "multiplies", "rows"),
    [("avx2", False, 64), (" ".join(levels.VNNI.needs), True, 4), (BF16, True, 24), (f"{BF16} {TILES}", True, 4)],
)
def test_kernels_take_as_many_rows_as_they_are_faster_for(processor, features, multiplies, rows) -> None:
    processor(features, multiplies)
    for count, implementation in ((rows, "C++ kernel"), (rows + 1, "C++ norm, torch's GEMM")):
        assert implementations("cpu", torch.bfloat16, rows=count)["linear"] == implementation


@pytest.mark.parametrize(("features", "most"), [(BF16, None), (f"{BF16} {TILES}", 128)])
def test_codes_are_written_out_for_many_rows_where_there_is_a_matrix_unit(processor, features, most) -> None:
    processor(features)
    for dtype, rows in ((torch.bfloat16, most), (torch.float32, None)):
        for count in (1, 128, 129, 4096):
            wanted = "C++ kernel" if rows is None or count <= rows else "written out, torch's GEMM"
            case = ops.rules.Case(rows=count, dtype=dtype)
            for op in ("linear_packed", "gate_up_packed"):
                index, _ = ops.rules.choose(op, "cpu", dtype, case)
                assert ops.RULES[op][index].implementation == wanted


def test_codes_that_are_written_out_give_the_logits_of_codes(processor, tmp_path) -> None:
    LlamaForCausalLM(LlamaConfig(**SHAPE | {"max_position_embeddings": 512})).save_pretrained(tmp_path)
    model = LlamaForCausalLM.from_pretrained(tmp_path, quantize="int4", dtype="bfloat16")
    ids_bt, logits = torch.randint(3, 90, (2, 300)), []
    for features in (BF16, f"{BF16} {TILES}"):
        processor(features)
        with Called() as called, torch.no_grad():
            logits.append(model(ids_bt, use_cache=False).logits)
            model.generate(ids_bt, max_new_tokens=2)
        assert ("written_out" in called.names) == (TILES in features)
    assert (logits[1] - logits[0]).abs().max() <= 0.1 * logits[0].abs().max()


def test_an_older_gpu_runs_torch_and_says_so_once(monkeypatch, caplog) -> None:
    on_chip(monkeypatch, (7, 5))
    with caplog.at_level(logging.WARNING):
        found = [ops.report("cuda:0", torch.float16)[0] for _ in range(2)]
    assert found[0] == ("linear", "torch", "compute capability 7.5 is below 8.0")
    assert [record.message for record in caplog.records] == [
        "compute capability 7.5 is below 8.0; decoding runs on torch's own operators, which is slower"
    ]
    assert ops.kernels_per_step("cuda:0", torch.float16, layers=16) is None


def test_without_triton_torch_runs(monkeypatch) -> None:
    on_chip(monkeypatch, (9, 0))
    monkeypatch.setitem(sys.modules, "fastllama_kernels.attention.triton", None)
    monkeypatch.delattr(fastllama_kernels.attention, "triton", raising=False)
    reason = ops.report("cuda:0", torch.bfloat16)[0].reason
    assert reason.startswith("Triton cannot be imported")


@pytest.mark.parametrize(("device", "said"), [("cpu", "not torch.float64"), ("xpu", "float64"), ("mps", "float64")])
def test_a_dtype_that_no_kernel_takes_runs_on_torch(device, said) -> None:
    assert said in ops.report(device, torch.float64)[0].reason


def test_other_devices_have_no_kernels() -> None:
    assert ops.report("mps", torch.float32)[0].reason == "there is no kernel for mps"


# ---- what is said is what runs ---------------------------------------------------------------------------------------

#: The operations by which an implementation is known: what of ours is called for it.
CALLED = {
    ("step", "C++ kernel"): {"decode_step"},
    ("layers", "C++ kernel"): {"layers"},
    ("linear", "C++ kernel"): {"linear"},
    ("linear", "C++ norm, torch's GEMM"): {"rms_norm"},
    ("linear", "Triton kernel"): {"linear"},
    ("linear", "Triton norm, cuBLAS"): {"rms_norm"},
    ("gate_up", "C++ kernel"): {"gate_up"},
    ("gate_up", "C++ norm and activation, torch's GEMM"): {"rms_norm", "silu_mul"},
    ("gate_up", "Triton kernel"): {"gate_up"},
    ("gate_up", "Triton norm and activation, cuBLAS"): {"rms_norm", "silu_mul"},
    ("rotary_attention", "C++ kernel"): {"rotary_attention"},
    ("rotary_attention", "C++ kernel for prompts"): {"prefill_attention"},
    ("rotary_attention", "Triton kernel"): {"rotary_attention_split"},
    ("rotary_attention", "Triton rotary and KV write, torch's masked attention"): {"rotary_write"},
    ("processed", "C++ kernel"): {"processed"},
    ("processed", "Inductor, Triton kernel for n-grams"): {"ban_ngrams"},
    ("sample", "C++ kernel"): {"sample"},
    ("sample", "Triton kernel"): {"sample"},
    **{(op, "torch"): set() for op in ops.RULES},
}


class Called(TorchDispatchMode):
    """Notes the operations of fastllama that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastllama":
            self.names.add(func._schema.name.removeprefix("fastllama::"))
        return func(*args, **(kwargs or {}))


def run(op: str, dtype: torch.dtype, rows: int, tokens: int, head_dim: int) -> None:
    """Call an operation on tensors of these sizes."""

    def tensor(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)

    batch, m = rows // tokens, 16
    x_btm, packed = tensor(batch, tokens, m), (HEADS + 2 * KV_HEADS) * head_dim
    tables = [tensor(SLOTS, head_dim, dtype=torch.float32) for _ in range(2)]
    position = tensor(batch, tokens, dtype=torch.long)
    caches = [tensor(batch, KV_HEADS, SLOTS, head_dim) for _ in range(2)]
    if op in ("layers", "step"):
        sizes = ((packed, m), (m, HEADS * head_dim), (48, m), (m, 24))
        qkv, o, gate_up, down = (ops.Weights(ops.DENSE, (tensor(*size),)) for size in sizes)
        weights = [ops.Layer(tensor(m), qkv, o, tensor(m), gate_up, down)]
        if op == "layers":
            assert ops.runs_layers_at_once(x_btm)
            ops.layers(x_btm, *tables, position, weights, caches[:1], caches[1:], 1e-5, "silu")
            return
        assert ops.runs_at_once(x_btm.device, dtype, rows, tokens)
        table = ops.Weights(ops.DENSE, (tensor(VOCABULARY, m),))
        tensors, kinds = ops.network(table, weights, tensor(m), table)
        ops.decode_step([position], *tables, tensors, kinds, caches[:1], caches[1:], 1e-5, 0, VOCABULARY)
    elif op == "linear":
        ops.linear(x_btm, tensor(24, m), None, tensor(m), 1e-5, tensor(batch, tokens, 24))
    elif op == "gate_up":
        ops.gate_up(x_btm, tensor(48, m), None, tensor(m), 1e-5, "gelu")
    elif op == "rotary_attention":
        arrived = tensor(batch * HEADS, dtype=torch.int32)
        ops.rotary_attention(tensor(batch, tokens, packed), *tables, position, *caches, arrived)
    elif op == "processed":
        numbers, counts = tensor(batch, dtype=torch.float32), tensor(batch, dtype=torch.long)
        processing = ops.Processing(
            *(numbers,) * 3,
            *(counts,) * 3,
            tensor(batch, 3, 2, dtype=torch.long),
            tensor(batch, 3, dtype=torch.float32),
            tensor(batch, 3, dtype=torch.long),
            tensor(batch, ops.token_mask_words(VOCABULARY), dtype=torch.int32),
            tensor(batch, SLOTS, dtype=torch.long),
            tensor(batch, VOCABULARY, dtype=torch.int32),
        )
        ops.processed(tensor(batch, VOCABULARY), processing, counts, counts, counts)
    else:
        numbers, counts = tensor(batch, dtype=torch.float32), tensor(batch, dtype=torch.long)
        params = ops.SamplingParams(numbers, counts, numbers, numbers, numbers, counts)
        ops.sample(tensor(batch, VOCABULARY), params, counts)


@pytest.fixture
def as_on(monkeypatch) -> Callable[[str], None]:
    """Lets choices be made as if the tensors were on another device: torch without CUDA has no tensors there."""
    genuine = ops._index
    return lambda device: monkeypatch.setattr(ops, "_index", lambda op, _, *case: genuine(op, device, *case))


@pytest.mark.parametrize(("device", "chip"), [("cpu", None), ("cuda:0", (9, 0)), ("cuda:0", (7, 5))])
def test_what_is_reported_is_what_runs(monkeypatch, as_on, device, chip) -> None:
    as_on(device)
    if chip:
        on_chip(monkeypatch, chip)
    seen = set()
    for dtype, batch, tokens, head_dim in itertools.product(DTYPES, (1, 2, 5, 17), (1, 8, 9), (16, 20)):
        choices = ops.report(device, dtype, head_dim, rows=batch * tokens, tokens=tokens)
        for op, implementation, _ in choices:
            if implementation == "Inductor":
                continue
            seen.add((op, implementation))
            with FakeTensorMode(), Called() as called:
                run(op, dtype, batch * tokens, tokens, head_dim)
            assert called.names == CALLED[op, implementation], (op, dtype, batch, tokens, head_dim)
    usable = {"cpu": "cpu", "cuda:0": "cuda" if chip != (7, 5) else None}[device]
    rules = {(op, rule.implementation) for op in ops.RULES for rule in ops.RULES[op] if rule.device in (None, usable)}
    rules = {rule for rule in rules if not rule[0].endswith(ops.PACKED)}
    assert seen == rules, "every rule is met"


def test_heads_that_the_kernels_do_not_take_are_logged_once(monkeypatch, as_on, caplog) -> None:
    on_chip(monkeypatch, (9, 0))
    with caplog.at_level(logging.WARNING), FakeTensorMode():
        for device, head_dim in (("cpu", 12), ("cuda:0", 64), ("cuda:0", 20), ("cuda:0", 20), ("cuda:0", 264)):
            as_on(device)
            run("rotary_attention", torch.float16, 1, 1, head_dim)
    assert [record.message.split(";")[0] for record in caplog.records] == [
        "head_dim 20: the kernel takes multiples of 8 up to 256",
        "head_dim 264: the kernel takes multiples of 8 up to 256",
    ]
