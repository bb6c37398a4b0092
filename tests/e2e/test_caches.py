"""Two processes that share Inductor's disk caches never get each other's result."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# One small graph in a process of its own. `run` prints the result's checksum and how often Inductor's caches hit.
CHILD = """
import json, sys
import torch
from torch._dynamo.utils import counters
from qcompile import Pass, compat

settings = json.loads(sys.argv[1])
if settings["blind"]:
    compat.Fingerprint.patch = staticmethod(lambda text, config=None: dict(config or {}))

class Change(Pass):
    name = "change"
    stage = "post"
    def __init__(self, factor):
        self.factor = factor
    def run(self, gm, ctx):
        for node in gm.graph.nodes:
            if node.target is torch.ops.aten.mul.Tensor:
                node.args = (node.args[0], self.factor)

def f(x):
    return (x.sum(-1) * 3.0).exp()

options = {"recipe": settings["recipe"]}
if settings["factor"]:
    options["passes"] = {"insert": [("before", "epilogue", Change(settings["factor"]))]}
with torch.no_grad():
    y = torch.compile(f, backend="qcompile", options=options)(torch.full((4, 8), 0.125))
hits = sum(counters["inductor"][name] for name in ("fxgraph_cache_hit", "fxgraph_lookup_write_file"))
hits += counters["aot_autograd"]["autograd_cache_hit"]
print("RESULT", json.dumps([float(y[0]), hits]))
"""


def child(cache: Path, factor: float = 0, recipe: str = "int8", blind: bool = False) -> tuple[float, int]:
    settings = json.dumps({"factor": factor, "recipe": recipe, "blind": blind})
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), "PYTHONHASHSEED": "random"}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, settings], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT"))
    value, hits = json.loads(line.removeprefix("RESULT "))
    return value, hits


def near(value: float, exponent: float) -> bool:
    """exp in fp32, whatever library computed it: two units in the last place."""
    want = 2.718281828459045**exponent
    return abs(value - want) <= 2 * 2.0**-23 * want


def test_other_passes_and_recipes_are_other_keys(tmp_path: Path) -> None:
    assert near(child(tmp_path)[0], 3)
    value, hits = child(tmp_path, factor=2.0)
    assert (near(value, 2), hits) == (True, 0), "a pass was not seen by the caches"
    assert child(tmp_path, recipe="int4")[1] == 0, "the recipe was not seen by the caches"
    value, hits = child(tmp_path, factor=2.0)
    assert near(value, 2)
    assert hits > 0, "equal passes and recipe do not share: the key is not equal in every process"


def test_without_the_fingerprint_the_caches_give_a_wrong_result(tmp_path: Path) -> None:
    """What the test above protects from, so that it cannot pass for another reason."""
    assert near(child(tmp_path, blind=True)[0], 3)
    value, hits = child(tmp_path, factor=2.0, blind=True)
    assert hits > 0
    assert near(value, 3), "the caches see the passes by themselves now: the fingerprint may go"


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
