"""What the machine code of a kernel holds, in the numbers that decide how fast a low-bit kernel is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from rich.table import Table

from qcompile.compat import aot
from qcompile.testing.sass import Counts, count, main_loop, parse_amdgcn, parse_sass, unwaited
from qcompile.testing.source import opening, pointers_of
from qcompile.testing.targets import Target


@dataclass(frozen=True)
class Report:
    """One kernel's machine code for one target.

    `whole` counts the whole kernel and `loop` its main loop: the innermost loop with matrix instructions, or else with
    loads from global memory (`loop.instructions` is 0 without one). `loop.instructions` are those that a thread
    executes per iteration, branches inside the loop counted as taken: times `threads`, over the weights that a block
    handles in an iteration, they are the instructions per weight. Of specialised warps, the loop is that of the warps
    that compute.

    Attributes:
        kernel: the kernel's name.
        about: what its text says of it first: the docstring's first line, or the comment that the body begins with.
        target: what it was compiled for.
        registers: of 32 bits, per thread; on AMD those for accumulators included.
        shared: bytes of shared memory per block.
        tensor_memory: columns of tensor memory per block (sm_100).
        threads: threads per block.
        unwaited: opcodes that some way through the kernel reaches before it has waited for the kernel before: loads and
            stores of global memory, the start of the next kernel, exits. Of a kernel that never waits, all of them.
        options: what the kernel was compiled with: num_warps, num_stages and others.
        texts: the compiler's texts by kind: ttir, ttgir, llir, then ptx and sass, or amdgcn.
    """

    kernel: str
    about: str
    target: Target
    registers: int
    shared: int
    tensor_memory: int
    threads: int
    whole: Counts
    loop: Counts
    unwaited: tuple[str, ...]
    options: Mapping[str, Any]
    texts: Mapping[str, str]

    @property
    def shared_limit(self) -> int:
        """Bytes of shared memory that a block may have on this target."""
        return self.target.shared_limit

    @property
    def fits(self) -> bool:
        """Whether a block can be launched: shared memory, tensor memory and threads (1024) are within the limits."""
        memory = self.shared <= self.shared_limit and self.tensor_memory <= self.target.tensor_memory
        return memory and self.threads <= 1024

    @property
    def spill_bytes(self) -> int:
        """Bytes per thread that the stores and loads of spilled registers move, each counted once."""
        return self.whole.spill_bytes

    @property
    def mma(self) -> Mapping[str, int]:
        """Matrix instructions of the whole kernel by opcode, with shapes."""
        return self.whole.mma

    @property
    def loads(self) -> Mapping[str, int]:
        """Loads from global memory in the main loop, or in the whole kernel when it has none, by opcode."""
        return self.loop.loads or self.whole.loads

    @property
    def sass(self) -> str:
        """The machine code: SASS, or AMD's assembly."""
        return self.texts.get("sass") or self.texts["amdgcn"]

    @property
    def ptx(self) -> str:
        """The PTX; empty on AMD."""
        return self.texts.get("ptx", "")

    @property
    def ttgir(self) -> str:
        """Triton's own representation, with layouts."""
        return self.texts["ttgir"]

    def __repr__(self) -> str:
        return f"<Report of {self.kernel} on {self.target.name}: print it alone>"

    def __str__(self) -> str:
        memory = f"shared {self.shared} of {self.shared_limit}" + ("" if self.fits else " DOES NOT FIT")
        tensor = f", tensor memory {self.tensor_memory} columns" if self.tensor_memory else ""
        name = f"{self.kernel} ({self.about})" if self.about else self.kernel
        lines = [
            f"{name} on {self.target.name}: {self.threads} threads, {self.registers} registers, "
            f"{self.spill_bytes} bytes spilled, {memory}{tensor}"
        ]
        for name, part in (("kernel", self.whole), ("loop", self.loop)):
            if part.instructions:
                lines.append(f"  {name}: {part.instructions} instructions; {_told(part)}")
        return "\n".join(lines)


def _told(counts: Counts) -> str:
    operands = {f"{name or '?'} {opcode}": n for name, found in counts.operands.items() for opcode, n in found.items()}
    parts = [f"{n} {name}" for name, n in {**counts.mma, **operands, **counts.shared}.items()]
    others = ("shuffles", "i2f", "arrives", "setmaxnreg", "barriers", "waits", "releases", "prefetches")
    return ", ".join(parts + [f"{getattr(counts, name)} {name}" for name in others if getattr(counts, name)])


def table(reports: Sequence[Report]) -> Table:
    """The reports as a table for `rich.print`: one row each, the counts of the main loop where there is one."""
    shown = Table("kernel", "target", "registers", "spilled", "shared", "in the loop", "MMA", "loads", "other")
    for report in reports:
        part = report.loop if report.loop.instructions else report.whole
        numbers = {**part.shared, "shuffles": part.shuffles, "I2F": part.i2f, "arrives": part.arrives}
        shown.add_row(
            *(
                "\n".join(filter(None, (report.kernel, report.about))),
                report.target.name,
                str(report.registers),
                str(report.spill_bytes),
            ),
            f"{report.shared}" if report.fits else f"[red]{report.shared} > {report.shared_limit}",
            str(report.loop.instructions),
            "\n".join(f"{n} {opcode}" for opcode, n in part.mma.items()),
            "\n".join(f"{name}: {n} {o}" for name, found in part.operands.items() for o, n in found.items()),
            " ".join(f"{name} {n}" for name, n in numbers.items() if n),
        )
    return shown


def report_of(entry: aot.Launch, target: Target, built: aot.Built) -> Report:
    """What was built of a kernel for a target."""
    sass = built.texts.get("sass")
    code = parse_amdgcn(built.texts["amdgcn"]) if sass is None else parse_sass(sass, built.texts["ptx"])
    pointers = pointers_of(*entry.lines, entry.pointers)
    return Report(
        kernel=entry.name,
        about=opening(entry.lines[2]),
        target=target,
        registers=built.registers,
        shared=built.shared,
        tensor_memory=built.tensor_memory,
        threads=built.threads,
        whole=count(code.instructions, pointers),
        loop=count(main_loop(code), pointers),
        unwaited=tuple(one.opcode for one in unwaited(code)),
        options=MappingProxyType(dict(entry.options)),
        texts=MappingProxyType(dict(built.texts)),
    )


__all__ = ["Report", "report_of", "table"]
