"""Results as JSON lines: what was measured, on what, and with which sources. They say what a later run can leave out."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
_SOURCES = ("qcompile", "passes", "codegen", "bench/gpu_blocks", "bench/gpu.py")
_PACKAGES = ("torch", "triton", "torchao", "gemlite")


def commit() -> str:
    """The checked-out commit if no source differs from it, else a hash of the sources."""
    try:
        head = _git("rev-parse", "HEAD")
        if not _git("status", "--porcelain", "--", *_SOURCES):
            return head
    except (OSError, subprocess.CalledProcessError):
        pass  # a copy without its history
    digest = hashlib.sha256()
    for name in _SOURCES:
        for path in sorted(_files(ROOT / name)):
            digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return f"sources-{digest.hexdigest()[:16]}"


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def _files(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
    for suffix in ("py", "jinja", "json", "h"):
        yield from path.rglob(f"*.{suffix}") if path.is_dir() else ()


def versions() -> dict[str, str]:
    """Of Python and the packages that matter, those that are installed."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


class Results:
    """A file of JSON lines, appended to at once.

    A line has `device`, `versions`, `commit`, `size`, `block`, `config` (what was asked), `result` (what was found), `ok`
    (whether it was right) and `time`.
    """

    def __init__(self, path: Path, device: str, size: str) -> None:
        self.path = path
        self.about = {"device": device, "size": size, "commit": commit(), "versions": versions()}
        self.lines = load(path)
        path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, block: int, config: Mapping[str, Any], result: Mapping[str, Any], ok: bool = True) -> None:
        """Append a line."""
        line = {**self.about, "block": block, "config": dict(config), "result": dict(result), "ok": ok}
        line["time"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self.lines.append(line)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def has(self, block: int, config: Mapping[str, Any]) -> bool:
        """Whether the same sources answered this question on this device, and were right."""
        same = ("device", "size", "commit")
        return any(
            line["block"] == block
            and line["config"] == config
            and line["ok"]
            and all(line[name] == self.about[name] for name in same)
            for line in self.lines
        )

    def last(self, block: int, config: Mapping[str, Any]) -> dict[str, Any] | None:
        """The newest answer of this device, of any sources."""
        for line in reversed(self.lines):
            if line["block"] == block and line["config"] == config and line["device"] == self.about["device"]:
                return dict(line["result"])
        return None


def load(path: Path) -> list[dict[str, Any]]:
    """The lines of a file; none of one that is not there. What a killed process left unfinished is passed over."""
    found = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            found.append(json.loads(text))
        except ValueError:
            continue
    return found


__all__ = ["ROOT", "Results", "commit", "load", "versions"]
