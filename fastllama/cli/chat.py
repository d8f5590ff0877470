"""``fastllama chat``: a conversation in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from fastllama.cli import options
from fastllama.cli.console import errors_in_one_line, stderr, write
from fastllama.cli.reply import stream_reply


def chat(
    model: options.Model = "demo",
    dtype: options.Dtype = None,
    device: options.Device = None,
    quantize: options.Quantize = None,
    kv_cache_dtype: options.KVCacheDtype = None,
    system: Annotated[str | None, typer.Option(help="System prompt.", show_default="none")] = None,
    max_new_tokens: options.MaxNewTokens = None,
    sample: options.Sample = None,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    seed: options.Seed = None,
    speculate: options.Speculate = False,
    assistant_model: options.AssistantModel = None,
    strict: options.Strict = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Chat with a model. Ctrl-C stops an answer, /clear starts a new conversation, /quit or Ctrl-D exits."""
    with errors_in_one_line(debug):
        sampling = options.sampling_arguments(sample, temperature, top_k, top_p, min_p, seed)
        loaded = options.load(model, dtype, device, quiet, strict, quantize, kv_cache_dtype)
        sampling |= options.draft_arguments(speculate, assistant_model, loaded, quiet)
        conversation = Conversation(loaded.tokenizer, system)
        if not conversation.has_template and not quiet:
            stderr().print(
                "this checkpoint has no chat template: the model continues your lines as plain text", style="dim"
            )
        for line in user_lines():
            if line == "/clear":
                conversation = Conversation(loaded.tokenizer, system)
            elif line:
                _answer(loaded, conversation, line, max_new_tokens, quiet, sampling)


class Conversation:
    """The messages so far, and the prompt they make.

    Args:
        tokenizer: its chat template is used; without one, messages are joined by newlines.
        system: a system prompt.
    """

    def __init__(self, tokenizer: Any, system: str | None = None) -> None:
        self._tokenizer = tokenizer
        self._messages = [{"role": "system", "content": system}] if system else []

    @property
    def has_template(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return bool(self._tokenizer.chat_template)

    def say(self, role: str, content: str) -> None:
        """Add a message by the ``user`` or the ``assistant``."""
        self._messages.append({"role": role, "content": content})

    def take_back(self) -> None:
        """Remove the last message."""
        self._messages.pop()

    def prompt_ids(self) -> list[int]:
        """Token ids of the prompt for the assistant's next message."""
        if self.has_template:
            return list(self._tokenizer.apply_chat_template(self._messages, add_generation_prompt=True))
        return list(self._tokenizer("\n".join(message["content"] for message in self._messages)).input_ids)


def user_lines() -> Iterator[str]:
    """The lines that the user types, until /quit or the end of stdin; a prompt is shown on a terminal only."""
    if sys.stdin.isatty():
        import readline  # noqa: F401  input() edits lines and keeps a history with it
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if line == "/quit":
            return
        yield line


def _answer(
    loaded: options.Loaded,
    conversation: Conversation,
    line: str,
    max_new_tokens: int | None,
    quiet: bool,
    sampling: dict[str, Any],
) -> None:
    """Take one line of the user and answer it."""
    from fastllama.model.cache import CacheOverflowError

    conversation.say("user", line)
    prompt_ids = conversation.prompt_ids()
    arguments = {"max_new_tokens": loaded.budget(len(prompt_ids), max_new_tokens)} | sampling
    try:
        reply = stream_reply(loaded, prompt_ids, write, quiet=quiet, stop_on_interrupt=True, **arguments)
    except CacheOverflowError as error:
        conversation.take_back()
        stderr().print(f"{error}; /clear starts a new conversation", style="red", markup=False)
        return
    write("\n")
    if reply.decode.tokens:
        conversation.say("assistant", reply.text)
    else:
        conversation.take_back()
    tokens = reply.decode.tokens
    ended = not tokens or tokens[-1] in loaded.model.generation_config.eos_token_id
    if not (ended or reply.interrupted) and len(tokens) == arguments["max_new_tokens"]:
        stderr().print(f"cut after {len(tokens)} tokens; --max-new-tokens allows more", style="dim")
    if not quiet:
        stderr().print(("stopped: " if reply.interrupted else "") + reply.speed(), style="dim")
