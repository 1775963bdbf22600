"""Walk over a program and collect what the rule of each operator says."""

from typing import Any

from torch.fx import Node

from fxopt.analysis import op_rules
from fxopt.analysis.relations import FIXED, Entry, Kind, Labels, Relations, Unit, sizes
from fxopt.ir.program import Program


def relate(
    program: Program, kind: Kind, unit: Unit, restored: frozenset[str] = frozenset()
) -> Relations:
    """Walk over a program and let each operator's rule speak."""
    relations = Relations(program, kind, unit)
    states = _states(program)
    for node in program.graph.nodes:
        relations.node = node
        operands = node.all_input_nodes
        if node.op == "get_attr" or (operands and relations.from_weights.issuperset(operands)):
            relations.from_weights.add(node)
        if node.op == "placeholder":
            relations.values[node] = _input(relations, node, node.name in states)
        elif node.op == "call_function":
            relations.values[node] = _call(relations, node)
        elif node.op == "output":
            _outputs(relations, node, states, restored)
    relations.node = None
    return relations


def _states(program: Program) -> dict[str, int]:
    """Inputs of the cache by name, with the index of the output that goes on from each."""
    cache = program.signature.cache
    if cache is None:
        return {}
    count = cache.count
    inputs = [node.name for node in program.graph.nodes if node.op == "placeholder"][-count:]
    first = len(program.signature.outputs) - count
    return {name: first + index for index, name in enumerate(inputs)}


def _input(relations: Relations, node: Node, state: bool) -> Labels:
    shape = sizes(node)
    if not state:
        return relations.fixed(len(shape))
    axes = tuple(axis for axis, size in enumerate(shape) if size not in (None, 1))
    labels = relations.fresh([shape[axis] or 1 for axis in axes])
    relations.entries.append(Entry("input", node.name, axes, labels.reshape(-1)))
    full = labels.reshape([n if axis in axes else 1 for axis, n in enumerate(shape)])  # type: ignore[arg-type]
    if relations.unit is not Unit.CHANNEL and relations.kind is not Kind.SCALE and len(axes) > 1:
        for axis in axes[1:]:
            full = relations.collapse(full, axis)
    return full


def _call(relations: Relations, node: Node) -> Any:
    rule = op_rules.rule_of(node.target)
    operands = node.all_input_nodes
    loose = any(_changes(relations, operand) for operand in operands)
    if rule is not None and loose:
        found = rule(relations, node)
        if relations.kind in op_rules.FACTORS or not op_rules.is_by_element(node.target):
            return found
        passed = any(found is relations.values.get(operand) for operand in operands)
        return relations.behind(found) if passed else found  # type: ignore[arg-type]
    for operand in operands if loose else ():
        held = relations.values.get(operand)
        for labels in held if isinstance(held, list) else [relations.labels(operand)]:
            relations.fix(labels, f"{node.target} has no op rule")
    value = node.meta.get("val")
    if isinstance(value, list | tuple):
        return [relations.fixed(getattr(part, "ndim", 0)) for part in value]
    return relations.fixed(len(sizes(node)))


def _changes(relations: Relations, operand: Node) -> bool:
    if operand.op == "get_attr":
        return bool(operand.meta["val"].is_floating_point())
    held = relations.values.get(operand)
    parts = held if isinstance(held, list) else [] if held is None else [held]
    return any((labels != FIXED).any() for labels in parts)


def _outputs(
    relations: Relations, node: Node, states: dict[str, int], restored: frozenset[str]
) -> None:
    results: Any = node.args[0]
    specs = relations.program.signature.outputs
    inputs = {n.name: n for n in relations.program.graph.nodes if n.op == "placeholder"}
    owners = {index: inputs[name] for name, index in states.items()}
    for index, (value, spec) in enumerate(zip(results, specs, strict=True)):
        if not isinstance(value, Node) or not sizes(value):
            continue
        labels = relations.labels(value)
        axes = tuple(axis for axis, size in enumerate(labels.shape) if size > 1)
        if index in owners:
            # What a cache gives back has the axes of what it takes.
            relations.couple(relations.values[owners[index]], labels)
        elif spec.name in restored and len(axes) == 1:
            relations.entries.append(Entry("output", spec.name, axes, labels.reshape(-1)))
        else:
            relations.fix(labels, f"it is the model's output {spec.name!r}")
