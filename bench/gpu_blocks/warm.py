"""Kernels compiled before they are needed, in many processes: a GPU's lease is for measuring.

A job launches kernels on tensors of the device "meta". In a process of this pool a launch compiles and does nothing
else, for the target that is named and without a GPU; Triton's cache on disk then has what the launch on the GPU asks
for: types, alignment and options are the same.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch

Target = tuple[str, int | str, int]  # backend, architecture, threads of a warp
Job = Callable[[torch.device], object]  # of a module's function and plain arguments: it goes to another process


class Warmer:
    """Compiling processes, each a pool of its own: a job that ends its process takes no other with it."""

    def __init__(self, target: Target, processes: int | None = None) -> None:
        count = processes or max(1, min(16, (os.cpu_count() or 2) - 1))
        self.target, self.left = target, 2 * count  # processes that may end before their time
        self.idle = deque(self._process() for _ in range(count))

    def _process(self) -> ProcessPoolExecutor:
        context = multiprocessing.get_context("spawn")
        made = ProcessPoolExecutor(1, mp_context=context, initializer=_prepare, initargs=(self.target,))
        made.submit(_nothing)  # imports take seconds: begin now
        return made

    def compile(self, jobs: Iterable[Job], seconds: float) -> list[str]:
        """Wait for all jobs, or as long as said.

        Returns:
            What went wrong, one text for each job that failed; a launch of such a kernel will say it again.
        """
        until, waiting, failed = time.monotonic() + seconds, deque(jobs), list[str]()
        busy: dict[Future[str], ProcessPoolExecutor] = {}
        while (waiting or busy) and self.left:
            while waiting and self.idle:
                process = self.idle.popleft()
                try:
                    busy[process.submit(_work, waiting[0])] = process
                    waiting.popleft()
                except BrokenProcessPool:  # by a job of an earlier call that took too long
                    self._replace(process)
            done, _ = wait(busy, max(0.0, until - time.monotonic()), FIRST_COMPLETED)
            if not done:
                break
            for future in done:
                process = busy.pop(future)
                try:
                    text = future.result()
                    self.idle.append(process)
                except BrokenProcessPool as error:
                    text = f"its process ended: {error}"[:200]
                    self._replace(process)
                failed += [text] if text else []
        self.idle.extend(busy.values())  # the next jobs wait for these
        why = "not in time" if self.left else "processes end before their time"
        return failed + [why] * (len(waiting) + len(busy))

    def _replace(self, process: ProcessPoolExecutor) -> None:
        process.shutdown(wait=False)
        self.left = max(0, self.left - 1)
        self.idle.append(self._process())

    def close(self) -> None:
        """End the processes; jobs that wait are dropped."""
        for process in self.idle:
            process.shutdown(wait=False, cancel_futures=True)


def _nothing() -> None:
    return None


def _work(job: Job) -> str:
    try:
        job(torch.device("meta"))
    except Exception as error:
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[-1]}"[
            :200
        ]  # a compiler's reason is its last line
    return ""


def _prepare(target: Target) -> None:
    """In a new process: a driver that names a target and can launch nothing, and launches that only compile."""
    importlib.import_module("qcompile.codegen.devices.triton")  # the jobs will want it
    os.environ.pop("TRITON_INTERPRET", None)
    torch.set_num_threads(1)
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class Named(DriverBase):  # type: ignore[misc]
        def __init__(self) -> None:
            self.utils = None

        @classmethod
        def is_active(cls) -> bool:
            return True

        def get_current_target(self) -> Any:
            return GPUTarget(*target)

        def get_active_torch_device(self) -> torch.device:
            return torch.device("meta")

        def get_benchmarker(self) -> Callable[..., list[float]]:
            return lambda function, **_: [0.0, 0.0, 0.0]

        def map_python_to_cpp_type(self, ty: str) -> str:
            raise NotImplementedError

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int = 0) -> int:
            return 0

    driver.set_active(Named())
    original = JITFunction.run

    def run(self: Any, *args: Any, warmup: bool = True, **kwargs: Any) -> Any:
        return original(self, *args, warmup=True, **kwargs)

    JITFunction.run = run


__all__ = ["Job", "Target", "Warmer"]
