"""A converted model in files and in other processes: the same bits, nothing lost, and memory that is given back."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qcompile import QCError, convert, load, save
from qcompile.packed import packed_weights
from tests.e2e.models import TinyLM
from tests.e2e.support import IDS, RECIPE, packed


class Odd(nn.Module):
    """What a file must keep besides packed weights: tied floats, foreign parametrizations, views, plain buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(16, 8), nn.Linear(8, 16, bias=False)
        self.head.weight = self.embed.weight
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
        self.fc = nn.Linear(8, 8)
        table = torch.randn(6, 6)
        self.register_buffer("table", table, persistent=False)
        self.register_buffer("turned", table.t())
        self.register_buffer("part", table[2:4])

    def forward(self, ids: Tensor) -> Tensor:
        y = self.fc(self.normed(self.embed(ids)))
        return self.head(y) + self.table.sum() + self.turned[0].sum() + self.part.sum()


def test_files_keep_what_they_must(tmp_path: Path) -> None:
    from qcompile import Recipe, Rule, Scheme

    torch.manual_seed(0)
    model, ids = Odd().eval(), torch.arange(6)
    convert(model, Recipe((Rule(Scheme.parse(RECIPE), path="fc.*"),)))
    assert [path for path, _, _ in packed_weights(model)] == ["fc"]
    save(model, tmp_path / "m")
    other = load(Odd().eval(), tmp_path / "m")
    assert torch.equal(other(ids), model(ids))
    assert other.head.weight is other.embed.weight
    assert other.head.weight.requires_grad
    assert torch.equal(other.turned, model.turned)
    # Into the folder it was read from, whose old contents it still reads.
    save(other, tmp_path / "m")
    assert torch.equal(other(ids), model(ids))
    assert torch.equal(load(Odd().eval(), tmp_path / "m")(ids), model(ids))
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == ["model.safetensors", "qcompile.json"]


def test_meta_model_is_filled(tmp_path: Path) -> None:
    model = packed("uint4/g32:fp16+m")
    save(model, tmp_path)
    with torch.device("meta"):
        empty = TinyLM(layers=1).eval()
    with torch.no_grad():
        assert torch.equal(load(empty, tmp_path)(IDS), model(IDS))
        assert empty.embed.parametrizations.weight.original0 is empty.head.parametrizations.weight.original0


def test_load_errors(tmp_path: Path) -> None:
    save(packed(), tmp_path)
    cases = {
        "load.path": (TinyLM(layers=1), tmp_path / "missing"),
        "load.missing": (TinyLM(layers=2), tmp_path),
        "load.shape": (TinyLM(layers=1, bias=True), tmp_path / "biased"),
        "load.module": (nn.Linear(3, 3), tmp_path),
    }
    save(packed(bias=True), tmp_path / "biased")
    cases["load.shape"][0].layers[0][0].q.bias = nn.Parameter(torch.randn(7))
    for code, (model, path) in cases.items():
        with pytest.raises(QCError) as caught:
            load(model, path)
        assert caught.value.code == code
    (tmp_path / "qcompile.json").write_text(json.dumps({"version": 99}))
    with pytest.raises(QCError, match=r"\n  next: .* save the model again") as caught:
        load(TinyLM(layers=1), tmp_path)
    assert (caught.value.code, caught.value.where) == ("load.version", str(tmp_path / "qcompile.json"))
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/nowhere")):
        with pytest.raises(QCError) as caught:
            save(packed(), path)
        assert caught.value.code == "save.path"


def test_fresh_process_gives_the_same_bits(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = packed("uint4/g32:fp16+m", bias=True)
    save(model, tmp_path / "m")
    with torch.no_grad():
        save_file({"ids": IDS, "logits": model(IDS)}, tmp_path / "want.safetensors")
    text = """
import sys, torch
from safetensors.torch import load_file
from qcompile import load
from tests.e2e.models import TinyLM
with torch.device("meta"):
    model = TinyLM(layers=1, bias=True).eval()
want = load_file(sys.argv[2])
with torch.no_grad():
    print("EQUAL", torch.equal(load(model, sys.argv[1])(want["ids"]), want["logits"]))
"""
    assert "EQUAL True" in run_child(text, str(tmp_path / "m"), str(tmp_path / "want.safetensors"))
    assert load_file(tmp_path / "want.safetensors")["logits"].shape == (2, 5, 128)


def run_child(text: str, *args: str) -> str:
    done = subprocess.run([sys.executable, "-c", text, *args], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("recipe", ["int8", "int4"])
def test_memory_is_given_back(recipe: str) -> None:
    """Resident memory falls by at least 60 % of the float bytes (8 bits leave 25 %, and what quantizing needs on the way
    must be gone as well)."""
    text = """
import sys, torch
from torch import nn
from qcompile import convert
import qcompile.api

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

convert(nn.Sequential(nn.Linear(256, 256)), sys.argv[1])  # what is loaded on first use is not the model's
model = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(48)))
size, before = sum(p.numel() * 4 for p in model.parameters()), resident()
report = convert(model, sys.argv[1])
print("DROP", (before - resident()) / size, report.bytes_before == size)
"""
    line = next(line for line in run_child(text, recipe).splitlines() if line.startswith("DROP"))
    _, drop, counted = line.split()
    assert counted == "True"
    assert float(drop) >= 0.6
