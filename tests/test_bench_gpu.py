"""`bench/gpu.py` on a machine without a GPU: every block, from the first line to the chart."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed: torch's builds for CPUs come without it")

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
    assert {line["block"] for line in found if "block" in line["config"]} == {
        block.number for block in BLOCKS
    }  # complete
    assert all(line["ok"] for line in found)
    assert not any(name in out.read_text() for name in ('"us"', '"share"', '"tokens_per_s"', "_per_s", '"speedup"'))
    assert " us" not in done.stdout
    assert "tokens/s" not in done.stdout
    for size in ("full", "quick"):
        assert sum(block.budget(size) for block in BLOCKS) <= TOTAL[size]  # type: ignore[arg-type]

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
