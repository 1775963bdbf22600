"""Every equivalence pass on an encoder-decoder with post-norms: BART, two layers on each side.

Each of its six attentions (two in the encoder, two in the decoder, two from one to the other) has
queries, keys, values and an output that nothing else reads; its norms are read by the residual.
"""

from collections import Counter

import pytest

from fxopt.passes.equivalence.awq_scale import AwqScale
from fxopt.passes.equivalence.equalize import Equalize
from fxopt.passes.equivalence.fold_norm import FoldNorm
from fxopt.passes.equivalence.permute_ffn import PermuteFfn
from fxopt.passes.equivalence.permute_heads import PermuteHeads
from fxopt.passes.equivalence.permute_qk import PermuteQk
from fxopt.passes.equivalence.permute_residual import PermuteResidual
from fxopt.passes.equivalence.permute_vo import PermuteVo
from fxopt.passes.equivalence.rotate import Rotate
from fxopt.passes.equivalence.smoothquant import SmoothQuant
from fxopt.passes.equivalence.untie import Untie
from tests.passes.equivalence.harness import canonical, refusals, run, sites

EVERY_ATTENTION = {"self_attn": 4, "encoder_attn": 2}
TWICE = {"self_attn": 8, "encoder_attn": 4}  # queries with keys, values with the output
POST_NORM = "a norm measures all of it together"
OUTPUT = "it is the model's output 'encoder_last_hidden_state'"
CENTRED = "its mean has to stay: it is combined with a value that no weight can change"

# The passes, the sites of the last one by the part of the model, and a reason that it gives.
EVERY_PASS = [
    ((Untie(),), {"lm_head": 1}, ""),
    ((FoldNorm(),), {}, POST_NORM),
    ((FoldNorm(centre=True),), {}, "a linear reads model.shared.weight by its columns"),
    ((Untie(), FoldNorm(centre=True)), {"final_layer_norm": 1, "shared": 1}, CENTRED),
    ((Equalize(),), TWICE, POST_NORM),
    ((AwqScale(ratio=0.5),), EVERY_ATTENTION, POST_NORM),
    ((SmoothQuant(ride=False),), EVERY_ATTENTION, POST_NORM),
    ((PermuteFfn(by="random"),), {"fc1": 4}, ""),
    ((PermuteVo(by="random"),), EVERY_ATTENTION, ""),
    ((PermuteQk(by="random"),), EVERY_ATTENTION, ""),
    ((PermuteHeads(by="random"),), EVERY_ATTENTION, ""),
    ((PermuteResidual(by="random"),), {}, OUTPUT),
    ((PermuteResidual(by="random", restore_output=True),), {"shared": 1}, ""),
    ((Rotate(online=False),), EVERY_ATTENTION, "layer_norm subtracts a mean"),
]


def part(path: str) -> str:
    """The attention that a module belongs to, or its own name."""
    names = path.split(".")
    return next((name for name in names if name.endswith("_attn")), names[-1])


@pytest.mark.parametrize(("passes", "counts", "reason"), EVERY_PASS)
def test_every_site_is_found_and_every_other_place_refused(passes, counts, reason):
    """The harness compares in float64 to 1e-9."""
    after = run(canonical("bart"), *passes)
    assert Counter(map(part, sites(after))) == counts
    assert reason in refusals(after)


def test_what_does_not_fold_rides():
    """Six scales fold into values; q/k/v, cross q, cross k/v of all layers, fc1 and fc2 ride."""
    after = run(canonical("bart"), SmoothQuant())
    riding = [site.path for site in after.history[-1].sites if "rides" in site.detail]
    assert len(sites(after)) - len(riding) == 6
    assert Counter(map(part, riding)) == {"self_attn": 4, "encoder_attn": 3, "fc1": 4, "fc2": 4}
    assert "run untie first" in refusals(after)


def test_what_weights_cannot_turn_is_turned_at_run_time():
    after = run(canonical("bart"), Untie(), Rotate(keys=True))
    kinds = Counter(site.detail[:2] for site in after.history[-1].sites)
    assert kinds == {"R2": 6, "R3": 6, "R4": 16}
