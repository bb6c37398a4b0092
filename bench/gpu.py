"""Everything that only a GPU can tell, in one command: ceilings, correctness, speed of kernels and of whole models.

    python bench/gpu.py                        # under 9 minutes on one H200
    python bench/gpu.py --quick                # under 3
    python bench/gpu.py --training             # training instead: optimizers, whole steps; under 9 minutes, --quick under 3
    python bench/gpu.py --blocks 1,3 --resume  # these only, without what the same sources answered before
    python bench/gpu.py --interpret --quick    # no GPU: the same code on tiny shapes, nothing is timed
    python bench/gpu.py --chart FILE           # a picture of the shares in the results

Blocks run in the order of what their answers are worth; each prints its lines at once and appends them to
`bench/results/gpu-<device>.jsonl`; on a borrowed machine `--out` names a file in a folder that comes back from it, as in
`--out "$OUT/gpu.jsonl"`. A question that fails does not stop the others, nor does a block: where it takes the device's
context with it, a new process goes on with the next. Contestants of one shape take turns, a graph of calls over rotated
copies of the weights, in windows of 30 ms; medians are told. The exit code is 1 when a result was wrong or a block failed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))
if (ROOT / "qcompile").is_dir():  # the sources that lie beside, whatever is installed
    sys.path.insert(0, str(ROOT))

from gpu_blocks import BLOCKS, TOTAL, Size  # noqa: E402


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    blocks = "; ".join(f"{block.number} {block.title}" for block in BLOCKS)
    parser.add_argument("--blocks", help=blocks)
    parser.add_argument("--training", action="store_true", help="the blocks about training; without it all others")
    parser.add_argument("--quick", action="store_true", help="fewer shapes and variants")
    parser.add_argument("--interpret", action="store_true", help="without a GPU, in Triton's interpreter, tiny shapes")
    parser.add_argument("--resume", action="store_true", help="leave out what these sources answered on this device")
    parser.add_argument(
        "--out", type=Path, help="the file of results; on a borrowed machine in a folder that comes back"
    )
    parser.add_argument("--chart", type=Path, metavar="FILE", help="draw the results in FILE as FILE.png, run nothing")
    parser.add_argument(
        "--journal", type=Path, help=argparse.SUPPRESS
    )  # a process that runs blocks: what became of them
    parser.add_argument("--seconds", type=float, default=0.0, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.blocks is None:
        given.blocks = ",".join(str(block.number) for block in BLOCKS if block.training == given.training)
    known = {str(block.number): block.number for block in BLOCKS}
    if unknown := sorted(set(given.blocks.split(",")) - set(known)):
        parser.error(f"no block {', '.join(unknown)}; there are {', '.join(known)} (--help says what they are)")
    given.blocks = [known[number] for number in given.blocks.split(",")]
    return given


def supervise(given: argparse.Namespace) -> int:
    """Run blocks in a process of their own, and go on in another where one ends before its time."""
    size: Size = "tiny" if given.interpret else "quick" if given.quick else "full"
    until, left, states = time.monotonic() + TOTAL[size], list(given.blocks), dict[int, str]()
    with tempfile.TemporaryDirectory() as folder:
        journal = Path(folder, "journal")
        while left and time.monotonic() < until:
            journal.write_text("")
            words = [*sys.argv[1:], "--blocks", ",".join(map(str, left)), "--journal", str(journal)]
            words += ["--seconds", str(until - time.monotonic())]
            code = subprocess.run([sys.executable, __file__, *words], check=False).returncode
            for line in journal.read_text().splitlines():
                number, state = line.split()
                states[int(number)] = state
            begun = [number for number in left if number in states]
            for number in begun:
                if states[number] == "begun":
                    states[number] = f"ended by exit status {code}"
            if not begun:  # not even the first one: the next would not begin either
                print(f"no block began; exit status {code}", flush=True)
                return 1
            left = left[len(begun) :]
    states |= dict.fromkeys(left, "not begun: out of time")
    print("\n" + "\n".join(f"block {number}: {state}" for number, state in states.items()), flush=True)
    return int(any(state not in ("ok", "cut") and not state.startswith("not begun") for state in states.values()))


def main() -> int:
    given = arguments()
    if given.chart:
        from gpu_blocks.chart import draw

        target = given.chart.with_suffix(".png")
        count = draw(given.chart, target)
        print(f"{target}: {count} bars" if count else f"{given.chart} holds no shares")
        return int(not count)
    import torch

    if not given.interpret and not torch.cuda.is_available():
        print("there is no GPU here that torch can use; --interpret runs the same code without one", file=sys.stderr)
        return 2
    if given.journal is None:
        return supervise(given)
    from gpu_blocks.session import work

    size: Size = "tiny" if given.interpret else "quick" if given.quick else "full"
    return work(given.blocks, size, given.interpret, given.resume, given.out, given.journal, given.seconds)


if __name__ == "__main__":
    sys.exit(main())
