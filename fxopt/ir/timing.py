"""Time calls by turns, so that all of them see the same machine."""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch


@torch.no_grad()
def time_by_turns(
    calls: Sequence[Callable[[], Any]], fewest: int, seconds: float, most: float = math.inf
) -> list[list[float]]:
    """The seconds of each call in each round; a first round, which sets things up, is not told.

    Args:
        calls: what is timed, one after the other in each round.
        fewest: rounds at least.
        seconds: after which no further round begins.
        most: rounds at most.
    """
    for call in calls:
        call()
    times: list[list[float]] = [[] for _ in calls]
    started, rounds = time.perf_counter(), 0
    while rounds < fewest or (rounds < most and time.perf_counter() - started < seconds):
        rounds += 1
        for call, found in zip(calls, times, strict=True):
            begun = time.perf_counter()
            call()
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            found.append(time.perf_counter() - begun)
    return times
