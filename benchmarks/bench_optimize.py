"""What `optimize` itself costs: time and peak memory for 2, 8 and 32 layers, or of SmolLM2-135M.

    python benchmarks/bench_optimize.py [--layers 2 8 32] [--width 1024] [--dtype bfloat16]
        [--inplace] [--json out]
    python benchmarks/bench_optimize.py --smollm2 [--recipe w4a16-gptq] [--threads 2]

Each run is a process of its own, with verification as it is by default. Memory is the peak of
resident memory less file pages (code that was used for the first time, and with `inplace` the
replaced weights, which wait in files and which the system can drop), read every 2 ms,
above what it is just before the call (the model is already there), divided by the model's bytes,
plus one for the model. CPU seconds are those of all threads
of the process: other work on the machine stretches the clock and not them. SmolLM2 is calibrated
with the prose of real_models.py, as much of it as the recipe reads.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
RUN = """
import json, resource, sys, threading, time
import torch, transformers as hf
import fxopt, fxopt.kernels
from fxopt.ir.memory import release_freed_memory
import real_models
asked = json.loads(sys.argv[1])
dtype = getattr(torch, asked["dtype"])
fxopt.kernels.ensure_native()
if asked["threads"]:
    torch.set_num_threads(asked["threads"])
torch.manual_seed(0)
# What imports and the first trace cost once is not the model's.
small = hf.LlamaConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=1,
    num_attention_heads=4, num_key_value_heads=2, vocab_size=99)
tokens = [{"input_ids": torch.arange(64).reshape(2, 32)}]
fxopt.optimize(hf.LlamaForCausalLM(small).eval().to(dtype), asked["recipe"], calibration=tokens)
if asked["layers"]:
    width = asked["width"]
    model = hf.LlamaForCausalLM(hf.LlamaConfig(hidden_size=width, intermediate_size=3 * width,
        num_hidden_layers=asked["layers"], num_attention_heads=8, num_key_value_heads=4,
        vocab_size=4096, tie_word_embeddings=True)).eval().to(dtype)
    data = None
else:
    model, tokenizer = real_models.load_smollm2()
    model = model.to(dtype)
    tokenizer.pad_token = tokenizer.eos_token
    reads = fxopt.Recipe.resolve(asked["recipe"]).calibration
    texts, rows = real_models.prose()[:reads.samples], reads.batch_size
    data = [tokenizer(texts[i:i + rows], return_tensors="pt", padding=True, truncation=True,
        max_length=reads.max_length) for i in range(0, len(texts), rows)]
size = sum(p.numel() * p.element_size() for p in model.parameters())
def resident():
    with open("/proc/self/statm") as statm:
        _, resident, shared, *_ = statm.read().split()
    return (int(resident) - int(shared)) * resource.getpagesize()
release_freed_memory(size)  # what reading a model leaves behind is no room for what follows
before, peak, done, stage, peaks = resident(), 0, False, "", {}
def tell(name, detail=""):
    global stage
    stage = name
def watch():
    global peak
    while not done:
        now = resident()
        peak = max(peak, now)
        peaks[stage] = max(peaks.get(stage, 0), now)
        time.sleep(0.002)
watcher = threading.Thread(target=watch); watcher.start()
started, used = time.perf_counter(), time.process_time()
optimized = fxopt.optimize(
    model, asked["recipe"], calibration=data, inplace=asked["inplace"], progress=tell)
seconds, used = time.perf_counter() - started, time.process_time() - used
done = True; watcher.join()
seconds_by_pass = {r.name: r.seconds for r in optimized.report.history}
print(json.dumps(asked | {"model_mb": size / 1e6, "threads": torch.get_num_threads(),
    "seconds": seconds, "cpu_seconds": used, "peak_over_model": 1 + (peak - before) / size,
    "program_mb": optimized.program.byte_count() / 1e6,
    "lowered_mb": optimized.lowered.byte_count() / 1e6,
    "peak_by_stage": {name: 1 + (p - before) / size for name, p in peaks.items() if name},
    "passes": seconds_by_pass}))
"""


def measure(asked: dict[str, Any]) -> dict[str, Any]:
    """One run in a process of its own."""
    command = [sys.executable, "-c", RUN, json.dumps(asked)]
    paths = [str(HERE), os.environ.get("PYTHONPATH", "")]
    places = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=places)
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 8, 32])
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--smollm2", action="store_true", help="the real model instead of layers")
    parser.add_argument("--recipe", default="w8a8-dynamic")
    parser.add_argument(
        "--threads", type=int, help="those of torch; as many as it takes if not said"
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--inplace", action="store_true", help="only runs that give up the model")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    kinds = (True,) if options.inplace else (False, True)
    common = {name: vars(options)[name] for name in ("recipe", "width", "threads", "dtype")}
    models = (None,) if options.smollm2 else tuple(options.layers)
    for layers, inplace in itertools.product(models, kinds):
        rows.append(measure({"layers": layers, "inplace": inplace, **common}))
        if options.json:  # after each run: the large ones take minutes
            options.json.write_text(json.dumps(rows, indent=2) + "\n")
    table = Table(
        "layers", "inplace", "model MB", "seconds", "CPU s", "CPU s/layer", "peak / model"
    )
    for row in rows:
        table.add_row(
            str(row["layers"] or "SmolLM2"),
            str(row["inplace"]),
            f"{row['model_mb']:.0f}",
            f"{row['seconds']:.1f}",
            f"{row['cpu_seconds']:.1f}",
            f"{row['cpu_seconds'] / row['layers']:.2f}" if row["layers"] else "",
            f"{row['peak_over_model']:.2f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
