"""HF models: inputs found by themselves, caches, masks, dtypes; the model is left as it was."""

import pytest
import torch
import transformers as hf
from torch import nn
from transformers import masking_utils

import fxopt
from fxopt.analysis.execution import run
from fxopt.capture import capture_program
from fxopt.capture.attention import IMPLEMENTATION, _recognize, name_activation
from fxopt.capture.pretrained import capture_pretrained
from fxopt.errors import CaptureError, InputError, ModelError
from fxopt.pipeline.data import keyword_inputs
from fxopt.rewrite.pattern import argument
from tests.models import zoo_model
from tests.zoo import BASE, GROUPED, ZOO

ops = torch.ops.fxopt


def attentions(program):
    return program.nodes(ops.attention.default)


def test_a_decoder_has_its_cache_and_free_batch_and_length():
    program = zoo_model("llama").program
    shapes = {spec.name: spec.shape for spec in program.signature.inputs}
    assert shapes["input_ids"] == ("batch", "sequence")
    assert shapes["past_key_0"] == ("batch", 2, "past", 8)
    assert shapes["past_value_1"] == ("batch", 2, "past", 8)
    assert program.signature.cache is not None
    assert program.signature.cache.layers == 2
    assert dict(program.signature.defaults) == {"attention_mask": "ones", "position_ids": "arange"}
    assert "runs" in program.notes[0]
    assert len(attentions(program)) == 2


def test_masks_keep_their_structure():
    llama = [argument(n, "causal") for n in attentions(zoo_model("llama").program)]
    assert llama == [True, True]
    mistral = [argument(n, "window") for n in attentions(zoo_model("mistral").program)]
    assert mistral == [5, 5]
    gemma = [argument(n, "window") for n in attentions(zoo_model("gemma3").program)]
    assert gemma == [5, 5, None]
    bert = attentions(zoo_model("bert").program)
    assert not any(argument(n, "causal") for n in bert)
    assert all(argument(n, "padding") is not None for n in bert)
    assert all(
        argument(n, "mask") is None for n in [*bert, *attentions(zoo_model("llama").program)]
    )


def test_position_bias_is_an_explicit_mask():
    nodes = attentions(zoo_model("t5").program)
    assert len(nodes) == 6
    assert any(argument(n, "mask") is not None for n in nodes)


def test_experts_stay_whole():
    assert len(zoo_model("mixtral").program.nodes(ops.moe.default)) == 2


def test_a_model_without_the_attention_interface_falls_back_and_says_so():
    program = zoo_model("bloom").program
    assert not attentions(program)
    assert any("plain operators" in note for note in program.notes)


def test_tied_weights_are_held_once():
    program = zoo_model("gemma3").program
    assert program.aliases == {"lm_head.weight": "model.embed_tokens.weight"}
    assert "lm_head.weight" not in program.weights()
    untied = zoo_model("llama").program
    assert untied.aliases == {}


def test_inputs_the_model_never_reads_are_ignored():
    signature = zoo_model("whisper").program.signature
    assert "attention_mask" in signature.ignored
    assert "attention_mask" not in {spec.name for spec in signature.inputs}


def test_the_model_is_left_as_it_was():
    torch.manual_seed(0)
    model = ZOO["mixtral"]().train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    attention = model.config._attn_implementation
    experts = model.config._experts_implementation
    program = capture_program(model)
    assert model.training
    assert "forward" not in model.__dict__
    assert (model.config._attn_implementation, model.config._experts_implementation) == (
        attention,
        experts,
    )
    assert IMPLEMENTATION not in (attention, experts)
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    # Weights are shared until a pass needs its own: capture costs no second model.
    assert program.weight("model.norm.weight").data_ptr() == model.model.norm.weight.data_ptr()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_models_stay_low_precision(dtype):
    torch.manual_seed(0)
    program = capture_program(ZOO["llama"]().to(dtype).eval())
    assert {spec.dtype for spec in program.signature.outputs} == {dtype}
    assert all(v.dtype == dtype for n, v in program.weights().items() if n.endswith("weight"))


def test_a_recurrent_state_is_reported_and_left_out():
    config = hf.MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=99, state_size=4)
    with pytest.raises(CaptureError, match="fixed to the example's size"):
        capture_pretrained(hf.MambaForCausalLM(config).eval(), None)


def test_example_inputs_decide_what_is_captured():
    model = zoo_model("bert").model
    example = {"input_ids": torch.randint(0, 99, (2, 6)), "token_type_ids": torch.ones(2, 6).long()}
    program = capture_program(model, example)
    assert "input_ids" in {spec.name for spec in program.signature.inputs}
    with pytest.raises(InputError, match="'input_ids' is a str"):
        capture_program(model, {"input_ids": "hello"})
    with pytest.raises(InputError, match="do not fit the forward of BertModel: too many"):
        capture_program(model, (torch.ones(1, 4, dtype=torch.long),) * 30)


def test_attention_maps_are_captured_from_plain_operators():
    config = hf.LlamaConfig(**GROUPED, attn_implementation="eager", output_attentions=True)
    program = capture_program(hf.LlamaForCausalLM(config).eval())
    assert "attentions.0" in {spec.name for spec in program.signature.outputs}
    assert not attentions(program)


def test_a_model_that_fails_with_a_cache_is_captured_without_one():
    class Cacheless(hf.LlamaForCausalLM):
        def forward(self, input_ids, use_cache=False, past_key_values=None, **kwargs):
            if use_cache:
                raise ValueError("no cache here")
            return super().forward(input_ids, use_cache=False, **kwargs)

    program = capture_program(Cacheless(hf.LlamaConfig(**GROUPED)).eval())
    assert program.signature.cache is None
    assert any("no cache here" in note for note in program.notes)


def test_a_graph_that_is_not_the_model_is_refused():
    class Branching(hf.BertModel):
        def forward(self, input_ids, attention_mask=None, **kwargs):
            result = super().forward(input_ids, attention_mask, **kwargs)
            if input_ids.shape[1] > 5:  # a size that export fixes to one side
                result.last_hidden_state = result.last_hidden_state * 2
            return result

    with pytest.raises(CaptureError, match="capture check at batch .* 'last_hidden_state' differs"):
        capture_program(Branching(hf.BertConfig(**BASE)).eval())


@pytest.mark.parametrize(("value", "word"), [(float("nan"), "NaN"), (float("inf"), "infinite")])
def test_broken_weights_are_refused(value, word):
    model = ZOO["bert"]()
    with torch.no_grad():
        model.encoder.layer[1].output.dense.weight[3, 3] = value
    with pytest.raises(ModelError, match=f"output.dense.weight.*{word}"):
        capture_program(model)


def test_weights_in_a_form_that_cannot_be_taken_are_refused():
    with pytest.raises(ModelError, match="lazy module. Run the model once"):
        capture_program(nn.LazyLinear(4), (torch.randn(2, 4),))
    sparse = nn.Linear(4, 4)
    sparse.weight = nn.Parameter(sparse.weight.detach().to_sparse(), requires_grad=False)
    with pytest.raises(ModelError, match="'weight'.*sparse_coo.*to_dense"):
        capture_program(sparse, (torch.randn(2, 4),))


@pytest.mark.parametrize("value", [1.0, float("nan")])
def test_weights_of_eight_bits_are_looked_at_too(value):
    class Eight(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            weight = torch.full((4, 4), value).to(torch.float8_e4m3fn)
            self.weight = nn.Parameter(weight, requires_grad=False)

        def forward(self, x):
            return x @ self.weight.to(x.dtype)

    if value == value:
        assert capture_program(Eight(), (torch.randn(2, 4),)).weights()
        return
    with pytest.raises(ModelError, match="holds NaN"):
        capture_program(Eight(), (torch.randn(2, 4),))


def test_things_that_are_not_models_are_refused():
    with pytest.raises(ModelError, match="a str"):
        capture_program("bert-base")  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="meta device"), torch.device("meta"):
        capture_program(nn.Linear(2, 2), (torch.randn(1, 2),))


@pytest.mark.parametrize("name", ["relu", "gelu", "silu", "tanh"])
def test_activations_are_named_by_their_values(name):
    assert name_activation(getattr(torch, name, getattr(nn.functional, name, None))) == name
    assert name_activation(torch.sin) is None
    assert name_activation(None) is None


def test_grouped_heads_are_not_repeated():
    program = capture_program(hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED)).eval())
    for node in attentions(program):
        assert node.args[0].meta["val"].shape[1] == 4
        assert node.args[1].meta["val"].shape[1] == 2


@pytest.mark.parametrize("window", [1, 3, 64, 4096, 8192, 32768])
def test_windows_of_every_size_are_told_from_plain_causal(window):
    mask = masking_utils.sliding_window_causal_mask_function(window)
    assert _recognize(mask, window) == (True, window)
    chunked = masking_utils.chunked_causal_mask_function(window + 1, torch.zeros(2).long())
    assert _recognize(chunked, window + 1) is None
    assert _recognize(masking_utils.causal_mask_function, None) == (True, None)
    assert _recognize(masking_utils.bidirectional_mask_function, None) == (False, None)


@pytest.mark.parametrize("window", [7, 69, 160, 1024, 4096, 100_000])
def test_a_window_that_is_not_told_is_not_taken_for_everything(window):
    causal = masking_utils.sliding_window_causal_mask_function(window)
    assert _recognize(causal, None) is None
    around = masking_utils.sliding_window_bidirectional_mask_function(window)
    assert _recognize(around, None) is None


def test_a_mask_function_of_the_models_own_is_an_explicit_mask():
    class Windowed(hf.BertModel):
        def _create_attention_masks(self, attention_mask, embedding_output, **kwargs):
            window = masking_utils.sliding_window_bidirectional_overlay(160)
            made = masking_utils.create_bidirectional_mask(
                config=self.config,
                inputs_embeds=embedding_output,
                attention_mask=attention_mask,
                and_mask_function=window,
            )
            return made, None

    config = hf.BertConfig(**{**BASE, "max_position_embeddings": 512})
    model = Windowed(config).eval()
    program = capture_program(model)
    assert all(argument(node, "mask") is not None for node in attentions(program))
    ids = torch.randint(3, 90, (1, 400))
    ones = torch.ones_like(ids)
    known = {"input_ids": ids, "token_type_ids": ones * 0, "attention_mask": ones}
    known["position_ids"] = torch.arange(400)[None]
    got = program.graph_module(*(known[spec.name] for spec in program.signature.inputs))
    assert torch.allclose(got[0], model(ids).last_hidden_state, atol=1e-5)


def test_a_model_in_training_mode_is_captured_as_it_runs_at_inference():
    torch.manual_seed(0)
    model = hf.BertModel(hf.BertConfig(**BASE)).train()
    program = capture_program(model)
    assert model.training
    assert "attention_mask" in program.signature.defaults


def test_positions_that_follow_the_mask_stay_inside_the_graph():
    program = zoo_model("opt").program
    assert "position_ids" not in {spec.name for spec in program.signature.inputs}


def test_positions_that_hardly_matter_are_still_counted():
    # With weights as small as these, rotary positions that are all alike are within any tolerance.
    torch.manual_seed(0)
    config = hf.ModernBertConfig(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        cls_token_id=1,
        sep_token_id=2,
        local_attention=6,
        global_attn_every_n_layers=2,
    )
    model = hf.ModernBertForMaskedLM(config).eval()
    program = capture_program(model)
    assert program.signature.defaults["position_ids"] == "arange"
    ids = {"input_ids": torch.randint(3, 99, (2, 33))}
    with torch.no_grad():
        expected = model(**ids).logits
    found = run(program, keyword_inputs(program.signature, ids))[0]
    assert torch.allclose(found, expected, rtol=1e-6, atol=1e-7)


def test_experts_in_bfloat16_are_judged_saved_and_loaded(tmp_path):
    """They are exported with an operator that takes no float64 and that no folder may name."""
    torch.manual_seed(0)
    model = ZOO["gptoss"]().eval().to(torch.bfloat16)
    made = fxopt.optimize(model, "w8a16", progress=False)
    assert made.report.history[-1].sites
    ids = torch.randint(3, 99, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = made(input_ids=ids).logits
        made.save_pretrained(tmp_path / "m")
        assert torch.equal(fxopt.load(tmp_path / "m")(input_ids=ids).logits, wanted)
        exact = model(input_ids=ids).logits
    assert float((wanted - exact).float().norm() / exact.float().norm()) < 0.1
