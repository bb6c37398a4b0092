"""The package list, the two folders at the top that are packages inside, and what ships: all say the same."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import tomllib
from pathlib import Path

import grimp
import pytest

import qcompile
from qcompile.doctor import CARRIERS, EXTRA

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUP = PROJECT["tool"]["setuptools"]
TOP_LEVEL = {"passes": "qcompile.passes", "codegen": "qcompile.codegen"}


def folders() -> dict[str, Path]:
    """Every folder of the package that holds a file: dotted name -> folder, never through the symlinks."""
    found = {}
    for top, name in {"qcompile": "qcompile", **TOP_LEVEL}.items():
        for folder in [ROOT / top, *(p for p in (ROOT / top).rglob("*") if p.is_dir())]:
            parts = folder.relative_to(ROOT / top).parts
            linked = top == "qcompile" and parts and parts[0] in TOP_LEVEL
            if not linked and "__pycache__" not in parts and any(file.is_file() for file in folder.iterdir()):
                found[".".join([name, *parts])] = folder
    return found


def package_folders() -> dict[str, Path]:
    """The folders that hold code; the others hold data of the package above them."""
    return {name: folder for name, folder in folders().items() if any(folder.glob("*.py"))}


def test_package_list_names_every_folder() -> None:
    assert sorted(SETUP["packages"]) == sorted(package_folders()), "edit [tool.setuptools] packages"


def test_every_package_folder_has_an_init() -> None:
    bare = [name for name, folder in package_folders().items() if not (folder / "__init__.py").is_file()]
    assert not bare, "a folder of code without __init__.py is left out of wheels"


def test_every_data_file_ships() -> None:
    shipped = {
        file
        for name, patterns in SETUP["package-data"].items()
        for pattern in patterns
        for file in package_folders()[name].glob(pattern)
    }
    data = {f for folder in folders().values() for f in folder.iterdir() if f.is_file()}
    lost = [file.relative_to(ROOT) for file in data - shipped if file.suffix not in {".py", ".pyc"}]
    assert not lost, "no pattern of [tool.setuptools.package-data] matches these"


@pytest.mark.parametrize("folder", TOP_LEVEL)
def test_symlink_and_mapping_agree(folder: str) -> None:
    link = ROOT / "qcompile" / folder
    assert link.is_symlink()
    assert link.readlink() == Path("..") / folder
    assert SETUP["package-dir"][TOP_LEVEL[folder]] == folder


@pytest.mark.parametrize("folder", TOP_LEVEL)
def test_guard_refuses_the_top_level_name(folder: str) -> None:
    spec = importlib.util.spec_from_file_location(folder, ROOT / folder / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    with pytest.raises(AssertionError, match=f"import qcompile.{folder}"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_the_layer_check_sees_through_the_symlinks() -> None:
    modules = grimp.build_graph("qcompile", cache_dir=None).modules
    for name, folder in package_folders().items():
        for file in folder.glob("*.py"):
            module = name if file.stem == "__init__" else f"{name}.{file.stem}"
            assert module in modules, f"import-linter does not see {file.relative_to(ROOT)}"


def test_the_layer_check_sees_an_import_upwards(tmp_path: Path) -> None:
    """A copy of the tree with one import that the contract forbids: the checker must find that import, or a
    green check would mean nothing."""
    import os
    import shutil
    import subprocess
    import sys

    for name in ("qcompile", "passes", "codegen"):
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "passes" / "forbidden.py").write_text("import qcompile.codegen\n", encoding="utf-8")
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "qcompile.passes.forbidden -> qcompile.codegen" in done.stdout


def test_entry_points_lead_to_objects() -> None:
    (backend,) = importlib.metadata.entry_points(group="torch_dynamo_backends", name="qcompile")
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="qcompile")
    assert callable(backend.load())
    assert callable(script.load())


@pytest.mark.parametrize("name", [name for name in qcompile.__all__ if name != "__version__"])
def test_a_public_name_stays_what_it_is(name: str) -> None:
    """Importing a module sets an attribute of its package: a module named like a public function would
    replace the function as soon as anything imports it."""
    importlib.import_module("qcompile.api")
    first, second = getattr(qcompile, name), getattr(qcompile, name)
    assert first is second
    assert callable(second)
    assert second.__name__ == name


def test_every_direct_dependency_is_pinned_within_its_bounds() -> None:
    from packaging.requirements import Requirement

    pins = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
    )
    pins = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pins.items()}
    extras = PROJECT["project"]["optional-dependencies"].values()
    for text in [*PROJECT["project"]["dependencies"], *(line for extra in extras for line in extra)]:
        wanted = Requirement(text)
        assert wanted.specifier.contains(pins[re.sub(r"[-_.]+", "-", wanted.name).lower()]), text
    carriers = re.search(r"^CARRIERS := (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    assert carriers
    assert set(carriers[1].split()) == {pinned.partition("==")[0] for _, pinned in CARRIERS.values()} <= set(pins)


def test_doctor_looks_at_the_whole_extra() -> None:
    assert set(EXTRA) == {re.split("[>=]", line)[0] for line in PROJECT["project"]["optional-dependencies"]["demo"]}


def test_doctor_names_the_pinned_versions() -> None:
    from qcompile.doctor import CHECKS

    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    named = [pin for check in CHECKS for pin in re.findall(r"--no-deps (\S+)", check.fix)]
    assert named
    assert set(named) <= set(pins)
