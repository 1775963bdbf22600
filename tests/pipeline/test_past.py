"""Inputs behind a long cache: what they hold, and that they are what the model would have seen."""

import pytest
import torch

from fxopt.analysis.execution import run
from fxopt.passes.quantization.quantize_cache import QuantizeCache
from fxopt.pipeline.manager import Manager
from fxopt.pipeline.past import reading_on
from fxopt.pipeline.verify import Verifier
from tests.models import canonical_program

DECODERS = ["llama", "gpt2", "bloom", "t5", "bart"]


def without_cache(program):
    return [v for v in program.examples if not program.signature.cache.length(v)]


@pytest.mark.parametrize("name", DECODERS)
def test_the_second_half_is_that_of_the_whole(name):
    program = canonical_program(name)
    (whole,) = [v for v in without_cache(program) if "13" in str([list(t.shape) for t in v[:6]])][
        :1
    ]
    (half,) = reading_on(program, [whole], 1)
    assert program.signature.cache.length(half) == 13 // 2
    expected, found = run(program, whole)[0], run(program, half)[0]
    assert found.shape[1] == 7
    assert torch.allclose(found, expected[:, -7:], atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 6, 7, 50])
@pytest.mark.parametrize("name", DECODERS)
def test_the_cache_is_as_long_as_asked_for(name, tokens):
    program = canonical_program(name)
    made = reading_on(program, program.examples, tokens)
    assert made
    for values in made:
        program.signature.check(values)
        assert program.signature.cache.length(values) >= tokens
        assert all(torch.isfinite(out).all() for out in run(program, values))


def test_a_cache_of_random_numbers_serves_where_there_is_nothing_else():
    program = canonical_program("llama")
    steps = [v for v in program.examples if v[0].shape[1] == 1 and v[3].shape[2]]
    (values,) = reading_on(program, steps[:1], 20)
    length = steps[0][3].shape[2]
    assert values[3].shape[2] == -(-20 // length) * length
    assert values[1].shape[1] == values[3].shape[2] + 1
    assert torch.equal(values[3][:, :, :length], steps[0][3])


def test_what_has_no_dense_cache_stays_as_it_is():
    bert = canonical_program("bert")
    assert all(
        a is b
        for made, given in zip(reading_on(bert, bert.examples, 9), bert.examples, strict=True)
        for a, b in zip(made, given, strict=True)
    )
    llama = canonical_program("llama")
    held = Manager(Verifier((), mode="off")).run(llama, [QuantizeCache()])
    (made,) = reading_on(held, held.examples[:1], 9)
    assert all(a is b for a, b in zip(made, held.examples[0], strict=True))
