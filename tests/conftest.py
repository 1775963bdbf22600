"""How the whole suite runs: one torch thread in each worker, and the same examples every time."""

import gc
import os

WORKER = "PYTEST_XDIST_WORKER" in os.environ
if WORKER:
    # Workers share the cores; two that each start a thread per core would only wait for each
    # other. Set before torch is imported, and inherited by the processes that tests start.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402
import transformers  # noqa: E402, F401
from hypothesis import settings  # noqa: E402

import fxopt  # noqa: E402, F401

if WORKER:
    torch.set_num_threads(1)

# The examples are drawn from each test's own code and not from a clock or a stored database, so
# that two runs of one commit judge alike. `--hypothesis-profile=default` looks for new ones.
settings.register_profile("same", derandomize=True, database=None, deadline=None)
settings.load_profile("same")

# The libraries' own objects outnumber a tiny model's by a thousand to one; a collection, and fxopt
# makes one after each pass, need not look through them.
gc.collect()
gc.freeze()


def pytest_unconfigure() -> None:
    """Let the interpreter take its libraries down in order."""
    gc.unfreeze()
