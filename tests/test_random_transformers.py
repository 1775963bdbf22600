"""Random transformers are captured and canonicalized without a change of their outputs."""

from collections import defaultdict
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

import fxopt
from fxopt.passes.canonicalize.canonicalize import Canonicalize
from fxopt.pipeline.manager import Manager
from fxopt.pipeline.verify import Verifier
from tests.random_transformers import AXES, Choice, build, choices, inputs

GENERATE = settings(
    derandomize=True,
    database=None,
    deadline=None,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)


def double(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(t.double() if t.is_floating_point() else t for t in tensors)


def check(choice: Choice, seed: int) -> None:
    """Capture and canonicalize in float64; the outputs stay, at two sizes."""
    model = build(choice, seed).double()
    program = fxopt.capture(model, double(inputs(choice, seed, 2, 5)))
    canonical = Manager(Verifier(program.examples, mode="off")).run(program, [Canonicalize()])
    for batch, length in ((2, 5), (3, 8)):
        example = double(inputs(choice, seed + 1, batch, length))
        expected = model(*example)
        (result,) = canonical.graph_module(*example)
        assert bool(expected.isfinite().all())
        error = (result - expected).abs().max() / expected.square().mean().sqrt()
        assert float(error) < 1e-9


@settings(GENERATE, max_examples=25)
@given(choice=choices(), seed=st.integers(0, 1000))
def test_capture_and_canonicalize_keep_the_outputs(choice, seed):
    check(choice, seed)


@pytest.fixture(scope="module")
def reached() -> dict[str, set[Any]]:
    """The values of every axis that 400 draws reach."""
    seen: dict[str, set[Any]] = defaultdict(set)

    @settings(GENERATE, max_examples=400)
    @given(choice=choices())
    def collect(choice):
        for axis in (*AXES, "grouping"):
            seen[axis].add(getattr(choice, axis))

    collect()
    return seen


@pytest.mark.parametrize("axis", AXES)
def test_every_value_of_an_axis_is_drawn(axis, reached):
    assert reached[axis] == set(AXES[axis])


def test_every_grouping_is_drawn(reached):
    assert reached["grouping"] == {"mha", "gqa", "mqa"}


def test_the_axes_are_the_fields():
    assert list(AXES) == list(Choice.__dataclass_fields__)


@settings(GENERATE, max_examples=25)
@given(choice=choices(), seed=st.integers(0, 1000))
def test_models_repeat_and_no_weight_is_the_identity(choice, seed):
    model, again = build(choice, seed), build(choice, seed)
    example = inputs(choice, seed, 2, 4)
    output = model(*example)
    assert output.dtype == torch.float32
    assert output.shape[:2] == (2, 4)
    assert torch.equal(output, again(*example))
    for name, parameter in model.named_parameters():
        assert not bool((parameter == 0).all()), name
        if name.endswith("gain"):
            gain = parameter + (choice.norm == "offset_rms_norm")
            assert bool((gain.abs() >= 0.5 - 1e-6).all()), name
            assert choice.negative_gains or bool((gain > 0).all()), name


@settings(GENERATE, max_examples=20)
@given(choice=choices(causal=True, tokens=False, unembedding="none"), seed=st.integers(0, 1000))
def test_causal_models_do_not_look_ahead(choice, seed):
    model = build(choice, seed)
    x, *memory = inputs(choice, seed, 1, 5)
    later = x.clone()
    later[:, 3:] = -later[:, 3:] * 2
    before, after = model(x, *memory), model(later, *memory)
    assert torch.allclose(before[:, :3], after[:, :3], atol=1e-5)
    assert not torch.allclose(before[:, 3:], after[:, 3:], atol=1e-5)
