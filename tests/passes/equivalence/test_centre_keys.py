"""Constants in all keys: softmax does not see them, and caches round smaller numbers."""

import pytest
import torch

from fxopt.analysis.calibration import Recorder, record
from fxopt.analysis.execution import run as run_program
from fxopt.analysis.samples import Sample
from fxopt.ir.program import Program
from fxopt.passes.equivalence.attended_keys import attended_keys
from fxopt.passes.equivalence.centre_keys import CentreKeys
from fxopt.passes.equivalence.rotate import Rotate
from fxopt.passes.quantization.quantize_cache import QuantizeCache
from fxopt.pipeline.data import keyword_inputs
from fxopt.pipeline.manager import Manager
from fxopt.pipeline.verify import Verifier
from tests.passes.equivalence.harness import (
    calibration_of,
    canonical,
    changed,
    idempotent,
    refusals,
    run,
    sites,
)


def mean_keys(program: Program) -> dict[str, torch.Tensor]:
    """The mean of the new keys of each head [H, h] over the calibration data, run by hand."""
    wanted = {keys.new.name for keys in attended_keys(program) if keys.new is not None}
    found: dict[str, list[torch.Tensor]] = {}

    def watch(node, value):
        if node.name in wanted:
            found.setdefault(node.name, []).append(value.transpose(0, 1).flatten(1, 2))

    for sample in calibration_of(program):
        run_program(program, sample.inputs, watch)
    return {name: torch.cat(parts, 1).mean(1) for name, parts in found.items()}


@pytest.mark.parametrize("model", ["llama", "qwen3", "phi3", "gpt2", "bert", "tied-llama"])
def test_keys_lose_their_mean_and_nothing_else_changes(model):
    before = canonical(model)
    after = run(before, CentreKeys())
    assert len(sites(after)) == len(attended_keys(before)) > 0
    new = changed(before, after)
    assert len(new) == len(sites(after))
    assert all(name.split(".")[-1].startswith("mean_key") for name in new)
    for name, mean in mean_keys(after).items():
        assert name.startswith("sub")
        assert float(mean.abs().max()) < 1e-5
    assert any(float(mean.abs().max()) > 1e-3 for mean in mean_keys(before).values())
    idempotent(after, CentreKeys())


def test_a_cache_of_before_is_brought_to_the_new_basis():
    after = run(canonical("llama"), CentreKeys())
    assert "caches made by the original no longer fit" in after.history[-1].notes[0]


def test_keys_that_were_turned_are_centred_as_they_are_then():
    turned = Rotate(residual=False, values=False, online=False, keys=True)
    after = run(canonical("llama"), turned, CentreKeys())
    assert len(sites(after)) == 2


def test_a_cache_that_is_quantized_holds_centred_keys():
    after = run(canonical("llama"), CentreKeys())
    held = Manager(Verifier((), mode="off")).run(after, [QuantizeCache("fp8_e4m3")])
    appended = [node.args[2] for node in held.nodes(torch.ops.fxopt.cache_append_token.default)]
    centred = {site.node for site in after.history[-1].sites}
    assert centred <= {node.name for node in appended}
    assert len(centred) == 2


@pytest.mark.parametrize(("model", "why"), [("gemma2", "capped"), ("gptoss", "sink")])
def test_where_a_constant_would_be_seen_nothing_is_done(model, why):
    before = canonical(model)
    after = run(before, CentreKeys())
    assert sites(after) == []
    assert changed(before, after) == set()
    assert why in refusals(after)


def test_padding_does_not_count():
    program = canonical("llama")
    keys = attended_keys(program)[0].new
    assert keys is not None
    (batch, length), heads = program.examples[0][0].shape, 2
    ids = torch.arange(batch * length).reshape(batch, length) + 3
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    inputs = keyword_inputs(program.signature, {"input_ids": ids, "attention_mask": mask})
    sample = Sample(inputs, mask.bool())
    recorder = Recorder(program, [keys], [sample], rows=1000)
    record(program, recorder, [sample])
    rows = recorder.statistics()["rows"][keys.name]
    assert rows.shape == (batch * length - 2, heads * 8)

    seen: list[torch.Tensor] = []
    run_program(program, inputs, lambda node, value: seen.append(value) if node is keys else None)
    assert torch.equal(rows, seen[0].transpose(1, 2).flatten(2)[mask.bool()])
