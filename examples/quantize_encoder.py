"""Quantize a sentence encoder, compare its embeddings, save it and load it again."""

import tempfile

import torch
from transformers import AutoModel, AutoTokenizer

import fxopt
from fxopt.demo import minilm_folder

folder = minilm_folder()
model = AutoModel.from_pretrained(folder).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
inputs = tokenizer(
    ["A cat sits on the mat.", "Quantization stores numbers in fewer bits."],
    return_tensors="pt",
    padding=True,
)

optimized = fxopt.optimize(model, "w8a8-dynamic")
print(optimized.report)

mask = inputs["attention_mask"].unsqueeze(-1)
with torch.no_grad():
    pooled = [
        (m(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1) for m in (model, optimized)
    ]
print("cosine with the original:", torch.cosine_similarity(*pooled).tolist())

with tempfile.TemporaryDirectory() as place:
    optimized.save_pretrained(f"{place}/model")
    again = fxopt.load(f"{place}/model")
same = torch.equal(again(**inputs).last_hidden_state, optimized(**inputs).last_hidden_state)
print("bit-equal after reload:", same)
