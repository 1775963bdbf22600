"""Experts of a mixture: each is rounded as a linear of its own would be."""

import re

import pytest
import torch
from torch import Tensor, nn

from fxopt.analysis.execution import run as run_program
from fxopt.analysis.samples import Sample
from fxopt.ir.operators.moe import expert_hidden
from fxopt.ir.program import Program, module_path
from fxopt.ir.stored_codes import is_stored_weight, stored_values
from fxopt.passes.quantization.allocate_bits import AllocateBits
from fxopt.passes.quantization.budget import Budget
from fxopt.passes.quantization.compensation import compensated, hessian
from fxopt.passes.quantization.gobo import Gobo
from fxopt.passes.quantization.gptq import Gptq
from fxopt.passes.quantization.grid import choose_grid
from fxopt.passes.quantization.llm_int8 import LlmInt8
from fxopt.passes.quantization.options import Choice, WeightOptions
from fxopt.passes.quantization.quantize import Quantize
from fxopt.pipeline.data import keyword_inputs
from fxopt.pipeline.manager import Manager
from fxopt.pipeline.verify import Verifier
from fxopt.runtime.folder import read_folder
from tests.graphs import signature_of
from tests.lowering.test_lower import UNTIMED, check, lower
from tests.models import canonical_program, optimize_zoo
from tests.passes.quantization.test_gptq import samples_of
from tests.passes.quantization.test_quantize import TOKEN, captured, refusals
from tests.tiny import save

ops = torch.ops.fxopt
MODELS = ["mixtral", "qwen3moe", "granitemoe"]
GROUPS = {"granularity": "group", "group_size": 8}
FORMATS = {
    "int8": WeightOptions(),
    "int8 tensor": WeightOptions(granularity="tensor"),
    "int4 asymmetric": WeightOptions("int4", symmetric=False, **GROUPS),
    "int3 mse": WeightOptions("int3", range="mse", **GROUPS),
    "int2 rows": WeightOptions("int2", "block", block_size=(4, -1)),
    "nf4": WeightOptions("nf4", **GROUPS),
    "fp8": WeightOptions("fp8_e4m3"),
}


def applied(program: Program, *passes, count: int = 8) -> Program:
    samples = samples_of(program, count)
    return Manager(Verifier((), mode="off"), samples=lambda: samples).run(program, passes)


def weights(program: Program) -> dict[tuple[str, int], Tensor]:
    """The values of both stacks of each mixture."""
    return {
        (module_path(node), index): stored_values(program, node.args[index])
        for node in program.nodes(ops.moe.default)
        for index in (3, 4)
    }


def sites(program: Program) -> dict[str, str]:
    found = program.history[-1].sites
    return {site.path: site.detail for site in found if site.path.endswith("experts")}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("chosen", FORMATS)
def test_each_expert_is_rounded_by_itself(model, chosen):
    before = canonical_program(model)
    after = applied(before, Quantize(FORMATS[chosen]))
    exact, rounded = weights(before), weights(after)
    assert exact
    assert exact.keys() == rounded.keys()
    for place, stack in exact.items():
        for expert, mine in zip(stack, rounded[place], strict=True):
            grid = choose_grid(expert, FORMATS[chosen])
            assert torch.equal(mine, grid.round(expert)), place
    for node in after.nodes(ops.moe.default):
        assert all(is_stored_weight(node.args[index]) for index in (3, 4))
    assert set(sites(after)) == {path for path, _ in exact}
    assert "of each expert" in next(iter(sites(after).values()))
    again = applied(after, Quantize(FORMATS[chosen]))
    assert signature_of(again) == signature_of(after)


def test_codes_of_experts_take_their_bits():
    before = canonical_program("mixtral")
    after = applied(before, Quantize(WeightOptions("int4"), include=("*.experts",)))
    numbers = sum(value.numel() for value in weights(before).values())
    scales = sum(value[..., 0].numel() for value in weights(before).values())
    assert before.byte_count() - after.byte_count() == 4 * numbers - numbers // 2 - 4 * scales


def test_experts_are_selected_by_path():
    before = canonical_program("mixtral")
    after = applied(before, Quantize(exclude=("*.layers.0.mlp.experts",)))
    assert refusals(after)["model.layers.0.mlp.experts"].startswith("excluded by")
    assert list(sites(after)) == ["model.layers.1.mlp.experts"]


def test_what_does_not_divide_is_left_alone():
    before = canonical_program("mixtral")
    after = applied(before, Quantize(WeightOptions("int4", "group", 64)))
    assert sites(after) == {}
    assert "64 does not divide its 32 inputs" in refusals(after)["model.layers.0.mlp.experts"]


def test_the_report_says_that_activations_stay():
    before = canonical_program("mixtral")
    after = applied(before, Quantize(activations=TOKEN))
    assert set(sites(after).values()) == {
        "int8 weight per channel of each expert, activations in floating point"
    }
    rounded = applied(before, Quantize(None, activations=TOKEN))
    reason = "weights are null, and activations of experts are not rounded"
    assert refusals(rounded)["model.layers.0.mlp.experts"] == reason


@pytest.mark.parametrize(
    ("a_pass", "reason"),
    [
        (Gobo(bits=3), "gobo learns tables for linears and embeddings"),
        (LlmInt8(outliers="dynamic"), "llm-int8 splits the columns of linears"),
        (Quantize(exclude=("*.experts",)), "excluded by '*.experts'"),
    ],
)
def test_what_stays_is_said_once(a_pass, reason):
    found = refusals(applied(canonical_program("mixtral"), a_pass))
    assert [site for site in found if "experts" in site] == [
        f"model.layers.{layer}.mlp.experts" for layer in range(2)
    ]
    assert found["model.layers.1.mlp.experts"].endswith(reason)


CHOICES = (Choice(WeightOptions("int4", "channel")), Choice(WeightOptions("int8")))


def test_a_budget_does_not_count_experts_and_leaves_them():
    allocate = AllocateBits(choices=CHOICES, budget=Budget(bits=6.0))
    after = applied(canonical_program("mixtral"), allocate, Quantize())
    assert sites(after) == {}
    path = "model.layers.0.mlp.experts"
    assert refusals(after)[path] == "allocate-bits leaves it in floating point"
    said = {refusal.site: refusal.reason for refusal in after.history[-2].refusals}
    assert "not part of the budget" in said[path]


def test_experts_that_a_budget_excludes_are_stored_by_the_pass_behind_it():
    allocate = AllocateBits(choices=CHOICES, budget=Budget(bits=6.0), exclude=("*.experts",))
    after = applied(canonical_program("mixtral"), allocate, Quantize())
    assert set(sites(after).values()) == {"int8 weight per channel of each expert"}


def test_groups_per_head_are_rows_of_experts_as_of_other_linears():
    options = WeightOptions("int4", "head", groups_per_head=2)
    after = applied(canonical_program("mixtral"), Quantize(options))
    assert set(sites(after).values()) == {"int4 weight per group of 4 rows of each expert"}


# --- mixtures of all kinds ------------------------------------------------------------------


class Mixture(nn.Module):
    """A mixture between an embedding and a head; its weights are stored in several ways."""

    def __init__(self, gated=True, transposed=False, computed_bias=False, layers=1):
        super().__init__()
        torch.manual_seed(0)
        rows = 32 if gated else 16
        self.gated, self.transposed = gated, transposed
        self.computed_bias, self.layers = computed_bias, layers
        self.embed, self.head = nn.Embedding(50, 16), nn.Linear(16, 50)
        self.router = nn.Linear(16, 4)
        up = (4, 16, rows) if transposed else (4, rows, 16)
        for name, shape in (("up", up), ("down", (4, 16, 16))):
            self.register_parameter(name, nn.Parameter(0.3 * torch.randn(shape)))
        for name, shape in (("up_bias", (4, rows)), ("down_bias", (4, 16))):
            self.register_parameter(name, nn.Parameter(0.3 * torch.randn(shape)))

    def forward(self, input_ids):
        x = self.embed(input_ids).flatten(0, 1)
        for _ in range(self.layers):  # of one set of weights
            weight, index = torch.topk(self.router(x).softmax(-1), 2)
            up = self.up.transpose(1, 2) if self.transposed else self.up
            bias = 2 * self.up_bias if self.computed_bias else self.up_bias
            rest = (bias, self.down_bias, "silu", self.gated)
            x = x + ops.moe(x, index, weight, up, self.down, *rest)
        return {"logits": self.head(x).unflatten(0, input_ids.shape)}


def mixture(dtype=torch.float32, **options) -> tuple[Program, list[Sample]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 50, (8, 2, 9), generator=generator)
    program = captured(Mixture(**options).to(dtype), ids[0])
    return program, [Sample([row]) for row in ids]


KINDS = {
    "gated": {},
    "not gated": {"gated": False},
    "computed bias": {"computed_bias": True},
    "tied": {"layers": 2},
    "bfloat16": {"dtype": torch.bfloat16},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"match_original": False}, {"true_sequential": False}])
def test_gptq_takes_mixtures_of_all_kinds(kind, options):
    program, samples = mixture(**KINDS[kind])
    settings = Gptq(WeightOptions("int3"), **options)
    after = Manager(Verifier((), mode="off"), samples=lambda: samples).run(program, [settings])
    mixtures = after.nodes(ops.moe.default)
    assert all(is_stored_weight(node.args[index]) for node in mixtures for index in (3, 4))
    check(after, lower(after, UNTIMED))
    details = [site.detail for site in after.history[-1].sites if site.node.startswith("moe")]
    share = re.search(r"of each expert, mean output error (0\.\d+)x", details[0])
    assert share is not None
    assert float(share[1]) < 0.95
    assert details[1:] == [
        "int3 weight per channel, tied to one before it and rounded for the tokens of that one"
    ] * (kind == "tied")


def test_transposed_experts_are_refused():
    program, samples = mixture(transposed=True)
    for a_pass in (Quantize(), Gptq(WeightOptions())):
        after = Manager(Verifier((), mode="off"), samples=lambda: samples).run(program, [a_pass])
        assert "the weight is computed in the graph, not stored" in refusals(after).values()


def test_what_the_hidden_layer_of_an_expert_reads_makes_up_for_the_first():
    """Rounded beside the original, the outputs of a mixture come nearer to the original's."""
    program, samples = mixture()
    (node,) = program.nodes(ops.moe.default)
    errors = []
    for match in (True, False):
        exclude = ("head", "router")
        settings = Gptq(WeightOptions("int2"), exclude=exclude, match_original=match)
        after = Manager(Verifier((), mode="off"), samples=lambda: samples).run(program, [settings])
        outputs: list[Tensor] = []
        for one in (program, after):
            for sample in samples:

                def watch(at, value, outputs=outputs):
                    if at.name == node.name:
                        outputs.append(value)

                run_program(one, sample.inputs, watch)
        half = len(samples)
        errors.append(float((torch.cat(outputs[:half]) - torch.cat(outputs[half:])).norm()))
    assert errors[0] < errors[1]


def test_what_gptq_had_to_do_with_experts_is_said():
    program, samples = mixture()
    settings = Gptq(WeightOptions("int4"), damping=1e-8, bias_correction=True)
    after = Manager(Verifier((), mode="off"), samples=lambda: samples[:1]).run(program, [settings])
    (detail,) = [site.detail for site in after.history[-1].sites if "each expert" in site.detail]
    assert detail.endswith("biases as they were")
    notes = [note for note in after.history[-1].notes if "needed damping of up to" in note]
    assert any("expert" in note for note in notes)


# --- GPTQ -----------------------------------------------------------------------------------


def routed(program: Program, samples) -> dict[str, tuple[Tensor, Tensor]]:
    """What each mixture reads, and which experts each row is sent to."""
    found: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for sample in samples:
        values: dict[str, Tensor] = {}

        def watch(node, value, values=values):
            values[node.name] = value

        run_program(program, sample.inputs, watch)
        for node in program.nodes(ops.moe.default):
            x, index = (values[source.name] for source in node.args[:2])
            real = slice(None) if sample.tokens is None else sample.tokens.flatten()
            found.setdefault(module_path(node), []).append((x[real], index[real]))
    return {
        path: (torch.cat([x for x, _ in parts]), torch.cat([i for _, i in parts]))
        for path, parts in found.items()
    }


@pytest.mark.parametrize("model", ["mixtral", "granitemoe"])
@pytest.mark.parametrize("sequential", [True, False])
def test_gptq_of_an_expert_is_that_of_its_linears_on_its_tokens(model, sequential):
    options = WeightOptions("int4", **GROUPS)
    program = canonical_program(model)
    settings = Gptq(
        options, include=("*layers.0.*experts",), true_sequential=sequential, match_original=False
    )
    after = applied(program, settings)
    (path,) = sites(after)
    x, index = routed(program, samples_of(program, 8))[path]
    (node,) = (n for n in program.nodes(ops.moe.default) if module_path(n) == path)
    exact, rounded = weights(program), weights(after)
    shares = []
    for expert in range(len(exact[path, 3])):
        rows = x[(index == expert).any(1)]
        assert len(rows)
        up, down = exact[path, 3][expert], exact[path, 4][expert]
        first = compensated(up, options, hessian([rows], 0.01, True), 128, True)
        assert torch.allclose(rounded[path, 3][expert], first.values, atol=1e-6)
        read = first.values if sequential else up
        hidden = expert_hidden(rows @ read.T, str(node.args[7]), bool(node.args[8]))
        second = compensated(down, options, hessian([hidden], 0.01, True), 128, True)
        same = torch.isclose(rounded[path, 4][expert], second.values, atol=1e-6)
        assert float(same.float().mean()) > 0.99  # sums in another order may cross a tie
        shares += [first.share, second.share]
    mean = sum(shares) / len(shares)
    assert sites(after)[path].endswith(f"mean output error {mean:.2f}x of rounding to nearest")


def test_gptq_of_experts_errs_less_than_rounding_to_nearest():
    program = canonical_program("mixtral")
    samples = samples_of(program, 8)
    options = WeightOptions("int3", **GROUPS)

    def distance(after: Program) -> float:
        pairs = [
            (run_program(program, s.inputs)[0], run_program(after, s.inputs)[0]) for s in samples
        ]
        return float(sum((a - b).square().sum() for a, b in pairs))

    nearest = distance(applied(program, Quantize(options)))
    assert distance(applied(program, Gptq(options))) < 0.8 * nearest


def test_experts_without_tokens_are_rounded_to_nearest_and_named():
    program = canonical_program("mixtral")
    ids = torch.tensor([[7, 7]])
    entry = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    samples = [Sample(keyword_inputs(program.signature, entry))]
    options = WeightOptions("int4", **GROUPS)
    after = Manager(Verifier((), mode="off"), samples=lambda: samples).run(program, [Gptq(options)])
    path = "model.layers.0.mlp.experts"
    unreached = sorted({0, 1, 2, 3} - set(routed(program, samples)[path][1].flatten().tolist()))
    assert unreached
    exact, rounded = weights(program), weights(after)
    for number in unreached:
        for index in (3, 4):
            expert = exact[path, index][number]
            nearest = choose_grid(expert, options).round(expert)
            assert torch.equal(rounded[path, index][number], nearest)
    numbers = ", ".join(map(str, unreached))
    assert any(
        note.startswith(f"{path}: no token of the calibration data was sent to expert")
        and f" {numbers};" in note
        for note in after.history[-1].notes
    )


def test_experts_with_few_tokens_are_named():
    program = canonical_program("mixtral")
    after = applied(program, Gptq(WeightOptions("int4")), count=1)
    assert any("had fewer tokens than inputs" in note for note in after.history[-1].notes)


@pytest.mark.parametrize("method", ["quantize", "gptq"])
def test_a_mixture_is_optimized_saved_and_generates(method, tmp_path):
    weight = {"dtype": "int4", "granularity": "group", "group_size": 8}
    ids = torch.arange(3, 11)[None]
    recipe = ["canonicalize", {method: {"weights": weight}}]
    optimized = optimize_zoo("mixtral", recipe, calibration=[{"input_ids": ids}] * 2)
    assert optimized.generate(input_ids=ids, max_new_tokens=4).shape == (1, 12)
    save(tmp_path / "model", optimized.program)
    again = weights(read_folder(tmp_path / "model").program)
    for place, value in weights(optimized.program).items():
        assert torch.equal(value, again[place]), place


def test_tables_of_linears_and_of_experts_are_saved_apart(tmp_path):
    """Of unlike shapes, they hold the same numbers."""
    program = applied(canonical_program("mixtral"), Quantize(FORMATS["nf4"]))
    tables = [name for name in program.weights() if "nf4_table" in name]
    assert len(tables) == 2
    save(tmp_path / "m", program)
    back = read_folder(tmp_path / "m").program
    assert all(torch.equal(back.weight(name), program.weight(name)) for name in tables)
    found, wanted = (run_program(p, program.examples[0]) for p in (back, program))
    assert all(map(torch.equal, found, wanted))
