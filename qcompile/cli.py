"""The command line: `qcompile doctor | explain | demo | bench`.

The commands parse, call and print; what they do lives in the modules they call, which are imported when a
command runs, so that `--help` answers at once and `doctor` can speak on a machine where the rest does not
import.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import logging
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from qcompile import __version__

if TYPE_CHECKING:
    from qcompile.errors import QCError
    from qcompile.ledger import Explanation

app = typer.Typer(
    name="qcompile",
    help="A low-bit backend for torch.compile.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _console(stderr: bool = False) -> Console:
    """A file or a pipe has no width: 200 columns there, or what COLUMNS says, and not the 80 of an unknown terminal."""
    console = Console(stderr=stderr)
    return console if console.is_terminal or "COLUMNS" in os.environ else Console(stderr=stderr, width=200)


_out, _err = _console(), _console(stderr=True)
_Json = Annotated[bool, typer.Option("--json", help="one JSON document on stdout, and nothing else there")]


def main() -> None:
    """Entry point of the console script: an error of ours is a message, not a traceback."""
    from qcompile.errors import QCError

    try:
        app()
    except QCError as error:
        _err.print(Text(str(error), style="red"), soft_wrap=True)
        sys.exit(1)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"qcompile {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version and exit")
    ] = False,
) -> None:
    """Options of the command without a subcommand."""


# --------------------------------------------------------------------------------------------------- commands
@app.command()
def doctor(as_json: _Json = False) -> None:
    """Check this machine: Python, torch, compiler, caches, packages; 1 when an essential is missing."""
    from qcompile.doctor import examine

    with _err.status("looking at this machine ..."), redirect_stdout(sys.stderr):
        findings = list(examine())
    ready = all(finding.ok for finding in findings if finding.check.essential)
    if as_json:
        checks = [
            {"name": f.check.name, "found": f.found, "ok": f.ok, "essential": f.check.essential, "fix": f.fix}
            for f in findings
        ]
        print(json.dumps({"ready": ready, "checks": checks}, indent=1))
    else:
        table = Table("check", "found", "", title="qcompile doctor", title_justify="left")
        for finding in findings:
            bad = ("MISSING", "bold red") if finding.check.essential and finding.fix else ("-", "yellow")
            table.add_row(finding.check.name, finding.found, Text(*(("ok", "green") if finding.ok else bad)))
        _out.print(table)
        for finding in findings:
            if finding.fix:
                _out.print(Text.assemble((finding.check.name, "bold"), ": ", finding.fix), soft_wrap=True)
        if ready:
            _out.print("ready")
    if not ready:
        raise typer.Exit(1)


@app.command()
def explain(
    target: Annotated[
        str, typer.Argument(help="module.path:function that returns (model, inputs) or (model, inputs, keyword inputs)")
    ],
    recipe: Annotated[str, typer.Option(help="preset, scheme or JSON file")] = "auto",
    policy: Annotated[str, typer.Option(help="speed, memory or accuracy")] = "speed",
    strict: Annotated[bool, typer.Option("--strict", help="fail where a site cannot be quantized as asked")] = False,
    trace: Annotated[bool, typer.Option("--traceback", help="where a model that fails does so, in full")] = False,
    as_json: _Json = False,
) -> None:
    """Print what the backend does with every matmul of a model, and why."""
    settings = {"recipe": recipe, "policy": policy, "strict": strict}
    if as_json:
        with redirect_stdout(sys.stderr):  # the model may print
            found = _explain(target, settings, trace)
        print(json.dumps(found.to_json(), indent=1, allow_nan=False))
    else:
        _out.print(_explain(target, settings, trace))


@app.command()
def demo(
    quick: Annotated[bool, typer.Option("--quick", help="fewer tokens and rounds")] = False,
    out: Annotated[Path, typer.Option(help="folder for the table, the chart and the JSON file")] = Path("demo-results"),
) -> None:
    """Quantize a small language model in every way and measure quality, speed and size against float."""
    signal.signal(signal.SIGTERM, _terminate)  # `timeout`: there are processes to stop and 500 MB of files to delete
    from qcompile.demo import run

    run(quick=quick, out=out)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def bench(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="a script of bench/, such as kernels/cpu; nothing: list them")] = "",
) -> None:
    """Run a benchmark of a source checkout; further arguments go to it."""
    folder = _bench_folder()
    scripts = {
        str(path.relative_to(folder).with_suffix("")): path
        for path in sorted(folder.rglob("*.py"))
        if not path.name.startswith("_") and not (path.parent / "__init__.py").exists()
    }
    if name in ("", "--help", "-h"):
        for known, path in scripts.items():
            about = ast.get_docstring(ast.parse(path.read_text())) or ""
            _out.print(f"{known:16} {about.splitlines()[0]}" if about else known, soft_wrap=True)
        return
    if name not in scripts:
        from qcompile.errors import QCError, suggest

        raise QCError(
            "cli.bench",
            f"there is no benchmark {name!r}{suggest(name, list(scripts))}",
            where=str(folder),
            next="`qcompile bench` lists them",
        )
    raise typer.Exit(subprocess.run([sys.executable, scripts[name], *context.args], check=False).returncode)


# ---------------------------------------------------------------------------------------------------- details
def _terminate(number: int, frame: object) -> NoReturn:
    """End as Ctrl-C does, through every `finally`. Once: `timeout` signals the process and then its group."""
    signal.signal(number, signal.SIG_IGN)
    sys.exit(128 + number)


def _explain(target: str, settings: dict[str, Any], trace: bool) -> Explanation:
    with _users_code():
        made = _load(target)()
    import torch

    from qcompile import api
    from qcompile.errors import QCError

    model, args, keywords = (*made, {})[:3] if isinstance(made, tuple) and len(made) in (2, 3) else (None, None, {})
    args = (args,) if isinstance(args, torch.Tensor) else args
    if not callable(model) or not isinstance(args, tuple | list) or not isinstance(keywords, Mapping):
        given = f"({', '.join(type(one).__name__ for one in made)})" if isinstance(made, tuple) else type(made).__name__
        raise QCError(
            "cli.target",
            f"{target} returned {given}",
            next="return the model and a tuple of its positional inputs, and its keyword inputs as a dict if it takes "
            "any: return model, (x,) or return model, (x,), {'mask': mask}",
        )
    _check_keywords(target, keywords, api.explain)
    if not trace:  # the exception says it again
        logging.getLogger("torch._subclasses.fake_tensor").disabled = True
    with _users_code():
        try:
            return api.explain(model, *args, options=settings, **keywords)
        except QCError:
            raise
        except Exception as error:
            if trace:
                raise
            raise _failed(target, error, lambda: model(*args, **keywords)) from error


def _failed(target: str, error: Exception, eager: Callable[[], object]) -> QCError:
    """What went wrong in one line: the model's own words, which a tracer's error is many lines about."""
    import torch

    from qcompile.errors import QCError

    what, lines = "the model cannot be traced", str(error).strip().splitlines()[:1]
    try:
        with torch.inference_mode():
            eager()
    except Exception as own:
        error, what, lines = own, "the model failed on these inputs", str(own).strip().splitlines()[-1:]
    return QCError(
        "cli.model",
        f"{what}: {': '.join([type(error).__name__, *lines])}",
        where=target,
        next="--traceback shows where",
    )


def _check_keywords(target: str, keywords: Mapping[Any, object], call: Callable[..., object]) -> None:
    """Keyword inputs share the argument list of `call` with its own parameters."""
    from qcompile.errors import QCError

    own = [name for name, one in inspect.signature(call).parameters.items() if one.kind in _BY_NAME]
    for name in keywords:
        if isinstance(name, str) and name not in own:
            continue
        raise QCError(
            "cli.target",
            f"{target} returned a keyword input named {name!r}",
            why=f"explain has an argument {name!r} of its own" if isinstance(name, str) else "a name is text",
            next="return it as a positional input: return model, (x, mask)"
            if isinstance(name, str)
            else "name it as the model does: return model, (x,), {'mask': mask}",
        )


_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


@contextmanager
def _users_code() -> Iterator[None]:
    """What the user's function raises is shown from the user's first line on, without the frames that led there."""
    from qcompile.errors import QCError

    try:
        yield
    except QCError:
        raise
    except Exception as error:
        trace = error.__traceback__
        while trace is not None and trace.tb_frame.f_code.co_filename.startswith(_NOT_THEIRS):
            trace = trace.tb_next
        traceback.print_exception(type(error), error, trace)
        raise typer.Exit(1) from error


_NOT_THEIRS = (__file__, "<frozen importlib", importlib.__file__)


def _load(target: str) -> Any:
    from qcompile.errors import QCError

    def refusal(what: str, why: str = "") -> QCError:
        fix = "name it as package.module:function, where the function returns (model, inputs)"
        return QCError("cli.target", what, where="qcompile explain", why=why, next=fix)

    module, _, name = target.partition(":")
    if not module or not name:
        raise refusal(f"{target!r} names no function")
    sys.path.insert(0, os.getcwd())  # as `python -m` does: a target may lie in the working folder
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise refusal(f"cannot load {target!r}", str(error)) from error
    # A module's own call takes anything; its forward says what it needs.
    with suppress(ValueError):  # some builtins keep their arguments to themselves
        try:
            inspect.signature(getattr(found, "forward", found)).bind()
        except TypeError as error:
            raise refusal(f"{target!r} cannot be called without arguments", str(error)) from error
    return found


def _bench_folder() -> Path:
    from qcompile.errors import QCError

    for start in (Path.cwd(), Path(__file__).resolve().parent):
        for folder in (start, *start.parents):
            if (folder / "bench").is_dir() and (folder / "pyproject.toml").is_file():
                return folder / "bench"
    raise QCError(
        "cli.bench",
        "there is no folder bench/ here",
        where=str(Path.cwd()),
        why="benchmarks belong to the source checkout and are not installed",
        next="run this inside a checkout",
    )


if __name__ == "__main__":
    main()
