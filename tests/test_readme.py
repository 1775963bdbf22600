"""What the README and the pages print is what runs."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from fxopt.cli import app

ROOT = Path(__file__).parents[1]


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def run(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.model
def test_the_example_of_the_readme_runs(tmp_path):
    done = run(blocks("README.md", "python")[0], tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "minilm-w8a8" / "model.safetensors").exists()


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.stem)
@pytest.mark.model
def test_examples_run(example, tmp_path):
    done = run(example.read_text(), tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_the_pass_of_the_tutorial_works(tmp_path):
    (code,) = blocks("docs/adding-a-pass.md", "python")
    (tmp_path / "tutorial.py").write_text(code)
    use = """
import torch, fxopt, tutorial
model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU())
recipe = {"passes": ["canonicalize", "tanh-gelu"], "expect": {"tanh-gelu": {"min_sites": 1}}}
optimized = fxopt.optimize(model, recipe, example_inputs=(torch.randn(4, 8),), target="reference")
again = fxopt.optimize(model.double(), ["canonicalize", "tanh-gelu"],
                       example_inputs=(torch.randn(4, 8).double(),), target="reference")
assert "asks for the exact form" in again.explain("1")
print(optimized.explain("1"))
"""
    done = run(use, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "TanhGelu" in done.stdout


@pytest.mark.parametrize("page", ["README.md", "docs/quickstart.md"])
def test_commands_exist_with_their_options(page):
    commands = get_command(app).commands
    lines = [line for block in blocks(page, "bash") for line in block.splitlines()]
    used = [shlex.split(line) for line in lines if line.startswith("fxopt ")]
    assert used
    for _, name, *arguments in used:
        options = {option for parameter in commands[name].params for option in parameter.opts}
        assert {argument for argument in arguments if argument.startswith("--")} <= options


def test_the_recipe_of_the_page_is_valid(tmp_path):
    from fxopt.errors import RecipeError
    from fxopt.pipeline.recipe import Recipe

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(blocks("docs/recipes.md", "yaml")[0])
    assert Recipe.resolve(recipe).name == "my-recipe"
    wrong = {
        "name": "my-recipe",
        "verfy": "off",
        "passes": ["canonicalize", {"quantize": {"weights": {"dtype": "int9"}}}],
    }
    with pytest.raises(RecipeError) as caught:
        Recipe.resolve(wrong)
    shown = blocks("docs/recipes.md", "text")[0]
    assert shown == f"RecipeError: {caught.value}\n"


def test_places_for_figures_are_kept():
    text = (ROOT / "README.md").read_text()
    assert text.index("<!-- figures:begin -->") < text.index("<!-- figures:end -->")
