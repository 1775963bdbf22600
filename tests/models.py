"""Zoo models captured and canonicalized once per test run; callers get copies of the graph."""

from dataclasses import dataclass
from functools import cache
from typing import Any
from unittest import mock

import torch
from torch import nn

from fxopt import api
from fxopt.capture import capture_program
from fxopt.ir.program import Program
from fxopt.passes.canonicalize.canonicalize import Canonicalize
from fxopt.pipeline.manager import Manager
from fxopt.pipeline.verify import Verifier
from fxopt.runtime.optimized import OptimizedModel
from tests.zoo import ZOO


@dataclass(frozen=True)
class CapturedModel:
    model: nn.Module
    program: Program


@cache
def _captured(name: str) -> CapturedModel:
    torch.manual_seed(0)
    model = ZOO[name]().eval()
    randomize(model)
    return CapturedModel(model, capture_program(model))


def randomize(model: nn.Module) -> None:
    """Give norms and biases values of their own: HF starts them at one and zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                noise = torch.randn(parameter.shape, generator=generator) * 0.2
                parameter.add_(noise.to(parameter.dtype))


def zoo_model(name: str) -> CapturedModel:
    """A zoo model and its captured program."""
    held = _captured(name)
    return CapturedModel(held.model, held.program.clone())


def optimize_zoo(name: str, recipe: Any, **options: Any) -> OptimizedModel:
    """`fxopt.optimize` on a zoo model, from the capture that all tests of it share."""
    held = zoo_model(name)
    with mock.patch.object(api, "capture_program", return_value=held.program):
        return api.optimize(held.model, recipe, **{"verify": "fast", "progress": False, **options})


@cache
def _canonical(name: str) -> Program:
    program = _captured(name).program
    return Manager(Verifier(program.examples, mode="off")).run(program, [Canonicalize()])


def canonical_program(name: str) -> Program:
    """A zoo model's program at the canonical level."""
    return _canonical(name).clone()
