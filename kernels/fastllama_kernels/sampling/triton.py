"""A token of each row from its logits, in Triton: two launches and no sort.

    race      all over the chip: of every block of 128 tokens its largest logit, the sum of its weights, and the token
              of the highest score
    settle    a program a row: the winner of all blocks, and whether it is kept. If not, the next race is among the
              tokens more likely than it; that changes nothing of the result, for none less likely is kept either

:mod:`fastllama_kernels.sampling.op` defines scores and which tokens are kept; weights are exp((logit - largest) / T).
A winner is kept with the probability that the kept tokens have among those that raced, so there are few rounds: 1.1 on
average for a top-p of 0.9. For top-k the k-th largest logit is found first, by bisection among the blocks that can
hold it: those whose maximum is no less than the k-th largest maximum. Without top-k, top-p and min-p nothing is left to
settle.

Bytes moved: the logits once from memory, and then from the L2 cache by one multiprocessor a row, as often as there are
rounds. Needs compute capability 8.0, or the interpreter. Tokens are those of the reference but for rounding.

Shape suffixes: ``b`` batch, ``v`` vocabulary, ``n`` tokens of a block, ``p`` blocks.
"""

import torch
import triton
import triton.language as tl

from fastllama_kernels.common import pdl
from fastllama_kernels.common.checks import check, check_dtype
from fastllama_kernels.common.launch import Launch, cdiv, next_power_of_2
from fastllama_kernels.sampling.op import SamplingParams

BLOCK = 128  # tokens
RACE_BLOCKS, RACE_WARPS = 8, 4  # of a program
SETTLE_BLOCKS, SETTLE_WARPS = 64, 16  # looked at together by the one program of a row
SETTLED = ("temperature", "top_k", "top_p", "min_p", "seed")
GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)
LOWEST = tl.constexpr(-(2**31))


@triton.jit
def _mix(z):
    """splitmix64 (doi 10.1145/2660193.2660195)."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def _row_key(seed_ptr, position_ptr, row):
    seed, position = tl.load(seed_ptr + row), tl.load(position_ptr + row)
    return _mix(seed.to(tl.uint64) + position.to(tl.uint64) * GOLDEN)


@triton.jit
def _score(logit, token, row_key, temperature):
    """``logit / T`` and noise, or at a temperature of 0 the logit."""
    high = (_mix((row_key + token.to(tl.uint64)) * GOLDEN) >> 32).to(tl.uint32)
    u = tl.minimum((high.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.99999994)
    series = u * (1.0 + u * (0.5 + u * (0.33333333 + u * 0.25)))  # -log(1 - u), which is inexact for small u
    race = tl.where(u < 0.015625, series, -tl.log(1.0 - u))
    is_sampled = temperature > 0
    return logit / tl.where(is_sampled, temperature, 1.0) - tl.where(is_sampled, tl.log(race), 0.0)


@triton.jit
def _number(logit):
    """A logit in float32; minus infinity where it is no number."""
    logit = logit.to(tl.float32)
    return tl.where(logit == logit, logit, float("-inf"))


@triton.jit
def _rank(logit):
    """A logit as an integer: higher logits have higher ones, equal ones the same."""
    bits = (logit + 0.0).to(tl.int32, bitcast=True)  # minus zero plus zero is zero
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _race_kernel(
    logits_ptr,
    temperature_ptr,
    seed_ptr,
    position_ptr,
    top_ptr,
    weight_ptr,
    score_ptr,
    token_ptr,
    vocab,
    blocks,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    pdl.let_next_start(PDL)
    row = tl.program_id(0)
    block_p = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    token_pn = block_p[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    pdl.wait_for_previous(PDL)

    temperature = tl.load(temperature_ptr + row)
    row_key = _row_key(seed_ptr, position_ptr, row)
    at_pn = row.to(tl.int64) * vocab + token_pn
    logit_pn = _number(tl.load(logits_ptr + at_pn, mask=token_pn < vocab, other=float("-inf")))
    top_p = tl.max(logit_pn, axis=1)
    base_p = tl.where(top_p == float("-inf"), 0.0, top_p)
    weight_pn = tl.exp((logit_pn - base_p[:, None]) / tl.where(temperature > 0, temperature, 1.0))
    score_pn = _score(logit_pn, token_pn, row_key, temperature)
    score_p, best_p = tl.max(score_pn, axis=1, return_indices=True)
    at_p, mask_p = row * blocks + block_p, block_p < blocks
    tl.store(top_ptr + at_p, top_p, mask=mask_p)
    tl.store(weight_ptr + at_p, tl.sum(weight_pn, axis=1), mask=mask_p)
    tl.store(score_ptr + at_p, score_p, mask=mask_p)
    tl.store(token_ptr + at_p, block_p * BLOCK + best_p, mask=mask_p)


@triton.jit
def _load_chosen(logits_ptr, chosen_ptr, chosen, begin, vocab, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """Logits and numbers of the tokens of some chosen blocks; minus infinity where there is none."""
    index_p = begin + tl.arange(0, TILE)
    block_p = tl.load(chosen_ptr + index_p, mask=index_p < chosen, other=0)
    token_pn = block_p[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask_pn = (index_p < chosen)[:, None] & (token_pn < vocab)
    return _number(tl.load(logits_ptr + token_pn, mask=mask_pn, other=float("-inf"))), token_pn


@triton.jit
def _count(logits_ptr, chosen_ptr, chosen, floor, vocab, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """How many tokens of the chosen blocks have a rank of ``floor`` or higher."""
    count_pn = tl.zeros((TILE, BLOCK), dtype=tl.int32)
    for begin in range(0, chosen, TILE):
        logit_pn, _ = _load_chosen(logits_ptr, chosen_ptr, chosen, begin, vocab, TILE, BLOCK)  # pyright: ignore[reportGeneralTypeIssues]
        count_pn += (_rank(logit_pn) >= floor).to(tl.int32)
    return tl.sum(tl.sum(count_pn, axis=1), axis=0)


@triton.jit
def _weigh(logits_ptr, chosen_ptr, chosen, floor, top, temperature, vocab, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of their weights, which are relative to the most likely token's."""
    weight_pn = tl.zeros((TILE, BLOCK), dtype=tl.float32)
    for begin in range(0, chosen, TILE):
        logit_pn, _ = _load_chosen(logits_ptr, chosen_ptr, chosen, begin, vocab, TILE, BLOCK)
        weight_pn += tl.where(_rank(logit_pn) >= floor, tl.exp((logit_pn - top) / temperature), 0.0)
    return tl.sum(tl.sum(weight_pn, axis=1), axis=0)


@triton.jit
def _race_again(
    logits_ptr, chosen_ptr, chosen, floor, row_key, temperature, vocab, TILE: tl.constexpr, BLOCK: tl.constexpr
):
    """The token of the highest score among those of the chosen blocks with a rank of ``floor`` or higher."""
    best_pn = tl.full((TILE, BLOCK), float("-inf"), dtype=tl.float32)
    winner_pn = tl.zeros((TILE, BLOCK), dtype=tl.int32)
    for begin in range(0, chosen, TILE):
        logit_pn, token_pn = _load_chosen(logits_ptr, chosen_ptr, chosen, begin, vocab, TILE, BLOCK)
        score_pn = _score(logit_pn, token_pn, row_key, temperature)
        better_pn = (_rank(logit_pn) >= floor) & (score_pn > best_pn)
        best_pn = tl.where(better_pn, score_pn, best_pn)
        winner_pn = tl.where(better_pn, token_pn, winner_pn)
    best = tl.max(tl.max(best_pn, axis=1), axis=0)
    return tl.min(tl.min(tl.where(best_pn == best, winner_pn, vocab - 1), axis=1), axis=0)


@triton.jit
def _kth_of(rank_p, k, highest):
    """The k-th highest of some ranks, by bisection: k or more of them are ``low`` or higher, fewer ``high``."""
    low, high, found = LOWEST, highest + 1, 0
    while (low + 1 < high) & (found != k):
        middle = (low & high) + ((low ^ high) >> 1)
        found = tl.sum((rank_p >= middle).to(tl.int32), axis=0)
        low, high = tl.where(found >= k, middle, low), tl.where(found >= k, high, middle)
    return low


@triton.jit
def _kth_of_chosen(logits_ptr, chosen_ptr, chosen, low, k, highest, vocab, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """The k-th highest rank of the chosen blocks' tokens, which is no lower than ``low``."""
    high, found = highest + 1, 0
    while (low + 1 < high) & (found != k):
        middle = (low & high) + ((low ^ high) >> 1)
        found = _count(logits_ptr, chosen_ptr, chosen, middle, vocab, TILE, BLOCK)
        low, high = tl.where(found >= k, middle, low), tl.where(found >= k, high, middle)
    return low


@triton.jit
def _kth_of_tile(rank_pn, low, k, highest):
    """The same where the chosen blocks are one tile, which stays in registers."""
    high, found = highest + 1, 0
    while (low + 1 < high) & (found != k):
        middle = (low & high) + ((low ^ high) >> 1)
        found = tl.sum(tl.sum((rank_pn >= middle).to(tl.int32), axis=1), axis=0)
        low, high = tl.where(found >= k, middle, low), tl.where(found >= k, high, middle)
    return low


@triton.jit
def _list_chosen(chosen_ptr, block_p, is_chosen_p):
    """Write the numbers of the chosen blocks one after the other; returns how many there are."""
    count_p = is_chosen_p.to(tl.int32)
    tl.store(chosen_ptr + tl.cumsum(count_p, axis=0) - 1, block_p, mask=is_chosen_p)
    tl.debug_barrier()  # every thread sees the whole list
    return tl.sum(count_p, axis=0)


@triton.jit
def _kept_winner(
    logits_ptr, chosen_ptr, chosen, token, rank, floor, highest, top, by_mass, mass, row_key, temperature, vocab,
    TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The token of the highest score that is kept, given the winner of all.

    Kept are ranks of ``floor`` and higher; by mass, those above which less than ``mass`` lies.
    """
    searching = tl.full((), 1, tl.int1)
    while searching:
        if rank < floor:
            token = _race_again(logits_ptr, chosen_ptr, chosen, floor, row_key, temperature, vocab, TILE, BLOCK)
            rank = _rank(tl.load(logits_ptr + token).to(tl.float32))
        floor = rank + 1
        searching = by_mass & (rank < highest)
        if searching:
            above = _weigh(logits_ptr, chosen_ptr, chosen, floor, top, temperature, vocab, TILE, BLOCK)
            searching = above >= mass
    return token


@triton.jit
def _settle_kernel(
    logits_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    seed_ptr,
    position_ptr,
    top_ptr,
    weight_ptr,
    score_ptr,
    token_ptr,
    chosen_ptr,
    out_ptr,
    vocab,
    blocks,
    BLOCKS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    pdl.let_next_start(PDL)
    row = tl.program_id(0)
    logits_ptr += row.to(tl.int64) * vocab
    chosen_ptr += row * blocks
    block_p = tl.arange(0, BLOCKS)
    mask_p = block_p < blocks
    at_p = row * blocks + block_p
    pdl.wait_for_previous(PDL)

    temperature, top_p, min_p = tl.load(temperature_ptr + row), tl.load(top_p_ptr + row), tl.load(min_p_ptr + row)
    top_k = tl.minimum(tl.load(top_k_ptr + row), vocab).to(tl.int32)
    score_p = tl.load(score_ptr + at_p, mask=mask_p, other=float("-inf"))
    maximum_p = tl.load(top_ptr + at_p, mask=mask_p, other=float("-inf"))
    token = tl.load(token_ptr + row * blocks + tl.argmax(score_p, axis=0))
    top = tl.max(maximum_p, axis=0)
    by_rank, by_mass = (top_k > 0) & (top_k < vocab), top_p < 1
    if (temperature > 0) & (by_rank | by_mass | (min_p > 0)) & (tl.abs(top) < float("inf")):
        highest, rank_p = _rank(top), tl.where(mask_p, _rank(maximum_p), LOWEST)
        least = tl.where(min_p > 0, top + temperature * tl.log(tl.maximum(min_p, 1e-30)), float("-inf"))
        floor = tl.minimum(_rank(least), highest)
        rank = _rank(tl.load(logits_ptr + token).to(tl.float32))
        low = tl.maximum(floor, rank + 1)  # where all are kept by rank, none but the winner and those above it matter
        if by_rank:
            low = tl.full((), LOWEST, tl.int32)
            if top_k <= blocks:  # as many blocks have a token of this rank or higher
                low = _kth_of(rank_p, top_k, highest)
        chosen = _list_chosen(chosen_ptr, block_p, mask_p & (rank_p >= low))
        weight_p = tl.load(weight_ptr + at_p, mask=mask_p, other=0.0)
        total = tl.sum(weight_p * tl.exp((maximum_p - top) / temperature), axis=0)
        if by_rank:
            if chosen <= TILE:
                logit_pn, _ = _load_chosen(logits_ptr, chosen_ptr, chosen, 0, vocab, TILE, BLOCK)
                low = _kth_of_tile(_rank(logit_pn), low, top_k, highest)
            else:
                low = _kth_of_chosen(logits_ptr, chosen_ptr, chosen, low, top_k, highest, vocab, TILE, BLOCK)
            total = _weigh(logits_ptr, chosen_ptr, chosen, low, top, temperature, vocab, TILE, BLOCK)
            floor = tl.maximum(floor, low)

        row_key = _row_key(seed_ptr, position_ptr, row)
        token = _kept_winner(
            logits_ptr, chosen_ptr, chosen, token, rank, floor, highest, top, by_mass, top_p * total, row_key,
            temperature, vocab, TILE, BLOCK,
        )  # fmt: skip
    tl.store(out_ptr + row, token.to(tl.int64))


def plan_launches(
    logits_bv: torch.Tensor, params: SamplingParams, position_b: torch.Tensor, chip: tuple[int, int] | None = None
) -> tuple[tuple[Launch, Launch], torch.Tensor]:
    """Both launches in their order, and the tensor ``[b]`` that they fill.

    Args:
        logits_bv: of every token.
        params: of each row.
        position_b: int64, of the token that is sampled.
        chip: compute capability to make them for; None: that of the tensors' device.

    Raises:
        ValueError: arguments that the kernels would misread.
    """
    _check_arguments(logits_bv, params, position_b)
    batch, vocab = logits_bv.shape
    blocks = cdiv(vocab, BLOCK)
    top, weight, score = (logits_bv.new_empty((batch, blocks), dtype=torch.float32) for _ in range(3))
    token = logits_bv.new_empty((batch, blocks), dtype=torch.int32)
    of_blocks = {"top_ptr": top, "weight_ptr": weight, "score_ptr": score, "token_ptr": token}
    sizes = {"vocab": vocab, "blocks": blocks}
    with_pdl = pdl.used(logits_bv.device, chip)
    race = Launch(
        "race",
        _race_kernel,
        (batch, cdiv(blocks, RACE_BLOCKS)),
        {"logits_ptr": logits_bv, "temperature_ptr": params.temperature, "seed_ptr": params.seed,
         "position_ptr": position_b, **of_blocks, **sizes},
        {"BLOCKS": RACE_BLOCKS, "BLOCK": BLOCK, "PDL": with_pdl},
        reads=logits_bv.nbytes,
        writes=sum(x.nbytes for x in of_blocks.values()),
        warps=RACE_WARPS,
        pdl=with_pdl,
    )  # fmt: skip
    chosen, out = torch.empty_like(token), torch.empty_like(position_b)
    padded = next_power_of_2(blocks)
    settle = Launch(
        "settle",
        _settle_kernel,
        (batch,),
        {"logits_ptr": logits_bv, **{f"{name}_ptr": getattr(params, name) for name in SETTLED},
         "position_ptr": position_b, **of_blocks, "chosen_ptr": chosen, "out_ptr": out, **sizes},
        {"BLOCKS": padded, "TILE": min(SETTLE_BLOCKS, padded), "BLOCK": BLOCK, "PDL": with_pdl},
        reads=sum(x.nbytes for x in of_blocks.values()),
        writes=out.nbytes,
        warps=SETTLE_WARPS,
        pdl=with_pdl,
    )  # fmt: skip
    return (race, settle), out


def _check_arguments(logits_bv: torch.Tensor, params: SamplingParams, position_b: torch.Tensor) -> None:
    check_dtype("logits", logits_bv)
    check("logits", logits_bv, logits_bv, (None, None))
    batch = len(logits_bv)
    for name, value in params._asdict().items():
        is_count = name in ("top_k", "seed")
        check(name, value, logits_bv, (batch,), torch.int64 if is_count else torch.float32)
    check("positions", position_b, logits_bv, (batch,), torch.int64)


def sample(
    logits_bv: torch.Tensor,
    temperature_b: torch.Tensor,
    top_k_b: torch.Tensor,
    top_p_b: torch.Tensor,
    min_p_b: torch.Tensor,
    typical_p_b: torch.Tensor,
    seed_b: torch.Tensor,
    position_b: torch.Tensor,
) -> torch.Tensor:
    """A token of each row, int64 ``[b]``, whatever ``typical_p_b``; see :func:`plan_launches` for the arguments."""
    params = SamplingParams(temperature_b, top_k_b, top_p_b, min_p_b, typical_p_b, seed_b)
    launches, out = plan_launches(logits_bv, params, position_b)
    for launch in launches:
        launch.run()
    return out


torch.library.impl("fastllama::sample", "CUDA", sample)
