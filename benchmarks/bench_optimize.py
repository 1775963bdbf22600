"""What `optimize` itself costs: time and peak memory for 2, 8 and 32 layers.

    python benchmarks/bench_optimize.py [--layers 2 8 32] [--width 1024] [--dtype bfloat16]
        [--inplace] [--json out]

Each run is a process of its own, with verification as it is by default. Memory is the peak of
resident memory less file pages (code that was used for the first time, and with `inplace` the
replaced weights, which wait in files and which the system can drop), read every 2 ms,
above what it is just before the call (the model is already there), divided by the model's bytes,
plus one for the model. CPU seconds are those of all threads
of the process: other work on the machine stretches the clock and not them.
"""

import argparse
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

RUN = """
import json, resource, sys, threading, time
import torch, transformers as hf
import fxopt, fxopt.kernels
layers, width, inplace = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "True"
dtype = getattr(torch, sys.argv[4])
fxopt.kernels.ensure_native()
torch.manual_seed(0)
config = hf.LlamaConfig(hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
    num_attention_heads=8, num_key_value_heads=4, vocab_size=4096, tie_word_embeddings=True)
# What imports and the first trace cost once is not the model's.
small = hf.LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1,
    num_attention_heads=4, num_key_value_heads=2, vocab_size=99)
fxopt.optimize(hf.LlamaForCausalLM(small).eval().to(dtype), "w8a8-dynamic")
model = hf.LlamaForCausalLM(config).eval().to(dtype)
size = sum(p.numel() * p.element_size() for p in model.parameters())
def resident():
    with open("/proc/self/statm") as statm:
        _, resident, shared, *_ = statm.read().split()
    return (int(resident) - int(shared)) * resource.getpagesize()
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
optimized = fxopt.optimize(model, "w8a8-dynamic", inplace=inplace, progress=tell)
seconds, used = time.perf_counter() - started, time.process_time() - used
done = True; watcher.join()
seconds_by_pass = {r.name: r.seconds for r in optimized.report.history}
print(json.dumps({"layers": layers, "inplace": inplace, "dtype": sys.argv[4],
    "model_mb": size / 1e6,
    "seconds": seconds, "cpu_seconds": used, "peak_over_model": 1 + (peak - before) / size,
    "program_mb": optimized.program.byte_count() / 1e6,
    "lowered_mb": optimized.lowered.byte_count() / 1e6,
    "peak_by_stage": {name: 1 + (p - before) / size for name, p in peaks.items() if name},
    "passes": seconds_by_pass}))
"""


def measure(layers: int, width: int, inplace: bool, dtype: str) -> dict[str, Any]:
    """One run in a process of its own."""
    command = [sys.executable, "-c", RUN, str(layers), str(width), str(inplace), dtype]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 8, 32])
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--inplace", action="store_true", help="only runs that give up the model")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    kinds = (True,) if options.inplace else (False, True)
    for layers, inplace in itertools.product(options.layers, kinds):
        rows.append(measure(layers, options.width, inplace, options.dtype))
        if options.json:  # after each run: the large ones take minutes
            options.json.write_text(json.dumps(rows, indent=2) + "\n")
    table = Table(
        "layers", "inplace", "model MB", "seconds", "CPU s", "CPU s/layer", "peak / model"
    )
    for row in rows:
        table.add_row(
            str(row["layers"]),
            str(row["inplace"]),
            f"{row['model_mb']:.0f}",
            f"{row['seconds']:.1f}",
            f"{row['cpu_seconds']:.1f}",
            f"{row['cpu_seconds'] / row['layers']:.2f}",
            f"{row['peak_over_model']:.2f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
