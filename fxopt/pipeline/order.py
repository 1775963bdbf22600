"""Whether the passes of a recipe stand in an order that can work, judged before any runs."""

import json
from collections.abc import Sequence

from fxopt.ir.program import Level
from fxopt.passes.base import Pass
from fxopt.pipeline.options import known_passes
from fxopt.pipeline.problems import Problem


def order_problems(built: Sequence[Pass | None]) -> list[Problem]:
    """What is wrong with an order of passes; None stands for one that could not be built."""
    found = [*_declared_order(built), *_missing(built), *_rounding(built)]
    return [*found, *_levels(built), *_repeats(built)]


def _declared_order(built: Sequence[Pass | None]) -> list[Problem]:
    problems: list[Problem] = []
    for index, item in enumerate(built):
        if item is None:
            continue
        earlier = {other.name for other in built[:index] if other is not None}
        later = {other.name for other in built[index + 1 :] if other is not None}
        for verb, names in (("after", later & {*item.after}), ("before", earlier & {*item.before})):
            for name in sorted(names - {item.name}):
                reason = f"{item.name} must run {verb} {name}; exchange them."
                problems.append(Problem(f"passes[{index}].{item.name}", reason))
    return problems


def _missing(built: Sequence[Pass | None]) -> list[Problem]:
    """Passes that only prepare something, with nothing after them that uses it."""
    problems: list[Problem] = []
    for index, item in enumerate(built):
        if item is None or not item.followed_by or None in built:
            continue
        if not {other.name for other in built[index + 1 :] if other} & {*item.followed_by}:
            makers = " or ".join(item.followed_by)
            reason = f"{item.name} has no effect by itself; put {makers} after it."
            problems.append(Problem(f"passes[{index}].{item.name}", reason))
    return problems


def _rounding(built: Sequence[Pass | None]) -> list[Problem]:
    """What must run before `quantize` must run before every pass that rounds, by whatever name."""
    problems: list[Problem] = []
    for index, item in enumerate(built):
        if item is None or "quantize" not in item.before:
            continue
        for other in built[:index]:
            if other is None or other.name in item.before or item.name in other.after:
                continue  # said elsewhere
            if other.output_level is Level.QUANTIZED:
                reason = f"{item.name} must run before {other.name}; exchange them."
                problems.append(Problem(f"passes[{index}].{item.name}", reason))
    return problems


def _levels(built: Sequence[Pass | None]) -> list[Problem]:
    if None in built:
        return []  # an unknown pass may be the one that raises the level
    level = Level.CAPTURED
    problems: list[Problem] = []
    for index, item in enumerate(built):
        assert item is not None  # noqa: S101 - excluded above
        place = f"passes[{index}].{item.name}"
        if level < item.input_level:
            reason = f"needs a {item.input_level.name.lower()} program and gets a "
            makers = [n for n, p in known_passes().items() if p.output_level == item.input_level]
            advice = f"Put {' or '.join(makers)} before it." if makers else "No pass makes one."
            problems.append(Problem(place, f"{reason}{level.name.lower()} one. {advice}"))
        if item.output_level is not None and item.output_level < level:
            reason = f"comes too late: the program is {level.name.lower()} by then"
            problems.append(Problem(place, f"{reason}. Move it to the front."))
        level = max(level, item.output_level or level)
    return problems


def _repeats(built: Sequence[Pass | None]) -> list[Problem]:
    """A pass with the same options again, where the second run has nothing left to do."""
    problems: list[Problem] = []
    for index, item in enumerate(built):
        if item is None:
            continue
        alike = [i for i in range(index) if _key(built[i]) == _key(item)]
        if alike and (alike[-1] == index - 1 or item.output_level is not None):
            reason = f"repeats passes[{alike[-1]}] with the same options; remove one."
            problems.append(Problem(f"passes[{index}].{item.name}", reason))
    return problems


def _key(item: Pass | None) -> str:
    if item is None:
        return ""
    return json.dumps([item.name, item.options()], sort_keys=True, default=str)
