"""The layout and the promises that no single module can keep."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import fxopt
from fxopt.pipeline.options import known_passes

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "fxopt").rglob("*.py"))
OWN = [
    path
    for folder in ("fxopt", "tests", "docs", "examples", "benchmarks", ".ci")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.is_file() and "__pycache__" not in path.parts
]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("link", ["passes", "lowering", "kernels"])
def test_the_root_links_into_the_package(link):
    assert (ROOT / link).is_symlink()
    assert (ROOT / link).resolve() == ROOT / "fxopt" / link


def test_one_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == fxopt.__version__


def test_dependencies_are_bounded_so_that_pip_takes_a_small_torch():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (torch,) = [d for d in project["dependencies"] if re.match(r"torch\b", d)]
    assert torch == "torch>=2.11,<2.14"


def test_imports_point_one_way():
    command = [
        sys.executable,
        "-c",
        "from importlinter.cli import lint_imports_command as run; run()",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_nothing_is_called_utils():
    assert not [name_of(p) for p in OWN if re.search(r"(^|_)utils?$", p.stem)]


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_a_source_file_is_short_and_says_what_it_is(path):
    text = path.read_text()
    assert ast.get_docstring(ast.parse(text)), "no module docstring"
    assert len(text.splitlines()) <= 350
    assert not re.search(r"\b(TODO|FIXME|XXX)\b", text)


def test_no_path_of_a_machine():
    pattern = re.compile(rb"/(home|root|work|Users)/\w")
    text_files = [p for p in [*OWN, *PAGES] if p.suffix in (".py", ".md", ".yaml", ".jinja", "")]
    here = Path(__file__)
    found = [name_of(p) for p in text_files if p != here and pattern.search(p.read_bytes())]
    assert not found


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_resolve(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith(("http://", "https://", "#")):
            assert (page.parent / target.partition("#")[0]).exists(), target


def test_files_that_the_package_needs_are_packaged():
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = data["package-data"]["fxopt"]
    packaged = {p for pattern in patterns for p in (ROOT / "fxopt").glob(pattern)}
    needed = {
        p for p in (ROOT / "fxopt").rglob("*") if p.suffix in (".yaml", ".jinja", ".cpp", ".h")
    }
    assert {name_of(p) for p in needed - packaged} == set()


def test_the_page_of_passes_is_up_to_date():
    command = [sys.executable, "docs/generate.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", known_passes())
def test_a_pass_teaches_in_its_docstring(name):
    module = sys.modules[known_passes()[name].__module__]
    if not module.__name__.startswith("fxopt."):
        pytest.skip("registered by a test")
    assert module.__doc__ is not None
    for part in ("Shapes:", "Exactness:"):
        assert part in module.__doc__


def test_the_ci_script_is_executable_and_parses():
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    subprocess.run(["bash", "-n", script], check=True)
