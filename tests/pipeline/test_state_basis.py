"""A cache may change its basis if the pass says how; then generation goes on as before."""

import dataclasses
import warnings

import pytest
import torch

import fxopt
from fxopt.errors import NotEquivalentError
from fxopt.ir.program import Program
from fxopt.passes.base import Context, PassResult
from fxopt.passes.equivalence.permute_heads import PermuteHeads
from fxopt.passes.equivalence.permute_vo import PermuteVo
from fxopt.pipeline.manager import Manager
from fxopt.pipeline.verify import Verifier
from tests.models import canonical_program, zoo_model


@dataclasses.dataclass(frozen=True)
class Silent(PermuteVo):
    """Moves the channels of values, and says nothing about the cache that holds them."""

    name = "silent"

    def run(self, program: Program, context: Context) -> PassResult:
        return dataclasses.replace(super().run(program, context), state={})


@dataclasses.dataclass(frozen=True)
class Wrong(PermuteVo):
    """Says that the cache changes in another way than it does."""

    name = "wrong"

    def run(self, program: Program, context: Context) -> PassResult:
        result = super().run(program, context)
        state = {name: lambda value: value.flip(-1) for name in result.state}
        return dataclasses.replace(result, state=state)


def apply(a_pass) -> Program:
    program = canonical_program("llama")
    return Manager(Verifier(program.examples[:3])).run(program, [a_pass])


@pytest.mark.parametrize(
    "broken", [Silent(by="random"), Wrong(by="random")], ids=["silent", "wrong"]
)
def test_a_pass_that_hides_a_change_of_the_cache_is_caught(broken):
    with pytest.raises(NotEquivalentError, match=f"pass '{broken.name}' promised"):
        apply(broken)


@pytest.mark.parametrize("honest", [PermuteVo(by="random"), PermuteHeads(by="random")])
def test_a_pass_that_says_so_passes_and_the_report_warns(honest):
    record = apply(honest).history[-1]
    assert record.sites
    assert record.notes == (
        "the basis of the cache changes: caches made by the original no longer fit",
    )
    assert record.verification["error_float64"] <= 1e-9


RECIPES = {
    "rotate": ["untie", "fold-norm", {"rotate": {"keys": True}}],
    "permute-heads": [{"permute-heads": {"by": "random"}}],
    "permute-qk": [{"permute-qk": {"by": "random"}}],
    "smoothquant": ["smoothquant"],
}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("use_cache", [True, False])
def test_generation_goes_on_as_before(recipe, use_cache):
    model = zoo_model("llama").model
    ids = torch.randint(3, 99, (2, 6), generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": 8, "do_sample": False, "use_cache": use_cache}
    expected = model.generate(ids, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        optimized = fxopt.optimize(
            model, ["canonicalize", *RECIPES[recipe]], calibration=[{"input_ids": ids}]
        )
    assert torch.equal(optimized.generate(ids, **options), expected)
