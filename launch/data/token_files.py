"""Token files in Megatron-Core's format: ``PREFIX.bin`` holds tokens, ``PREFIX.idx`` where each document starts.

    PREFIX.idx, little endian:  magic "MMIDIDX\\0\\0", version u64 = 1, dtype code u8,
                                sequences u64, document indices u64,
                                lengths i32[sequences], byte offsets i64[sequences], document indices i64[...]

One document is one sequence here and ends with the tokenizer's eos. ``PREFIX.json`` says which tokenizer made
them; Megatron does not read it. ``lasp data prepare`` writes such files, training maps them into memory.
"""

from __future__ import annotations

import json
import os
import struct
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from lasp.launch.data.tokenizer import Tokenizer, fingerprint
from lasp.parallel.file_errors import reading, writing

STDLIB = "stdlib"  # as data.source: the running interpreter's standard library
_SUFFIXES = (".bin", ".idx", ".json")
_MAGIC = b"MMIDIDX\x00\x00"
_DTYPES = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    8: np.uint16,
}
_CODES = {np.dtype(dtype): code for code, dtype in _DTYPES.items()}


class TokenFile:
    """A prepared data set, mapped into memory: ``len(file)`` documents, ``file.document(i)`` its tokens."""

    def __init__(self, prefix: str | Path):
        _check_prefix(prefix, "data.source")
        self.prefix = Path(prefix)
        index, tokens = with_suffix(prefix, ".idx"), with_suffix(prefix, ".bin")
        for path in (index, tokens):
            if not path.is_file():
                fault = "is no file" if path.exists() else "does not exist"
                raise ValueError(
                    f"data.source {prefix!s}: {path} {fault}. Make it with `lasp data prepare INPUT... --output "
                    f"{prefix!s}`, or use data.source={STDLIB}."
                )
        self.lengths, self._offsets, self._dtype = _read_index(index)
        size = tokens.stat().st_size
        if len(self.lengths):
            end = int((self._offsets + self.lengths.astype(np.int64) * self._dtype.itemsize).max())
            if self.lengths.min() < 0 or self._offsets.min() < 0 or end < 0:
                raise ValueError(
                    f"{index} is damaged: lengths and byte offsets must not be negative, the smallest are "
                    f"{self.lengths.min()} and {self._offsets.min()}. Prepare the data again."
                )
            if size < end:
                raise ValueError(
                    f"{tokens} is truncated: {size} bytes, {index.name} says {end}. Prepare the data again."
                )
        with reading(tokens):
            self._bytes = np.memmap(tokens, np.uint8, mode="r") if size else np.zeros(0, np.uint8)
        info = with_suffix(prefix, ".json")
        self.info: dict = _read_info(info) if info.is_file() else {}

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents."""
        return int(self.lengths.sum(dtype=np.int64))

    def document(self, index: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Tokens ``[start, stop)`` of a document, int64."""
        length = int(self.lengths[index])
        stop = length if stop is None else stop
        if not 0 <= start <= stop <= length:
            raise ValueError(
                f"[start, stop) must lie inside document {index} of {length} tokens, got [{start}, {stop}). Ask "
                "for less."
            )
        size = self._dtype.itemsize
        begin = int(self._offsets[index]) + start * size
        return self._bytes[begin : begin + (stop - start) * size].view(self._dtype).astype(np.int64)


def write_token_file(prefix: str | Path, texts: Iterable[str], tokenizer: Tokenizer) -> TokenFile:
    """Tokenize documents into ``prefix``.bin/.idx/.json. Files appear whole or not at all.

    Raises:
        ValueError: no document holds any text; ``prefix`` is a folder.
        OSError: the files cannot be written.
    """
    _check_prefix(prefix, "prefix")
    with writing(prefix):
        _write_files(Path(prefix), texts, tokenizer)
    return TokenFile(prefix)


def _write_files(prefix: Path, texts: Iterable[str], tokenizer: Tokenizer) -> None:
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size < 65500 else np.int32)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    temporary = {s: with_suffix(prefix, f"{s}.tmp{os.getpid()}") for s in _SUFFIXES}
    lengths: list[int] = []
    try:
        with temporary[".bin"].open("wb") as tokens:
            for text in texts:
                if not text:
                    continue
                ids = np.asarray([*tokenizer.encode(text), tokenizer.eos], dtype)
                if len(ids) >= 2**31:
                    raise ValueError(
                        f"a document must have fewer than 2^31 tokens, got {len(ids)} in number {len(lengths)}. Cut it."
                    )
                tokens.write(ids.tobytes())
                lengths.append(len(ids))
        if not lengths:
            raise ValueError(f"no text to prepare for {prefix}: every input is empty. Name files that hold text.")
        _write_index(temporary[".idx"], lengths, dtype)
        info = {
            "tokenizer": tokenizer.name,
            "tokenizer_sha256": fingerprint(tokenizer),
            "vocab_size": tokenizer.vocab_size,
            "eos": tokenizer.eos,
            "documents": len(lengths),
            "tokens": sum(lengths),
        }
        temporary[".json"].write_text(json.dumps(info, indent=1))
        for suffix in _SUFFIXES:
            os.replace(temporary[suffix], with_suffix(prefix, suffix))
    finally:
        for path in temporary.values():
            if path.parent.is_dir():
                path.unlink(missing_ok=True)


def list_files(inputs: Iterable[str | Path], pattern: str = "*") -> list[Path]:
    """Named files, and those below named folders whose name matches, in sorted order.

    Raises:
        ValueError: an input that does not exist; no file at all; a pattern that is none.
    """
    if not pattern or Path(pattern).is_absolute():
        raise ValueError(f"--glob must be a pattern below the named folders, like '*.txt', got {pattern!r}. Change it.")
    files: list[Path] = []
    for path in map(Path, inputs):
        if not path.exists():
            raise ValueError(f"input {path} does not exist. Name files, or folders that hold some.")
        files += sorted(p for p in path.rglob(pattern) if p.is_file()) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"no file to read: no input holds a file that matches {pattern!r}. Change --glob.")
    return files


def check_output(prefix: str | Path, files: Iterable[Path]) -> None:
    """Refuse an output where a folder is, or one of the inputs.

    Raises:
        ValueError: naming the file.
    """
    _check_prefix(prefix, "--output")
    outputs = {with_suffix(prefix, suffix).resolve() for suffix in _SUFFIXES}
    for folder in sorted(path for path in outputs if path.is_dir()):
        raise ValueError(f"--output {prefix}: {folder.name} must be a file, and is a folder. Choose another name.")
    for file in files:
        if file.resolve() in outputs:
            raise ValueError(
                f"--output {prefix}: {file} is one of the inputs and would be overwritten. Write to another folder, "
                "or choose the inputs with --glob."
            )


def read_texts(files: Iterable[Path]) -> Iterator[str]:
    """The text of each file.

    Raises:
        OSError: a file that cannot be read.
    """
    for file in files:
        with reading(file):
            text = file.read_text(encoding="utf-8", errors="surrogateescape")
        yield text


def stdlib_files() -> list[Path]:
    """Sources of the running interpreter's standard library, in sorted order, without tests and packages."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    files = [p for p in root.rglob("*.py") if not left_out & set(p.relative_to(root).parts)]
    if not files:
        raise ValueError(f"data.source=stdlib: {root} holds no *.py source. Prepare other text and name it.")
    return sorted(files)


def with_suffix(prefix: str | Path, suffix: str) -> Path:
    """``prefix`` + ``suffix``; a prefix may have dots of its own."""
    return Path(f"{prefix}{suffix}")


def _check_prefix(prefix: str | Path, argument: str) -> None:
    if str(prefix).endswith("/") or Path(prefix).name in ("", ".."):
        raise ValueError(
            f"{argument} must end with the name that its files share, got the folder {str(prefix)!r}. "
            f"Use {Path(prefix) / 'NAME'}: its files are NAME.bin, NAME.idx and NAME.json."
        )


def _write_index(path: Path, lengths: list[int], dtype: np.dtype) -> None:
    sizes = np.asarray(lengths, np.int64) * dtype.itemsize
    with path.open("wb") as file:
        file.write(_MAGIC + struct.pack("<QB", 1, _CODES[dtype]))
        file.write(struct.pack("<QQ", len(lengths), len(lengths) + 1))
        file.write(np.asarray(lengths, "<i4").tobytes())
        file.write((np.cumsum(sizes) - sizes).astype("<i8").tobytes())
        file.write(np.arange(len(lengths) + 1, dtype="<i8").tobytes())


def _read_info(path: Path) -> dict:
    """What PREFIX.json says."""
    try:
        with reading(path):
            info = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}. Prepare the data again.") from error
    if not isinstance(info, dict):
        raise ValueError(f"{path} must hold a JSON object, got {info!r:.80}. Prepare the data again.")
    return info


def _read_index(path: Path) -> tuple[np.ndarray, np.ndarray, np.dtype]:
    """Document lengths in tokens, their byte offsets, and the token dtype."""
    with reading(path):
        content = path.read_bytes()
    head = struct.calcsize("<9sQBQQ")
    if content[: len(_MAGIC)] != _MAGIC[: len(content)]:
        raise ValueError(
            f"{path} is not a Megatron index file: it does not start with {_MAGIC!r}. Prepare the data again."
        )
    if len(content) < head:
        raise ValueError(f"{path} is truncated: {len(content)} bytes, its head has {head}. Prepare the data again.")
    _, version, code, sequences, marks = struct.unpack("<9sQBQQ", content[:head])
    if version != 1 or code not in _DTYPES:
        raise ValueError(
            f"{path} must have version 1 and a dtype code of {list(_DTYPES)}, got {version} and {code}. Prepare the "
            "data again."
        )
    if len(content) < head + 12 * sequences + 8 * marks:
        raise ValueError(
            f"{path} is truncated: {len(content)} bytes for {sequences} sequences. Prepare the data again."
        )
    lengths = np.frombuffer(content, "<i4", sequences, head)
    offsets = np.frombuffer(content, "<i8", sequences, head + 4 * sequences)
    documents = np.frombuffer(content, "<i8", marks, head + 12 * sequences)
    if marks and not 0 <= documents.min() <= documents.max() <= sequences:
        raise ValueError(
            f"{path} is damaged: its document indices must lie in [0, {sequences}], the number of its sequences, got "
            f"{documents.min()} to {documents.max()}. Prepare the data again."
        )
    return lengths, offsets, np.dtype(_DTYPES[code])
