"""Kernels compiled for GPUs that are not there: what the machine code of a kernel looks like, for every target.

Most of what makes a low-bit kernel slow is visible before it runs: registers that spill, more shared memory than a
block may have, loads of 2 bytes, weights that take the way through shared memory, a matrix instruction of the wrong
size. Triton brings its compilers along, and none of them needs a device: `compile_kernel` compiles one kernel,
`compile_for` every kernel that a function launches, Inductor's included, and both tell what is in the code.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import torch

from qcompile.compat import aot, pretending, triton_version
from qcompile.errors import QCError, suggest
from qcompile.testing.interpret import interpret
from qcompile.testing.report import Report, report_of, table
from qcompile.testing.targets import TARGETS, Target, chosen


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
    found = chosen(targets)
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
    return {report.target.name: report for report in _reports([(entry, target) for target in found])}


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
    compiled is called again under `torch.compile`. One that asks what the device is, as qcompile does to choose and cut its
    kernels, is compiled and called for each target, as if the target were there.

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
    found = chosen(targets)
    noted: list[list[aot.Launch]] = []
    with interpret():
        for target in found:
            with pretending(target.gpu) as asked:
                noted.append(_launches(f, args, kwargs, run))
                if not asked():
                    noted *= len(found)
                    break
            torch.compiler.reset()  # what was compiled for this target is none of the next one's
    _refuse_without_launches(f, dict(zip(found, noted, strict=True)))
    pairs = zip_longest(
        *([(entry, target) for entry in launches] for launches, target in zip(noted, found, strict=True))
    )
    return _reports([pair for each in pairs for pair in each if pair is not None])


def _launches(f: Callable[..., object], args: Any, kwargs: Any, run: bool) -> list[aot.Launch]:
    with aot.noted(run=run) as launches:
        f(*args, **kwargs)
    if not launches and not aot.is_compiled(f):
        with aot.noted(run=run) as launches:
            torch.compile(f)(*args, **kwargs)
    return launches


def _refuse_without_launches(f: Callable[..., object], launches: Mapping[Target, Sequence[aot.Launch]]) -> None:
    some = tuple(target.name for target, noted in launches.items() if noted)
    none = tuple(target.name for target, noted in launches.items() if not noted)
    if not some:
        raise QCError(
            "testing.no-kernels",
            f"{getattr(f, '__name__', f)!s} launched no Triton kernel.",
            why="Inductor emits none for what it gives to libraries, such as a float linear (weights stay float while autograd "
            "records), and none for a graph that it does not compile",
            next="pass torch.compile(model, backend='qcompile') under torch.no_grad(), a function whose work Inductor "
            "compiles, or a kernel to compile_kernel",
        )
    if none:
        raise QCError(
            "testing.no-kernels",
            f"{getattr(f, '__name__', f)!s} launches no Triton kernel for {', '.join(none)}.",
            why="what is missing there (an instruction for a format, say), the ledger of qcompile.explain tells",
            next=f"leave out what it is not for: targets={some}",
        )


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


def _reports(pairs: Sequence[tuple[aot.Launch, Target]]) -> list[Report]:
    results = aot.build([(entry, (target.backend, target.arch, target.warp)) for entry, target in pairs])
    reports, failures = [], []
    for (entry, target), built in zip(pairs, results, strict=True):
        if isinstance(built, aot.Failed):
            failures.append((entry.name, target.name, built.message))
        else:
            reports.append(report_of(entry, target, built))
    if failures:
        name, where, message = failures[0]
        refused = {target for _, target, _ in failures}
        fine = tuple(dict.fromkeys(target.name for _, target in pairs if target.name not in refused))
        others = [f"{kernel} for {target}" for kernel, target, _ in failures[1:]]
        raise QCError(
            "testing.compile",
            f"The kernel {name} does not compile for {where}." + (f" Nor do: {', '.join(others)}." if others else ""),
            where=f"triton {triton_version()}",
            why=message,
            next=f"leave out what it is not for: targets={fine}"
            if fine
            else "mend the kernel: no target's compiler takes it",
        )
    return reports


__all__ = ["TARGETS", "Report", "Target", "compile_for", "compile_kernel", "table"]
