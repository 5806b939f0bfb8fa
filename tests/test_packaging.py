"""The repository root is the package: the wheel holds all of it, no module hides in an unlisted folder."""

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PACKAGES: list[str] = PROJECT["tool"]["setuptools"]["packages"]
DATA_ONLY = {"halfweight.recipes", "halfweight.data"}
NOT_PACKAGE = {"tests", "scripts", "docs", "build", "dist"}

# All on one worker, so that the wheel is built once.
pytestmark = pytest.mark.xdist_group("packaging")


def folder(package: str) -> Path:
    return ROOT.joinpath(*package.split(".")[1:])


def source_files() -> Iterator[Path]:
    """Every .py file of the package, relative to the root."""
    for here, folders, files in os.walk(ROOT):
        top = Path(here) == ROOT
        folders[:] = [
            f
            for f in folders
            if not f.startswith(".")
            and not f.endswith((".egg-info", ".partial"))
            and f != "__pycache__"
            and not (top and f in NOT_PACKAGE)
            and not (Path(here) / f / "pyvenv.cfg").exists()
        ]
        yield from (Path(here, f).relative_to(ROOT) for f in files if f.endswith(".py"))


def package_of(file: Path) -> str:
    return ".".join(("halfweight", *file.parts[:-1]))


def test_listed_packages_are_the_folders() -> None:
    found = {package_of(f) for f in source_files() if f.name == "__init__.py"} | DATA_ONLY
    assert set(PACKAGES) == found
    assert len(PACKAGES) == len(set(PACKAGES))
    assert all(folder(p).is_dir() for p in PACKAGES)


def test_no_module_outside_the_listed_packages() -> None:
    assert [str(f) for f in source_files() if package_of(f) not in PACKAGES] == []


def test_tests_are_not_a_package() -> None:
    # With an __init__.py pytest would take the root for their parent package, under the checkout's own name.
    assert not list((ROOT / "tests").rglob("__init__.py"))


def run(*command: str | Path, cwd: Path) -> str:
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The wheel in an environment of its own: (its python, a folder to run in that is not the repository)."""
    tmp = tmp_path_factory.mktemp("packaging")
    # Building writes build/ and *.egg-info beside the sources, so a copy is built, made folder by folder: a
    # checkout may hold gigabytes of models.
    for package in PACKAGES:
        target = tmp / "src" / folder(package).relative_to(ROOT)
        target.mkdir(parents=True, exist_ok=True)
        for file in folder(package).iterdir():
            if file.is_file() and file.suffix in {".py", ".yaml", ".txt", ".toml", ".md", ""}:
                shutil.copy(file, target)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", tmp / "dist", tmp / "src", cwd=tmp)
    (wheel,) = (tmp / "dist").glob("halfweight-*.whl")

    run(sys.executable, "-m", "venv", "--without-pip", tmp / "venv", cwd=tmp)
    python = tmp / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    run(*pip, "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=tmp)
    # The dependencies come from the outer environment. A folder named in a .pth file has its own .pth files
    # ignored, so that environment's editable halfweight stays out of sight.
    (inner,) = (tmp / "venv").rglob("site-packages")
    outer = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    (inner / "outer.pth").write_text("".join(f"{path}\n" for path in outer), encoding="utf-8")

    cwd = tmp / "elsewhere"
    cwd.mkdir()
    return python, cwd


@pytest.mark.slow
def test_wheel_imports(installed: tuple[Path, Path]) -> None:
    python, cwd = installed
    out = run(python, "-c", "import halfweight as h; print(h.__version__); print(h.__file__)", cwd=cwd)
    version, file = out.split("\n")[:2]
    assert version == PROJECT["project"]["version"]
    assert Path(file).is_relative_to(cwd.parent / "venv")


@pytest.mark.slow
def test_wheel_holds_every_module(installed: tuple[Path, Path]) -> None:
    _, cwd = installed
    (inner,) = (cwd.parent / "venv").rglob("site-packages")
    assert [str(f) for f in source_files() if not (inner / "halfweight" / f).is_file()] == []


@pytest.mark.slow
def test_wheel_has_a_command_line(installed: tuple[Path, Path]) -> None:
    python, cwd = installed
    assert "Usage" in run(python, "-m", "halfweight", "--help", cwd=cwd)
    assert "Usage" in run(python.with_name("halfweight"), "--help", cwd=cwd)


@pytest.mark.slow
def test_wheel_has_its_data(installed: tuple[Path, Path]) -> None:
    python, cwd = installed
    code = (
        "from importlib.resources import files\n"
        "root = files('halfweight')\n"
        "print(*sorted(f.name for f in (root / 'recipes').iterdir() if f.name.endswith('.yaml')))\n"
        "print(*(len((root / 'data' / n).read_bytes()) for n in ('calibration.txt', 'heldout.txt')))\n"
    )
    recipes, sizes = run(python, "-c", code, cwd=cwd).split("\n")[:2]
    assert recipes.split() == sorted(f.name for f in (ROOT / "recipes").glob("*.yaml")) != []
    calibration, heldout = (int(s) for s in sizes.split())
    assert calibration > 250_000
    assert heldout > 30_000


def test_texts_are_clean_and_apart() -> None:
    paragraphs = {}
    for name in ("calibration", "heldout"):
        text = (ROOT / "data" / f"{name}.txt").read_bytes().decode("utf-8")
        assert "\r" not in text
        assert text.endswith("\n")
        paragraphs[name] = set(text.strip("\n").split("\n\n"))
        assert not any("\n" in p for p in paragraphs[name])
    assert not paragraphs["calibration"] & paragraphs["heldout"]
