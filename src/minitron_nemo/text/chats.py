"""Chats: messages become text by the tokenizer's own template, and the assistant's turns are what is learned.

    {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}], "tools": [...]}

A template says itself what the assistant writes (`{% generation %}`), or a turn is what the rendering grows by: from
the messages before it with the prompt for an answer, to the messages up to it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from minitron_nemo.checks import Mistake, require

if TYPE_CHECKING:
    from minitron_nemo.text.tokenizer import Tokenizer

ASSISTANT = "assistant"
TOOLS = "tools"
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Chat:
    """The messages of one record, and the tools they may call."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    where: str
    """The record, for messages about it."""

    @property
    def has_answer(self) -> bool:
        return any(message["role"] == ASSISTANT for message in self.messages)


def read_chat(messages: Any, tools: Any, where: str) -> Chat:
    """The chat in a record; either part may be spelled as JSON in a string. Raises: ValueError: it is none."""
    messages, tools = _from_json(messages, "messages", where), _from_json(tools, TOOLS, where)
    require(isinstance(messages, list), f"{where}: messages are {type(messages).__name__}, not a list of messages.")
    require(
        tools is None or (isinstance(tools, list) and all(isinstance(tool, Mapping) for tool in tools)),
        f"{where}: {TOOLS} must be a list of JSON schemas, or null.",
    )
    for number, message in enumerate(messages, start=1):
        require(
            isinstance(message, Mapping) and isinstance(message.get("role"), str),
            f"{where}: message {number} has no role. A message is {{role: ..., content: ...}}, with the role user, "
            "assistant, system or tool.",
        )
        require(
            isinstance(message.get("content"), (str, list, type(None))),
            f"{where}: the content of message {number} is {type(message.get('content')).__name__}, not text.",
        )
    # a column of Parquet gives every message every key, null where it has none
    filled = [{"content": ""} | _without_nulls(message) for message in messages]
    return Chat(filled, _without_nulls(tools) or None, where)


class ChatTemplate:
    """A tokenizer's chat template. Raises: ValueError: it has none."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        require(
            bool(tokenizer.chat_template),
            f"tokenizer={tokenizer.name_or_path} has no chat template, which writes messages as text. Take the "
            "tokenizer of a chat model, or put a chat_template.jinja there.",
        )
        self._tokenizer = tokenizer

    def render(self, chat: Chat) -> str:
        return self._render(chat, chat.messages)

    def learned(self, chat: Chat, text: str) -> list[tuple[int, int]]:
        """Where in `text`, which `render` gave, the assistant writes: [start, end) of each turn, in characters."""
        if _GENERATION.search(self._template(chat)):
            return self._marked(chat)
        spans = []
        for index, message in enumerate(chat.messages):
            if message["role"] != ASSISTANT:
                continue
            before = self._render(chat, chat.messages[:index], add_generation_prompt=True)
            after = self._render(chat, chat.messages[: index + 1])
            require(
                text.startswith(after) and after.startswith(before),
                f"{chat.where}: the chat template of {self._tokenizer.name_or_path} writes message {index + 1} "
                "differently when others follow or when it is to be answered, so its part of the text is not known. "
                "Use a template that marks it with {% generation %}, or end the chat with its first answer.",
            )
            spans.append((len(before), len(after)))
        return spans

    def _template(self, chat: Chat) -> str:
        template: str = self._tokenizer.get_chat_template(None, chat.tools)
        return template

    def _render(self, chat: Chat, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        try:
            text: str = self._tokenizer.apply_chat_template(
                messages, tools=chat.tools, chat_template=self._template(chat), tokenize=False, **options
            )
        except Exception as error:  # whatever the template raises, and jinja in it
            raise self._refused(chat, error) from error
        return text

    def _marked(self, chat: Chat) -> list[tuple[int, int]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            _, (spans,) = render_jinja_template(
                conversations=[chat.messages],
                tools=chat.tools,
                chat_template=self._template(chat),
                return_assistant_tokens_mask=True,
                **self._tokenizer.special_tokens_map,
            )
        except Exception as error:
            raise self._refused(chat, error) from error
        return [tuple(span) for span in spans]

    def _refused(self, chat: Chat, error: Exception) -> Mistake:
        return Mistake(
            f"{chat.where}: the chat template of {self._tokenizer.name_or_path} refuses these messages ({error}). "
            "Correct the record or take it out."
        )


def _from_json(value: Any, what: str, where: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise Mistake(f"{where}: {what} are a string that is not JSON ({error}). Write a list of messages.") from error


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value
