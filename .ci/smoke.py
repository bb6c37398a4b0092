"""Smoke test of an installed wheel: compile a model by the backend's name, without importing the package
first.

Run from a folder outside the checkout, whose path is the argument: nothing may come from there.
"""

import sys
from importlib import metadata
from pathlib import Path

import torch

checkout = Path(sys.argv[1]).resolve()
assert "qcompile" not in sys.modules

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(256, 512), torch.nn.ReLU(), torch.nn.Linear(512, 64)).eval()
x = torch.randn(8, 256)
compiled = torch.compile(model, backend="qcompile", options={"recipe": "int8", "policy": "memory"})
with torch.inference_mode():
    expected, got = model(x), compiled(x)

import qcompile  # noqa: E402

where = Path(qcompile.__file__).resolve()
assert checkout not in where.parents, f"{where} lies in the checkout"
assert qcompile.__version__ == metadata.version("torch-qcompile")
# An int8 layer rounds uniform weights in [-a, a] with steps of a/127: noise a/127/sqrt(12) against a signal
# a/sqrt(3) is 1/254, and two such layers add in squares. Float code would be at 1e-7, wrong code at 1.
error, derived = float((got - expected).norm() / expected.norm()), 2**0.5 / 254
assert derived / 4 < error < derived * 4, f"relative error {error:.1e}, about {derived:.1e} was due"
print(f"qcompile {qcompile.__version__} in {where.parent}, torch {torch.__version__}: error {error:.1e}")
