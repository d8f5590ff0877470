"""What is installed: the three packages with their data and built kernels, and nothing named ``kernels``."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = {
    "fastllama": ROOT / "fastllama",
    "fastllama_kernels": ROOT / "kernels" / "fastllama_kernels",
    "fastllama_benchmarks": ROOT / "benchmarks",
}
SHIPPED = {".py", ".cpp", ".h"}
DEMO_LIMIT_BYTES = 12_000_000

FIND = """
import importlib.util, json, sys
specs = [importlib.util.find_spec(name) for name in ("fastllama", "fastllama_kernels", "kernels")]
print(json.dumps([spec and (spec.origin or "namespace") for spec in specs]))
"""


def run(*command: str, cwd: Path, **env: str) -> str:
    """The stdout of a command, which must succeed."""
    done = subprocess.run(command, cwd=cwd, env=os.environ | env, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def pip(*arguments: str, cwd: Path, **env: str) -> None:
    """Runs pip without a network."""
    options = ("--disable-pip-version-check", "--no-index", "--no-deps", "--quiet")
    run(sys.executable, "-m", "pip", *arguments, *options, cwd=cwd, **env)


def build_wheel(checkout: Path, folder: Path, levels: str) -> Path:
    """A wheel with kernels for these instruction sets."""
    options = ("--no-build-isolation", "--wheel-dir", str(folder))
    pip("wheel", *options, str(checkout), cwd=folder, FASTLLAMA_BUILD_LEVELS=levels)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the source tree, so that building leaves nothing behind in it."""
    unwanted = (".git", ".*", "build", "built", "dist", "*.egg-info", "__pycache__")
    copy = tmp_path_factory.mktemp("source") / "checkout"
    return shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*unwanted))


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, but for its compiled kernels."""
    return build_wheel(checkout, tmp_path_factory.mktemp("wheel"), "none")


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    """The paths inside the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.mark.parametrize("package", SOURCES)
def test_the_wheel_holds_every_source_file_of_the_packages(package: str, names: set[str]) -> None:
    folder = SOURCES[package]
    sources = {f"{package}/{p.relative_to(folder)}" for p in folder.rglob("*") if p.suffix in SHIPPED}
    assert sources | {f"{package}/py.typed"} <= names


def test_the_wheel_holds_nothing_else_at_its_top(names: set[str]) -> None:
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == set(SOURCES)


def test_the_wheel_holds_the_whole_demo_checkpoint_and_it_is_small(names: set[str]) -> None:
    files = [path for path in (ROOT / "fastllama" / "data" / "demo").glob("*") if path.is_file()]
    if not files:
        pytest.skip("no demo checkpoint in this tree")
    assert {f"fastllama/data/demo/{path.name}" for path in files} <= names
    assert sum(path.stat().st_size for path in files) <= DEMO_LIMIT_BYTES


def test_the_wheel_holds_the_licence_and_the_command(wheel: Path, names: set[str]) -> None:
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    (entry_points,) = (name for name in names if name.endswith(".dist-info/entry_points.txt"))
    with zipfile.ZipFile(wheel) as archive:
        assert "fastllama = fastllama.cli:main" in archive.read(entry_points).decode()


def test_the_installed_wheel_imports_and_shadows_no_kernels(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    pip("install", "--target", str(site), str(wheel), cwd=tmp_path)
    code = "import fastllama, fastllama_kernels, fastllama.cli\n" + FIND
    ours, kernels_package, theirs = json.loads(run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(site)))
    assert Path(ours).is_relative_to(site)
    assert Path(kernels_package).is_relative_to(site)
    assert theirs is None or not Path(theirs).is_relative_to(site)


def test_a_wheel_without_kernels_is_for_any_platform(wheel: Path) -> None:
    assert wheel.name.endswith("-py3-none-any.whl")


@pytest.mark.slow
def test_the_kernels_of_an_installed_wheel_load_without_a_compiler(checkout: Path, tmp_path: Path) -> None:
    built = build_wheel(checkout, tmp_path, "own")
    assert f"-py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}" in built.name
    site, caches = tmp_path / "site", tmp_path / "caches"
    pip("install", "--target", str(site), str(built), cwd=tmp_path)
    code = """
import torch
from fastllama_kernels.common import bandwidth, build, levels
assert build.load() is None
assert build.level() == levels.runnable()[0].name
print(bandwidth.read_bytes(torch.tensor([5, 7])))
"""
    environment = {"PYTHONPATH": str(site), "TORCH_EXTENSIONS_DIR": str(caches), "CXX": "no-such-compiler"}
    assert run(sys.executable, "-c", code, cwd=tmp_path, **environment).strip() == "12"
    assert not caches.exists()


def test_without_a_compiler_the_wheel_is_built_all_the_same(checkout: Path, tmp_path: Path) -> None:
    options = ("--no-build-isolation", "--wheel-dir", str(tmp_path))
    pip("wheel", *options, str(checkout), cwd=tmp_path, CXX="no-such-compiler")
    (built,) = tmp_path.glob("*.whl")
    assert built.name.endswith("-py3-none-any.whl")


def test_an_editable_install_finds_both_packages_and_shadows_no_kernels(checkout: Path, tmp_path: Path) -> None:
    build = f"import setuptools.build_meta as b; b.build_editable({str(tmp_path)!r})"
    run(sys.executable, "-c", build, cwd=checkout)
    (editable,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    pip("install", "--target", str(site), str(editable), cwd=tmp_path)
    code = f"import site; site.addsitedir({str(site)!r})\n" + FIND
    found = json.loads(run(sys.executable, "-I", "-S", "-c", code, cwd=tmp_path))
    assert found == [
        str(checkout / "fastllama" / "__init__.py"),
        str(checkout / "kernels" / "fastllama_kernels" / "__init__.py"),
        None,
    ]


def test_transformers_does_not_take_the_kernels_folder_for_its_kernels_package() -> None:
    code = """
import importlib.metadata, sys
from transformers.utils import is_kernels_available
sys.exit(is_kernels_available() != any(d.name == "kernels" for d in importlib.metadata.distributions()))
"""
    run(sys.executable, "-c", code, cwd=ROOT, PYTHONPATH=str(ROOT))
