"""One GPTQ of another project, run in that project's own environment.

    python gptq_peer.py llm-compressor|gptqmodel FOLDER WEIGHTS [--group N]

Called by bench_gptq_peers.py. FOLDER holds a model, its tokenizer and `calibration.json` (token
ids, one list for each text). The rounded weights of all linears but the head, multiplied back, go
to WEIGHTS; the last line printed is what ran and for how long, as JSON. Nothing of fxopt is read.
"""

import argparse
import importlib
import importlib.metadata
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

BITS = 4
Weights = dict[str, Tensor]


def tokens_of(folder: Path) -> list[list[int]]:
    return json.loads((folder / "calibration.json").read_text())


def llm_compressor(folder: Path, group: int | None) -> tuple[Weights, float]:
    """GPTQModifier as it is by default: static order by activation, damping 0.01."""
    llmcompressor: Any = importlib.import_module("llmcompressor")
    gptq: Any = importlib.import_module("llmcompressor.modifiers.gptq")
    transformers: Any = importlib.import_module("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    sizes = {"strategy": "channel"} if group is None else {"strategy": "group", "group_size": group}
    scheme = {"num_bits": BITS, "type": "int", "symmetric": True, **sizes}
    modifier = gptq.GPTQModifier(
        ignore=["lm_head"], config_groups={"linears": {"targets": ["Linear"], "weights": scheme}}
    )
    batches = [
        {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids)).long()}
        for ids in tokens_of(folder)
    ]
    loader = torch.utils.data.DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
    started = time.perf_counter()
    llmcompressor.oneshot(
        model=model, dataset=loader, recipe=modifier, num_calibration_samples=len(batches)
    )
    seconds = time.perf_counter() - started
    found = {
        f"{name}.weight": module.weight.detach().float().contiguous()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    return found, seconds


def gptqmodel(folder: Path, group: int | None) -> tuple[Weights, float]:
    """With columns in the order of activations; its other settings as they are by default."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # its default on two cores is refused
    peer: Any = importlib.import_module("gptqmodel")
    settings = peer.QuantizeConfig(
        bits=BITS,
        group_size=group or -1,
        sym=True,
        desc_act=True,
        device="cpu",
        offload_to_disk=False,
    )
    model = peer.GPTQModel.load(str(folder), settings, dtype=torch.float32)
    rows = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in tokens_of(folder)]
    started = time.perf_counter()
    model.quantize(rows, batch_size=1, backend=peer.BACKEND.TORCH)
    seconds = time.perf_counter() - started
    # What it holds has the zero points of its file format; loading makes them those of its kernels.
    model.save(str(folder / "gptqmodel"))
    model = peer.GPTQModel.load(
        str(folder / "gptqmodel"), device="cpu", backend=peer.BACKEND.TORCH, dtype=torch.float16
    )
    found = {
        f"{name}.weight": module.dequantize_weight().T.detach().float().contiguous()
        for name, module in model.model.named_modules()
        if hasattr(module, "dequantize_weight")
    }
    return found, seconds


PEERS: dict[str, tuple[str, Callable[[Path, int | None], tuple[Weights, float]]]] = {
    "llm-compressor": ("llmcompressor", llm_compressor),
    "gptqmodel": ("gptqmodel", gptqmodel),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("weights", type=Path)
    parser.add_argument("--group", type=int)
    options = parser.parse_args()
    package, run = PEERS[options.peer]
    found, seconds = run(options.folder, options.group)
    save_file(found, options.weights)
    version = importlib.metadata.version(package)
    print(json.dumps({"version": version, "seconds": seconds, "linears": len(found)}))


if __name__ == "__main__":
    main()
