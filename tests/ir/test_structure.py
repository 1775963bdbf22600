"""Nested data comes back with its own classes, also where two models name theirs alike."""

import dataclasses
import json
from typing import Any, NamedTuple

import pytest
import torch
from transformers.utils import ModelOutput

from fxopt.ir.structure import flatten, in_order, leaf_names, unflatten


class Pair(NamedTuple):
    first: Any
    second: Any


def output_class():
    @dataclasses.dataclass
    class MyOutput(ModelOutput):
        logits: torch.Tensor | None = None

    return MyOutput


def test_two_models_may_name_their_results_alike():
    classes = [output_class(), output_class()]
    structures = [flatten(one(logits=torch.ones(2)), []) for one in classes]
    assert [type(unflatten(one, [torch.ones(2)])) for one in structures] == classes
    stored = json.loads(json.dumps(structures[0]))
    assert stored == structures[0]
    assert isinstance(unflatten(stored, [torch.ones(2)]), ModelOutput)


@pytest.mark.parametrize(
    "value", [Pair(torch.ones(2), 3), torch.max(torch.ones(2, 3), -1)], ids=["own", "torch"]
)
def test_named_tuples_keep_their_names(value):
    leaves: list[torch.Tensor] = []
    structure = flatten(value, leaves)
    assert type(unflatten(structure, leaves)) is type(value)
    stored = json.loads(json.dumps(structure))
    back = unflatten(stored, leaves)
    assert type(back).__name__ == type(value).__name__
    assert all(getattr(back, name) is not None for name in structure["fields"])
    assert set(leaf_names(structure)) <= set(structure["fields"])


def test_dicts_are_brought_to_the_order_of_a_structure():
    structure = flatten(([{"a": 1, "b": {"c": 2, "d": 3}}],), [])
    other = ([{"b": {"d": 3, "c": 2}, "a": 1}],)
    assert flatten(other, []) != structure
    assert flatten(in_order(other, structure), []) == structure
    assert in_order(([{"a": 1}],), structure) == ([{"a": 1}],)
