"""Triton ahead of time: launches noted instead of made, and kernels compiled for devices that are not there.

A launch tells everything about a kernel's variant: the types of its arguments, which are divisible by 16, the constants,
the number of warps. `noted` collects launches, users' and Inductor's alike, while kernels are interpreted
(`triton.interpreted`). `build` compiles them, each in a process of its own: LLVM ends the process on what it cannot
select, Triton prints to the file descriptors and keeps settings in the environment, and none of this reaches the caller.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import multiprocessing
import multiprocessing.connection
import os
import pickle
import re
import resource
import signal
import subprocess
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from qcompile.compat.interpreter import replace

SECONDS = 900  # a process that compiles one kernel for one target is ended after this time


@dataclass(frozen=True)
class Variant:
    """The arguments as one of Triton's back ends sees them: types by name ("constexpr" for constants), the constants
    by position, and attributes such as divisibility by position."""

    types: Mapping[str, str]
    constants: Mapping[Any, Any]
    attributes: Mapping[Any, Any]


@dataclass(frozen=True)
class Launch:
    """A kernel with everything that decides its code. `variants` is by back end ("cuda", "hip")."""

    name: str
    function: Any
    variants: Mapping[str, Variant]
    options: Mapping[str, Any]

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for launches that compile to the same code."""
        return (id(self.function.fn), repr(sorted(self.variants.items())), repr(sorted(self.options.items())))

    @property
    def lines(self) -> tuple[str, int, str]:
        """The kernel's file without folders, its first line, and its source text from there."""
        function = self.function
        return Path(function.fn.__code__.co_filename).name, function.starting_line_number, "".join(function.raw_src)

    @property
    def pointers(self) -> list[str]:
        """The arguments that point to memory, descriptors included."""
        return [name for name, type_ in self.variants["cuda"].types.items() if type_.startswith(("*", "tensordesc"))]


@dataclass(frozen=True)
class Built:
    """What a compiler made of a kernel: `texts` by kind (ttir, ttgir, llir, ptx, amdgcn, sass), the registers of a
    thread, bytes of shared memory, columns of tensor memory, and the threads of a block."""

    texts: Mapping[str, str]
    registers: int
    shared: int
    tensor_memory: int
    threads: int


@dataclass(frozen=True)
class Failed:
    """Why a kernel did not compile."""

    message: str


# ------------------------------------------------------------------------------------------------------ launches
def kernel_function(kernel: object) -> Any:
    """The `JITFunction` behind a decorated kernel, autotuned or interpreted ones included; None for anything else."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    while not isinstance(kernel, JITFunction | InterpretedFunction):
        kernel = getattr(kernel, "fn", None)
        if kernel is None:
            return None
    return _jit(kernel)


def _jit(kernel: Any) -> Any:
    from triton.runtime.jit import JITFunction

    return kernel if isinstance(kernel, JITFunction) else JITFunction(kernel.fn, **kernel.kwargs)


def is_compiled(f: object) -> bool:
    """Whether `torch.compile` made this function or module."""
    from torch._dynamo import OptimizedModule

    return isinstance(f, OptimizedModule) or hasattr(f, "_torchdynamo_orig_callable")


def option_names() -> set[str]:
    """What a launch may say beside its arguments, of any backend."""
    from triton.backends.amd.compiler import HIPOptions
    from triton.backends.nvidia.compiler import CUDAOptions

    return {field.name for kind in (CUDAOptions, HIPOptions) for field in fields(kind)}


def only_interprets() -> bool:
    """Whether nothing can be compiled now: Triton's functions are replaced by the interpreter's (`interpreted`), or
    were decorated for it when the process was started with TRITON_INTERPRET=1."""
    import triton.language as tl
    from triton.runtime.jit import JITFunction

    importlib.import_module("triton.compiler.code_generator")  # before anything is interpreted: see `_statics_anew`
    return not isinstance(tl.sum, JITFunction) or JITFunction.__call__.__module__ != JITFunction.__module__


def launch(
    kernel: Any,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    aligned: Sequence[str],
    options: Mapping[str, Any],
) -> Launch:
    """A launch that was never made: types of the arguments by name, constants by name, names divisible by 16."""
    names = list(kernel.arg_names)
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    variant = Variant(
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    return Launch(kernel.__name__, kernel, {"cuda": variant, "hip": variant}, dict(options))


@contextmanager
def noted(*, run: bool) -> Iterator[list[Launch]]:
    """Inside, every launch of a Triton kernel is noted, once for each variant; with `run` it is also made.

    For use within `triton.interpreted`.
    """
    from torch._inductor import graph
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner
    from torch._inductor.utils import tensor_is_aligned
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    launches: dict[tuple[object, ...], Launch] = {}
    inside = False

    def replace_run(owner: Any, noted_as: Any) -> None:
        original = owner.run

        def launched(self: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal inside
            if inside or kwargs.get("warmup"):
                return original(self, *args, **kwargs)
            entry = noted_as(self, args, kwargs)
            launches.setdefault(entry.key, entry)
            if not run:
                return None
            inside = True
            kwargs.pop("launch_pdl", None)  # no argument to the interpreter, unlike other options
            try:
                return original(self, *args, **kwargs)
            finally:
                inside = False

        # Dynamo is to break the graph at a user's kernel and not to trace what notes it.
        replace(stack, owner, "run", torch.compiler.disable(launched))

    found: list[Launch] = []
    with ExitStack() as stack:
        # Inductor takes the inputs of a graph on a GPU for aligned when they are, those on a CPU never.
        replace(stack, graph, "should_assume_input_aligned", tensor_is_aligned)
        replace_run(CachingAutotuner, lambda tuner, args, kwargs: _of_inductor(tuner))
        replace_run(JITFunction, _of_user)
        replace_run(InterpretedFunction, _of_user)
        stack.callback(lambda: found.extend(launches.values()))
        yield found


def _of_inductor(tuner: Any) -> Launch:
    """Inductor's kernel in its first configuration, with Inductor's own signature, constants and options."""
    config, old, function = tuner.configs[0], tuner.fn, _jit(tuner.fn)
    tuner.fn = function
    try:
        meta = tuner._create_compile_meta(config)
        options = tuner._create_compile_options(config, meta)
    finally:
        tuner.fn = old
    # Inductor gives these to CUDA alone, and here it compiles for a CPU.
    options |= {key: meta[key] for key in ("launch_pdl", "launch_cooperative_grid") if key in meta}
    options |= {"enable_reflect_ftz": False} if meta.get("disable_ftz") else {}
    variant = Variant(meta["signature"], meta["constants"], meta["configs"][0])
    return Launch(function.__name__, function, {"cuda": variant, "hip": variant}, options)


def _of_user(kernel: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Launch:
    """A user's kernel as Triton specialises it: by type, divisibility by 16, and integers that are 1."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    function = _jit(kernel)
    given = {key: value for key, value in kwargs.items() if key not in ("grid", "warmup")}
    variants, options = {}, {}
    for target in (GPUTarget("cuda", 90, 32), GPUTarget("hip", "gfx942", 64)):
        backend = make_backend(target)
        binder = create_function_from_signature(function.signature, function.params, backend)
        bound, specialization, options = binder(*args, **given)
        _, types, constants, attributes = function._pack_args(backend, {}, bound, specialization, options)
        variants[target.backend] = Variant(types, constants, attributes)
    return Launch(function.__name__, function, variants, options)


# ------------------------------------------------------------------------------------------------------ compiling
Job = tuple[Launch, tuple[str, int | str, int]]  # with a target: back end, architecture, lanes of a warp


def build(jobs: Sequence[Job]) -> list[Built | Failed]:
    """Compile each kernel for its target, in processes of their own and as many at once as there are cores."""
    from triton.runtime.cache import triton_key

    triton_key()  # reads all of Triton's files: once here, and not once in every process
    results: dict[int, Built | Failed] = {}
    waiting = list(range(len(jobs)))[::-1]
    running: dict[int, tuple[Any, Path, float]] = {}  # the process, its folder, when it must have ended
    with tempfile.TemporaryDirectory(prefix="qcompile-aot-") as folder:
        try:
            while waiting or running:
                while waiting and len(running) < len(os.sched_getaffinity(0)):
                    number = waiting.pop()
                    place = Path(folder) / str(number)
                    place.mkdir()
                    running[number] = _started(*jobs[number], place), place, time.monotonic() + SECONDS
                first = min(end for *_, end in running.values()) - time.monotonic()
                multiprocessing.connection.wait([p.sentinel for p, *_ in running.values()], timeout=max(first, 0.0))
                for number, (process, place, end) in list(running.items()):
                    if late := process.is_alive() and time.monotonic() > end:
                        process.kill()
                        process.join()
                    if not process.is_alive():
                        process.join()
                        told = Failed(f"compiling took longer than {SECONDS} s")
                        results[number] = told if late else _result(process.exitcode, place)
                        del running[number]
        finally:
            for process, *_ in running.values():
                process.kill()
                process.join()
    return [results[number] for number in range(len(jobs))]


def _started(entry: Launch, target: tuple[str, int | str, int], place: Path) -> Any:
    process = multiprocessing.get_context("fork").Process(target=_child, args=(entry, target, place))
    with warnings.catch_warnings():
        # Python warns of locks that other threads may hold: the child takes none of torch's, and waits for no thread.
        warnings.simplefilter("ignore", DeprecationWarning)
        process.start()
    return process


def _result(exitcode: int | None, place: Path) -> Built | Failed:
    with contextlib.suppress(FileNotFoundError, EOFError, pickle.UnpicklingError):
        result = pickle.loads((place / "result").read_bytes())
        if isinstance(result, Built | Failed):
            return result
    how = f"ended by {signal.Signals(-exitcode).name}" if exitcode and exitcode < 0 else f"exit code {exitcode}"
    return Failed(f"the compiling process was {how}\n{_log(place)}".rstrip())


def _log(place: Path) -> str:
    """What the compiler complained of; what Triton prints besides (the whole module) is left out."""
    with contextlib.suppress(FileNotFoundError):
        lines = (place / "log").read_text(errors="replace").splitlines()
        told = [line for line in lines if re.search(r"error|ERROR|fatal|Assertion", line)]
        return "\n".join(line[:500] for line in (told or lines[-5:])[:10])
    return ""


def _child(entry: Launch, target: tuple[str, int | str, int], place: Path) -> None:
    """In the new process: nothing that is changed here is seen by the caller."""
    log = os.open(place / "log", os.O_CREAT | os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    faulthandler.disable()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.environ.pop("TRITON_INTERPRET", None)
    try:
        result: Built | Failed = _compile(entry, target, place)
    except BaseException as error:
        told = [f"{type(error).__name__}: {error}"[:4000], _log(place)]
        result = Failed("\n".join(part for part in told if part))
    (place / "part").write_bytes(pickle.dumps(result))
    (place / "part").rename(place / "result")


def _compile(entry: Launch, target: tuple[str, int | str, int], place: Path) -> Built:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    triton.knobs.cache.dir = str(place)
    _set_target(GPUTarget(*target))
    _statics_anew()
    _decorate_anew(entry.function, set())
    variant = entry.variants[target[0]]
    source = ASTSource(entry.function, variant.types, variant.constants, variant.attributes)
    kernel = triton.compile(source, target=GPUTarget(*target), options=dict(entry.options))
    texts = {kind: text for kind, text in kernel.asm.items() if isinstance(text, str)}
    metadata = kernel.metadata
    if "cubin" in kernel.asm:
        binary = place / "kernel.cubin"
        binary.write_bytes(kernel.asm["cubin"])
        texts["sass"] = _tool("nvdisasm", "-c", "-gp", binary)
        registers = re.search(r"\bREG:(\d+)", _tool("cuobjdump", "-res-usage", binary))
    else:
        registers = re.search(r"^\s*\.vgpr_count:\s+(\d+)", texts["amdgcn"], re.M)
    if registers is None:
        raise RuntimeError("the compiler did not tell the number of registers")
    return Built(
        texts=texts,
        registers=int(registers[1]),
        shared=int(metadata.shared),
        tensor_memory=int(getattr(metadata, "tmem_size", None) or 0),
        threads=int(metadata.num_warps) * target[2],
    )


def _set_target(target: Any) -> None:
    """What kernels are told that ask for the target: `triton.language.target_info` asks the driver."""
    from triton.runtime import driver

    driver.set_active(SimpleNamespace(get_current_target=lambda: target))


def _statics_anew() -> None:
    """Triton's compiler keeps a table of functions of `triton.language` (static_assert) from when it is imported. If
    that was while a kernel was interpreted, the table has the interpreter's in their place, and asserts nothing."""
    import triton.language as tl
    from triton.compiler import code_generator

    if tl.core.static_assert not in code_generator.CodeGenerator.statically_implemented_functions:
        importlib.reload(code_generator)


def _decorate_anew(function: Any, done: set[int]) -> None:
    """Helpers that were decorated while kernels were interpreted cannot be compiled: they are wrapped anew, here in
    the compiling process only."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    if id(function) in done:
        return
    done.add(id(function))
    names = function.fn.__globals__
    cells = zip(function.fn.__code__.co_freevars, function.fn.__closure__ or (), strict=False)
    for name, value in [(name, names.get(name)) for name in function.fn.__code__.co_names]:
        if isinstance(value, InterpretedFunction):
            names[name] = _jit(value)
        if isinstance(names.get(name), JITFunction):
            _decorate_anew(names[name], done)
    for _, cell in cells:
        if isinstance(cell.cell_contents, InterpretedFunction):
            cell.cell_contents = _jit(cell.cell_contents)
        if isinstance(cell.cell_contents, JITFunction):
            _decorate_anew(cell.cell_contents, done)


def _tool(name: str, *arguments: object) -> str:
    """The output of one of NVIDIA's tools that Triton brings along."""
    import triton

    path = getattr(triton.knobs.nvidia, name).path
    done = subprocess.run([path, *map(str, arguments)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name} failed: {done.stderr.strip()[:1000]}")
    return done.stdout
