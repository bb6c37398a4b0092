"""The ledger says what happens: sites, shapes, bytes, reasons, rules that matched nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qcompile import Recipe, Rule, Scheme, explain
from qcompile.backend import watching
from qcompile.plan.recipe import sqnr_db
from qcompile.runtime.store import STORE
from tests.e2e.models import TinyLM
from tests.e2e.support import RECIPE, compiled
from tests.e2e.test_modes import Broken

INT8, INT4 = Scheme.parse(RECIPE), Scheme.parse("uint4/g32:fp16+m")


def test_rows_of_a_language_model() -> None:
    model, ids = TinyLM(layers=1, bias=True).eval(), torch.randint(0, 128, (2, 5))
    known = {id(entry) for entry in STORE}
    found = explain(model, ids, recipe="int4")
    new = [entry for entry in STORE if id(entry) not in known]
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
    assert found.bytes_after == sum(entry.nbytes for entry in new)  # the joined biases too
    assert found.graphs == 1
    text = str(found)
    assert "layers.0.1.down.weight" in text
    assert "int4" in text


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
    known = {id(entry) for entry in STORE}
    model = Broken().eval()
    found = explain(model, torch.randn(3, 64), recipe=recipe)
    assert [(row.graph, row.path) for row in found] == [(0, "a.weight"), (1, "b.weight"), (1, "a.weight")]
    assert found.graphs == 2
    assert found.coverage == 1.0
    assert found.rows[2].bytes_after == 0
    assert found.bytes_after == sum(entry.nbytes for entry in STORE if id(entry) not in known)
    assert found.unused_rules == (str(Rule(INT8, path="c.*").to_json()),)
    assert "c.*" in str(found)


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
    assert [row.path for row in explain(compiled(model), x, recipe=RECIPE)] == ["weight"]
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
    assert "not a parameter" in reasons["linear"]
    assert reasons["linearkept.weight"] == "rule 0 keeps it float"
