"""Drive one causal language model: prompt, greedy decoding, perplexity, with a preallocated cache.

The same few lines run every engine, eager or compiled, so a difference between two engines is not a
difference between two loops. Two call shapes exist, `[1, chunk]` and `[1, 1]`: a compiled model has a graph
for each, and perplexity, prompt speed, decode speed and the answer to a question all use these two.
"""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy

CHUNK = 128  # tokens per prompt call
WINDOW = 256  # tokens per perplexity window, and of the cache


@dataclass(frozen=True)
class Turn:
    """One timed turn: seconds of the prompt call, and of every decode step."""

    prompt: float
    steps: tuple[float, ...]


class Session:
    """A model with its cache. Batch 1; every call runs in inference mode (a switch would compile another
    graph).

    Args:
        call: the model, or what `torch.compile` made of it.
        config: the model's configuration.
        chunk: tokens per prompt call.
        window: length of the cache in tokens, a multiple of `chunk`.
        dtype: of the cache.
    """

    def __init__(
        self,
        call: Callable[..., Any],
        config: Any,
        chunk: int = CHUNK,
        window: int = WINDOW,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        from transformers import StaticCache

        self.call, self.chunk, self.window = call, chunk, window
        self.cache: Any = StaticCache(config=config, max_cache_len=window)
        heads, size = config.num_key_value_heads, config.head_dim
        # Without this, the cache would be allocated inside the first compiled call, and a graph more would be
        # compiled.
        self.cache.early_initialization(1, heads, size, dtype, torch.device("cpu"))

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """`[1, t]` token ids -> `[1, t, vocabulary]`; the tokens join the cache."""
        result: torch.Tensor = self.call(input_ids=ids, past_key_values=self.cache, use_cache=True).logits
        return result

    def place(self, ids: torch.Tensor) -> torch.Tensor:
        """A copy of token ids as an ordinary contiguous tensor of inference mode.

        Graphs are guarded on strides (of a dimension of size 1 too) and on inference mode: a slice of a longer
        tensor would compile every graph once more.
        """
        return ids.clone(memory_format=torch.contiguous_format)

    @torch.inference_mode()
    def first_calls(self, prompt: torch.Tensor) -> Iterator[float]:
        """Seconds of the first prompt call, then of the first decode step: compiling included.

        Args:
            prompt: `[1, chunk]`.
        """
        self.cache.reset()
        ids = self.place(prompt)
        for _ in range(2):
            start = time.perf_counter()
            ids = self.logits(ids)[:, -1].argmax(-1, keepdim=True)
            yield time.perf_counter() - start

    @torch.inference_mode()
    def turn(self, prompt: torch.Tensor, steps: int) -> Turn:
        """Time a prompt and greedy decoding after it.

        Args:
            prompt: `[1, chunk]`.
            steps: at most `window - chunk`.
        """
        self.cache.reset()
        prompt = self.place(prompt)
        gc.collect()
        clock = time.perf_counter
        start = clock()
        token = self.logits(prompt)[:, -1].argmax(-1, keepdim=True)
        marks = [clock()]
        for _ in range(steps):
            token = self.logits(token)[:, -1].argmax(-1, keepdim=True)
            marks.append(clock())
        return Turn(marks[0] - start, tuple(b - a for a, b in itertools.pairwise(marks)))

    @torch.inference_mode()
    def surprise(self, window: torch.Tensor) -> float:
        """Negative log likelihood, in nats, of all tokens of a window but the first.

        Args:
            window: `[self.window]` token ids.
        """
        self.cache.reset()
        total = 0.0
        for start in range(0, self.window, self.chunk):
            logits = self.logits(self.place(window[None, start : start + self.chunk]))[0]
            wanted = window[start + 1 : start + self.chunk + 1]
            total += float(cross_entropy(logits[: len(wanted)].float(), wanted, reduction="sum"))
        return total

    @torch.inference_mode()
    def answer(self, prompt: torch.Tensor, stop: int, limit: int) -> list[int]:
        """Greedy continuation, at most `limit` tokens, without the stop token.

        Args:
            prompt: `[1, t]` of any length: it is fed one token at a time, which needs no third graph.
        """
        self.cache.reset()
        for token in prompt.split(1, dim=1):
            logits = self.logits(self.place(token))
        found: list[int] = []
        for _ in range(min(limit, self.window - prompt.shape[1])):
            token = logits[:, -1].argmax(-1, keepdim=True)
            if int(token) == stop:
                break
            found.append(int(token))
            logits = self.logits(token)
        return found
