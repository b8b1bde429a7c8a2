"""Chat templates: a model's own Jinja template, which makes one text of many messages."""

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.exceptions import TemplateSyntaxError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


class WrongTemplate(ValueError):
    """The template itself cannot be used."""


class TemplateRefusal(ValueError):
    """The template cannot make a prompt of these messages; the text says why."""


class _Generation(Extension):
    """``{% generation %}`` marks, for training, what the assistant says; here its content is all that counts."""

    tags = {"generation"}  # noqa: RUF012 - as the base class has it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """``special`` are the special tokens that a template may name, such as ``bos_token``."""

    def __init__(self, source: str, special: Mapping[str, str]) -> None:
        """Raises: WrongTemplate."""
        # A template comes with the weights, from whoever made them: in the sandbox it can reach nothing but its input.
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _raise, "strftime_now": _strftime_now}
        try:
            self._template = environment.from_string(source)
        except TemplateSyntaxError as error:
            raise WrongTemplate(f"its chat template is no Jinja: {error}") from error
        self._special = dict(special)

    def render(self, messages: Sequence[Mapping[str, Any]], arguments: Mapping[str, Any]) -> str:
        """The prompt up to where the model's answer begins. ``arguments``: what the template takes beside messages.

        Raises:
            TemplateRefusal: see there.
        """
        try:
            # Templates ask whether these are none, so they have to be there.
            given = {"tools": None, "documents": None} | self._special | dict(arguments)
            text = self._template.render(given | {"messages": list(messages), "add_generation_prompt": True})
            # Half a character can come with the arguments; no tokenizer takes one.
            text.encode()
            return text
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError, RecursionError) as error:
            raise TemplateRefusal(str(error)[:300] or type(error).__name__) from error


def _raise(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **_: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)
