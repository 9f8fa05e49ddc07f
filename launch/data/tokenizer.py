"""Text to token ids and back: bytes by default, any Hugging Face ``tokenizers`` JSON file on request."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Protocol

from lasp.parallel.file_errors import reading

BYTES = "bytes"
_END_TOKENS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "[SEP]", "<|im_end|>")


class Tokenizer(Protocol):
    """What data preparation and generation need.

    Attributes:
        name: ``bytes``, or the file it was read from.
        vocab_size: ids are below it.
        eos: ends every document.
    """

    name: str
    vocab_size: int
    eos: int

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without ``eos``."""

    def decode(self, ids: list[int]) -> str:
        """The text of some ids; special ones are left out."""

    def to_json(self) -> bytes | None:
        """The file that makes it again; None: its name is enough."""


class ByteTokenizer:
    """One id per byte of UTF-8, and 256 for the end of a document."""

    name, vocab_size, eos = BYTES, 257, 256

    def encode(self, text: str) -> list[int]:
        """The bytes of the text."""
        return list(text.encode("utf-8", "surrogateescape"))

    def decode(self, ids: list[int]) -> str:
        """The text; bytes that are no UTF-8 show as a replacement character."""
        return bytes(i for i in ids if i < 256).decode("utf-8", "replace")

    def to_json(self) -> None:
        """Nothing to keep."""
        return None


class FileTokenizer:
    """A ``tokenizer.json`` of the Hugging Face ``tokenizers`` library."""

    def __init__(self, name: str, content: bytes):
        try:
            from tokenizers import Tokenizer as Backend
        except ModuleNotFoundError as error:
            raise ValueError(
                f"tokenizer {name} needs the tokenizers package: pip install 'lasp[tokenizers]', or use "
                f"tokenizer={BYTES}."
            ) from error
        try:
            self._backend = Backend.from_str(content.decode())
        except Exception as error:  # the library raises plain Exception
            raise ValueError(
                f"{name} is not a Hugging Face tokenizers JSON file: {error}. Use {BYTES}, or a file that they saved."
            ) from error
        self.name, self._content = name, content
        self.vocab_size = self._backend.get_vocab_size(with_added_tokens=True)
        ends = [i for token in _END_TOKENS if (i := self._backend.token_to_id(token)) is not None]
        if not ends:
            raise ValueError(
                f"tokenizer {name} has no end-of-document token: one of {', '.join(_END_TOKENS)}. Add one to it."
            )
        self.eos = ends[0]

    def encode(self, text: str) -> list[int]:
        """Ids, without the special tokens that the file's post-processor would add."""
        clean = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        return self._backend.encode(clean, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """The text, without special tokens."""
        return self._backend.decode(ids)

    def to_json(self) -> bytes:
        """The file's content."""
        return self._content


def fingerprint(tokenizer: Tokenizer) -> str:
    """What tells a tokenizer from another one of equal size: ``bytes``, or the sha256 of its JSON."""
    content = tokenizer.to_json()
    return BYTES if content is None else hashlib.sha256(content).hexdigest()


def load_tokenizer(name: str, content: bytes | None = None) -> Tokenizer:
    """The tokenizer called ``bytes``, or the one in a JSON file.

    Args:
        name: ``bytes`` or a path.
        content: the file's content, where it is at hand already (in a checkpoint).
    """
    if name == BYTES:
        return ByteTokenizer()
    if content is None:
        if not Path(name).is_file():
            raise ValueError(
                f"tokenizer must be {BYTES!r} or a tokenizer JSON file; {name!r} is no file. Name one that exists."
            )
        with reading(name):
            content = Path(name).read_bytes()
        name = os.path.abspath(name)  # data and checkpoints keep it: it must mean the same in any working directory
    return FileTokenizer(name, content)
