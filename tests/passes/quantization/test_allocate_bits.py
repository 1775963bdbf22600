"""Bit allocation: budgets are met, what is marked is stored so, and nothing else changes."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fxopt
from fxopt.analysis.execution import run
from fxopt.analysis.output_error import OutputError
from fxopt.errors import CalibrationError, QualityFloorError, RecipeError
from fxopt.ir.program import Program, module_path
from fxopt.ir.stored_codes import is_stored_weight
from fxopt.passes.base import Context
from fxopt.passes.quantization.allocate_bits import AllocateBits
from fxopt.passes.quantization.allocation import Search
from fxopt.passes.quantization.budget import Budget
from fxopt.passes.quantization.gptq import Gptq
from fxopt.passes.quantization.latency_prices import LatencyPrices, _stretched
from fxopt.passes.quantization.linear_groups import linear_groups, stored_bytes
from fxopt.passes.quantization.options import ActivationOptions, Choice, WeightOptions
from fxopt.passes.quantization.quantize import Quantize
from fxopt.passes.quantization.rounding_trials import Trials
from fxopt.passes.quantization.sites import CHOICE
from fxopt.pipeline.recipe import Recipe
from fxopt.pipeline.report import Report
from tests.graphs import signature_of
from tests.models import canonical_program
from tests.passes.quantization.test_quantize import as_sample, bert_batch, manager

aten = torch.ops.aten
INT2 = Choice(WeightOptions("int2"))
INT4 = Choice(WeightOptions("int4"))
INT8 = Choice(WeightOptions("int8"))
FLOAT = Choice()
CHOICES = (INT2, INT4, INT8)


def bert() -> tuple[Program, list]:
    program = canonical_program("bert")
    return program, [as_sample(program, bert_batch(3, 9, seed)) for seed in (0, 1)]


def apply(program: Program, samples, *passes, **options) -> Program:
    options.setdefault("choices", CHOICES)
    return manager(samples).run(program, [AllocateBits(**options), *passes])


def chosen(program: Program) -> list[Choice]:
    linears = program.nodes(aten.linear.default)
    return [node.meta[CHOICE] for node in linears if CHOICE in node.meta]


def frontier(program: Program) -> list[tuple]:
    record = next(record for record in program.history if record.name == "allocate-bits")
    return list(record.tables[0].rows)


def linear_bytes(program: Program) -> int:
    """Bytes of the weights of linears."""
    names: set[str] = set()
    for node in program.nodes(aten.linear.default):
        todo: list[Any] = [node.args[1]]
        while todo:
            source = todo.pop()
            if source.op == "get_attr":
                names.add(str(source.target))
            todo += source.all_input_nodes
    return sum(program.weight(name).nbytes for name in names)


@pytest.mark.parametrize("sensitivity", ["output", "trace", "eigenvalue"])
def test_a_size_is_kept_and_predicted_to_the_byte(sensitivity):
    program, samples = bert()
    after = apply(program, samples, Quantize(), budget=Budget(bits=6), sensitivity=sensitivity)
    groups, _ = linear_groups(program, CHOICES, ("*",), ())
    limit = 6 * sum(group.elements for group in groups) / 8
    (row,) = [row for row in frontier(after) if row[-1] == "chosen"]
    assert linear_bytes(after) == row[0] <= limit
    assert len({str(choice) for choice in chosen(after)}) > 1
    assert all(is_stored_weight(node.args[1]) for node in after.nodes(aten.linear.default))


def test_marking_changes_no_graph_and_a_second_run_does_nothing():
    program, samples = bert()
    after = apply(program, samples, budget=Budget(bits=5))
    assert signature_of(after) == signature_of(program)
    with pytest.warns(UserWarning, match="changed nothing"):
        again = manager(samples).run(after, [AllocateBits(Budget(bits=8), CHOICES)])
    assert chosen(again) == chosen(after)
    assert again.history[-1].sites == ()
    assert "allocated already" in again.history[-1].refusals[0].reason


def test_linears_that_share_an_input_share_a_choice():
    program, samples = bert()
    after = apply(program, samples, budget=Budget(bits=5))
    by_source: dict[Any, set[str]] = {}
    for node in after.nodes(aten.linear.default):
        by_source.setdefault(node.args[0], set()).add(str(node.meta[CHOICE]))
    assert all(len(found) == 1 for found in by_source.values())
    assert max(len(node.users) for node in by_source) > 1


@pytest.mark.parametrize("limit", [8.0, 14.0, 25.0])
def test_an_accuracy_is_met_by_the_stored_program_and_stricter_costs_more(limit):
    program, samples = bert()
    after = apply(program, samples, Quantize(), budget=Budget(sqnr_db=limit))
    error = OutputError.of(program, samples[:1], [run(program, samples[0].inputs)])
    measured = error.sqnr_db([run(after, samples[0].inputs)])
    (row,) = [row for row in frontier(after) if row[-1] == "chosen"]
    assert measured >= limit
    assert measured == pytest.approx(row[3], abs=0.05)
    looser = apply(program, samples, budget=Budget(sqnr_db=limit - 4))
    (cheaper,) = [row for row in frontier(looser) if row[-1] == "chosen"]
    assert cheaper[0] <= row[0]


def decoder(name: str = "llama") -> tuple[Program, list]:
    from fxopt.analysis.samples import Sample

    program = canonical_program(name)
    return program, [Sample(inputs, None) for inputs in program.examples[:2]]


@pytest.mark.parametrize(("budget", "value"), [("perplexity", "0.5 %"), ("kl", 1e-4)])
def test_a_decoder_is_judged_by_its_logits(budget, value):
    program, samples = decoder()
    after = apply(program, samples, budget=Budget(**{budget: value}), choices=(INT2, INT8, FLOAT))
    (row,) = [row for row in frontier(after) if row[-1] == "chosen"]
    assert row[3] <= (0.005 if budget == "perplexity" else 1e-4)


def test_gptq_stores_what_was_chosen_and_activations_follow():
    program, samples = bert()
    rounded = Choice(WeightOptions("int8"), ActivationOptions())
    after = apply(
        program, samples, Gptq(), Quantize(weights=None, activations=ActivationOptions()),
        choices=(INT4, rounded), budget=Budget(bits=7),
    )  # fmt: skip
    quantized = {node.name for node in after.nodes(torch.ops.fxopt.dequantize.default)}
    for node in after.nodes(aten.linear.default):
        expected = node.meta[CHOICE] == rounded
        assert (node.args[0].name in quantized) == expected
    assert "int4 weight per channel" in str(after.history[-2].sites)


def test_floating_point_is_a_choice_that_is_left_alone():
    program, samples = bert()
    after = apply(program, samples, Quantize(), choices=(INT2, FLOAT), budget=Budget(sqnr_db=20))
    kept = [n for n in after.nodes(aten.linear.default) if n.meta[CHOICE] == FLOAT]
    assert kept
    assert all(node.args[1].op == "get_attr" for node in kept)
    reasons = {refusal.reason for refusal in after.history[-1].refusals}
    assert "allocate-bits leaves it in floating point" in reasons


def test_what_cannot_be_met_is_said_with_the_nearest_figure():
    program, samples = bert()
    with pytest.raises(RecipeError, match="even the cheapest choices take"):
        apply(program, samples, budget=Budget(bits=1))
    with pytest.raises(QualityFloorError, match="not met by any of the choices"):
        apply(program, samples, budget=Budget(sqnr_db=90))
    with pytest.raises(CalibrationError, match="perplexity needs logits"):
        apply(program, samples, budget=Budget(perplexity=0.01))
    with pytest.raises(RecipeError, match="nothing here can time"):
        apply(program, samples, budget=Budget(milliseconds=1.0))


def test_a_tied_table_is_refused_and_sizes_that_do_not_fit_are_named():
    program, samples = decoder("gemma3")
    after = apply(program, samples, budget=Budget(bits=6))
    told = {r.site: r.reason for r in after.history[-1].refusals}
    assert "also read by aten.embedding" in told["lm_head"]
    odd = Choice(WeightOptions("int4", "group", 7))
    with pytest.warns(UserWarning, match="changed nothing"):
        refused = manager(samples).run(
            program, [AllocateBits(Budget(bits=6), (odd, INT8), include=("*up_proj",))]
        )
    assert "group size 7 does not divide" in str(refused.history[-1].refusals)


@pytest.mark.parametrize("dtype", ["int8", "int4", "int3", "int2", "nf4", "fp8_e4m3"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_bytes_are_those_that_storing_takes(dtype, symmetric):
    if not (symmetric or dtype.startswith("int")):
        return
    program, _ = bert()
    for granularity in ({"granularity": "channel"}, {"granularity": "group", "group_size": 8}):
        options = WeightOptions(dtype, symmetric=symmetric, **granularity)
        node = program.nodes(aten.linear.default)[0]
        path = (node.meta["module_path"],)
        after = manager().run(program, [Quantize(weights=options, include=path)])
        name = str(node.args[1].target)
        taken = sum(
            value.nbytes
            for other, value in after.weights().items()
            if other.startswith(f"{name}_{options.format.name}")
        )
        assert taken == stored_bytes(tuple(program.weight(name).shape), options)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({}, "found nothing"),
        ({"bits": 4, "kl": 0.1}, "found bits and kl"),
        ({"bits": -1}, "not a positive number"),
        ({"perplexity": "little"}, "neither a number nor a percentage"),
        ({"milliseconds": 3.0, "shape": [0, 1]}, "both positive"),
    ],
)
def test_wrong_budgets_are_refused_before_any_work(budget, message):
    entries = ["canonicalize", {"allocate-bits": {"budget": budget}}, "quantize"]
    with pytest.raises(RecipeError, match=message):
        Recipe.resolve(entries)


def test_nothing_after_it_or_one_choice_is_refused():
    with pytest.raises(RecipeError, match="no effect by itself; put quantize or gptq"):
        Recipe.resolve(["canonicalize", {"allocate-bits": {"budget": {"bits": 5}}}])
    with pytest.raises(RecipeError, match="at least two different"):
        AllocateBits(Budget(bits=5), (INT4, INT4))
    with pytest.raises(RecipeError, match="needs calibration|need calibration"):
        Choice(activations=ActivationOptions(granularity="tensor"))


def test_a_time_is_predicted_and_measured_and_the_report_draws_the_frontier(tmp_path):
    class Wide(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = torch.nn.Linear(64, 256), torch.nn.Linear(256, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(torch.relu(self.up(x)))

    torch.manual_seed(0)
    data = [(torch.randn(4, 6, 64),) for _ in range(2)]
    made = fxopt.optimize(
        Wide().eval(),
        [
            "canonicalize",
            {
                "allocate-bits": {
                    "budget": {"milliseconds": 1e6, "shape": [4, 6]},
                    "choices": [{"weights": {"dtype": "int4"}}, {"weights": {"dtype": "int8"}}],
                }
            },
            "quantize",
        ],
        example_inputs=data[0],
        calibration=data,
        progress=False,
    )
    record = next(r for r in made.report.history if r.name == "allocate-bits")
    assert "ms predicted" in record.notes[0]
    assert "frontier" in made.report.to_markdown()
    made.report.to_html(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "frontier" in page
    assert "<circle" in page
    # Time does not matter here, so error decides.
    assert {site.detail.partition(":")[0] for site in record.sites} == {"int8 weight per channel"}
    again = Report.from_dict(made.report.to_dict())
    assert again.to_markdown() == made.report.to_markdown()


@settings(max_examples=50, deadline=None)
@given(
    gains=st.lists(st.floats(-1, 1), min_size=1, max_size=6),
    whole=st.floats(-1, 1),
)
def test_differences_are_stretched_to_what_they_give_together(gains, whole):
    found = _stretched(np.array(gains), whole)
    assert float(found.sum()) == pytest.approx(whole, abs=1e-9)


def test_uniform_assignments_are_priced_at_what_they_take():
    """A program's time is counted here: 8 for each linear in int8, 2 for all of them together."""
    program, _ = bert()
    groups, _ = linear_groups(program, (INT8, FLOAT), ("*",), ())

    def lowered_call(twin: Program, shape: tuple[int, int]):
        rounded = sum(is_stored_weight(n.args[1]) for n in twin.nodes(aten.linear.default))
        busy = 8 * rounded + 2 * (rounded == len(program.nodes(aten.linear.default)))
        return lambda: (shape, busy)

    context = Context(lowered_call=lowered_call)
    timed = LatencyPrices(program, groups, (FLOAT, INT8), (1, 4), context)
    timed._ratio = lambda chosen, told: 1 + timed._call(chosen, told)()[1] / 100
    timed.fastest_base = 1.0
    price = timed.matrix()
    everything = 1 + (8 * len(program.nodes(aten.linear.default)) + 2) / 100
    assert float(price[:, 1].sum()) == pytest.approx(everything)
    assert float(price[:, 0].sum()) == pytest.approx(1.0)


class Clock:
    """Stands for prices of time: a call takes `slower` times what is predicted of it."""

    def __init__(self, slower: float) -> None:
        self.slower = slower

    def held_to(self, limit: float, search: Search):
        timed = object.__new__(LatencyPrices)
        timed.shape = (1, 4)
        timed._measured = lambda assignment: self.slower * assignment.price
        return timed.held_to(limit, search, search.best(limit))


def search_of_times() -> Search:
    """Eight groups of two choices: 1 ms each and a loss, or 2 ms and none."""
    program, samples = bert()
    groups, _ = linear_groups(program, (INT2, INT8), ("*",), ())
    price = np.tile([1.0, 2.0], (len(groups), 1))
    loss = np.stack([np.arange(1.0, len(groups) + 1), np.zeros(len(groups))], 1)
    trials = Trials(program, samples, groups, (INT2, INT8))
    return Search(loss, price, trials, Budget(milliseconds=1.0), lambda _: None)


@pytest.mark.parametrize("slower", [0.8, 1.0, 1.1, 1.3])
def test_a_time_budget_is_met_by_what_is_measured(slower):
    search = search_of_times()
    limit = 1.75 * len(search.price)
    found, note = Clock(slower).held_to(limit, search)
    assert slower * found.price <= limit
    # And no more was given up than it takes: one more group in int8 would not fit, or all are.
    predicted = limit / max(slower, 1.0)
    assert found.price == math.floor(predicted)
    assert "over the budget" not in note


def test_a_time_budget_that_nothing_meets_is_said_to_be_missed():
    search = search_of_times()
    limit = 1.2 * len(search.price)
    found, note = Clock(1.5).held_to(limit, search)
    assert "over the budget" in note
    assert f"{1.5 * found.price:.4g} ms measured" in note


@pytest.mark.parametrize("slower", [0.5, 3.0])
@pytest.mark.parametrize(
    ("name", "budget"), [("bert", {"sqnr_db": 25.0}), ("llama", {"kl": 1e-4})], ids=str
)
def test_the_least_time_within_an_accuracy_is_held_to_the_accuracy_alone(
    name, budget, slower, monkeypatch
):
    """Whatever was measured of it: dB and nats are no milliseconds."""
    program, samples = bert() if name == "bert" else decoder()
    monkeypatch.setattr(LatencyPrices, "_call", lambda self, chosen, told: lambda: chosen)
    monkeypatch.setattr(LatencyPrices, "_measured", lambda self, found: slower * found.price)

    def ratio(self, chosen, told):
        self.fastest_base = 20.0
        return sum(1 + choice for choice in chosen) / len(chosen)

    monkeypatch.setattr(LatencyPrices, "_ratio", ratio)
    context = Context(samples=samples, lowered_call=lambda program, shape: lambda: None)
    limit = Budget(**budget, spend="milliseconds")
    result = AllocateBits(budget=limit, choices=(INT2, INT8, FLOAT)).run(program.clone(), context)
    (row,) = [row for row in result.tables[0].rows if row[-1] == "chosen"]
    assert row[3] >= 25 if name == "bert" else row[3] <= 1e-4
    assert "over the budget" not in result.notes[0]
    assert f"{slower * row[0]:.4g} ms measured" in result.notes[0]


def test_gptq_rounds_the_activations_that_were_chosen():
    program, samples = bert()
    rounded = Choice(WeightOptions("int8"), ActivationOptions())
    after = apply(program, samples, Gptq(), choices=(INT4, rounded), budget=Budget(bits=7))
    told = {site.path: site.detail for site in after.history[-1].sites}
    assert rounded in chosen(after)
    assert INT4 in chosen(after)
    for node in after.nodes(aten.linear.default):
        is_rounded = node.meta[CHOICE] == rounded
        assert (node.args[0].target is torch.ops.fxopt.dequantize.default) == is_rounded
        assert told[module_path(node)].endswith(", int8 activation per token") == is_rounded
    with pytest.warns(UserWarning, match="its input is already rounded"):
        again = manager(samples).run(after, [Quantize(None, ActivationOptions())])
    assert signature_of(again) == signature_of(after)


def test_what_a_pass_without_weights_leaves_of_a_choice_is_said():
    program, samples = bert()
    rounded = Choice(WeightOptions("int8"), ActivationOptions())
    activations = Quantize(weights=None, activations=ActivationOptions())
    after = apply(program, samples, activations, choices=(INT4, rounded), budget=Budget(bits=7))
    record = after.history[-1]
    assert {site.detail for site in record.sites} == {
        "int8 weight per channel left to a pass behind, int8 activation per token"
    }
    assert {refusal.reason for refusal in record.refusals} == {
        "allocate-bits chose int4 weight per channel, and weights are null here"
    }
    stored = manager(samples).run(after, [Gptq()])
    with pytest.warns(UserWarning, match="allocate-bits leaves its activations in floating point"):
        manager(samples).run(stored, [activations])
