"""The ledger says what happens: sites, shapes, bytes, reasons, rules that matched nothing."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import asdict
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from qcompile import Pass, QCError, Recipe, Rule, Scheme, explain
from qcompile.backend import watching
from qcompile.ledger import Explanation, Row, summarize
from qcompile.plan.recipe import sqnr_db
from qcompile.runtime.store import STORE
from tests.e2e.models import TinyLM
from tests.e2e.support import RECIPE, compiled, encodes_during
from tests.e2e.test_modes import Broken

INT8, INT4 = Scheme.parse(RECIPE), Scheme.parse("uint4/g32:fp16+m")


def test_rows_of_a_language_model() -> None:
    model, ids = TinyLM(layers=1, bias=True).eval(), torch.randint(0, 128, (2, 5))
    recipe = Recipe((Rule(INT8, kind=("embedding", "head")), Rule(INT4)), "mine")
    found = explain(model, ids, recipe=recipe)
    rows = {(row.kind, row.path): row for row in found}
    assert len(rows) == len(found.rows)

    q = rows["linear", "layers.0.0.q.weight"]
    assert (q.shape, q.scheme, q.flops) == ((10, 64, 64), str(INT4), 2 * 10 * 64 * 64)
    assert q.source.startswith(("models.py:", "linear.py:"))
    assert q.bytes_before == 64 * 64 * 4
    assert q.bytes_after == 64 * 64 // 2 + 2 * 2 * 64 * 2  # half a byte each; fp16 scale and minimum, two groups a row
    assert q.sqnr == pytest.approx(sqnr_db(model.layers[0][0].q.weight, INT4), abs=1e-3)  # one fp32 sum, two orders
    head, table = rows["head", "embed.weight"], rows["embedding", "embed.weight"]
    assert {head.scheme, table.scheme} == {RECIPE}
    assert sorted([head.bytes_after, table.bytes_after]) == [0, 128 * 64 + 128 * 4]

    attention = rows["attention", ""]
    assert "activations" in attention.reason
    assert attention.flops == 4 * 2 * 4 * 5 * 5 * 16
    total = sum(row.flops for row in found)
    assert found.coverage == (total - attention.flops) / total
    with torch.no_grad(), watching("reference") as trace:
        compiled(model, recipe)(ids)
    held = {id(item.entry): item.entry.nbytes for item in trace.contexts[0].packed}
    assert found.bytes_after == sum(held.values())  # the joined biases too
    assert found.graphs == 1
    text = str(found)
    assert "layers.0.1.down.weight" in text
    assert "recipe mine" in text


def test_the_same_rows_as_the_backend() -> None:
    model, ids = TinyLM(layers=1).eval(), torch.randint(0, 128, (2, 5))
    found = explain(model, ids, recipe="auto")
    with torch.no_grad(), watching("reference") as trace:
        compiled(model, "auto")(ids)
    plan = trace.contexts[0].plan
    assert [(r.path, r.kernel, r.bytes_after, r.reason) for r in found] == [
        (d.site.path, d.kernel, d.bytes_after, d.reason) for d in plan
    ]
    assert found.coverage == plan.coverage


def test_graph_breaks() -> None:
    """Two graphs; a weight that both read is counted once; a rule used in one of them is used."""
    recipe = Recipe((Rule(INT4, path="b.*"), Rule(INT8, path="a.*"), Rule(INT8, path="c.*")), "mine")
    model, x = Broken().eval(), torch.randn(3, 64)
    found = explain(model, x, recipe=recipe)
    assert [(row.graph, row.path) for row in found] == [(0, "a.weight"), (1, "b.weight"), (1, "a.weight")]
    assert found.graphs == 2
    assert found.coverage == 1.0
    assert found.rows[2].bytes_after == 0
    with torch.no_grad(), watching("reference") as trace, warnings.catch_warnings(action="ignore"):
        compiled(model, recipe)(x)
    held = {id(item.entry): item.entry.nbytes for ctx in trace.contexts for item in ctx.packed}
    assert found.bytes_after == sum(held.values())
    assert found.unused_rules == (str(Rule(INT8, path="c.*").to_json()),)
    assert found.notes[0] == f"this rule of the recipe matched no site: {found.unused_rules[0]}"
    assert found.notes[1].startswith("graph break: ")
    assert f"note: {found.notes[0]}" in str(found)


class Sandwich(nn.Module):
    """A graph without any site comes after the break."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        torch._dynamo.graph_break()
        return y.relu() + 1


def test_unused_rules_with_a_graph_without_sites() -> None:
    recipe = Recipe((Rule(None, path="typo.*"), Rule(INT8)), "mine")
    assert len(explain(Sandwich(), torch.randn(2, 8), recipe=recipe).unused_rules) == 1
    assert explain(Sandwich(), torch.randn(2, 8), recipe="int4").unused_rules == ()


def test_explaining_often_uses_nothing_up() -> None:
    """More often than Dynamo compiles one piece of code, and the model can still be compiled afterwards."""
    model, x = nn.Sequential(nn.Linear(8, 8)).eval(), torch.randn(2, 8)
    for _ in range(torch._dynamo.config.recompile_limit + 2):
        assert explain(model, x, recipe=RECIPE).graphs == 1
    with torch.no_grad(), watching("reference") as trace:
        compiled(model)(x)
    assert len(trace.contexts) == 1


def test_explain_of_a_compiled_model_and_of_a_function() -> None:
    model, x = nn.Linear(8, 8).eval(), torch.randn(2, 8)
    assert [(row.path, row.source) for row in explain(compiled(model), x, recipe=RECIPE)] == [("weight", "")]
    w = nn.Parameter(torch.randn(8, 8))
    assert explain(lambda x: x @ w, x, recipe=RECIPE).coverage == 1.0


def test_reasons() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.table = nn.Conv1d(4, 4, 1), nn.Embedding(10, 4, max_norm=1.0)
            self.register_buffer("fixed", torch.randn(4, 4))
            self.kept = nn.Linear(4, 4)

        def forward(self, x: Tensor, ids: Tensor) -> Tensor:
            x = self.conv(x.unsqueeze(-1)).squeeze(-1) + self.table(ids)
            return self.kept(x @ x.t() @ nn.functional.linear(x, self.fixed))

    recipe = Recipe((Rule(None, path="kept.*"), Rule(INT8)))
    found = explain(Odd(), torch.randn(4, 4), torch.arange(4), recipe=recipe)
    assert found.coverage == 0
    reasons = {row.kind + row.path: row.reason for row in found}
    assert "convolutions" in reasons["conv"]
    assert "max_norm" in reasons["embeddingtable.weight"]
    assert "both operands" in reasons["bmm"]
    assert "not a parameter" in reasons["linearfixed"]
    assert reasons["linearkept.weight"] == "rule 0 keeps it float"


class Remark(Pass):
    name = "remark"

    def run(self, gm: torch.fx.GraphModule, ctx: Any) -> None:
        ctx.plan.notes.append("seen")


def test_notes_of_passes_name_their_graph() -> None:
    options = {"passes": {"insert": [("before", "detect", Remark())]}}
    one = explain(nn.Linear(8, 8).eval(), torch.randn(2, 8), recipe=RECIPE, options=options)
    assert one.notes == ("seen",)
    two = explain(Sandwich().eval(), torch.randn(2, 8), recipe=RECIPE, options=options)
    assert two.notes[:2] == ("graph 0: seen", "graph 1: seen")
    assert explain(nn.Linear(8, 8).eval(), torch.randn(2, 8), recipe=RECIPE).notes == ()


def test_notes_of_compiled_graphs() -> None:
    """`summarize` on what was compiled: weights that are trained are counted, outlining says what it did."""
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), torch.randn(2, 8)
    with watching("reference") as trace, warnings.catch_warnings(action="ignore"):
        compiled(model, "int8")(x)
    (note,) = summarize(trace.contexts).notes
    assert note == "autograd is recording: 2 weights stay float parameters and are rounded in every call"
    torch._dynamo.reset()
    with torch.no_grad(), watching() as trace:
        compiled(model, "none")(x)
    (note,) = summarize(trace.contexts).notes
    assert note.startswith("outline: compiled in one piece")


@pytest.mark.parametrize(
    ("before", "after", "unit", "cell"),
    [
        (256, 64, "B", "256 -> 64"),
        (4096, 1088, "kB", "4.10 -> 1.09"),
        (51_200_000, 6_553, "MB", "51.2 -> 0.00655"),
        (2_000_000_000, 1_234_567_890, "GB", "2.00 -> 1.23"),
        (999_400, 1, "kB", "999 -> 0.00100"),
    ],
)
def test_the_unit_leaves_three_digits(before: int, after: int, unit: str, cell: str) -> None:
    row = Row(0, "linear", "w", "", (1, 8, 8), RECIPE, "k", 1, before, after, None, "")
    text = str(Explanation((row,), 1.0, 1, "mine", ()))
    assert cell in text
    first, second = cell.split(" -> ")
    assert f"{first} {unit} -> {second} {unit}" in text


def test_only_what_compiled_graphs_use_stays_in_the_store() -> None:
    model, x = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)).eval(), torch.randn(2, 32)
    known = STORE.nbytes
    first = explain(model, x, recipe=RECIPE)
    assert first.bytes_after > 0
    assert STORE.nbytes == known
    with torch.no_grad(), watching("reference"):
        run = compiled(model)
        want = run(x)
        held = list(STORE)
        assert explain(model, x, recipe=RECIPE).rows == first.rows  # shared entries are counted all the same
        explain(model, x, recipe="int4")
        assert list(map(id, STORE)) == list(map(id, held))
        assert encodes_during(lambda: run(x)) == 0
        assert torch.equal(run(x), want)
        model[0].weight.mul_(2)  # the entries are still watched
        assert encodes_during(lambda: run(x)) == 1


def test_an_explanation_that_fails_leaves_nothing_behind() -> None:
    class Last(Pass):
        name = "last"

        def run(self, gm: torch.fx.GraphModule, ctx: Any) -> None:
            raise ValueError("after freeze")

    known = STORE.nbytes
    with pytest.raises(QCError, match="after freeze"):
        explain(
            nn.Linear(8, 8).eval(), torch.randn(2, 8), recipe=RECIPE,
            options={"passes": {"insert": [("after", "freeze", Last())]}},
        )  # fmt: skip
    assert STORE.nbytes == known


def test_one_entry_serves_several_modules_of_a_graph() -> None:
    """A graph that modules share reads the entries of all of them, also of the one that was not called last."""
    models, x = [nn.Linear(32, 32).eval() for _ in range(2)], torch.randn(2, 32)

    def call(layer: nn.Module, x: Tensor) -> Tensor:
        return layer(x)

    with torch.no_grad(), watching("reference"):
        run = compiled(call)
        for model in models:
            run(model, x)
        held = list(STORE)
        STORE.drop_unused(held)
        assert [entry for entry in held if entry.users] == [entry for entry in STORE if entry.users]
        assert encodes_during(lambda: [run(model, x) for model in models]) == 0


class Noisy(nn.Module):
    """Dropout, a norm with statistics, a graph break, and one part that is never trained."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.drop, self.norm = nn.Linear(32, 32), nn.Dropout(0.5), nn.BatchNorm1d(32)
        self.fixed = nn.Linear(32, 32).eval()

    def train(self, mode: bool = True) -> Noisy:
        raise AssertionError("explain changes modes without the user's code")

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.drop(self.fc(x)))
        torch._dynamo.graph_break()
        return self.fixed(x)


def test_a_model_in_training_mode_is_explained_in_evaluation_mode() -> None:
    model, x = Noisy(), torch.randn(4, 32)
    modes = [module.training for module in model.modules()]
    assert {True, False} == set(modes)
    for target in (model, model.forward, compiled(model)):
        seen: list[bool] = []
        with model.norm.register_forward_pre_hook(lambda module, _, seen=seen: seen.append(module.training)):
            found = explain(target, x, recipe=RECIPE)
        assert seen
        assert not any(seen)
        assert found.coverage == 1.0
        assert found.notes[-1] == "the model is in training mode: explained as in eval()"
    with pytest.raises(TypeError):
        explain(model, x, x, recipe=RECIPE)
    assert [module.training for module in model.modules()] == modes
    assert int(model.norm.num_batches_tracked) == 0
    assert torch.equal(model.norm.running_mean, torch.zeros(32))


def test_a_misspelt_rule_is_told_the_nearest_name() -> None:
    model, ids = TinyLM(layers=1).eval(), torch.randint(0, 128, (2, 5))
    recipe = Recipe((Rule(None, path="layers.0.1.dwon.*"), Rule(INT8, path="embed.*", kind="linear"), Rule(INT8)))
    with warnings.catch_warnings(action="ignore"):
        other, wrong = explain(model, ids, recipe=recipe).notes
    assert wrong.endswith("; did you mean 'layers.0.1.down'?")
    assert "its path fits 'embed.weight'" in other


def test_json_holds_everything_that_the_object_does() -> None:
    rows = tuple(
        Row(0, "linear", "w", "a.py:1", (m, 8, 8), RECIPE, "k", 1024, 256, 96, sqnr, "")
        for m, sqnr in ((None, math.inf), (3, 40.5), (3, None))
    )
    found = Explanation(rows, 0.5, 1, "mine", ("rule",), ("note",))
    data = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert data.pop("rows") == [
        {**asdict(row), "shape": list(row.shape), "sqnr": sqnr}
        for row, sqnr in zip(rows, ("inf", 40.5, None), strict=True)
    ]
    assert data == {
        "coverage": 0.5, "graphs": 1, "recipe": "mine", "unused_rules": ["rule"], "notes": ["note"],
        "bytes_before": 768, "bytes_after": 288,
    }  # fmt: skip


@torch.compiler.disable
def _outside(layer: nn.Linear, x: Tensor) -> Tensor:
    y: Tensor = layer(x)
    return y


def test_what_runs_outside_of_every_graph_counts() -> None:
    inner, outer = nn.Linear(64, 32).eval(), nn.Linear(32, 32).eval()
    found = explain(lambda x: _outside(outer, inner(x)).relu(), torch.randn(4, 64), recipe=RECIPE)
    row = found.rows[-1]
    assert (row.kind, row.flops, row.quantized) == ("eager", 2 * 4 * 32 * 32, False)
    assert "disable" in row.reason
    assert found.coverage == 2 * 64 / (2 * 64 + 2 * 32)
    assert any("graph break" in note for note in found.notes)


def test_a_function_that_dynamo_cannot_trace() -> None:
    layer = nn.Linear(16, 16).eval()

    def loop(x: Tensor) -> Tensor:
        for _ in range(3):
            x = layer(x)
            torch._dynamo.graph_break()
        return x

    found = explain(loop, torch.randn(2, 16), recipe=RECIPE)
    assert sum(row.flops for row in found) == 3 * 2 * 2 * 16 * 16


def test_an_option_among_the_keywords_of_the_model() -> None:
    model, x = nn.Linear(64, 64).eval(), torch.randn(2, 64)
    with pytest.raises(QCError, match=r"options=\{'strict': True\}") as caught:
        explain(model, x, recipe=RECIPE, strict=True)
    assert caught.value.code == "explain.option"

    def takes(x: Tensor, strict: bool) -> Tensor:
        return model(x) if strict else x

    assert len(explain(takes, x, recipe=RECIPE, strict=True).rows) == 1


def test_nothing_to_quantize_is_said() -> None:
    found = explain(lambda a: a, torch.randn(2, 4), recipe="int8")
    assert str(found) == "recipe int8: nothing to quantize, no graph was compiled\n"


def test_a_narrow_terminal_gets_fewer_columns() -> None:
    found = explain(nn.Linear(64, 64).eval(), torch.randn(2, 64), recipe=RECIPE)
    heads = {}
    for width in (80, 119, 120):
        console = Console(width=width, color_system=None)
        with console.capture() as capture:
            console.print(found)
        heads[width] = [
            name for name in ("site", "scheme", "kernel", "reason", "source", "SQNR") if name in capture.get()
        ]
    assert heads[80] == heads[119] == ["site", "scheme", "kernel", "reason"]
    assert heads[120] == [*heads[80], "source", "SQNR"]
