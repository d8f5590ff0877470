"""Chat templates: Jinja, rendered in a sandbox, with what Hugging Face's templates expect to find there.

Source: https://huggingface.co/docs/transformers/chat_templating and transformers' utils/chat_template_utils.py.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import CallBlock
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

Messages = list[dict[str, Any]]
Spans = list[tuple[int, int]]

# What the expressions of a template may raise besides jinja's own errors.
TEMPLATE_FAULTS = (ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError, ValueError)

MARK = "CONTINUE_FINAL_MESSAGE_HERE "  # with a space, so that it shows whether the template strips messages
_rendering: ContextVar[tuple[list[str], Spans] | None] = ContextVar("rendering", default=None)


def render(
    template: str,
    messages: Messages,
    continued: bool | str = False,
    *,
    tools: Sequence[dict[str, Any] | Callable[..., Any]] | None = None,
    documents: Sequence[dict[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    **variables: Any,
) -> tuple[str, Spans]:
    """Write a conversation as one prompt, as :func:`render_chat` or :func:`render_open` does.

    Args:
        template, messages: as they take them.
        continued: whether the last message is open, or the name of its field that is.
        tools: as :func:`tool_schemas` takes them.
        documents: dicts.
        add_generation_prompt: whether to open the assistant's turn at the end.
        variables: further ones of the template.

    Raises:
        TypeError: tools or documents of another kind.
        ValueError: as the functions above; or two arguments that exclude each other.
    """
    if continued and add_generation_prompt:
        raise ValueError("continue_final_message and add_generation_prompt exclude each other.")
    if documents is not None and not all(isinstance(document, dict) for document in documents):
        raise TypeError("documents are dicts, such as {'title': '…', 'text': '…'}.")
    variables |= {"tools": tool_schemas(tools), "documents": documents, "add_generation_prompt": add_generation_prompt}
    if not continued:
        return render_chat(template, messages, **variables)
    return render_open(template, messages, "content" if continued is True else continued, **variables)


def render_chat(template: str, messages: Messages, **variables: Any) -> tuple[str, Spans]:
    """Write a conversation as one prompt.

    Args:
        template: the Jinja source.
        messages: such as ``[{"role": "user", "content": "Hey"}]``.
        variables: what else the template may read, such as ``add_generation_prompt`` or ``bos_token``.

    Returns:
        The prompt, and where in it the assistant's words are: the parts inside ``{% generation %}``, as indices of
        their first character and of the one after their last.

    Raises:
        ValueError: the template is broken, or refuses the messages.
    """
    if not isinstance(messages, list | tuple) or not all(isinstance(message, dict) for message in messages):
        raise ValueError(
            f"expected a conversation as a list of messages like {{'role': 'user', 'content': 'Hey'}}, "
            f"got {messages!r:.100}"
        )
    if not messages:
        raise ValueError("the conversation is empty; give at least one message.")
    blocks: list[str] = []
    spans: Spans = []
    token = _rendering.set((blocks, spans))
    try:
        for block in compiled(template).generate(messages=messages, **variables):
            blocks.append(block)
    except (jinja2.TemplateError, *TEMPLATE_FAULTS) as error:
        raise ValueError(f"the chat template cannot write these messages: {error}") from error
    finally:
        _rendering.reset(token)
    return "".join(blocks), spans


def render_open(template: str, messages: Messages, field: str = "content", **variables: Any) -> tuple[str, Spans]:
    """Write a conversation whose last message is not finished, so that the model continues it.

    Args:
        template, messages, variables: as :func:`render_chat` takes them.
        field: of the last message, to continue.

    Raises:
        ValueError: the last message has no such text, or the template does not write it.
    """
    messages = copy.deepcopy(messages)
    last = messages[-1] if messages and isinstance(messages[-1], dict) else {}
    holder, key = last, field
    if isinstance(last.get(field), list):
        parts = [part for part in last[field] if isinstance(part, dict) and "text" in part]
        holder, key = (parts[-1], "text") if parts else ({}, "text")
    text = holder.get(key)
    if not isinstance(text, str):
        raise ValueError(f"continue_final_message: the last message has no text in {field!r} to continue.")
    holder[key] = text + MARK
    prompt, spans = render_chat(template, messages, **variables)
    end = prompt.rfind(MARK.strip())
    if end < 0 or text.strip() not in prompt:
        raise ValueError("continue_final_message: the chat template does not write the last message as it is.")
    prompt = prompt[:end] if prompt[end:].startswith(MARK) else prompt[:end].rstrip()
    return prompt, [(start, min(stop, len(prompt))) for start, stop in spans]


def tool_schemas(tools: Sequence[dict[str, Any] | Callable[..., Any]] | None) -> list[dict[str, Any]] | None:
    """Tools as JSON schemas, those that are functions by their type hints and docstrings.

    Raises:
        NotImplementedError: a function, without transformers, which makes schemas of functions.
        TypeError: a tool is neither.
        ValueError: a function without the hints or the docstring that it takes.
    """
    if tools is None:
        return None
    if wrong := [tool for tool in tools if not isinstance(tool, dict) and not callable(tool)]:
        raise TypeError(f"tools are JSON schemas (dicts) or functions, got {wrong[0]!r:.100}.")
    if all(isinstance(tool, dict) for tool in tools):
        return list(tools)  # pyright: ignore
    try:
        from transformers.utils.chat_template_utils import DocstringParsingException, TypeHintParsingException
        from transformers.utils.chat_template_utils import get_json_schema as schema_of
    except ImportError as error:
        raise NotImplementedError("functions as tools need transformers: pip install transformers") from error
    try:
        return [tool if isinstance(tool, dict) else schema_of(tool) for tool in tools]
    except (DocstringParsingException, TypeHintParsingException) as error:
        raise ValueError(f"a tool cannot be described: {error}") from error


def choose_template(templates: str | dict[str, str] | None, wanted: str | None, has_tools: bool) -> str:
    """Choose the template: ``wanted`` (a name or a source), or else the tokenizer's own.

    If there are several, ``tool_use`` serves conversations with tools and ``default`` all others.

    Raises:
        ValueError: there is none, or several and none of them is the default.
    """
    if isinstance(templates, dict):
        names = [wanted] if wanted else ["tool_use", "default"] if has_tools else ["default"]
        chosen = next((templates[name] for name in names if name in templates), wanted)
        if chosen is None:
            raise ValueError(
                f"this tokenizer has the chat templates {sorted(templates)} and no default; "
                "pass the name of one as chat_template."
            )
        return chosen
    chosen = wanted or templates
    if chosen is None:
        raise ValueError(
            "this tokenizer has no chat template: it may belong to a base model, not a chat model. "
            "Pass one as chat_template, or encode the text itself."
        )
    return chosen


@functools.lru_cache(maxsize=16)
def compiled(template: str) -> jinja2.Template:
    """The template, compiled in an environment like the one transformers gives its templates."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, GenerationTag]
    )
    environment.filters["tojson"] = to_json
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    return environment.from_string(template)


class GenerationTag(Extension):
    """``{% generation %}…{% endgeneration %}``: marks the assistant's words; rendered as its body."""

    tags = {"generation"}  # noqa: RUF012 (as jinja2 declares it)

    def parse(self, parser: Parser) -> CallBlock:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        block = CallBlock(self.call_method("_noted"), [], [], body)
        block.set_lineno(line)
        return block

    def _noted(self, caller: Callable[[], str]) -> str:
        words, rendering = caller(), _rendering.get()
        if rendering is not None:
            blocks, spans = rendering
            start = sum(map(len, blocks))
            spans.append((start, start + len(words)))
        return words


def to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """The ``tojson`` filter; jinja's own would escape ``<``, ``>`` and ``&`` for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def raise_exception(message: str) -> NoReturn:
    """How a template refuses a conversation."""
    raise jinja2.TemplateError(message)


def strftime_now(pattern: str) -> str:
    """The local time now, written as ``pattern`` says."""
    return datetime.now().strftime(pattern)
