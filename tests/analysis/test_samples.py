"""Which rows of activations are real: an encoder's tokens and a decoder's are told apart."""

import pytest
import torch
import transformers as hf
from torch import nn

import fxopt
from fxopt.analysis.calibration import collect, linear_inputs
from fxopt.analysis.execution import run
from fxopt.analysis.lockstep import Lockstep
from fxopt.analysis.output_error import OutputError
from fxopt.analysis.samples import RealTokens, Sample
from fxopt.errors import CalibrationError
from fxopt.ir.program import Program, module_path
from fxopt.pipeline.data import calibration_samples
from tests.models import canonical_program

aten = torch.ops.aten


def batch(length: int, decoder_length: int) -> dict[str, torch.Tensor]:
    """Two rows; the encoder's second is half padding, the decoder's first is."""
    generator = torch.Generator().manual_seed(length)
    tokens = torch.ones(2, length, dtype=torch.long)
    decoder_tokens = torch.ones(2, decoder_length, dtype=torch.long)
    tokens[1, length // 2 :] = 0
    decoder_tokens[0, decoder_length // 2 :] = 0
    return {
        "input_ids": torch.randint(3, 90, (2, length), generator=generator),
        "attention_mask": tokens,
        "decoder_input_ids": torch.randint(3, 90, (2, decoder_length), generator=generator),
        "decoder_attention_mask": decoder_tokens,
    }


def one_sample(program: Program, entry: dict[str, torch.Tensor]) -> Sample:
    (sample,) = calibration_samples(program.signature, [entry], None, 1, 64, 1)
    return sample


def linears(program: Program, side: str) -> list[torch.fx.Node]:
    """The linears of the encoder, or those of the decoder that do not read the encoder."""
    found = program.nodes(aten.linear.default)
    return [
        node
        for node in found
        if module_path(node).removeprefix("model.").startswith(side)
        and not any(
            part in module_path(node) for part in ("EncDecAttention.k", "EncDecAttention.v")
        )
        and not any(part in module_path(node) for part in ("encoder_attn.k_", "encoder_attn.v_"))
    ]


@pytest.mark.parametrize("model", ["t5", "bart"])
@pytest.mark.parametrize(("length", "decoder_length"), [(6, 6), (7, 5)])
def test_each_side_is_observed_over_its_own_tokens(model, length, decoder_length):
    program = canonical_program(model)
    entry = batch(length, decoder_length)
    sample = one_sample(program, entry)
    values: dict[str, torch.Tensor] = {}
    run(program, sample.inputs, lambda node, value: values.__setitem__(node.name, value))
    found = collect(program, linear_inputs(program), [sample])
    for side, mask in (("encoder", "attention_mask"), ("decoder", "decoder_attention_mask")):
        chosen = linears(program, side)
        assert len(chosen) >= 6
        for node in chosen:
            name = node.args[0].name
            rows = values[name][entry[mask].bool()]
            assert torch.equal(found["minimum"][name], rows.amin(0))
            assert torch.equal(found["maximum"][name], rows.amax(0))
            assert int(found["tokens"][name]) == int(entry[mask].sum())


@pytest.mark.parametrize("model", ["t5", "bart"])
def test_a_decoder_without_a_mask_has_no_padding(model):
    """Lengths happen to be equal: the encoder's mask says nothing of the decoder's tokens."""
    program = canonical_program(model)
    entry = batch(6, 6)
    del entry["decoder_attention_mask"]
    found = collect(program, linear_inputs(program), [one_sample(program, entry)])
    for side, count in (("encoder", 9), ("decoder", 12)):
        for node in linears(program, side):
            assert int(found["tokens"][node.args[0].name]) == count


def test_a_decoder_that_is_shown_the_encoders_tokens_has_its_padding():
    program = canonical_program("t5")
    entry = batch(6, 6)
    sample = one_sample(program, {k: entry[k] for k in ("input_ids", "attention_mask")})
    assert torch.equal(sample.decoder_tokens, entry["attention_mask"].bool())


@pytest.mark.parametrize("captured_as", ["keywords", "positions"])
@pytest.mark.parametrize("shown_as", ["keywords", "positions"])
def test_padding_is_known_however_the_inputs_are_passed(captured_as, shown_as):
    def passed(how: str, entry: dict[str, torch.Tensor]):
        return entry if how == "keywords" else tuple(entry.values())

    torch.manual_seed(0)
    config = hf.BertConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=99,
    )
    model = hf.BertModel(config).eval()
    names = ("input_ids", "attention_mask")
    example, shown = ({name: batch(n, 3)[name] for name in names} for n in (6, 8))
    program = fxopt.capture(model, passed(captured_as, example))
    sample = one_sample(program, passed(shown_as, shown))
    assert torch.equal(sample.tokens, shown["attention_mask"].bool())


def test_masks_that_are_added_to_scores_say_nothing_of_tokens():
    class Biased(torch.nn.Module):
        def forward(self, x, attention_mask):
            return torch.softmax(x + attention_mask, -1)

    mask = torch.zeros(4, 4).masked_fill(torch.ones(4, 4).triu(1).bool(), -torch.inf)
    program = fxopt.capture(Biased().eval(), (torch.randn(4, 4), mask))
    assert one_sample(program, (torch.randn(4, 4), mask)).tokens is None


def test_a_decoder_alone_is_no_decoder_beside_an_encoder():
    program = canonical_program("llama")
    real = RealTokens(program)
    assert not any(real.of_decoder(node) for node in program.graph.nodes)


def test_rounding_in_step_reads_the_same_tokens():
    program = canonical_program("t5")
    sample = one_sample(program, batch(7, 5))
    lockstep, seen = Lockstep(program, [sample]), {}

    def look(node):
        if node.target is aten.linear.default:
            seen[node] = len(lockstep.rows(node.args[0])[0])

    lockstep.run(look)
    assert {seen[node] for node in linears(program, "encoder")} == {7 + 3}
    assert {seen[node] for node in linears(program, "decoder")} == {5 + 2}


def test_errors_and_perplexity_are_over_the_decoders_tokens():
    """Padding of the decoder may err as it likes; the perplexity is that of its own ids."""
    program = canonical_program("t5")
    entry = batch(7, 5)
    sample = one_sample(program, entry)
    exact = run(program, sample.inputs)
    judge = OutputError.of(program, [sample], [exact])
    (index,) = (i for i, logits in judge.logits.items() if logits)
    changed = list(exact)
    changed[index] = exact[index].clone()
    changed[index][0, 2:] += torch.randn_like(exact[index][0, 2:])
    assert judge.kl([changed]) == 0
    assert judge.perplexity_rise([changed]) == 0
    changed[index] = exact[index] * 0
    ids, real = entry["decoder_input_ids"], entry["decoder_attention_mask"].bool()
    losses = [
        torch.nn.functional.cross_entropy(
            exact[index][row, :-1][real[row, 1:]], ids[row, 1:][real[row, 1:]], reduction="sum"
        )
        for row in range(2)
    ]
    before = float(sum(losses)) / int(real[:, 1:].sum())
    uniform = torch.tensor(exact[index].shape[-1]).log()
    expected = float((uniform - before).exp() - 1)
    assert judge.perplexity_rise([changed]) == pytest.approx(expected, rel=1e-5)


class ScoreOfText(nn.Module):
    """One score for each text: it predicts no tokens."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(16, 8), nn.Linear(8, 1)

    def forward(self, input_ids):
        return {"logits": self.head(self.embed(input_ids)).mean((1, 2))}


def test_a_score_for_each_text_has_no_perplexity():
    ids = torch.arange(10).reshape(2, 5)
    program = fxopt.capture(ScoreOfText(), {"input_ids": ids})
    exact = run(program, [ids])
    judge = OutputError.of(program, [Sample([ids], None)], [exact])
    assert judge.logits == {0: True}
    assert judge.token_ids is None
    with pytest.raises(CalibrationError, match="perplexity needs logits over the vocabulary"):
        judge.perplexity_rise([exact])
