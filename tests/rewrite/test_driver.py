import pytest
import torch

from fxopt.errors import PassError
from fxopt.rewrite.driver import apply_rules
from fxopt.rewrite.rule import Rule
from tests.graphs import run, signature_of
from tests.rewrite.programs import aten, program_of

X = torch.randn(3, 4)


class DoubleNegation(Rule):
    """`-(-x)` becomes `x`."""

    def pattern(self, op, x):
        return op.neg(op.neg(x))

    def rewrite(self, build, match):
        return match.x


class SquareAsPower(Rule):
    """`x * x` becomes `x ** 2`."""

    detail = "square"

    def pattern(self, op, x):
        return op.mul(x, x)

    def rewrite(self, build, match):
        return build.call(aten.pow.Tensor_Scalar, match.x, 2)


class PowerOfNegation(Rule):
    """`(-x) ** 2` becomes `x ** 2`."""

    def pattern(self, op, x):
        return op.pow(op.neg(x), 2)

    def rewrite(self, build, match):
        return build.call(aten.pow.Tensor_Scalar, match.x, 2)


class RefuseSquares(Rule):
    """Never rewrites."""

    benefit = 1

    def pattern(self, op, x):
        return op.mul(x, x)

    def check(self, program, match):
        return "squares are kept"

    def rewrite(self, build, match):
        raise AssertionError("must not be called")


def chain(count: int):
    def build(b, x):
        for _ in range(count):
            x = b.call(aten.neg.default, x)
        return x

    return program_of(build, X)


@pytest.mark.parametrize("count", range(7))
def test_matches_back_to_back(count: int):
    program = chain(count)
    expected = run(program, [X])[0]
    sites, refusals = apply_rules(program, [DoubleNegation()], "test")
    assert (len(sites), refusals) == (count // 2, [])
    assert len(program.nodes()) == count % 2
    torch.testing.assert_close(run(program, [X])[0], expected)


def test_a_replacement_is_matched_again():
    def build(b, x):
        negative = b.call(aten.neg.default, x)
        return b.call(aten.mul.Tensor, negative, negative)

    program = program_of(build, X)
    sites, _ = apply_rules(program, [SquareAsPower(), PowerOfNegation()], "test")
    assert [site.detail for site in sites] == ["square", "PowerOfNegation"]
    assert [node.target for node in program.nodes()] == [aten.pow.Tensor_Scalar]
    torch.testing.assert_close(run(program, [X])[0], X**2)


def test_shared_operands_stay_for_their_other_readers():
    def build(b, x):
        inner = b.call(aten.neg.default, x)
        return [b.call(aten.neg.default, inner), inner]

    program = program_of(build, X)
    assert len(apply_rules(program, [DoubleNegation()], "test")[0]) == 1
    assert len(program.nodes()) == 1
    restored, negative = run(program, [X])
    assert torch.equal(restored, X)
    assert torch.equal(negative, -X)


def test_provenance_says_which_rule_and_which_node():
    program = program_of(lambda b, x: b.call(aten.mul.Tensor, x, x), X)
    original = program.nodes()[0]
    original.meta["module_path"] = "model.layers.3.mlp"
    [site], _ = apply_rules(program, [SquareAsPower()], "canonicalize")
    [node] = program.nodes()
    assert node.meta["from_node"][-1] == {
        "node": original.name,
        "pass": "canonicalize/SquareAsPower",
    }
    assert node.meta["module_path"] == site.path == "model.layers.3.mlp"
    assert (site.detail, site.node) == ("square", original.name)
    assert tuple(node.meta["val"].shape) == (3, 4)
    assert node.name == "pow_1"


def test_a_refusal_changes_nothing_and_is_reported_once():
    program = program_of(lambda b, x: b.call(aten.mul.Tensor, x, x), X)
    before = signature_of(program)
    sites, refusals = apply_rules(program, [RefuseSquares()], "test")
    assert sites == []
    assert [refusal.reason for refusal in refusals] == ["squares are kept"]
    assert signature_of(program) == before


def test_a_refusing_rule_leaves_the_place_to_the_next():
    program = program_of(lambda b, x: b.call(aten.mul.Tensor, x, x), X)
    sites, refusals = apply_rules(program, [SquareAsPower(), RefuseSquares()], "test")
    assert [site.detail for site in sites] == ["square"]
    assert refusals == []  # the refused node is gone


def test_a_condition_is_silent_and_tries_the_other_operand_order():
    class DropSecond(Rule):
        def pattern(self, op, x, y):
            return op.add(x, y)

        def condition(self, program, match):
            return match.y.name == "x0"

        def rewrite(self, build, match):
            return build.call(aten.neg.default, match.y)

    program = program_of(lambda b, x, y: b.call(aten.add.Tensor, x, y), X, X)
    sites, refusals = apply_rules(program, [DropSecond()], "test")
    assert (len(sites), refusals) == (1, [])


def test_rules_that_never_end_are_an_error():
    class Grow(Rule):
        def pattern(self, op, x):
            return op.neg(x)

        def rewrite(self, build, match):
            return build.call(aten.neg.default, build.call(aten.abs.default, match.x))

    with pytest.raises(PassError, match="kept rewriting"):
        apply_rules(chain(1), [Grow()], "test")


@pytest.mark.parametrize(
    "change",
    [
        lambda build, x: build.call(aten.to.dtype, x, torch.float64),
        lambda build, x: build.call(aten.slice.Tensor, x, 0, 1),
    ],
    ids=["dtype", "shape"],
)
def test_a_replacement_of_another_type_is_an_error(change):
    class Change(Rule):
        def pattern(self, op, x):
            return op.neg(x)

        def rewrite(self, build, match):
            return change(build, match.x)

    with pytest.raises(PassError, match="bug of the rule"):
        apply_rules(chain(1), [Change()], "test")


def test_a_replacement_that_reads_its_root_is_an_error():
    class Wrap(Rule):
        def pattern(self, op, x):
            return op.neg(x)

        def rewrite(self, build, match):
            return build.call(aten.abs.default, match.root)

    with pytest.raises(PassError, match="which they replace"):
        apply_rules(chain(1), [Wrap()], "test")


def test_higher_benefit_goes_first():
    class Eager(SquareAsPower):
        benefit = 5
        detail = "eager"

    program = program_of(lambda b, x: b.call(aten.mul.Tensor, x, x), X)
    sites, _ = apply_rules(program, [SquareAsPower(), Eager()], "test")
    assert [site.detail for site in sites] == ["eager"]


def test_what_a_rule_built_and_did_not_use_is_erased():
    class Wasteful(SquareAsPower):
        def rewrite(self, build, match):
            build.call(aten.sin.default, match.x)
            return super().rewrite(build, match)

    program = program_of(lambda b, x: b.call(aten.mul.Tensor, x, x), X)
    apply_rules(program, [Wasteful()], "test")
    assert [node.target for node in program.nodes()] == [aten.pow.Tensor_Scalar]
