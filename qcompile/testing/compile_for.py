"""Kernels compiled for GPUs that are not there: what the machine code of a kernel looks like, for every target.

Most of what makes a low-bit kernel slow is visible before it runs: registers that spill, more shared memory than a
block may have, loads of 2 bytes, weights that take the way through shared memory, a matrix instruction of the wrong
size. Triton brings its compilers along, and none of them needs a device: `compile_kernel` compiles one kernel,
`compile_for` every kernel that a function launches, Inductor's included, and both tell what is in the code.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from rich.table import Table

from qcompile.compat import aot, triton_version
from qcompile.errors import QCError, suggest
from qcompile.testing.interpret import interpret
from qcompile.testing.sass import Counts, count, main_loop, parse_amdgcn, parse_sass, unwaited
from qcompile.testing.source import pointers_of


@dataclass(frozen=True)
class Target:
    """A GPU to compile for.

    Attributes:
        name: as in `TARGETS`.
        backend, arch: as Triton names them.
        warp: lanes of a warp.
        shared_limit: bytes of shared memory that one block may have.
        register_limit: registers of 32 bits that one thread may have.
        tensor_memory: columns of tensor memory that one block may have.
    """

    name: str
    backend: str
    arch: int | str
    warp: int
    shared_limit: int
    register_limit: int = 255
    tensor_memory: int = 0


# CUDA C++ Programming Guide, "Compute Capabilities", table of technical specifications: the maximum amount of shared
# memory per thread block, of registers per thread, and (PTX ISA, "Tensor Memory") 512 columns of tensor memory.
# AMD Instinct MI300 (CDNA3) ISA guide: 64 KiB of LDS per work-group; 512 VGPRs, of which up to 256 are for accumulators.
_KIB = 1024
TARGETS: Mapping[str, Target] = MappingProxyType(
    {
        target.name: target
        for target in (
            Target("sm_80", "cuda", 80, 32, 163 * _KIB),
            Target("sm_86", "cuda", 86, 32, 99 * _KIB),
            Target("sm_89", "cuda", 89, 32, 99 * _KIB),
            Target("sm_90", "cuda", 90, 32, 227 * _KIB),
            Target("sm_100", "cuda", 100, 32, 227 * _KIB, tensor_memory=512),
            Target("sm_120", "cuda", 120, 32, 99 * _KIB),
            Target("gfx942", "hip", "gfx942", 64, 64 * _KIB, register_limit=512),
        )
    }
)


# What devices are called, and what they are.
DEVICES = {
    "A100": "sm_80",
    "A10": "sm_86",
    "L40": "sm_89",
    "L4": "sm_89",
    "H100": "sm_90",
    "H200": "sm_90",
    "GH200": "sm_90",
    "B200": "sm_100",
    "MI300": "gfx942",
    "4090": "sm_89",
    "3090": "sm_86",
    "5090": "sm_120",
}


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
    target: Target
    registers: int
    shared: int
    tensor_memory: int
    threads: int
    whole: Counts
    loop: Counts
    unwaited: tuple[str, ...] = field(repr=False)
    options: Mapping[str, Any] = field(repr=False)
    texts: Mapping[str, str] = field(repr=False)

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

    def __str__(self) -> str:
        memory = f"shared {self.shared} of {self.shared_limit}" + ("" if self.fits else " DOES NOT FIT")
        tensor = f", tensor memory {self.tensor_memory} columns" if self.tensor_memory else ""
        lines = [
            f"{self.kernel} on {self.target.name}: {self.threads} threads, {self.registers} registers, "
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
            *(report.kernel, report.target.name, str(report.registers), str(report.spill_bytes)),
            f"{report.shared}" if report.fits else f"[red]{report.shared} > {report.shared_limit}",
            str(report.loop.instructions),
            "\n".join(f"{n} {opcode}" for opcode, n in part.mma.items()),
            "\n".join(f"{name}: {n} {o}" for name, found in part.operands.items() for o, n in found.items()),
            " ".join(f"{name} {n}" for name, n in numbers.items() if n),
        )
    return shown


def compile_kernel(
    kernel: object,
    signature: Mapping[str, str],
    constants: Mapping[str, object],
    *,
    aligned: Collection[str] | None = None,
    targets: Collection[str] = tuple(TARGETS),
    num_warps: int = 4,
    num_stages: int = 3,
    **options: object,
) -> dict[str, Report]:
    """Compile one `@triton.jit` kernel.

    Args:
        kernel: the decorated function.
        signature: Triton's types of the arguments by name: "*fp16", "*u8", "i32", ...
        constants: the arguments that are known: those marked `tl.constexpr` (those with a default may be left out),
            and any others, which then need no type.
        aligned: the arguments divisible by 16 (pointers: in bytes). None means every pointer, as torch allocates, and
            no integer. Loads are as wide as this can prove.
        targets: names of `TARGETS`.
        num_warps, num_stages: as for a launch.
        options: further options of a launch: `maxnreg`, `num_ctas`, ...

    Returns:
        A report by target, in the order of `targets`.

    Raises:
        QCError: `testing.no-triton`; `testing.unknown-target`; `testing.signature` for arguments that the kernel does
            not have or that have no type; `testing.compile` when a target's compiler refuses.
    """
    chosen = _chosen(targets)
    function = aot.kernel_function(kernel)
    if function is None:
        raise QCError(
            "testing.signature",
            f"{kernel!r} is no Triton kernel.",
            next="pass a function decorated with @triton.jit, or compile_for(f, ...) for a function that launches some",
        )
    types, known = _arguments(function, signature, constants)
    names = {name for name, type_ in types.items() if type_.startswith("*")} if aligned is None else set(aligned)
    if unknown := names - set(types):
        raise _no_argument(function, min(unknown), types)
    if unknown_options := sorted(set(options) - (choices := aot.option_names())):
        raise QCError(
            "testing.signature",
            f"A launch has no option {unknown_options[0]!r}{suggest(unknown_options[0], choices)}",
            where=f"kernel {function.__name__}",
        )
    options = {"num_warps": num_warps, "num_stages": num_stages, **options}
    entry = aot.launch(function, types, known, sorted(names), options)
    return {report.target.name: report for report in _reports([entry], chosen)}


def compile_for(
    f: Callable[..., object],
    *args: object,
    targets: Collection[str] = tuple(TARGETS),
    run: bool = False,
    **kwargs: object,
) -> list[Report]:
    """Compile every Triton kernel that a function launches: Inductor's, exactly as emitted, and users' own.

    The function is called within `interpret()` and its launches are noted: types, alignment and constants are those of
    the call. Of an autotuned kernel, the first configuration counts. A function that launches nothing and is not
    compiled is called again under `torch.compile`.

    Args:
        f: the function, plain or under `torch.compile`.
        args, kwargs: what to call it with: CPU tensors. (`targets` and `run` cannot be passed on.)
        targets: names of `TARGETS`.
        run: also run the kernels, in the interpreter. Otherwise their outputs are uninitialised memory, which is
            faster by far and wrong only for functions that decide by the values what to launch.

    Returns:
        Reports in the order of the launches, each variant of a kernel once, and for each in the order of `targets`.

    Raises:
        QCError: `testing.no-triton`; `testing.unknown-target`; `testing.no-kernels` when nothing is launched;
            `testing.compile` when a target's compiler refuses.
    """
    chosen = _chosen(targets)
    with interpret():
        with aot.noted(run=run) as launches:
            f(*args, **kwargs)
        if not launches and not aot.is_compiled(f):
            with aot.noted(run=run) as launches:
                torch.compile(f)(*args, **kwargs)
    if not launches:
        raise QCError(
            "testing.no-kernels",
            f"{getattr(f, '__name__', f)!s} launched no Triton kernel.",
            why="Inductor emits none for what it gives to libraries, and none for a graph that it does not compile",
            next="pass a function whose work Inductor compiles, or a kernel to compile_kernel",
        )
    return _reports(launches, chosen)


def _chosen(targets: Collection[str]) -> list[Target]:
    if triton_version() is None:
        raise QCError(
            "testing.no-triton",
            "There is no Triton to compile kernels with.",
            why="torch's builds for CPUs come without it",
            next="install the package triton; a GPU is not needed",
        )
    if aot.only_interprets():
        raise QCError(
            "testing.interpreter",
            "Kernels are interpreted here and cannot be compiled.",
            why="inside interpret(), and with TRITON_INTERPRET=1, Triton's own functions are those of its interpreter",
            next="leave interpret(), which compile_for enters itself; start the process without TRITON_INTERPRET",
        )
    names = [targets] if isinstance(targets, str) else list(targets)
    for name in names:
        if name not in TARGETS:
            device = next((of for word, of in DEVICES.items() if word in str(name).upper()), "")
            hint = f"; {device!r} is that architecture" if device else suggest(str(name), TARGETS)
            raise QCError(
                "testing.unknown-target", f"There is no target {name!r}{hint}", next=f"choose of {', '.join(TARGETS)}"
            )
    if not names:
        raise QCError("testing.unknown-target", "No target to compile for", next=f"choose of {', '.join(TARGETS)}")
    return [TARGETS[name] for name in ([targets] if isinstance(targets, str) else targets)]


def _arguments(
    function: Any, signature: Mapping[str, str], constants: Mapping[str, object]
) -> tuple[dict[str, str], dict[str, object]]:
    """The types of the arguments at run time, and the constants with the kernel's own defaults."""
    names = list(function.arg_names)
    for name in [*signature, *constants]:
        if name not in names:
            raise _no_argument(function, name, names)
    known = dict(constants)
    for parameter in function.params:
        if parameter.is_constexpr and parameter.name not in known and parameter.has_default:
            known[parameter.name] = parameter.default
        elif parameter.name not in known and (parameter.is_constexpr or parameter.name not in signature):
            raise QCError(
                "testing.signature",
                f"The argument {parameter.name!r} has no {'value' if parameter.is_constexpr else 'type'}.",
                where=f"kernel {function.__name__}",
                next=f"give it in {'constants' if parameter.is_constexpr else 'signature, or its value in constants'}",
            )
    types = {name: signature[name] for name in names if name not in known}
    for name, type_ in types.items():
        if not isinstance(type_, str) or not _TYPE.fullmatch(type_):
            raise QCError(
                "testing.signature",
                f"Triton has no type {type_!r}.",
                where=f"kernel {function.__name__}, argument {name}",
                next="write *fp16 for a pointer to halves, i32 for an integer",
            )
    return types, known


_TYPE = re.compile(r"\*?k?(?:i1|[iu](?:8|16|32|64)|fp(?:16|32|64)|bf16|fp8e(?:4nv|5|4b15|4b8|5b16))|tensordesc<.*>")


def _no_argument(function: Any, name: str, choices: Collection[str]) -> QCError:
    return QCError(
        "testing.signature",
        f"There is no argument {name!r}{suggest(name, choices)}.",
        where=f"kernel {function.__name__}",
        next=f"its arguments are {', '.join(function.arg_names)}",
    )


def _reports(launches: Sequence[aot.Launch], targets: Sequence[Target]) -> list[Report]:
    pairs = [(entry, target) for entry in launches for target in targets]
    results = aot.build([(entry, (target.backend, target.arch, target.warp)) for entry, target in pairs])
    reports, failures = [], []
    for (entry, target), built in zip(pairs, results, strict=True):
        if isinstance(built, aot.Failed):
            failures.append((entry.name, target.name, built.message))
        else:
            reports.append(_report(entry, target, built))
    if failures:
        name, where, message = failures[0]
        others = [f"{kernel} for {target}" for kernel, target, _ in failures[1:]]
        raise QCError(
            "testing.compile",
            f"The kernel {name} does not compile for {where}." + (f" Nor do: {', '.join(others)}." if others else ""),
            where=f"triton {triton_version()}",
            why=message,
            next="give the targets that are meant",
        )
    return reports


def _report(entry: aot.Launch, target: Target, built: aot.Built) -> Report:
    sass = built.texts.get("sass")
    code = parse_amdgcn(built.texts["amdgcn"]) if sass is None else parse_sass(sass, built.texts["ptx"])
    pointers = pointers_of(*entry.lines, entry.pointers)
    return Report(
        kernel=entry.name,
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
