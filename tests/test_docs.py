"""Every code block of README.md and docs/ is run, or, for shell, checked to name commands that exist.

Python blocks of one file share one namespace and run in order. A block that shows an error says so in its
first line, ```` ```python raises=QCError ````. Shell blocks are not run (they install and measure for
minutes); each of their commands must be a target of the Makefile, a command of ours with options that it has,
or one of a few tools. Any other language must be in `PROSE`, so that a typo in the language does not switch a
check off.
"""

from __future__ import annotations

import re
import shlex
import sys
import tomllib
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import typer.main

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SHELL = {"sh", "bash", "shell", "console"}
PROSE = {"", "text", "json", "toml", "yaml", "cpp", "c++", "c", "diff", "mermaid", "triton"}
TOOLS = {"cd", "export", "git", "pip", "python", "python3", "source", "."}

_BLOCK = re.compile(
    r"^(?P<indent> *)(?P<fence>`{3,})(?P<info>[^`\n]*)\n(?P<body>.*?)^(?P=indent)(?P=fence)`* *$", re.M | re.S
)


@dataclass(frozen=True)
class Block:
    """One fenced block: its language, the words after it, its text and the page's line on which the text
    begins."""

    language: str
    marks: tuple[str, ...]
    text: str
    line: int

    @property
    def raises(self) -> str | None:
        names = [mark.removeprefix("raises=") for mark in self.marks if mark.startswith("raises=")]
        return names[0] if names else None


def blocks(page: str) -> Iterator[Block]:
    """The fenced blocks of a page. Indented ones (in lists) lose their indentation."""
    for match in _BLOCK.finditer(page):
        language, *marks = match["info"].split() or [""]
        text = re.sub(f"^{match['indent']}", "", match["body"], flags=re.M)
        yield Block(language.lower(), tuple(marks), text, page.count("\n", 0, match.start("body")) + 1)
    fences = re.findall(r"^ *`{3,}", page, re.M)
    assert len(fences) == 2 * len(_BLOCK.findall(page)), "a block is not closed, or its fences differ"


def run_python(page: str, name: str, folder: Path) -> int:
    """Run a page's Python blocks; returns how many ran.

    The blocks are also written to a file that has them on the page's own line numbers, since a traceback and
    `inspect.getsource` (which a pass's fingerprint uses) read source from files.
    """
    code = [block for block in blocks(page) if block.language in {"python", "py"}]
    lines = [""] * (page.count("\n") + 1)
    for block in code:
        body = block.text.splitlines()
        lines[block.line - 1 : block.line - 1 + len(body)] = body
    file = folder / f"{re.sub(r'[^0-9A-Za-z]', '_', name)}.py"
    file.write_text("\n".join(lines), encoding="utf-8")
    module = types.ModuleType(file.stem)
    module.__file__ = str(file)
    sys.modules[module.__name__] = module
    try:
        for block in code:
            unknown = [mark for mark in block.marks if not mark.startswith("raises=")]
            assert not unknown, f"{name}:{block.line}: unknown mark {unknown}"
            compiled = compile("\n" * (block.line - 1) + block.text, str(file), "exec", dont_inherit=True)
            try:
                exec(compiled, vars(module))
            except Exception as error:
                if block.raises not in {kind.__name__ for kind in type(error).__mro__}:
                    raise
            else:
                assert block.raises is None, f"{name}:{block.line}: did not raise {block.raises}"
    finally:
        del sys.modules[module.__name__]
    return len(code)


def commands(text: str) -> Iterator[list[str]]:
    """The simple commands of a shell block, without prompts, comments and variable settings."""
    for line in re.sub(r"\\\n", " ", text).splitlines():
        lexer = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars="&|;")
        lexer.whitespace_split = True  # words end at blanks and operators; what stands in quotes is one word
        words: list[str] = []
        for word in (*lexer, ";"):
            if not word or not set(word) <= set("&|;"):
                words.append(word)
                continue
            while words and re.fullmatch(r"\w+=.*", words[0], re.S):
                words.pop(0)
            if words:
                yield words
            words = []


def check_command(words: list[str]) -> None:
    """Raises AssertionError with the reason when a command of the page does not exist."""
    tool, *rest = words
    if tool == "make":
        targets = re.findall(r"^([\w-]+):(?!=)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
        for word in rest:
            assert "=" in word or word in targets, f"`make {word}`: no such target"
    elif tool == "qcompile":
        check_our_command(rest)
    elif tool == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
            "optional-dependencies"
        ]
        for group in re.findall(r"\[([\w,-]+)\]", " ".join(rest)):
            for extra in group.split(","):
                assert extra in extras, f"`pip install ...[{extra}]`: no such extra"
    else:
        assert tool in TOOLS, f"`{tool}` is no command that the pages may use: {sorted(TOOLS)}"
        for word in rest:
            if word.endswith(".py"):
                assert (ROOT / word).is_file(), f"{word} does not exist"


def check_our_command(words: list[str]) -> None:
    from qcompile.cli import app

    group = typer.main.get_command(app)
    known = group.commands  # type: ignore[attr-defined]
    assert words, "`qcompile` alone does nothing"
    assert words[0] in known or words[0] == "--help", f"`qcompile {words[0]}`: no such command"
    if words[0] in known and words[0] != "bench":  # bench hands its options to the script
        options = {name for one in known[words[0]].params for name in one.opts} | {"--help"}
        for word in words[1:]:
            flag = word.partition("=")[0]
            assert not flag.startswith("-") or flag in options, f"`qcompile {words[0]} {flag}`: no such option"


def check_page(page: str, name: str, folder: Path) -> int:
    """Run and check all blocks of a page; returns how many were run or checked."""
    count = run_python(page, name, folder)
    for block in blocks(page):
        if block.language in SHELL:
            for words in commands(block.text):
                check_command(words)
            count += 1
        else:
            assert block.language in PROSE | {"python", "py"}, f"{name}:{block.line}: language {block.language!r}"
    return count


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_page(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "import triton" in path.read_text(encoding="utf-8"):
        pytest.importorskip("triton", reason="triton is not installed: torch's builds for CPUs come without it")
    monkeypatch.chdir(tmp_path)  # what a page saves, it saves here
    torch.compiler.reset()
    torch.manual_seed(0)
    with torch.random.fork_rng():
        check_page(path.read_text(encoding="utf-8"), str(path.relative_to(ROOT)), tmp_path)


# --------------------------------------------------------------------------------- the runner itself can fail
GOOD = """
# Page
```python
x = 1
```
text
```python raises=ZeroDivisionError
x / 0
```
1. list
   ```python
   class Here:
       y = x + 1
   import inspect
   assert "y = x + 1" in inspect.getsource(Here)
   ```
```console
$ make test ARGS="-k x"  # comment
$ OMP_NUM_THREADS=2 qcompile demo --quick && qcompile doctor
```
"""


def test_runner_runs_a_page(tmp_path: Path) -> None:
    assert check_page(GOOD, "GOOD.md", tmp_path) == 4


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("$ make test ARGS='-k a;b'  # first; then this | that", [["make", "test", "ARGS=-k a;b"]]),
        ('python -c "import torch; print(1 && 2)" x.py', [["python", "-c", "import torch; print(1 && 2)", "x.py"]]),
        ("cd here;make a&&make b | pip c", [["cd", "here"], ["make", "a"], ["make", "b"], ["pip", "c"]]),
        ("A=1 B='2 3' make\\\n  check", [["make", "check"]]),
        ("# only; a comment", []),
        ("echo it\\'s; make", [["echo", "it's"], ["make"]]),
    ],
)
def test_runner_reads_shell_lines_as_a_shell_does(text: str, expected: list[list[str]]) -> None:
    assert list(commands(text)) == expected


@pytest.mark.parametrize(
    ("page", "error"),
    [
        ("```python\nassert False\n```\n", AssertionError),
        ("```python\nx = 1\n```\n\n```python\ny\n```\n", NameError),
        ("```python raises=ValueError\nx = 1\n```\n", AssertionError),
        ("```python raises=ValueError\n1 / 0\n```\n", ZeroDivisionError),
        ("```python skip\nx = 1\n```\n", AssertionError),
        ("```pyhton\nx = 1\n```\n", AssertionError),
        ("```python\nx = 1\n", AssertionError),
        ("```sh\nmake nothing\n```\n", AssertionError),
        ("```sh\nqcompile dmo\n```\n", AssertionError),
        ("```sh\nqcompile demo --fast\n```\n", AssertionError),
        ("```sh\npip install 'torch-qcompile[extra]'\n```\n", AssertionError),
        ("```sh\npython bench/no_such_file.py\n```\n", AssertionError),
        ("```sh\nnpm install\n```\n", AssertionError),
    ],
)
def test_runner_sees_a_broken_page(page: str, error: type[Exception], tmp_path: Path) -> None:
    with pytest.raises(error):
        check_page(page, "BROKEN.md", tmp_path)


def test_a_failure_names_the_line_of_the_page(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        check_page("one\n\n```python\nx = 1\n1 / 0\n```\n", "page.md", tmp_path)
    assert caught.traceback[-1].lineno + 1 == 5
