"""``bench decode --speculate``: tokens per second with drafts over those without, interleaved, and what steps cost.

Texts: ``code`` is a file of the standard library and the beginning of the same again (or the wish for it, of a model
with a chat template), ``story`` is free text; a share such as ``0.7`` is random tokens whose drafts come true so
often, each for itself: they are looked up in what the model has decoded before. With a second model its drafts cost
what they cost, but for a share it is that share that decides what is drafted.
"""

from __future__ import annotations

import inspect
import statistics
import textwrap
import time
from collections.abc import Generator, Mapping, Sequence
from typing import Any

import torch

from fastllama import LlamaForCausalLM
from fastllama.causal_lm import engine_of
from fastllama.engine.runner import Runner
from fastllama.generation.assistant import AssistantSource
from fastllama.generation.drafting import Drafting
from fastllama.generation.known import DraftCounts, known_of
from fastllama.generation.lookup import Draft
from fastllama.generation.loop import decode
from fastllama.generation.request import Request
from fastllama.measure import BandwidthProbe

from .environment import bandwidth
from .parity import check
from .rounds import Say, interleave
from .workload import Contender, Decode, Workload, timed

TEXTS = ("code", "story")
CODE_CHARACTERS, AGAIN_CHARACTERS = 2600, 300
COST_ROUNDS = 30
PLAIN, DRAFTED = "plain", "speculating"


class Prescribed:
    """Drafts of which a share comes true; made by a second model if one is given, and then replaced.

    Args:
        truth: what each row goes on with.
        share: of the tokens.
        model: the second model's drafts.
    """

    classes = 1

    def __init__(self, truth: Sequence[Sequence[int]], share: float, model: AssistantSource | None = None) -> None:
        self._truth, self._share, self._model = truth, share, model
        self._given, self._random = [0] * len(truth), torch.Generator().manual_seed(0)
        self.is_free, self.key = model is None, "prescribed"

    def draft(self, going: Sequence[int], count: int) -> Mapping[int, Draft]:
        """The tokens that come, some of them changed."""
        if self._model is not None:
            self._model.draft(going, count)
        found = {}
        for row in going:
            tokens = list(self._truth[row][self._given[row] :][:count])
            misses = (torch.rand(len(tokens), generator=self._random) >= self._share).tolist()
            drafted = [abs(token - 1) if miss else token for token, miss in zip(tokens, misses, strict=True)]
            found[row] = Draft(drafted, [0] * len(tokens))
        return {row: draft for row, draft in found.items() if draft.tokens}

    def extend(self, number: int, tokens: Sequence[int]) -> None:
        """Let a row go on."""
        self._given[number] += len(tokens)
        if self._model is not None:
            self._model.extend(number, tokens)

    def close(self) -> None:
        """Let the second model's next call go on from this one."""
        if self._model is not None:
            self._model.close()


class Engine(Contender):
    """The engine, with drafts or without."""

    def __init__(self, model: LlamaForCausalLM, name: str, drafting: Drafting | None = None, **settings: Any) -> None:
        self.name, self._model, self._drafting, self._settings = name, model, drafting, settings

    def run(self, workload: Workload) -> Decode:
        """Decode once, past any EOS token."""
        if self._drafting is None:
            ids_bt, settings = workload.input_ids(self._model.device), {"do_sample": False, "eos_token_id": ()}
            settings |= {"max_new_tokens": workload.new_tokens, **self._settings}
            return timed(self._model.stream(ids_bt, torch.ones_like(ids_bt), **settings))
        return timed(self._columns(workload))

    def _columns(self, workload: Workload) -> Generator[torch.Tensor, None, None]:
        requests = [Request(torch.tensor(prompt), workload.new_tokens) for prompt in workload.prompts]
        for tokens_bn in decode(engine_of(self._model), requests, drafting=self._drafting):
            yield from tokens_bn.unbind(1)


def measure(
    model: LlamaForCausalLM,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    batch: int,
    prompt_len: int,
    new_tokens: int,
    rounds: int,
    assistant: LlamaForCausalLM | None = None,
    say: Say = lambda message: None,
) -> dict[str, Any]:
    """The fields of a record.

    Args:
        model, tokenizer: what decodes; the tokenizer matters to texts in words.
        texts: names and shares.
        batch, prompt_len: rows of the same text; tokens of each prompt where it is random.
        new_tokens: of each row.
        rounds: timed decodes of each kind.
        assistant: a second model that drafts.
        say: shows what goes on.

    Raises:
        ValueError: a text that there is not; with sampling off, other tokens with drafts than without.
    """
    model.prefix_caching = False  # each run computes its whole prompt
    probe, found = BandwidthProbe(model.device), {}
    for text in texts:
        say(f"text: {text}")
        if text in TEXTS:
            ids = prompt_of(text, tokenizer)
            workload = Workload((ids,) * batch, new_tokens)
        else:
            workload = Workload.random(model.config.vocab_size, batch, prompt_len, new_tokens)
        found[text] = _measure_text(model, workload, text, rounds, assistant, probe, say)
    say("costs of steps")
    counts = {"batch": batch, "prompt_len": prompt_len, "new_tokens": new_tokens, "rounds": rounds}
    second = {"assistant": assistant and assistant.config.to_dict()}
    costs = {str(size): ratio for size, ratio in step_costs(model, batch, prompt_len).items()}
    parity = all(each["parity"] for each in found.values())
    return {**counts, **second, "texts": found, "costs": costs, "parity": parity, **bandwidth(probe)}


def _measure_text(
    model: LlamaForCausalLM,
    workload: Workload,
    text: str,
    rounds: int,
    assistant: LlamaForCausalLM | None,
    probe: BandwidthProbe,
    say: Say,
) -> dict[str, Any]:
    plain = Engine(model, PLAIN)
    if text in TEXTS:
        how: dict[str, Any] = {"speculate": "auto"} if assistant is None else {"assistant_model": assistant}
        drafted = Engine(model, DRAFTED, **how)
    else:
        truth = plain.run(workload).tokens or ()
        drafted = Engine(model, DRAFTED, prescribed(truth, float(text), assistant))
    runner = engine_of(model)
    runner.speculation = None  # each text begins with nothing known
    runs = interleave([plain, drafted], workload, rounds, say=say, between=probe.sample).runs
    tokens = {name: each[0].tokens for name, each in runs.items()}
    speeds = {
        name: workload.batch * sum(len(run.tpot) for run in each) / sum(sum(run.tpot) for run in each)
        for name, each in runs.items()
    }
    counts: DraftCounts = known_of(runner).counts
    rows = tokens[PLAIN] or ()
    return {
        "prompt_len": workload.prompt_len,
        "plain_tokens_per_second": speeds[PLAIN],
        "tokens_per_second": speeds[DRAFTED],
        "ratio": speeds[DRAFTED] / speeds[PLAIN],
        "tokens_per_step": counts.tokens_per_step,
        "acceptance": counts.acceptance,
        "drafted": counts.drafted,
        "same_tokens": tokens[PLAIN] == tokens[DRAFTED],
        "parity": tokens[PLAIN] == tokens[DRAFTED] and check(model, workload.prompts, rows, workload.new_tokens).passed,
    }


def prescribed(truth: Sequence[Sequence[int]], share: float, assistant: LlamaForCausalLM | None) -> Drafting:
    """Drafts of which a share comes true."""
    if assistant is None:
        return Drafting(lambda requests: Prescribed(truth, share), most=32)
    second = engine_of(assistant)
    return Drafting(
        lambda requests: Prescribed(truth, share, AssistantSource(second, requests, threshold=0.0)), 32, False, second
    )


def prompt_of(text: str, tokenizer: Any) -> tuple[int, ...]:
    """The prompt of a text in words."""
    code = inspect.getsource(textwrap)[:CODE_CHARACTERS]
    if not tokenizer.chat_template:
        return tuple(tokenizer(code + code[:AGAIN_CHARACTERS] if text == "code" else "Once upon a time").input_ids)
    wish = f"Rename the argument `width` to `columns` in this code and print the whole code again:\n{code}"
    content = wish if text == "code" else "Write a long story about a lighthouse."
    return tuple(tokenizer.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True))


@torch.inference_mode()
def step_costs(model: LlamaForCausalLM, batch: int, prompt_len: int) -> dict[int, float]:
    """What steps of several tokens a row take, over a step of one: medians of interleaved steps."""
    runner: Runner = engine_of(model)
    sizes, steps = runner.draft_sizes(batch), 0
    ids_bt = Workload.random(model.config.vocab_size, batch, prompt_len, 1).prompts
    seconds: dict[int, list[float]] = {size: [] for size in (1, *sizes)}
    with runner.session():
        most = prompt_len + (COST_ROUNDS + 2) * (1 + sum(sizes)) + 8
        runner.reserve(batch, most)
        runner.prefill({slot: Request(torch.tensor(ids), most) for slot, ids in enumerate(ids_bt)})
        for steps in range(COST_ROUNDS + 2):
            for size in seconds:
                started = time.perf_counter()
                if size == 1:
                    runner.step()
                    runner.newest().read()
                else:
                    runner.step_with(torch.zeros(batch, size - 1, dtype=torch.long))
                if steps > 1:
                    seconds[size].append(time.perf_counter() - started)
    one = statistics.median(seconds[1])
    return {size: statistics.median(seconds[size]) / one for size in sizes}
