"""What bytes each token stands for, and text out of tokens as they come: no character is ever split.

Known are the two families that causal language models use: byte-level vocabularies, whose letters each stand for one
byte (GPT-2 and its heirs), and SentencePiece's, with ``▁`` for a space and ``<0x41>`` for single bytes.
"""

import codecs
import json
import re
from collections.abc import Callable, Iterable
from typing import Any

from tokenizers import Tokenizer

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class UnknownDecoder(ValueError):
    """The tokenizer turns tokens into text in a way that is not known here."""


class TokenPieces:
    """The bytes of every token of a vocabulary. Special tokens have none in text, but have a name."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Raises: UnknownDecoder."""
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self._added = {token: str(entry.content).encode() for token, entry in added.items()}
        self._special = frozenset(token for token, entry in added.items() if entry.special)
        self._bytes_of = _piece_reader(json.loads(tokenizer.to_str()).get("decoder"))
        self._known: dict[int, bytes] = {}

    def name(self, token: int) -> bytes:
        """The token's bytes; a special one's name."""
        found = self._known.get(token)
        if found is None:
            found = self._known[token] = self._read(token)
        return found

    def text(self, token: int) -> bytes:
        """What the token adds to a text."""
        return b"" if token in self._special else self.name(token)

    def _read(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token]
        piece = self._tokenizer.id_to_token(token)
        # Models have more rows than their tokenizer has tokens; such a row stands for nothing.
        return b"" if piece is None else self._bytes_of(piece)


class Detokenizer:
    """The text of one answer. Bytes that are no character, nor ever become one, show as U+FFFD."""

    def __init__(self, pieces: TokenPieces) -> None:
        self._pieces = pieces
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, tokens: Iterable[int]) -> str:
        """The text that is complete with these tokens."""
        return self._decoder.decode(b"".join(map(self._pieces.text, tokens)))

    def flush(self) -> str:
        """What the end leaves unfinished."""
        return self._decoder.decode(b"", final=True)


def _piece_reader(decoder: dict[str, Any] | None) -> Callable[[str], bytes]:
    kinds = {str(step.get("type")) for step in _steps(decoder)}
    if "ByteLevel" in kinds:
        return _byte_level
    if kinds & {"ByteFallback", "Metaspace"}:
        return _sentence_piece
    raise UnknownDecoder(
        f"its decoder ({', '.join(sorted(kinds)) or 'none'}) is neither byte-level nor SentencePiece's"
    )


def _steps(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    if decoder is None:
        return []
    return list(decoder["decoders"]) if decoder.get("type") == "Sequence" else [decoder]


def _byte_level(piece: str) -> bytes:
    try:
        return bytes(_LETTERS[letter] for letter in piece)
    except KeyError:
        return piece.encode()


def _sentence_piece(piece: str) -> bytes:
    found = _BYTE_PIECE.fullmatch(piece)
    return bytes((int(found[1], 16),)) if found else piece.replace("▁", " ").encode()


def _letters() -> dict[str, int]:
    """Byte-level vocabularies write printable Latin-1 as itself, and the other bytes in order from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + place): byte for place, byte in enumerate(others)}


_LETTERS = _letters()
