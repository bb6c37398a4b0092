"""`bench/gpu.py` on a machine without a GPU: every block, from the first line to the chart."""

from __future__ import annotations

import ast
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: torch's builds for CPUs come without it")

from qcompile import compat
from qcompile.codegen.devices import triton, triton_decoded, triton_rotate
from qcompile.codegen.spec import KernelSpec

CPU = torch.device("cpu")

BENCH = Path(__file__).resolve().parent.parent / "bench"
# A kernel compiles in another process and its machine code is in the cache: what the launch on a GPU will look for.
WARM = """
import sys
sys.path[:0] = [{bench!r}, {root!r}]
from pathlib import Path

def main():
    from gpu_blocks.matmuls import compile_job, spec_of
    from gpu_blocks.warm import Warmer
    from qcompile.codegen.devices.triton import Tile

    warmer = Warmer(("cuda", 90, 32), processes=1)
    job = compile_job(spec_of("int4/g128:fp16"), 1, 4096, 4096, Tile(splits=2))
    too_wide = compile_job(spec_of("int4/g128:fp16"), 1, 64, 256, Tile(columns=48))  # no power of two
    print(warmer.compile([job, job, too_wide], 300))
    print(sorted({{path.suffix for path in Path({cache!r}).rglob("*") if path.suffix in (".cubin", ".ptx")}}))
    print(len(list(Path({cache!r}).rglob("*.cubin"))))
    warmer.close()

if __name__ == "__main__":
    main()
"""


def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
        env={**os.environ, **environment},
    )


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def complete(found: list[dict[str, Any]], numbers: set[int]) -> None:
    assert {line["block"] for line in found if "block" in line["config"]} == numbers
    assert all(line["ok"] for line in found)


def nothing_is_timed(out: Path, printed: str) -> None:
    names = ('"us"', '"share"', "_per_s", '"speedup"')
    assert not any(name in out.read_text() for name in names)
    assert " us" not in printed
    assert "tokens/s" not in printed


def test_blocks_about_training_run_interpreted(tmp_path: Path) -> None:
    out = tmp_path / "gpu.jsonl"
    done = run(str(BENCH / "gpu.py"), "--interpret", "--quick", "--training", "--out", str(out))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    found = lines(out)
    complete(found, {11, 12})
    nothing_is_timed(out, done.stdout)
    moved = [line["result"]["rounding"] for line in found if "rounding" in line["result"]]
    assert moved
    assert all(0.001 < each < 1 for each in moved)


def test_every_block_runs_interpreted_and_nothing_is_timed(tmp_path: Path) -> None:
    out = tmp_path / "gpu.jsonl"
    done = run(str(BENCH / "gpu.py"), "--interpret", "--quick", "--out", str(out))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    sys.path.insert(0, str(BENCH))
    try:
        from gpu_blocks import BLOCKS, TOTAL
        from gpu_blocks.results import load
    finally:
        sys.path.remove(str(BENCH))
    found = load(out)
    complete(found, {block.number for block in BLOCKS if not block.training})
    nothing_is_timed(out, done.stdout)
    for size in ("full", "quick"):
        for training in (False, True):
            assert sum(block.budget(size) for block in BLOCKS if block.training == training) <= TOTAL[size]

    # Again, without a line for one question: that question is asked, and the file's torn end is passed over.
    kept = [line for line in found if line["config"] not in ({"block": 0}, {"what": "launch"})]
    out.write_text("".join(json.dumps(line) + "\n" for line in kept) + '{"cut of\n')
    again = run(str(BENCH / "gpu.py"), "--interpret", "--quick", "--out", str(out), "--resume", "--blocks", "0,7")
    assert again.returncode == 0
    assert again.stdout.count("complete, from") == 1  # block 7
    assert "were answered before" in again.stdout
    assert [line["config"] for line in load(out)[len(kept) :]] == [{"what": "launch"}, {"block": 0}]


KILLS = """
import os, sys, torch

def copy(self, other, *more, _original=torch.Tensor.copy_):
    if sys._getframe(1).f_code.co_filename.endswith("ceilings.py"):
        os._exit(9)
    return _original(self, other, *more)

torch.Tensor.copy_ = copy
"""


def test_a_block_that_ends_its_process_is_told_and_the_next_one_runs(tmp_path: Path) -> None:
    """As a kernel does that takes the device's context with it."""
    (tmp_path / "sitecustomize.py").write_text(KILLS)
    words = ("--interpret", "--quick", "--blocks", "0,7", "--out", str(tmp_path / "gpu.jsonl"))
    path = os.pathsep.join((str(tmp_path), os.environ.get("PYTHONPATH", "")))
    done = run(str(BENCH / "gpu.py"), *words, PYTHONPATH=path)
    assert done.returncode == 1
    assert "\nblock 0: ended by exit status 9\nblock 7: ok\n" in done.stdout


def test_kernels_compile_ahead_without_a_gpu(tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    script = tmp_path / "warm.py"
    script.write_text(WARM.format(bench=str(BENCH), root=str(BENCH.parent), cache=cache))
    done = run(str(script), TRITON_CACHE_DIR=cache)
    assert done.returncode == 0, done.stderr[-3000:]
    failed, suffixes, count = done.stdout.splitlines()
    assert failed.count("power of 2") == 1, failed
    assert suffixes == "['.cubin', '.ptx']"
    assert count == "1"  # the same job twice is one kernel


ENDS = """
import os, sys
sys.path[:0] = [{bench!r}, {root!r}]

def fine(device):
    pass

def ends(device):
    os.abort()

def main():
    from gpu_blocks.warm import Warmer

    warmer = Warmer(("cuda", 90, 32), processes=2)
    print(warmer.compile([fine, ends, *[fine] * 6], 300))
    print(warmer.compile([fine, fine], 300))
    warmer.left = 1
    print(warmer.compile([ends, ends], 300))
    warmer.close()

if __name__ == "__main__":
    main()
"""


def test_a_compiler_that_aborts_takes_no_other_job_with_it(tmp_path: Path) -> None:
    script = tmp_path / "ends.py"
    script.write_text(ENDS.format(bench=str(BENCH), root=str(BENCH.parent)))
    done = run(str(script))
    assert done.returncode == 0, done.stderr[-3000:]
    one, none, many = (ast.literal_eval(line) for line in done.stdout.splitlines())
    assert [text.partition(":")[0] for text in one] == ["its process ended"]
    assert none == []
    assert len(many) == 2  # and no process after process for a compiler that always ends


@pytest.fixture
def walk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A session of the full size on an H200's numbers that asks nothing: `asked` and `jobs` are what it was given."""
    monkeypatch.syspath_prepend(str(BENCH))
    monkeypatch.setattr(compat, "gpu", lambda device: compat.jit.Gpu("sm_90", 132, 232448))
    triton.choose_tile.cache_clear()
    from gpu_blocks import BLOCKS
    from gpu_blocks.device import Device
    from gpu_blocks.results import Results
    from gpu_blocks.session import Session

    class Walk(Session):
        def __init__(self, size: Any = "full") -> None:
            super().__init__(Device(True), Results(tmp_path / "walk.jsonl", "walk", "full"), size, False, None)
            self.asked: list[tuple[str, dict[str, Any]]] = []
            self.jobs: list[tuple[str, Any]] = []
            for self.block in BLOCKS:
                if self.block.module != "models" and not self.block.training:  # those start a compiler
                    importlib.import_module(f"gpu_blocks.{self.block.module}").run(self)

        def items(self, configs: Any, cost: Any = None) -> Iterator[dict[str, Any]]:
            self.asked += [(self.block.module, dict(config)) for config in configs]
            return iter(())

        def compile(self, jobs: Any) -> None:
            self.jobs += [(self.block.module, job) for job in jobs]

        @contextmanager
        def guarded(self, config: Any) -> Iterator[None]:
            yield

    yield Walk
    triton.choose_tile.cache_clear()


@pytest.mark.parametrize("size", ["full", "quick"])
def test_the_questions_of_a_gpu_have_shapes_that_their_kernels_take(size: str, walk: Any) -> None:
    found = walk(size)
    asked = {module: [config for name, config in found.asked if name == module] for module, _ in found.asked}
    assert len(asked) == 10  # every block but those that compile whole models
    for config in asked["streams"]:
        kind, _, block = config["kernel"].partition(" ")
        if kind == "rotate":
            block = int(block.split()[0])
            assert config["columns"] % block == 0
            assert 0 <= 8192 - config["columns"] < block
            triton_rotate.choose_tile(
                triton_rotate.Rotation(block, "bf16", "bf16"), config["rows"], config["columns"], CPU
            )
    lowering, ways, launched = triton.TritonLowering("sm_90"), dict[str, set[str]](), 0
    for module, job in found.jobs:
        while not isinstance(job.args[0], KernelSpec) and len(job.args) == 2 and callable(job.args[-1]):
            job = job.args[-1]  # an overlap is around it
        if not isinstance(job.args[0], KernelSpec):
            assert module == "subnormals"
            continue
        spec, _, _, k, tile, _ = job.args
        launched += 1
        ways.setdefault(module, set()).add(tile.way)
        assert lowering.supports(spec), spec
        assert tile.way in triton_decoded.ways(spec), (module, spec, tile)
        assert all(size & (size - 1) == 0 for size in (tile.rows, tile.columns, tile.depth, tile.warps)), tile
        assert tile.rows >= 16 <= tile.columns
        if module != "correctness":  # where a launch makes it fit
            assert triton.fit(tile, triton.text_of(spec).layout, k) == tile, (module, spec, tile)
    assert launched > 100
    assert {"fused", "vendor"} <= ways["band"]
    assert ways["correctness"] == ways["eight"] == {"fused", "own", "vendor"}


def test_a_question_that_fails_is_told_and_the_next_one_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    from gpu_blocks.device import Device
    from gpu_blocks.results import Results, load
    from gpu_blocks.session import Session

    session = Session(Device(True), Results(tmp_path / "a.jsonl", "a", "tiny"), "tiny", True, None)
    session.until, seen = float("inf"), []

    def answer(config: dict[str, Any]) -> None:
        seen.append(config["x"])
        if config["x"] == 1:
            raise ValueError("one")
        session.record(config, {"y": 0})

    session.ask([{"x": x} for x in range(3)], answer)
    assert (seen, len(session.failures)) == ([0, 1, 2], 1)
    assert [(line["config"]["x"], line["ok"]) for line in load(tmp_path / "a.jsonl")] == [
        (0, True),
        (1, False),
        (2, True),
    ]
    session.ask([{"x": x} for x in range(3)], answer)  # only the one that failed
    assert seen[3:] == [1]

    def broken() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(session.device, "synchronize", broken)
    with pytest.raises(ValueError, match="one"):
        session.ask([{"x": 1}, {"x": 5}], answer)
    assert seen[-1] == 1


def test_chart(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    config = {"scheme": "int4/g128:fp16", "m": 1, "n": 8192, "k": 8192}
    result = {"best": "a", "contestants": {"a": {"us": 11.0, "share": 0.74, "speedup": 3.2}, "F.linear": {"us": 36.0}}}
    line = {"block": 3, "device": "GPU", "config": config, "result": result, "ok": True}
    source = tmp_path / "gpu.jsonl"
    source.write_text(json.dumps(line) + "\n")
    done = run(str(BENCH / "gpu.py"), "--chart", str(source))
    assert (done.returncode, "1 bars" in done.stdout) == (0, True), done.stderr
    assert (tmp_path / "gpu.png").read_bytes().startswith(b"\x89PNG")
    source.write_text(json.dumps({**line, "ok": False}) + "\n")
    assert run(str(BENCH / "gpu.py"), "--chart", str(source)).returncode == 1
