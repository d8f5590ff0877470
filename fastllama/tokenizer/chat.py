"""Chat templates: Jinja, rendered in a sandbox, with what Hugging Face's templates expect to find there."""

from __future__ import annotations

import functools
import json
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Scope
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

Messages = list[dict[str, Any]]


def render_chat(template: str, messages: Messages, **variables: Any) -> str:
    """Write a conversation as one prompt.

    Args:
        template: the Jinja source.
        messages: such as ``[{"role": "user", "content": "Hey"}]``.
        variables: what else the template may read, such as ``add_generation_prompt`` or ``bos_token``.

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
    try:
        return compiled(template).render(messages=messages, **variables)
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template cannot write these messages: {error}") from error


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
    """``{% generation %}…{% endgeneration %}``: marks the assistant's words for training; rendered as its body."""

    tags = {"generation"}  # noqa: RUF012 (as jinja2 declares it)

    def parse(self, parser: Parser) -> Scope:
        line = next(parser.stream).lineno
        return Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """The ``tojson`` filter; jinja's own would escape ``<``, ``>`` and ``&`` for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def raise_exception(message: str) -> NoReturn:
    """How a template refuses a conversation."""
    raise jinja2.TemplateError(message)


def strftime_now(pattern: str) -> str:
    """The local time now, written as ``pattern`` says."""
    return datetime.now().strftime(pattern)
