"""Apply rules until none fits, owning every change to the graph."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch.fx import Node

from fxopt.errors import PassError
from fxopt.ir.program import Program, Refusal, Site, dtype_of, hints, module_path, shape_of
from fxopt.rewrite.builder import Builder
from fxopt.rewrite.pattern import Match, matches, packet_of, root_packets
from fxopt.rewrite.rule import Rule


def apply_rules(
    program: Program, rules: Sequence[Rule], made_by: str
) -> tuple[list[Site], list[Refusal]]:
    """Apply rules everywhere they fit; each replacement is matched again.

    Nodes are visited in order, roots first found first rewritten; a rule that keeps matching its
    own output is an error of the rule.

    Raises:
        PassError: the rules did not come to an end.
    """
    table: dict[Any, list[tuple[Rule, Any]]] = {}
    for rule in sorted(rules, key=lambda rule: -rule.benefit):
        for pattern in rule.patterns():
            for packet in root_packets(pattern):
                table.setdefault(packet, []).append((rule, pattern))
    sites: list[Site] = []
    refusals: dict[tuple[str, str], Refusal] = {}
    limit = 50 * (len(program.graph.nodes) + 1)
    work = list(program.graph.nodes)
    position = 0
    while position < len(work):
        node = work[position]
        position += 1
        if position > limit:
            raise PassError(f"{made_by}: the rules kept rewriting; last at {node.name!r}.")
        if node._erased or node.op != "call_function":
            continue
        replaced = _rewrite_at(program, node, table, made_by, sites, refusals)
        if replaced:
            # What was made may be a root itself; what reads it comes later in the list anyway.
            work[position:position] = replaced
    alive = {node.name for node in program.graph.nodes}
    return sites, [refusal for (name, _), refusal in refusals.items() if name in alive]


def _rewrite_at(
    program: Program,
    node: Node,
    table: dict[Any, list[tuple[Rule, Any]]],
    made_by: str,
    sites: list[Site],
    refusals: dict[tuple[str, str], Refusal],
) -> list[Node] | None:
    for rule, pattern in table.get(packet_of(node), ()):
        found = next((m for m in matches(pattern, node) if rule.condition(program, m)), None)
        if found is None:
            continue
        reason = rule.check(program, found)
        if reason is not None:
            refusals[node.name, rule.name] = Refusal(f"{module_path(node)} [{node.name}]", reason)
            continue
        path, name = module_path(node), node.name
        created = replace(program, rule, found, made_by)
        sites.append(Site(path, rule.detail or rule.name, name))
        return created
    return None


def replace(program: Program, rule: Rule, found: Match, made_by: str) -> list[Node]:
    """Put a rule's replacement in the place of its root and drop what is no longer used.

    Raises:
        PassError: the replacement has another dtype or shape than the root, or reads the root; the
            rule is wrong.
    """
    root = found.root
    build = Builder(program, root, f"{made_by}/{rule.name}")
    result = rule.rewrite(build, found)
    if (dtype_of(result), hints(shape_of(result))) != (dtype_of(root), hints(shape_of(root))):
        raise PassError(
            f"{build.made_by} replaced {root.name!r} ({dtype_of(root)} {list(shape_of(root))}) by "
            f"{dtype_of(result)} {list(shape_of(result))}. This is a bug of the rule."
        )
    if any(root in node.all_input_nodes for node in build.created):
        raise PassError(f"{build.made_by} made nodes that read {root.name!r}, which they replace.")
    root.replace_all_uses_with(result)
    if result in build.created and not result.meta.get("module_path"):
        result.meta["module_path"] = root.meta.get("module_path", "")
    erase_dead([root, *build.created])
    return [node for node in build.created if not node._erased]


def erase_dead(nodes: Iterable[Node]) -> None:
    """Erase nodes that nothing uses, and whatever only they used; inputs stay."""
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node._erased or node.users or node.op in ("placeholder", "output"):
            continue
        inputs = node.all_input_nodes
        node.graph.erase_node(node)
        stack.extend(inputs)
