"""Documents become ids: one rule for token files, calibration samples and questions.

    plain text            [bos] text             what looks like a special token stays text
    prompt and text       [bos] prompt | text    special tokens are kept: it is written as the model is to see it
    chat                  as its template        the same; what the template does not begin with is not added

A document begins with the beginning-of-text token where the tokenizer's own setting says so (`begins_with_bos`), and
never with two. Ids that are read and not learned, a prompt's and what the assistant did not write, are marked (see
`documents.mark`).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from minitron_nemo.checks import require
from minitron_nemo.text.chats import Chat, ChatTemplate
from minitron_nemo.text.corpus import Document
from minitron_nemo.text.documents import mark
from minitron_nemo.text.tokenizer import begins_with_bos

if TYPE_CHECKING:
    from minitron_nemo.text.tokenizer import Tokenizer


class Encoder:
    """A tokenizer with the rule by which documents become its ids.

    Args:
        special_tokens: auto, as above; keep or split, for every document.
        add_bos: null, as above; true or false, for every document (a chat's own is never taken away).
    """

    def __init__(self, tokenizer: Tokenizer, *, special_tokens: str = "auto", add_bos: bool | None = None) -> None:
        require(
            not add_bos or tokenizer.bos_token_id is not None,
            f"add_bos=true, but tokenizer={tokenizer.name_or_path} has no bos_token. Set add_bos=null.",
        )
        self.tokenizer = tokenizer
        self.end_of_text: int = tokenizer.eos_token_id
        self.adds_bos = begins_with_bos(tokenizer) if add_bos is None else add_bos
        self._chats_add_bos, self._special_tokens = bool(add_bos), special_tokens

    def __call__(self, documents: Sequence[Document]) -> list[np.ndarray]:
        """Each document's ids, int64, marked where they are not learned; nothing closes them."""
        encoded: dict[int, np.ndarray] = {}
        for keep in (False, True):
            places = [i for i, each in enumerate(documents) if each.chat is None and self._keeps(each) == keep]
            prompts = self._ids([documents[i].prompt or "" for i in places], keep=keep)
            texts = self._ids([documents[i].text for i in places], keep=keep)
            for i, prompt, text in zip(places, prompts, texts, strict=True):
                encoded[i] = self._document(prompt, text)
        places = [i for i, each in enumerate(documents) if each.chat is not None]
        for i, ids in zip(places, self._chats([documents[i] for i in places]), strict=True):
            encoded[i] = ids
        return [encoded[i] for i in range(len(documents))]

    def prompt(self, text: str) -> list[int]:
        """Ids of a text that is to be answered, as a document begins."""
        (ids,) = self._ids([text], keep=self._special_tokens != "split")
        return self._begin(ids) + ids

    @property
    def prefix(self) -> int:
        """What an empty text is read as: the beginning of a text, or the end of one where there is none."""
        return self.end_of_text if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id

    def render(self, chat: Chat) -> str:
        """Raises: ValueError: the tokenizer has no template, or it refuses the messages."""
        return self._template.render(chat)

    @cached_property
    def _template(self) -> ChatTemplate:
        return ChatTemplate(self.tokenizer)

    def _keeps(self, document: Document) -> bool:
        if self._special_tokens == "auto":
            return document.prompt is not None or document.chat is not None
        return self._special_tokens == "keep"

    def _begin(self, ids: list[int]) -> list[int]:
        bos = self.tokenizer.bos_token_id
        return [bos] if self.adds_bos and ids[:1] != [bos] else []

    def _document(self, prompt: list[int], text: list[int]) -> np.ndarray:
        read, learned = self._begin(prompt + text[:1]) + prompt, text
        if not prompt:
            read, learned = [], read + text
        return np.concatenate([mark(np.asarray(read, np.int64)), np.asarray(learned, np.int64)])

    def _ids(self, texts: list[str], *, keep: bool) -> list[list[int]]:
        if not any(texts):
            return [[] for _ in texts]
        encoded = self.tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, split_special_tokens=not keep, verbose=False
        )
        return encoded["input_ids"]

    def _chats(self, documents: Sequence[Document]) -> list[np.ndarray]:
        if not documents:
            return []
        found = self._with_places.encode_batch([each.text for each in documents], add_special_tokens=False)
        encoded = []
        for document, tokens in zip(documents, found, strict=True):
            assert document.chat is not None
            ids, spans = np.asarray(tokens.ids, np.int64), self._template.learned(document.chat, document.text)
            start, end = np.asarray(tokens.offsets, np.int64).reshape(-1, 2).T
            learned = np.zeros(len(ids), bool)
            for first, last in spans:
                learned |= (start < last) & (end > first)
            bos = self.tokenizer.bos_token_id
            begin = [bos] if self._chats_add_bos and ids[:1].tolist() != [bos] else []
            encoded.append(np.concatenate([mark(np.asarray(begin, np.int64)), np.where(learned, ids, mark(ids))]))
        return encoded

    @cached_property
    def _with_places(self) -> Any:
        """The tokenizer that says which characters a token is; as a rule a post-processor cuts white space off them."""
        from tokenizers import processors

        require(
            self.tokenizer.is_fast,
            f"tokenizer={self.tokenizer.name_or_path} has no tokenizer.json, which chats need. Save it as a fast one.",
        )
        backend = copy.deepcopy(self.tokenizer.backend_tokenizer)
        backend.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
        backend.encode_special_tokens = self._special_tokens == "split"
        backend.no_truncation()
        backend.no_padding()
        return backend
