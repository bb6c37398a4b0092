"""The backend: what happens between Dynamo's graph and the code that runs, top to bottom.

group_queries  decode attention reads keys and values where they lie
canonicalize   every spelling of "activation times weight" becomes F.linear
detect         sites, with a reason where nothing can be done
resolve        the recipe names schemes, the lowerings say whether they pay
merge          sites that read one input become one matmul
freeze         weights are encoded once; packed tensors become inputs
fake_quant     weights that are trained are rounded where they are read
(AOTAutograd)  functional ATen graph
pieces         a merged matmul's results are read where they lie
epilogue       bias, activation, gate and residual move into the matmul
outline        repeated layers are compiled once
(Inductor)     generated kernels

Where the recipe rounds updates stochastically, `numbers` and `updates` stand behind freeze, and `steps` behind epilogue.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import astuple, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import fx

from qcompile import compat
from qcompile.codegen import inductor
from qcompile.codegen.devices.cpu import detect_isa
from qcompile.errors import QCError, warn
from qcompile.ir.formats import FORMATS, SCALE_FORMATS
from qcompile.ir.matmul import MatmulSpec
from qcompile.ir.ops import reference_only
from qcompile.options import Options
from qcompile.passes.base import Kernel, Pass, PassContext, Stage
from qcompile.passes.detect.canonicalize import Canonicalize
from qcompile.passes.detect.sites import Detect
from qcompile.passes.freeze.freeze import Freeze
from qcompile.passes.late.epilogue import Epilogue
from qcompile.passes.late.outline_pass import Outline
from qcompile.passes.late.pieces import Pieces
from qcompile.passes.late.steps import Steps
from qcompile.passes.manager import PassManager
from qcompile.passes.match import ORIGIN
from qcompile.passes.rewrite.attention import GroupQueries
from qcompile.passes.rewrite.fake_quant import FakeQuant
from qcompile.passes.rewrite.merge import Merge
from qcompile.passes.rewrite.numbers import Numbers
from qcompile.passes.rewrite.resolve import Resolve, warn_notes
from qcompile.passes.rewrite.updates import Updates, learning_rates_as_inputs
from qcompile.plan.plan import Plan
from qcompile.plan.recipe import Recipe
from qcompile.runtime.frozen import FrozenCall, Slot
from qcompile.runtime.store import STORE
from qcompile.runtime.updates import Stepping
from qcompile.verify import verifying

DEFAULT_PASSES: tuple[Pass, ...] = (
    GroupQueries(),
    Canonicalize(),
    Detect(),
    Resolve(),
    Merge(),
    Freeze(),
    FakeQuant(),
    Pieces(),
    Epilogue(),
    Outline(),
)
# Those of a recipe that says how updated parameters are rounded. `freeze` put its inputs first; theirs come before these.
UPDATE_PASSES: tuple[Pass, ...] = (Numbers(), Updates(), Steps())


# Defaults that a user's own setting overrides. Stride checks of every input cost a tenth of a decode step;
# the wrapper and the outlined program hand compiled code exactly the tensors it was compiled for.
_CONFIG = {"size_asserts": False}


# What the graphs of a `watching` block execute: generated code, the rewritten graph with the plain-torch operators, or
# Dynamo's own float graph (when only the plan is wanted).
Run = Literal["compiled", "reference", "float"]


@dataclass
class Trace:
    """What a `watching` block saw: one context per compiled graph."""

    run: Run = "compiled"
    contexts: list[PassContext] = field(default_factory=list)


_TRACE: ContextVar[Trace | None] = ContextVar("qcompile_trace", default=None)


@contextmanager
def watching(run: Run = "compiled") -> Iterator[Trace]:
    """Collect the plans of every graph compiled inside the block; `run` says what those graphs execute."""
    token = _TRACE.set(trace := Trace(run))
    try:
        yield trace
    finally:
        _TRACE.reset(token)


def qcompile(gm: fx.GraphModule, example_inputs: Sequence[Any], **settings: Any) -> Callable[..., Any]:
    """The backend that `torch.compile(model, backend="qcompile")` calls, once per graph.

    Args:
        gm: Dynamo's graph; it is copied, never edited.
        example_inputs: one value per placeholder; parameters are the real ones.
        settings: `options` and `mode` as `torch.compile` passes them, or single options as keywords.

    Returns:
        A callable with the graph's calling convention.

    The callable raises `QCError` for an option, a recipe, a weight or (with `strict`) a site that cannot be
    quantized.
    """
    try:
        return compile_graph(gm, example_inputs, Options.parse(**settings))
    except QCError as error:
        return _raiser(error)


def _raiser(error: QCError) -> Callable[..., Any]:
    """Raise on the first call of the graph (the very call being compiled): Dynamo wraps what a backend raises
    in an exception of its own, and users should be able to catch ours."""

    fresh = copy.copy(error)  # without the traceback and the cause, which would hold the model as long as this code

    def fail(*_: Any) -> Any:
        raise copy.copy(fresh)

    return fail


def compile_graph(gm: fx.GraphModule, inputs: Sequence[Any], options: Options) -> Callable[..., Any]:
    """`qcompile` with checked options."""
    recipe, trace = Recipe.of(options.recipe), _TRACE.get()
    updating = recipe.updates == "stochastic"
    passes: list[Any] = options.passes.apply((*DEFAULT_PASSES, *UPDATE_PASSES) if updating else DEFAULT_PASSES)
    if updating:
        _keep_compiling()
        learning_rates_as_inputs(gm, inputs)
    work = compat.clone_graph(gm)
    names = [node.name for node in work.graph.nodes if node.op == "placeholder"]
    if trace is not None and trace.run == "float":
        for node in work.graph.nodes:
            node.meta[ORIGIN] = node.name
    devices = {value.device for value in inputs if isinstance(value, torch.Tensor)}
    generates = compat.cpp_compiler() is not None or (bool(devices) and all(map(compat.writes_triton, devices)))
    ctx = PassContext(
        options=options,
        recipe=recipe,
        plan=Plan(),
        store=STORE,
        inputs=dict(zip(names, inputs, strict=True)),
        kernel=_ask_lowerings if generates else _no_compiler,
        packing=inductor.packing,
        training=torch.is_grad_enabled(),
    )
    PassManager(_stage(passes, "dynamo")).run(work, ctx, _dump(options, "dynamo"))
    for decision in list(ctx.plan):
        if decision.quantized and not decision.packed:
            ctx.plan.keep_float(decision.site.index, "no pass packed this weight (is `freeze` in the list of passes?)")
    if trace is not None:
        trace.contexts.append(ctx)
    warn_notes(ctx)

    placeholders = [n for n in work.graph.nodes if n.op == "placeholder"]
    kept = [n for n in placeholders if n.name in ctx.inputs]
    made = [n for n in placeholders if n.name not in ctx.inputs]
    packed = [n for n in made if n.name not in ctx.random]
    run = trace.run if trace is not None else "compiled"
    if run == "float":
        errors = [item.entry.error for item in ctx.packed if item.entry.error is not None]
        if errors:
            raise copy.copy(errors[0])
        return gm.forward
    if not generates or run == "reference":
        if run == "compiled":
            _warn_no_compiler()
        compiled: Callable[..., Any] = _by_reference(work)
    else:
        inductor.install()
        inner = compat.inner_compile()
        for item in reversed(_stage(passes, "compile")):
            inner = item.wrap(inner, ctx)
        if options.verify:
            inner = verifying(inner, ctx)
        values = [
            *(compat.compile_example(n.meta["example_value"]) for n in made),
            *(ctx.inputs[n.name] for n in kept),
        ]
        # A cached graph generates no kernels: there would be nothing to dump, and what is verified would not be what runs.
        uncached = {"force_disable_caches": True} if options.dump or options.verify else {}
        config = {**_CONFIG, **uncached, **options.inductor}
        config = compat.Fingerprint.patch(fingerprint(passes, ctx, devices), config)
        numbers = compat.floats_that_stay_tensors(work.graph) if updating else nullcontext()
        with inductor.dumping(options.dump), numbers:
            compiled = compat.compile_fx(work, values, inner_compile=_post(passes, inner, ctx), config=config)
    if ctx.counter is not None:
        compiled = Stepping(compiled, list(ctx.random.values()), ctx.counter)
    position = {name: index for index, name in enumerate(names)}
    inputs_by_name = {item.name: item for item in ctx.packed}
    slots = [
        Slot(item.entry, item.part, tuple(position[name] for name in item.roots))
        for item in (inputs_by_name[n.name] for n in packed)
    ]
    if trace is None:
        release(ctx)
    if not slots and len(kept) == len(names):
        return compiled
    return FrozenCall(compiled, slots, [position[n.name] for n in kept], STORE)


def _keep_compiling() -> None:
    """An update that Dynamo no longer compiles would be rounded to nearest: however often it is another one, it is compiled.

    Those that have nothing to round count too: optimizers of one class share the code of their step, and so the limit.
    """
    done = compat.leave_room()
    if done >= _MANY and done & (done - 1) == 0:
        warn(
            f"an update that is rounded stochastically was compiled {done} times, each of which takes seconds. Keep what "
            "changes from step to step in tensors (`lr` may be a number) and give an optimizer all of its parameters; "
            "TORCH_LOGS=recompiles tells what was new"
        )


_MANY = 8  # the most often that Dynamo compiles other code


def release(ctx: PassContext) -> None:
    """Compiled code keeps the context as long as it lives itself, because a backward graph is compiled later. It must not
    keep the model's parameters and packed weights with it."""
    ctx.inputs.clear()
    ctx.packed.clear()
    for index in ctx.plan.decisions:
        ctx.plan.update(index, entry=None)


def _by_reference(gm: fx.GraphModule) -> Callable[..., Any]:
    """The graph as it is, with the plain-torch meaning of every operator."""

    def call(*args: Any) -> Any:
        with reference_only():
            return gm.forward(*args)

    return call


def fingerprint(passes: Sequence[Pass], ctx: PassContext, devices: Collection[torch.device] = ()) -> str:
    """Everything that decides which code a graph becomes, for Inductor's cache keys. The compiler is asked for the
    processor's instructions, which takes a while, unless all `devices` have their kernels from Triton."""
    cpu = not devices or not all(map(compat.writes_triton, devices))
    parts = [
        package_hash(),
        # A user may have put others there.
        repr(([astuple(fmt) for fmt in FORMATS.values()], [astuple(fmt) for fmt in SCALE_FORMATS.values()])),
        *(f"{item.name}:{item.fingerprint()}" for item in passes),
        ctx.recipe.fingerprint(),
        ctx.options.fingerprint(),
        detect_isa() if cpu else "",
        compat.triton_version() or "",
        compat.cpp_compiler() or "",
        compat.processor(),
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


@lru_cache(maxsize=1)
def package_hash() -> str:
    """Hash of this package's own sources: a development tree changes more often than its version."""
    root, digest = Path(__file__).parent, hashlib.sha256()
    folders = {path.resolve() for path in (root, root / "passes", root / "codegen")}
    for file in sorted(
        f for folder in folders for f in folder.rglob("*") if f.suffix in (".py", ".h", ".jinja", ".json")
    ):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _stage(passes: Sequence[Pass], stage: Stage) -> list[Pass]:
    return [item for item in passes if item.stage == stage]


def _post(passes: Sequence[Pass], inner: Callable[..., Any], ctx: PassContext) -> Callable[..., Any]:
    """Inductor's inner compile with our late passes in front, for inference graphs."""
    manager, dump = PassManager(_stage(passes, "post")), _dump(ctx.options, "post")

    def compile_inner(gm: fx.GraphModule, inputs: Sequence[Any], **settings: Any) -> Any:
        if settings.get("is_inference"):
            manager.run(gm, ctx, dump)
            inductor.prebuild(gm)
        return inner(gm, inputs, **settings)

    return compile_inner


def _dump(options: Options, stage: str) -> Path | None:
    """The next free numbered folder for one graph's passes."""
    if options.dump is None:
        return None
    number = len(list(options.dump.glob(f"*_{stage}"))) if options.dump.exists() else 0
    return options.dump / f"{number:02d}_{stage}"


def _ask_lowerings(spec: MatmulSpec, device: torch.device, dtype: torch.dtype, rows: int | None) -> Kernel:
    verdict = inductor.verdict(spec, device, dtype)
    slow = inductor.loses(spec, device, dtype, rows) if verdict.ok else ""
    name = inductor.kernel_name(device, spec, dtype, rows) if verdict.ok else ""
    return Kernel(name, slow or verdict.reason, bool(slow))


def _no_compiler(spec: MatmulSpec, device: torch.device, dtype: torch.dtype, rows: int | None) -> Kernel:
    return Kernel("reference", "no C++ compiler")


@lru_cache(maxsize=1)
def _warn_no_compiler() -> None:
    warn(
        "no C++ compiler was found: the model runs with the plain-torch reference operators, which is correct and "
        "slow. Install g++ or clang (or set CXX); `qcompile doctor` checks it."
    )
