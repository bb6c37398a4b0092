"""Two processes that share Inductor's disk caches never get each other's result."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Compiles one small graph for each case and prints its result and how often Inductor's caches hit. The graph is one call
# of a library: the caches hold it like any other, and nobody waits for a C++ compiler.
CHILD = """
import json, sys
import torch
from torch._dynamo.utils import counters
from qcompile import Pass, compat

class Change(Pass):
    name = "change"
    stage = "post"
    def __init__(self, factor):
        self.factor = factor
    def run(self, gm, ctx):
        for node in gm.graph.nodes:
            if node.target is torch.ops.aten.addmm.default:
                node.kwargs = {**node.kwargs, "alpha": self.factor}

def f(x):
    return torch.addmm(x, x, x, alpha=3)

seen = compat.Fingerprint.patch
for factor, recipe, blind in json.loads(sys.argv[1]):
    torch.compiler.reset()
    counters.clear()
    compat.Fingerprint.patch = staticmethod(lambda text, config: dict(config)) if blind else seen
    edits = {"insert": [("before", "epilogue", Change(factor))]} if factor else {}
    with torch.no_grad():
        y = torch.compile(f, backend="qcompile", options={"recipe": recipe, "passes": edits})(torch.ones(4, 4))
    hits = sum(counters["inductor"][name] for name in ("fxgraph_cache_hit", "fxgraph_lookup_write_file"))
    hits += counters["aot_autograd"]["autograd_cache_hit"]
    assert (y == y[0, 0]).all()
    print("RESULT", json.dumps([float(y[0, 0]), hits]))
"""
Processes = tuple[list[tuple[float, int]], list[tuple[float, int]]]
PLAIN, CHANGED = 1 + 3 * 4, 1 + 2 * 4  # ones + alpha * (ones @ ones), exact in floating point


def child(cache: Path, *cases: tuple[float, str, bool]) -> list[tuple[float, int]]:
    """Results and cache hits of some cases `(factor or 0, recipe, without fingerprint)` in a process of their own."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), "PYTHONHASHSEED": "random"}
    environment["TORCHINDUCTOR_VEC_ISA_OK"] = "0"  # finding out what the compiler can vectorize takes it a minute
    done = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(cases)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    return [tuple(json.loads(line.removeprefix("RESULT "))) for line in lines]


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Processes:
    """Two processes, one after the other, that share their caches."""
    cache = tmp_path_factory.mktemp("caches")
    first = child(cache, (0, "int8", False), (2, "int8", False), (0, "int4", False), (0, "int8", True))
    return first, child(cache, (2, "int8", False), (2, "int8", True))


def test_other_passes_and_recipes_are_other_keys(processes: Processes) -> None:
    (plain, changed, recipe, _), (again, _) = processes
    assert plain == (PLAIN, 0)
    assert changed == (CHANGED, 0), "a pass was not seen by the caches"
    assert recipe == (PLAIN, 0), "the recipe was not seen by the caches"
    assert again[0] == CHANGED
    assert again[1] > 0, "equal passes and recipe do not share: the key is not equal in every process"


def test_without_the_fingerprint_the_caches_give_a_wrong_result(processes: Processes) -> None:
    """What the test above protects from, so that it cannot pass for another reason."""
    (*_, plain), (_, changed) = processes
    assert plain == (PLAIN, 0)
    assert changed[1] > 0
    assert changed[0] == PLAIN, "the caches see the passes by themselves now: the fingerprint may go"


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_fingerprint_reaches_every_part(name: str) -> None:
    """Everything that decides on code is in the text, in equal words for equal settings."""
    from qcompile.backend import DEFAULT_PASSES, fingerprint
    from tests.passes.graphs import context, dynamo_graph

    gm, inputs = dynamo_graph(lambda x: x + 1, __import__("torch").ones(3))
    texts = {
        fingerprint(DEFAULT_PASSES, context(gm, inputs, recipe=name)),
        fingerprint(DEFAULT_PASSES, context(gm, inputs, recipe=name)),
        fingerprint(DEFAULT_PASSES, context(gm, inputs, recipe="nf4")),
        fingerprint(DEFAULT_PASSES, context(gm, inputs, recipe=name, policy="memory")),
        fingerprint(DEFAULT_PASSES[:-1], context(gm, inputs, recipe=name)),
    }
    assert len(texts) == 4
