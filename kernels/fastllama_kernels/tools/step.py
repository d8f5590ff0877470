"""The launches of one decode step of a model, from its sizes alone: what an audit compiles and a plan adds up.

The tensors are on the ``meta`` device: they have shapes and no memory.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from fastllama_kernels.attention import triton as decode_attention
from fastllama_kernels.common import activations
from fastllama_kernels.common.calls import STEP, Call
from fastllama_kernels.common.launch import Launch
from fastllama_kernels.common.shapes import SHAPES as PUBLISHED
from fastllama_kernels.common.shapes import Shape
from fastllama_kernels.linear import triton as gemv
from fastllama_kernels.sampling import triton as sample
from fastllama_kernels.sampling.op import SamplingParams

EPS = 1e-5
#: What audit, plan and tune look at.
SHAPES = {name: PUBLISHED[name] for name in ("llama-3.2-1b", "llama-3.2-3b", "llama-3.1-8b")} | {
    "llama-3.1-70b/8": PUBLISHED["llama-3.1-70b"].sharded(8)
}


@dataclass(frozen=True)
class Part:
    """Some equal launches of a step.

    Attributes:
        name: what they compute.
        launch: one of them.
        times: how often it is in the step.
        nbytes: memory one of them has to move: weights, live keys and values, and what is small compared with them.
    """

    name: str
    launch: Launch
    times: int
    nbytes: int


@dataclass(frozen=True)
class Setting:
    """What decides a step's launches.

    Attributes:
        shape: of the model.
        chip: compute capability.
        dtype: of weights and cache.
        batch: rows, at most gemv.MAX_ROWS.
        live: tokens of each row in the cache, the new one included.
    """

    shape: Shape
    chip: tuple[int, int]
    dtype: torch.dtype
    batch: int
    live: int

    def tensor(self, *sizes: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A tensor without memory."""
        return torch.empty(sizes, dtype=dtype or self.dtype, device="meta")


def parts(
    shape: Shape, chip: tuple[int, int], dtype: torch.dtype = torch.bfloat16, batch: int = 1, live: int = 512
) -> Iterator[Part]:
    """A decode step's launches in their order, but for embedding and bookkeeping, which Inductor makes.

    For the arguments see :class:`Setting`.
    """
    setting = Setting(shape, chip, dtype, batch, live)
    for call in STEP:
        times = shape.num_hidden_layers if call.in_layer else 1
        for name, launch, nbytes in PLANS[call.op](setting, call):
            yield Part(name, launch, times, nbytes)


Planned = Iterator[tuple[str, Launch, int]]  # what it computes, the launch, the bytes it has to move


def _plan_matrix(setting: Setting, call: Call) -> Planned:
    assert call.matrix is not None
    n, k = setting.shape.matrices[call.matrix]
    is_gated = call.op == "gate_up"
    launch, _ = gemv.plan_launch(
        setting.tensor(setting.batch, k),
        setting.tensor(n, k),
        None,
        setting.tensor(k) if call.has_norm else None,
        EPS,
        setting.tensor(setting.batch, n) if call.has_residual else None,
        activations.SILU if is_gated else None,
        setting.chip,
    )
    yield call.name, launch, launch.reads + launch.writes


def _plan_attention(setting: Setting, call: Call) -> Planned:
    shape, batch, live = setting.shape, setting.batch, setting.live
    cache = setting.tensor(batch, shape.num_key_value_heads, live, shape.head_dim)
    table = setting.tensor(live, shape.head_dim, dtype=torch.float32)
    packed, position = setting.tensor(batch, 1, shape.packed), setting.tensor(batch, 1, dtype=torch.int64)
    launch, _ = decode_attention.plan_launch(packed, position, cache, cache, tables=(table, table), chip=setting.chip)
    yield call.name, launch, launch.reads + launch.writes + 2 * cache.nbytes


def _plan_sample(setting: Setting, call: Call) -> Planned:
    batch = setting.batch
    counts, numbers = setting.tensor(batch, dtype=torch.int64), setting.tensor(batch, dtype=torch.float32)
    params = SamplingParams(numbers, counts, numbers, numbers, numbers, counts)
    launches, _ = sample.plan_launches(setting.tensor(batch, setting.shape.vocab_size), params, counts, setting.chip)
    for launch in launches:
        yield f"{call.name}: {launch.name}", launch, launch.reads + launch.writes


PLANS: dict[str, Callable[[Setting, Call], Planned]] = {
    "linear": _plan_matrix,
    "gate_up": _plan_matrix,
    "rotary_attention": _plan_attention,
    "sample": _plan_sample,
}
