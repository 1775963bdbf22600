"""OptimizedPretrainedModel: calls, caches, streaming, and what transformers asks of a model."""

from functools import cache

import pytest
import torch
import transformers as hf
from transformers.cache_utils import DynamicCache

import fxopt
from fxopt.errors import InputError
from fxopt.ir.cache_names import CACHE_NAME, CACHE_NAMES
from tests.models import optimize_zoo, zoo_model
from tests.zoo import ZOO

RECIPE = {"passes": ["canonicalize"], "lowering": {"speed_gate": False}}


@cache
def pair(name: str):
    return zoo_model(name).model, optimize_zoo(name, RECIPE)


def close(a, b) -> bool:
    return torch.allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CACHE_NAMES)
@torch.no_grad()
def test_prefill_and_decode_share_one_graph(name):
    model, optimized = pair("llama")
    ids = torch.randint(3, 99, (2, 7))
    expected = model(input_ids=ids).logits
    whole = optimized(input_ids=ids)
    assert close(whole.logits, expected)
    assert whole[CACHE_NAME].get_seq_length() == 7
    first = optimized(input_ids=ids[:, :4], use_cache=True)
    cache_object = first[CACHE_NAME]
    second = optimized(input_ids=ids[:, 4:], **{name: cache_object})
    assert second[CACHE_NAME] is cache_object
    assert close(second.logits, expected[:, 4:])


@torch.no_grad()
def test_defaults_mean_what_they_mean_in_the_model():
    model, optimized = pair("bert")
    ids = torch.randint(3, 99, (1, 1))
    assert close(optimized(ids).last_hidden_state, model(ids).last_hidden_state)
    mask = torch.tensor([[1, 1, 0]])
    ids = torch.randint(3, 99, (1, 3))
    ours, theirs = optimized(ids, mask), model(ids, mask)
    assert close(ours.last_hidden_state[:, :2], theirs.last_hidden_state[:, :2])
    assert isinstance(optimized(ids, return_dict=False), tuple)


def test_results_have_the_models_type_and_no_cache_unless_wanted():
    _, optimized = pair("llama")
    ids = torch.randint(3, 99, (1, 3))
    assert isinstance(optimized(ids), hf.modeling_outputs.CausalLMOutputWithPast)
    assert CACHE_NAME not in optimized(ids, use_cache=False)
    assert optimized(ids, logits_to_keep=1).logits.shape == (1, 1, 99)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"labels": torch.zeros(1, 3).long()}, "labels is not available"),
        ({"output_attentions": True}, "attention maps"),
        ({"inputs_embeds": torch.zeros(1, 3, 32)}, "captured on token ids"),
        ({"atention_mask": torch.ones(1, 3)}, "Did you mean 'attention_mask'"),
        ({"input_ids": torch.zeros(1, 3)}, "torch.float32; the program takes torch.int64"),
        ({"attention_mask": torch.ones(2, 3).long()}, "'attention_mask'"),
        ({CACHE_NAME: hf.StaticCache(hf.LlamaConfig(), 8)}, "continues DynamicCache"),
        ({name: DynamicCache() for name in CACHE_NAMES}, "'cache' and 'past_key_values'"),
    ],
)
def test_bad_calls(kwargs, message):
    _, optimized = pair("llama")
    inputs = {"input_ids": torch.randint(3, 99, (1, 3)), **kwargs}
    with pytest.raises(InputError, match=message):
        optimized(**inputs)


@torch.no_grad()
def test_one_cache_beside_the_other_name_left_empty():
    _, optimized = pair("llama")
    filled = DynamicCache()
    optimized(torch.randint(3, 99, (1, 3)), cache=filled, past_key_values=None)
    assert filled.get_seq_length() == 3


def test_no_input_at_all():
    _, optimized = pair("bert")
    with pytest.raises(InputError, match="'input_ids'.*missing"):
        optimized()


def test_streaming_and_sampling():
    model, optimized = pair("llama")
    ids = torch.randint(3, 99, (1, 5))

    class Collect:
        def __init__(self):
            self.tokens = []

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            pass

    streamer = Collect()
    tokens = optimized.generate(ids, max_new_tokens=6, do_sample=False, streamer=streamer)
    assert streamer.tokens == tokens[0].tolist()
    assert optimized.can_generate()
    assert not pair("bert")[1].can_generate()
    del model


def test_a_cache_of_the_original_with_dropped_tokens_is_refused():
    model, optimized = pair("mistral")
    ids = torch.randint(3, 99, (1, 9))
    with torch.no_grad():
        theirs = model(ids, use_cache=True, **{CACHE_NAME: DynamicCache(config=model.config)})
    with pytest.raises(InputError, match="has dropped old tokens"):
        optimized(ids[:, :1], **{CACHE_NAME: theirs[CACHE_NAME]})


def test_static_caches_are_refused_by_name():
    _, optimized = pair("llama")
    with pytest.raises(InputError, match="cache_implementation='static'"):
        optimized.generate(
            torch.randint(3, 99, (1, 5)), max_new_tokens=2, cache_implementation="static"
        )


def test_the_encoder_runs_once_per_text():
    model, optimized = pair("t5")
    stages = optimized.stages
    assert stages is not None
    # The cross-attention keys and values of both layers are carried, not computed per token.
    linears = [n for n in optimized.lowered.graph.nodes if "linear" in str(n.target)]
    assert len(stages.carried) >= 5
    assert any(stages.expands)
    encoded = optimized.get_encoder()(input_ids=torch.randint(3, 99, (2, 6)))
    assert encoded.last_hidden_state.shape == (2, 6, 32)
    with pytest.raises(InputError, match="get_encoder"):
        optimized(
            decoder_input_ids=torch.zeros(1, 1).long(),
            encoder_outputs=hf.modeling_outputs.BaseModelOutput(torch.zeros(1, 3, 32)),
        )
    del model, linears


def test_two_optimizes_do_not_disturb_each_other():
    torch.manual_seed(0)
    model, other = ZOO["llama"]().eval(), ZOO["llama"]().eval()
    ids = torch.randint(3, 99, (2, 5))
    first = fxopt.optimize(model, RECIPE, verify="off")
    alone = first(ids).logits
    quantized = {"passes": ["canonicalize", {"quantize": {}}], "lowering": {"speed_gate": False}}
    second = fxopt.optimize(model, quantized, verify="off")
    rounded = second(ids).logits
    third = fxopt.optimize(other, quantized, verify="off", inplace=True)
    assert not torch.equal(third(ids).logits, rounded)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert torch.equal(first(ids).logits, alone)
    assert torch.equal(second(ids).logits, rounded)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_models_stay_low_precision(dtype):
    torch.manual_seed(0)
    model = ZOO["llama"]().to(dtype).eval()
    quantized = {
        "passes": ["canonicalize", {"quantize": {"activations": {"granularity": "token"}}}],
        "lowering": {"speed_gate": False},
    }
    optimized = fxopt.optimize(model, quantized)
    ids = torch.randint(3, 99, (2, 5))
    assert optimized.dtype == dtype
    floating = {v.dtype for n, v in optimized.state_dict().items() if n.endswith("norm.weight")}
    assert floating == {dtype}
    result = optimized(ids)
    assert result.logits.dtype == dtype
    with torch.no_grad():
        expected = model(ids).logits
    error = (result.logits - expected).float().norm() / expected.float().norm()
    assert float(error) < 0.05
    assert optimized.generate(ids, max_new_tokens=3, do_sample=False).shape == (2, 8)


def test_pipelines_take_it():
    _, optimized = pair("llama")
    tokens = optimized.generate(torch.randint(3, 99, (1, 4)), max_new_tokens=2, do_sample=False)
    assert tokens.shape == (1, 6)
    assert type(optimized).__name__ == "LlamaForCausalLM"
    assert optimized.device == torch.device("cpu")


def test_moving_to_another_dtype_says_what_to_do():
    _, optimized = pair("llama")
    with pytest.raises(fxopt.FxoptError, match="optimize it again"):
        optimized.to(torch.bfloat16)
    assert optimized.to("cpu") is optimized
    with pytest.raises(fxopt.FxoptError, match="does not load another state dict"):
        optimized.load_state_dict({})


def test_state_dict_lists_tied_names():
    torch.manual_seed(0)
    optimized = fxopt.optimize(ZOO["gemma3"]().eval(), RECIPE, verify="off")
    state = optimized.state_dict()
    assert state["lm_head.weight"].data_ptr() == state["model.embed_tokens.weight"].data_ptr()


def test_reloading_without_the_gate_runs_the_same_kernels(tmp_path):
    torch.manual_seed(0)
    model = ZOO["bert"]().eval()
    recipe = {**fxopt.Recipe.resolve("w8a8-dynamic").to_dict(), "lowering": {"speed_gate": False}}
    optimized = fxopt.optimize(model, recipe, verify="fast")
    optimized.save_pretrained(tmp_path / "saved")
    again = fxopt.load(tmp_path / "saved")
    ids = torch.randint(3, 99, (2, 7))
    assert torch.equal(again(ids).last_hidden_state, optimized(ids).last_hidden_state)


def test_an_encoder_decoder_without_cache_generates():
    torch.manual_seed(0)
    model = ZOO["t5"]().eval()
    model.config.use_cache = False
    optimized = fxopt.optimize(model, RECIPE, verify="off")
    assert optimized.signature.cache is None
    ids = torch.randint(3, 99, (2, 6))
    expected = hf.GenerationMixin.generate(model, ids, max_new_tokens=5, use_cache=False)
    tokens = optimized.generate(ids, max_new_tokens=5, do_sample=False, use_cache=False)
    assert torch.equal(tokens, expected)


@torch.no_grad()
def test_what_was_encoded_is_what_the_decoder_is_given():
    model, optimized = pair("t5")
    ids, tokens = torch.randint(3, 99, (2, 9)), torch.randint(3, 99, (2, 3))
    full = torch.ones_like(ids)
    part = full.clone()
    part[:, 4:] = 0

    def decode(of, encoded_with, mask, edit=lambda state: state):
        source = of.get_encoder()(input_ids=ids, attention_mask=encoded_with)
        source.last_hidden_state = edit(source.last_hidden_state)
        return of(encoder_outputs=source, attention_mask=mask, decoder_input_ids=tokens).logits

    for mask in (full, part):
        assert close(decode(optimized, mask, mask), decode(model, mask, mask))
        assert close(decode(optimized, mask, mask.bool()), decode(model, mask, mask))
    assert close(decode(optimized, full, None), decode(model, full, None))
    with pytest.raises(InputError, match="attention_mask is not the one .* computed with"):
        decode(optimized, full, part)
    for edit in (lambda state: state * 2, lambda state: state.mul_(2), lambda state: state[:1]):
        with pytest.raises(InputError, match="is not what the encoder returned"):
            decode(optimized, full, full, edit)
    source = optimized.get_encoder()(input_ids=ids)
    with pytest.raises(InputError, match="'decoder_input_ids' .*torch.float32"):
        optimized(encoder_outputs=source, decoder_input_ids=tokens.float())
    with pytest.raises(InputError, match="encoder_outputs is a tuple"):
        optimized(encoder_outputs=(source.last_hidden_state,), decoder_input_ids=tokens)


@pytest.mark.parametrize("name", ["llama", "t5"])
@torch.no_grad()
def test_autocast_changes_nothing(name):
    optimized = pair(name)[1]
    ids = torch.randint(3, 99, (2, 6))
    extra = {"decoder_input_ids": ids[:, :3]} if name == "t5" else {}

    def results():
        tokens = optimized.generate(ids, max_new_tokens=4, do_sample=False)
        return optimized(input_ids=ids, **extra).logits, tokens

    logits, tokens = results()
    with torch.autocast("cpu", torch.bfloat16):
        again = results()
    assert again[0].dtype == torch.float32
    assert torch.equal(again[0], logits)
    assert torch.equal(again[1], tokens)


def test_masks_of_other_integer_dtypes_and_flags():
    _, optimized = pair("bert")
    ids = torch.randint(3, 99, (2, 5))
    mask = torch.ones(2, 5)
    expected = optimized(ids, mask.long()).last_hidden_state
    assert torch.equal(optimized(ids, mask.bool()).last_hidden_state, expected)
    assert torch.equal(optimized(ids, mask.int()).last_hidden_state, expected)
    with pytest.raises(InputError, match="'input_ids' is passed by position and by keyword"):
        optimized(ids, input_ids=ids)
    with pytest.raises(InputError, match="'output_router_logits'"):
        pair("mixtral")[1](ids, output_router_logits=True)
    with pytest.raises(fxopt.FxoptError, match="optimize it again"):
        optimized.half()
    assert optimized.cpu() is optimized
