"""Weights go back to the original model: a fresh one of the class computes the same with them."""

import copy
import warnings

import pytest
import torch
import transformers as hf
from torch import nn

import fxopt
from fxopt.errors import StateDictError
from tests.models import optimize_zoo, randomize, zoo_model
from tests.zoo import GROUPED

EXACT = {"lowering": {"target": "reference", "speed_gate": False}}
PERMUTE = {"by": "random", "seed": 3}


def recipe(*passes):
    return {"passes": ["canonicalize", *passes], **EXACT}


def optimize(name, *passes, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a pass without a site in this model
        return optimize_zoo(name, recipe(*passes), **{"verify": "off", **options})


def example(model):
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 90, (2, 7), generator=generator)
    if model.config.is_encoder_decoder:
        return {"input_ids": ids, "decoder_input_ids": ids[:, :5]}
    return {"input_ids": ids}


def first(outputs):
    return outputs["logits"] if "logits" in outputs else outputs["last_hidden_state"]


def fresh(model) -> nn.Module:
    torch.manual_seed(9)
    return type(model)(copy.deepcopy(model.config)).eval()


def assert_taken_over(optimized, original, other):
    """`other` loads the weights and computes what `original` did; some weight is another."""
    state = optimized.state_dict_for(other)
    other.load_state_dict(state, strict=True)
    inputs = example(original)
    with torch.no_grad():
        expected, found = first(original(**inputs)), first(other(**inputs))
    assert (found - expected).abs().max() < 2e-4 * expected.square().mean().sqrt()
    assert torch.allclose(first(optimized(**inputs)), found, atol=1e-4)
    before = original.state_dict()
    assert any(not torch.equal(state[name], before[name]) for name in before if name in state)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "gemma3", "t5"])
@pytest.mark.parametrize(
    "a_pass",
    [
        {"permute-ffn": PERMUTE},
        {"permute-heads": PERMUTE},
        {"permute-vo": PERMUTE},
        {"permute-residual": PERMUTE},
        {"smoothquant": {"ride": False}},
        "equalize",
        "fold-norm",
    ],
    ids=lambda entry: entry if isinstance(entry, str) else next(iter(entry)),
)
def test_weights_only_passes_are_taken_over(name, a_pass):
    model = zoo_model(name).model
    calibration = [example(model)] if isinstance(a_pass, dict) and "smoothquant" in a_pass else None
    optimized = optimize(name, a_pass, calibration=calibration)
    if not optimized.program.history[-1].sites:
        assert (name, next(iter(a_pass)) if isinstance(a_pass, dict) else a_pass) in {
            ("bert", "permute-residual"),  # the stream is the output
            ("t5", "permute-residual"),  # the encoder's last state is an output
            ("bert", "fold-norm"),  # post-norm: the residual reads the norm too
            ("gpt2", "equalize"),  # gelu, and one fused projection
        }
        pytest.skip("no site in this model")
    assert optimized.program.history[-1].beyond_weights == ""
    assert_taken_over(optimized, model, fresh(model))


@pytest.mark.parametrize("tied", [True, False])
def test_a_rotated_checkpoint_loads_into_an_untied_model(tied):
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED, tie_word_embeddings=tied)).eval()
    randomize(model)
    passes = ["untie", "fold-norm", {"rotate": {"online": False}}]
    optimized = fxopt.optimize(model, recipe(*passes), verify="fast", progress=False)
    details = [site.detail for site in optimized.program.history[-1].sites]
    assert {detail[:2] for detail in details} == {"R1", "R2"}
    if tied:
        with pytest.raises(StateDictError, match="tie_word_embeddings=False"):
            optimized.state_dict_for(model)
    config = copy.deepcopy(model.config)
    config.tie_word_embeddings = False
    assert_taken_over(optimized, model, hf.LlamaForCausalLM(config).eval())


def test_the_weights_of_several_passes_survive_a_saved_folder(tmp_path):
    model = zoo_model("gpt2").model
    optimized = optimize("gpt2", {"permute-ffn": PERMUTE}, {"permute-residual": PERMUTE})
    optimized.save_pretrained(tmp_path / "saved")
    assert_taken_over(fxopt.load(tmp_path / "saved"), model, fresh(model))


def test_what_the_program_does_not_hold_is_the_models_own():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down, self.unused = nn.Linear(4, 8), nn.Linear(8, 4), nn.Linear(4, 4)
            self.register_buffer("steps", torch.tensor(7))

        def forward(self, x):
            return self.down(torch.relu(self.up(x)))

    model = Counting().eval()
    optimized = fxopt.optimize(
        model, recipe("equalize"), example_inputs=(torch.randn(2, 4),), progress=False
    )
    other = Counting().eval()
    other.load_state_dict(optimized.state_dict_for(model), strict=True)
    x = torch.randn(5, 4)
    assert torch.allclose(other(x), model(x), atol=1e-6)
    assert other.steps == 7
    assert torch.equal(other.unused.weight, model.unused.weight)
    assert not torch.equal(other.up.weight, model.up.weight)


# --- refusals -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "a_pass", "reason"),
    [
        ("bert", "smoothquant", "'smoothquant' did more.*inverse_smoothing_scale'.*no name"),
        ("llama", "rotate", "'rotate' did more than change the weights: it computes hadamard"),
        ("llama", {"permute-qk": PERMUTE}, "'permute-qk' did more.*reads .*rope.*no name"),
        (
            "bert",
            {"permute-residual": {**PERMUTE, "restore_output": True}},
            "'permute-residual' did more.*_order'.*no name",
        ),
        ("gpt2", {"fold-norm": {"centre": True}}, "'fold-norm' did more.*it computes rms_norm"),
        ("llama", "quantize", "'quantize' did more than change the weights"),
    ],
)
def test_what_the_model_cannot_express_is_refused(name, a_pass, reason):
    model = zoo_model(name).model
    passes = [a_pass]
    if name == "gpt2":
        passes = ["untie", a_pass]
    optimized = optimize(name, *passes, calibration=[example(model)] * 2)
    with pytest.raises(StateDictError, match=reason):
        optimized.state_dict_for(model)


def test_an_approximate_pass_is_refused_even_if_it_edits_only_weights():
    model = zoo_model("llama").model
    optimized = optimize("llama", {"permute-ffn": PERMUTE})
    record = optimized.program.history[-1]
    object.__setattr__(record, "exactness", "approximate")
    with pytest.raises(StateDictError, match="'permute-ffn' is approximate"):
        optimized.state_dict_for(model)


def test_a_tie_is_cut_for_the_linears_own_name():
    optimized = optimize("t5", "untie")
    assert "lm_head.weight" in optimized.program.weights()
    assert optimized.program.aliases["encoder.embed_tokens.weight"] == "shared.weight"


def test_another_model_or_configuration_is_refused():
    optimized = optimize("bert", {"permute-ffn": PERMUTE})
    model = zoo_model("bert").model
    with pytest.raises(StateDictError, match="has no such weight"):
        optimized.state_dict_for(zoo_model("llama").model)
    config = copy.deepcopy(model.config)
    config.intermediate_size = 48
    with pytest.raises(StateDictError, match=r"\[64, 32\] of torch.float32; the model takes"):
        optimized.state_dict_for(hf.BertModel(config))
    with pytest.raises(StateDictError, match="takes .* of torch.bfloat16"):
        optimized.state_dict_for(fresh(model).to(torch.bfloat16))


def test_a_changed_buffer_that_is_not_saved_is_refused():
    optimized = optimize("llama", {"permute-ffn": PERMUTE})
    other = fresh(zoo_model("llama").model)
    other.model.rotary_emb.inv_freq.mul_(2)
    with pytest.raises(StateDictError, match="'model.rotary_emb.inv_freq' is not saved"):
        optimized.state_dict_for(other)
