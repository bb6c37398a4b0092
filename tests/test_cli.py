"""The command line: `doctor` tells a healthy machine from a broken one and names the repair."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import qcompile
from qcompile import doctor

QCOMPILE = Path(sys.executable).with_name("qcompile")


# A line under the table that repairs a part of the C++ toolchain; one cause has one.
REPAIRS = ("C++ compiler: ", "cache folder: ", "instruction set: ", "kernel build: ")


def run(*arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """The installed command in a process of its own, on a wide terminal so that no line is broken."""
    return subprocess.run(
        [QCOMPILE, *arguments],
        env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1", **environment},
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )


def test_help_names_the_commands_without_importing_torch() -> None:
    code = "import sys, qcompile.cli; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    shown = run("--help").stdout
    assert all(command in shown for command in ("demo", "explain", "doctor", "bench"))


def test_doctor_on_this_machine(disk_cache: Path) -> None:
    done = run("doctor", TORCHINDUCTOR_CACHE_DIR=str(disk_cache))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ready" in done.stdout
    for check in doctor.CHECKS:
        assert check.name in done.stdout


def test_doctor_without_a_compiler(tmp_path: Path) -> None:
    done = run("doctor", CXX=str(tmp_path / "no-such-compiler"), PATH=str(tmp_path))
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert any("C++ compiler" in line and "MISSING" in line for line in lines)
    assert (
        [line for line in lines if line.startswith(REPAIRS)] == [line for line in lines if "install g++" in line] != []
    )
    assert "ready" not in done.stdout


def test_doctor_with_a_compiler_that_cannot_build(tmp_path: Path) -> None:
    broken = tmp_path / "g++"
    broken.write_text("#!/bin/sh\n[ $1 = --version ] && echo 'g++ (broken) 1.0' && exit\nexit 1\n")
    broken.chmod(0o755)
    done = run("doctor", CXX=str(broken), TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
    assert done.returncode == 1
    assert "g++ (broken) 1.0" in done.stdout
    lines = done.stdout.splitlines()
    assert any("kernel build" in line and "MISSING" in line for line in lines)
    assert [line.partition(":")[0] for line in lines if line.startswith(REPAIRS)] == ["kernel build"]


def test_doctor_with_a_cache_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = run("doctor", TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "file" / "cache"))
    assert done.returncode == 1
    (repair,) = (line for line in done.stdout.splitlines() if line.startswith(REPAIRS))
    assert repair.startswith("cache folder: set TORCHINDUCTOR_CACHE_DIR")


def test_a_check_that_raises_is_a_finding() -> None:
    def crash() -> str:
        raise OSError("no luck\nand more")

    def missing() -> str:
        raise doctor.Missing("nothing there")

    found = list(doctor.examine((doctor.Check("a", crash, "fix a"), doctor.Check("b", missing, "fix b"))))
    assert [(f.ok, f.found) for f in found] == [(False, "OSError: no luck"), (False, "nothing there")]


def test_a_check_that_needs_a_failed_one_is_no_second_thing_to_repair() -> None:
    def missing() -> str:
        raise doctor.Missing("nothing there")

    ran: list[str] = []
    a = doctor.Check("a", missing, "fix a")
    b = doctor.Check("b", lambda: ran.append("b") or "", "fix b", needs=("z", "a"))
    c = doctor.Check("c", lambda: ran.append("c") or "", "fix c", needs=("b",))
    d = doctor.Check("d", lambda: "well", "fix d", needs=("z",))
    found = list(doctor.examine((a, b, c, d)))
    assert [(f.ok, f.fix) for f in found] == [(False, "fix a"), (False, ""), (False, ""), (True, "")]
    assert ran == []
    known: set[str] = set()
    for check in doctor.CHECKS:  # what is needed comes first, under the name that is written there
        assert set(check.needs) <= known
        known.add(check.name)


def test_repairs_name_no_package_that_is_on_no_index() -> None:
    assert not [check.name for check in doctor.CHECKS if "torch-qcompile" in check.fix]


def test_a_terminated_demo_cleans_up(tmp_path: Path) -> None:
    code = """
import sys, tempfile, time
import qcompile.cli, qcompile.demo
def run(quick, out):
    with tempfile.TemporaryDirectory(dir=out):
        print("up", flush=True)
        time.sleep(60)
qcompile.demo.run = run
sys.argv = ["qcompile", "demo", "--out", sys.argv[1]]
qcompile.cli.main()
"""
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "up\n"
        assert list(tmp_path.iterdir())
        child.terminate()
        assert child.wait(30) == 128 + signal.SIGTERM
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("explain", "no_such_module:f"), "cannot load 'no_such_module:f'"),
        (("explain", "qcompile.doctor:nothing"), "cannot load"),
        (("explain", "qcompile.doctor"), "module:function"),
        (("explain", "builtins:dict"), "return the model and a tuple"),
        (("bench", "kernels/gemw"), "there is no benchmark"),
        (("explain", "models"), "'models' names no function"),
        (("explain", "qcompile:__version__"), "is not a callable object"),
        (("explain", "qcompile.errors:suggest"), "missing a required argument"),
    ],
)
def test_an_error_of_ours_is_a_message(arguments: tuple[str, ...], words: str) -> None:
    done = run(*arguments, cwd=Path(__file__).resolve().parent)
    assert done.returncode == 1
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_explain_prints_the_ledger_of_a_users_model(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "def make():\n"
        "    return torch.nn.Sequential(torch.nn.Linear(64, 64)).eval(), (torch.ones(2, 64),)\n"
    )
    done = run("explain", "mine:make", "--recipe", "int8", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "int8" in done.stdout


MAKES = """
import torch
print("a model that talks")
class Mine(torch.nn.Linear):
    def forward(self, x):
        print("and talks")
        return super().forward(x)
def make():
    return Mine(SIZE, 64).eval(), (torch.ones(2, SIZE),)
"""


def test_explain_in_json_prints_one_document(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MAKES.replace("SIZE", "64"))
    done = run("explain", "mine:make", "--recipe", "int8", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert "a model that talks" in done.stderr
    (row,) = found["rows"]
    assert (row["path"], row["scheme"], row["shape"]) == ("weight", "int8/g64:fp16", [2, 64, 64])
    assert (found["coverage"], found["recipe"], found["bytes_before"]) == (1.0, "int8", 64 * 64 * 4)
    assert any("graph break" in note for note in found["notes"])


def test_explain_takes_a_policy_and_strictness(tmp_path: Path) -> None:
    """Groups of 48 have no fast kernel: float, packed, or an error."""
    (tmp_path / "mine.py").write_text(MAKES.replace("SIZE", "96"))

    def explain(*arguments: str) -> subprocess.CompletedProcess[str]:
        return run("explain", "mine:make", "--recipe", "int8/g48", "--json", *arguments, cwd=tmp_path)

    schemes = [json.loads(explain(*words).stdout)["rows"][0]["scheme"] for words in ((), ("--policy", "memory"))]
    assert schemes == ["float", "int8/g48:fp16"]
    strict = explain("--strict")
    assert (strict.returncode, strict.stdout) == (1, "")
    assert "no fast kernel" in strict.stderr
    wrong = explain("--policy", "sped")
    assert (wrong.returncode, wrong.stdout) == (1, "")
    assert "did you mean 'speed'?" in wrong.stderr


def explained(folder: Path, result: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`explain` of a function that returns `result`, where `Model` and `x` are known."""
    (folder / "mine.py").write_text(
        "import torch\n"
        "class Model(torch.nn.Linear):\n"
        "    def forward(self, x, gain=1.0):\n"
        "        return super().forward(x) * gain\n"
        "def make():\n"
        "    model, x = Model(64, 64).eval(), torch.ones(2, 64)\n"
        f"    return {result}\n"
    )
    return run("explain", "mine:make", "--recipe", "int8", *arguments, cwd=folder, **environment)


@pytest.mark.parametrize("result", ["(model, x)", "(model, [x])", "(model, (x,), {'gain': 2.0})", "(model, x, {})"])
def test_explain_takes_inputs_as_one_tensor_a_tuple_and_keywords(tmp_path: Path, result: str) -> None:
    done = explained(tmp_path, result, "--json")
    assert done.returncode == 0, done.stderr
    assert [row["path"] for row in json.loads(done.stdout)["rows"]] == ["weight"]


@pytest.mark.parametrize("result", ["model", "(model, 3)", "(model, x, 3)", "(x, model)"])
def test_explain_refuses_other_results(tmp_path: Path, result: str) -> None:
    done = explained(tmp_path, result)
    assert done.returncode == 1
    assert "return model, (x,)" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("keywords", "said"),
    [
        ("{'options': 1}", "a keyword input named 'options'"),
        ("{'recipe': x}", "a keyword input named 'recipe'"),
        ("{'model': x}", "a keyword input named 'model'"),
        ("{1: 2}", "a keyword input named 1"),
    ],
)
def test_explain_refuses_keywords_that_are_its_own_or_no_names(tmp_path: Path, keywords: str, said: str) -> None:
    done = explained(tmp_path, f"model, x, {keywords}")
    assert (done.returncode, done.stdout) == (1, "")
    assert f"{said} [cli.target]" in done.stderr
    assert "next: " in done.stderr
    assert "Traceback" not in done.stderr


def test_explain_of_inputs_that_do_not_fit_is_one_line_or_everything(tmp_path: Path) -> None:
    done = explained(tmp_path, "model, x[:, 1:]")
    assert (done.returncode, done.stdout) == (1, "")
    first, *rest = done.stderr.splitlines()
    assert re.match(r"the model failed on these inputs: RuntimeError: .*2x63 and 64x64.* \[cli.model\]", first)
    assert [line.partition(":")[0].strip() for line in rest] == ["where", "next"]
    assert "--traceback" in rest[-1]
    full = explained(tmp_path, "model, x[:, 1:]", "--traceback")
    assert (full.returncode, "Traceback (most recent call last):" in full.stderr) == (1, True)


def test_explain_of_a_model_is_told_to_name_a_function(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("import torch\nmodel = torch.nn.Linear(2, 2)\n")
    done = run("explain", "mine:model", cwd=tmp_path)
    assert done.returncode == 1
    assert "cannot be called without arguments" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_users_exception_shows_the_users_lines_only(tmp_path: Path) -> None:
    done = explained(tmp_path, "model, 1 / 0")
    assert (done.returncode, done.stdout) == (1, "")
    lines = done.stderr.splitlines()
    assert (lines[0], lines[-1]) == ("Traceback (most recent call last):", "ZeroDivisionError: division by zero")
    assert [line.split('"')[1] for line in lines if line.startswith("  File")] == [str(tmp_path / "mine.py")]


def test_what_is_not_a_terminal_has_no_narrow_lines(tmp_path: Path) -> None:
    wide = {key: value for key, value in os.environ.items() if key != "COLUMNS"} | {"TERM": "dumb"}
    done = subprocess.run(
        [QCOMPILE, "bench", "long " * 60], env=wide, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert "long " * 60 in done.stderr  # longer than any console is taken to be
    explained(tmp_path, "model, x")
    done = subprocess.run(
        [QCOMPILE, "explain", "mine:make", "--recipe", "int8"],
        env=wide, cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "SQNR" in done.stdout
    assert max(map(len, done.stdout.splitlines())) > 80


def test_version() -> None:
    assert run("--version").stdout == f"qcompile {qcompile.__version__}\n"


def test_doctor_in_json(disk_cache: Path, tmp_path: Path) -> None:
    done = run("doctor", "--json", TORCHINDUCTOR_CACHE_DIR=str(disk_cache))
    found = json.loads(done.stdout)
    assert (done.returncode, found["ready"]) == (0, True)
    assert [check["name"] for check in found["checks"]] == [check.name for check in doctor.CHECKS]
    done = run("doctor", "--json", CXX=str(tmp_path / "no-such-compiler"), PATH=str(tmp_path))
    assert (done.returncode, json.loads(done.stdout)["ready"]) == (1, False)


@pytest.mark.parametrize(
    ("gpu", "installed", "ok", "found"),
    [
        ("", False, True, "missing, no GPU: not needed on a CPU"),
        ("", True, True, "9.9, no GPU: not needed on a CPU"),
        ("Some GPU", True, True, "9.9, Some GPU"),
        ("Some GPU", False, False, "missing, Some GPU"),
    ],
)
def test_doctor_on_triton(monkeypatch: pytest.MonkeyPatch, gpu: str, installed: bool, ok: bool, found: str) -> None:
    monkeypatch.setattr(doctor, "_gpu", lambda: gpu)
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: object() if installed else None)
    monkeypatch.setattr(doctor.importlib.metadata, "packages_distributions", lambda: {"triton": ["some-triton"]})
    monkeypatch.setattr(doctor.importlib.metadata, "version", lambda name: {"some-triton": "9.9"}[name])
    (check,) = (check for check in doctor.CHECKS if check.name == "triton")
    (finding,) = doctor.examine((check,))
    assert (finding.ok, finding.found) == (ok, found)


def test_bench_lists_runs_and_hands_over(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text("")
    (tmp_path / "bench" / "kernels").mkdir(parents=True)
    (tmp_path / "bench" / "kernels" / "one.py").write_text("import sys; print(sys.argv[1:]); sys.exit(3)")
    assert run("bench", cwd=tmp_path).stdout.split() == ["kernels/one"]
    assert run("bench", "--help", cwd=tmp_path).stdout.split() == ["kernels/one"]
    done = run("bench", "kernels/one", "--rounds", "7", cwd=tmp_path)
    assert done.stdout.strip() == "['--rounds', '7']"
    assert done.returncode == 3
