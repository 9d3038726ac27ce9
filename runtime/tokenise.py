"""Text files in, one memory map of token ids out: made once, kept in a cache folder.

A cached map is named by the hash of what it was made from: paths, sizes, times, tokenizer.
"""

import fcntl
import glob
import hashlib
import json
import os
import sys
import sysconfig
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from .errors import UserError

FORMAT = 1  # of the cache: a change makes old maps unfound
PIECE_BYTES = 2**20
DTYPES = {"uint8": torch.uint8, "uint16": torch.uint16, "uint32": torch.uint32}
END_MARKERS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")


@dataclass(frozen=True, slots=True, kw_only=True)
class Map:
    """vocab: how many different ids the tokenizer can give."""

    path: str
    dtype: str
    tokens: int
    vocab: int

    def open(self) -> Tensor:
        dtype = DTYPES[self.dtype]
        return mapped(self.path, self.tokens * dtype.itemsize).view(dtype)


def mapped(path: str, size_bytes: int) -> Tensor:
    """The file's bytes, read from the disk where they are looked at."""
    if size_bytes == 0:  # nothing can be mapped
        return torch.zeros(0, dtype=torch.uint8)
    return torch.from_file(path, shared=False, size=size_bytes, dtype=torch.uint8)


def find_files(
    patterns: str | Sequence[str], exclude: str | Sequence[str] = (), root: str = "."
) -> list[str]:
    """The files that match, each once, in an order that does not depend on the machine's disk.

    `{stdlib}` in a pattern is the folder of Python's own library; `**` is any depth.
    Errors: UserError if a pattern matches nothing.
    """
    excluded = [_expand(pattern, root) for pattern in _listed(exclude)]
    found: dict[str, None] = {}
    for pattern in _listed(patterns):
        full = _expand(pattern, root)
        matches = [p for p in sorted(glob.glob(full, recursive=True)) if os.path.isfile(p)]
        if not matches:
            raise UserError(f"no file matches `{pattern}` (looked for {full})")
        kept = (p for p in matches if not any(fnmatch(p, other) for other in excluded))
        found |= dict.fromkeys(kept)
    if not found:
        raise UserError(f"every file of {_quoted(patterns)} is excluded by {_quoted(exclude)}")
    return list(found)


def memory_map(files: Sequence[str], tokenizer: str, cache: str | None = None) -> Map:
    """tokenizer: `bytes` (a byte is a token), or the path of a tokenizer.json.

    Of all processes on a machine one makes the map; the others wait for it.
    """
    folder = Path(cache or default_cache())
    key = _key(files, tokenizer)
    about = folder / f"{key}.json"
    if not about.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with _locked(folder / f"{key}.lock"):
                if not about.exists():
                    _make(files, tokenizer, folder, key)
        except OSError as error:
            raise UserError(
                f"cannot keep tokens in {folder}: {error.strerror or error}"
                " (the variable LLMSPEC_CACHE names another folder)"
            ) from None
    return Map(path=str(folder / f"{key}.bin"), **json.loads(about.read_text()))


def default_cache() -> str:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.environ.get("LLMSPEC_CACHE") or os.path.join(base, "llmspec", "tokens")


def _listed(patterns: str | Sequence[str]) -> Sequence[str]:
    return [patterns] if isinstance(patterns, str) else patterns


def _quoted(patterns: str | Sequence[str]) -> str:
    return ", ".join(f"`{pattern}`" for pattern in _listed(patterns))


def _expand(pattern: str, root: str) -> str:
    pattern = pattern.replace("{stdlib}", sysconfig.get_path("stdlib"))
    return os.path.abspath(os.path.join(root, os.path.expanduser(pattern)))


def _key(files: Sequence[str], tokenizer: str) -> str:
    made_from: list[Any] = [FORMAT, tokenizer]
    if tokenizer != "bytes":
        made_from[1] = hashlib.sha256(_read(tokenizer)).hexdigest()
    for path in files:
        try:
            status = os.stat(path)
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from None
        made_from.append((path, status.st_size, status.st_mtime_ns))
    return hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:32]


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """The lock of a process that dies is free again; a file system without locks does the work
    twice, which is slow and right."""
    with open(path, "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:
            print(f"no file locks in {path.parent}: every process tokenises", file=sys.stderr)
        yield


def _make(files: Sequence[str], tokenizer: str, folder: Path, key: str) -> None:
    size = sum(os.path.getsize(path) for path in files)
    print(f"tokenising {len(files)} files ({size / 1e6:.1f} MB) into {folder}", file=sys.stderr)
    draft = folder / f"{key}.{os.uname().nodename}.{os.getpid()}.tmp"
    try:
        with open(draft, "wb") as out:
            if tokenizer == "bytes":
                dtype, vocab = "uint8", 256
                for path in files:
                    for piece in _pieces(path):
                        out.write(piece)
            else:
                dtype, vocab = _encode(files, tokenizer, out)
            out.flush()
            os.fsync(out.fileno())
        tokens = draft.stat().st_size // DTYPES[dtype].itemsize
        os.replace(draft, folder / f"{key}.bin")
        made = asdict(Map(path="", dtype=dtype, tokens=tokens, vocab=vocab))
        del made["path"]
        draft.write_text(json.dumps(made))
        os.replace(draft, folder / f"{key}.json")  # last: what it describes is there
    finally:
        draft.unlink(missing_ok=True)


def _encode(files: Sequence[str], tokenizer: str, out: BinaryIO) -> tuple[str, int]:
    encoder = load_tokenizer(tokenizer)
    vocab = encoder.get_vocab_size(with_added_tokens=True)
    dtype, code = ("uint16", "H") if vocab <= 2**16 else ("uint32", "I")
    end = next((i for i in map(encoder.token_to_id, END_MARKERS) if i is not None), None)
    for path in files:
        offset = 0
        for piece in _pieces(path):
            try:
                text = piece.decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{path} is not UTF-8 text: byte {offset + error.start} is"
                    f" 0x{piece[error.start]:02x}"
                ) from None
            offset += len(piece)
            ids = encoder.encode(text, add_special_tokens=False).ids
            out.write(array(code, ids).tobytes())
        if end is not None:
            out.write(array(code, [end]).tobytes())
    return dtype, vocab


def load_tokenizer(path: str) -> Any:
    try:
        from tokenizers import Tokenizer  # only runs that tokenise need the package
    except ImportError:
        raise UserError(f"{path} needs the package `tokenizers`: pip install tokenizers") from None
    data = _read(path)
    try:
        return Tokenizer.from_buffer(data)
    except Exception as error:
        raise UserError(f"{path} is not a tokenizer of the `tokenizers` package: {error}") from None


def _pieces(path: str) -> Iterator[bytes]:
    """About a MiB each, cut behind line ends where there are any and never inside a character."""
    try:
        with open(path, "rb") as file:
            while piece := file.read(PIECE_BYTES):
                piece += file.readline(PIECE_BYTES)
                for _ in range(3):
                    following = file.peek(1)[:1]
                    if following and 0x80 <= following[0] < 0xC0:
                        piece += file.read(1)
                yield piece
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
