"""The device under test: how calls are timed on it, and what "timed" means where there is none.

On a GPU a contestant is a CUDA graph of one call for each of its copies of the weights, so that neither Python nor a
warm cache is in a number. Contestants take turns, window after window, and each reports its median. Interpreted, every
call runs once and nothing is timed: a time of the interpreter's is no result.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

WINDOW = 0.030  # seconds of one measurement
GLANCE = 0.003  # the same, where many variants are looked at and the best are measured again
CACHE = 60e6  # bytes of the largest cache at hand (L2 of an H200); copies of a weight exceed it


@dataclass(frozen=True)
class Contestant:
    """Something to time.

    Attributes:
        name: what its line begins with. call: takes the number of a copy; the same work for each.
        copies: how many there are. bytes: of weights that one call reads.
    """

    name: str
    call: Callable[[int], object]
    copies: int = 1
    bytes: int = 0

    def result(self) -> torch.Tensor:
        """Of the last copy: called after the clock has run, it also tells whether timing has harmed anything."""
        made = self.call(self.copies - 1)
        assert isinstance(made, torch.Tensor)
        return made


class Device:
    """A GPU, or CPU tensors under `qcompile.testing.interpret`.

    Attributes:
        torch: where tensors live. interpreted: whether there is no GPU. name: what results are filed under.
    """

    def __init__(self, interpreted: bool) -> None:
        self.interpreted = interpreted
        self.torch = torch.device("cpu" if interpreted else "cuda")
        self.name = "interpreted" if interpreted else torch.cuda.get_device_name()

    def synchronize(self) -> None:
        """Wait for the device; raises what a kernel before has done to it."""
        if not self.interpreted:
            torch.cuda.synchronize()

    def generator(self, seed: int) -> torch.Generator:
        """Random numbers, the same in every run."""
        return torch.Generator(self.torch).manual_seed(seed)

    def randn(self, *shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
        """Normal values."""
        return torch.randn(*shape, dtype=dtype, device=self.torch, generator=self.generator(seed))

    def copies(self, size: int, least: int = 20) -> int:
        """How many weights of `size` bytes no cache holds, at least so many; two where nothing is timed."""
        return 2 if self.interpreted else max(least, int(CACHE / size) + 1)

    def race(
        self, contestants: Sequence[Contestant], rounds: int = 5, window: float = WINDOW
    ) -> dict[str, float | None]:
        """Microseconds of one call of each, the median of the rounds; `None` where nothing is timed."""
        if self.interpreted:
            for contestant in contestants:
                contestant.call(0)
            return {contestant.name: None for contestant in contestants}
        graphs = [_Graph(contestant) for contestant in contestants]
        times: list[list[float]] = [[] for _ in graphs]
        for _ in range(rounds):
            for graph, each in zip(graphs, times, strict=True):
                each.append(graph.window(window))
        return {c.name: statistics.median(each) * 1e6 for c, each in zip(contestants, times, strict=True)}

    def best(self, contestants: Sequence[Contestant], keep: int) -> list[Contestant]:
        """The fastest few, after a glance at each; the first ones where nothing is timed."""
        if self.interpreted:
            self.race(contestants)
            return list(contestants[:keep])
        times = {}
        for contestant in contestants:  # one after the other: a graph holds memory
            times[contestant.name] = _Graph(contestant).window(GLANCE)
        return sorted(contestants, key=lambda contestant: times[contestant.name])[:keep]

    def seconds(self, call: Callable[[], Any], rounds: int = 5, window: float = 0.3) -> float | None:
        """Seconds of one call that launches its own graphs, the median of the rounds; `None` where nothing is timed."""
        if self.interpreted:
            call()
            return None
        call()
        first = _events(call, 1)
        times = [_events(call, max(1, round(window / rounds / first))) for _ in range(rounds)]
        return statistics.median(times)

    def free(self) -> None:
        """Give memory back that no tensor holds."""
        if not self.interpreted:
            torch.cuda.empty_cache()

    def reset_peak(self) -> None:
        """Begin to watch the memory anew."""
        if not self.interpreted:
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int | None:
        """Bytes held by tensors at most since then; `None` where that would say nothing."""
        return None if self.interpreted else torch.cuda.max_memory_allocated()


def _events(call: Callable[[], Any], count: int) -> float:
    """Seconds of one of `count` calls in a row."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(count):
        call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3 / count


class _Graph:
    """One call for each copy, captured."""

    def __init__(self, contestant: Contestant) -> None:
        self.copies = contestant.copies
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compiles and allocates what the first call does
            for i in range(min(2, self.copies)):
                contestant.call(i)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=stream):  # what was allocated for a stream is there
            for i in range(self.copies):
                contestant.call(i)
        self.graph.replay()
        self.once = _events(self.graph.replay, 1)

    def window(self, seconds: float) -> float:
        """Seconds of one call."""
        return _events(self.graph.replay, max(1, round(seconds / self.once))) / self.copies


__all__ = ["CACHE", "GLANCE", "WINDOW", "Contestant", "Device"]
