"""The tokenizer that lies beside a checkpoint."""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

_FILES = (
    *("tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
    *("vocab.txt", "vocab.json"),
)


def load_tokenizer(place: str, local_files_only: bool = False) -> Any:
    """The tokenizer of a model folder or hub name, or None where it has none."""
    path = Path(place)
    if not place or path.suffix == ".gguf":
        return None
    # From a folder without its files transformers makes up a tokenizer that knows no words.
    if path.is_dir() and not any((path / name).exists() for name in _FILES):
        return None
    try:
        return AutoTokenizer.from_pretrained(place, local_files_only=local_files_only)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError):
        return None
