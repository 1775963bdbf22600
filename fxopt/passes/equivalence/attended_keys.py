"""The keys that attention reads, and those of them that a call computes itself."""

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from fxopt.ir.program import Program, module_path
from fxopt.rewrite.builder import Builder

aten = torch.ops.aten
READ_ELSEWHERE = "its keys are read elsewhere too"


@dataclass(frozen=True)
class AttendedKeys:
    """Keys [B, Hkv, T, h] that some attentions read.

    Attributes:
        read: the node that they read.
        attentions: the readers.
        new: the keys of this call's tokens; None where something else reads them too.
        past: the graph input that holds the keys of earlier calls, if there is one.
    """

    read: Node
    attentions: tuple[Node, ...]
    new: Node | None
    past: Node | None


def attended_keys(program: Program) -> list[AttendedKeys]:
    """All keys of a program, each once, in the order of the graph."""
    readers: dict[Any, list[Node]] = {}
    for node in program.nodes(torch.ops.fxopt.attention.default):
        readers.setdefault(node.args[1], []).append(node)
    return [
        AttendedKeys(key, tuple(attentions), *_newest(program, key, attentions))
        for key, attentions in readers.items()
    ]


def _newest(program: Program, key: Any, attentions: list[Node]) -> tuple[Node | None, Node | None]:
    output = program.graph.output_node()
    if any(list(node.args).count(key) != 1 for node in attentions):
        return None, None  # they are queries or values too
    if key.target is not aten.cat.default:
        return (key, None) if set(key.users) == set(attentions) else (None, None)
    parts: Any = key.args[0]
    plain = (
        len(parts) == 2
        and parts[0].op == "placeholder"
        and all(user is key or user.target is aten.sym_size.int for user in parts[0].users)
    )
    alone = len(parts[-1].users) == 1 and all(
        user is output or user in attentions for user in key.users
    )
    return (parts[1], parts[0]) if plain and alone else (None, None)


def replace_new_keys(
    program: Program, keys: AttendedKeys, made_by: str, operator: Any, *arguments: Any
) -> Node:
    """Let all that reads the new keys read `operator(new keys, *arguments)`."""
    assert keys.new is not None  # noqa: S101 - the caller looked
    readers = list(keys.new.users)
    first = min(readers, key=list(program.graph.nodes).index)
    made = Builder(program, first, made_by).call(operator, keys.new, *arguments)
    for reader in readers:
        reader.replace_input_with(keys.new, made)
    made.meta["module_path"] = module_path(keys.attentions[0])
    return made
