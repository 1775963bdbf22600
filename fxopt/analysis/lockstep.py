"""Run a program once over many batches side by side, node by node, while it is being rewritten.

At each node the inputs of all batches are at hand, computed by what stands before it. A pass that
rewrites the node then sees the effect of its earlier rewrites in everything that follows
("true sequential"), and the model runs over the data once, whatever the number of sites.
"""

from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from fxopt.analysis.calibration import Recorder, fitting
from fxopt.analysis.samples import RealTokens, Sample
from fxopt.errors import CalibrationError
from fxopt.ir.program import Program

# Computes a node in another way, from what `load` says of its sources.
Instead = Callable[[Callable[[Node], Any]], Any]


class Lockstep:
    """The values of all batches that nodes further on still read."""

    def __init__(self, program: Program, samples: Sequence[Sample]) -> None:
        self.program = program
        self.samples = samples
        self.real = RealTokens(program)
        self.values: list[dict[Node, Any]] = [{} for _ in samples]
        self.constant: dict[Node, Any] = {}  # what depends on weights alone, until its last use
        self.needed: set[Node] = set()

    def run(
        self,
        visit: Callable[[Node], None],
        looked_at: Iterable[Node] | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        """Call `visit` before each call of the program, then compute it."""
        for node in self.steps(looked_at, recorder):
            visit(node)

    def steps(
        self, looked_at: Iterable[Node] | None = None, recorder: Recorder | None = None
    ) -> Generator[Node]:
        """Each call of the program before it is computed.

        Nodes that are then put in front of it are computed as they are needed. Where `looked_at`
        says at whose inputs the caller looks, nothing is computed or held that leads to none of
        them: logits and caches of all batches may be larger than the model. A `recorder` is shown
        what it wants. Whoever does not ask for all steps closes the iterator: the values of batches
        are held until then.
        """
        order = list(self.program.graph.nodes)
        readers = set(order) if looked_at is None else set(looked_at)
        if recorder is not None:
            readers |= {
                n for n in order if any(s.name in recorder.wanted for s in n.all_input_nodes)
            }
        self.needed = _leading_to(order, readers)
        last = _last_uses(order, self.needed | readers)
        self.begin()
        for node in order:
            if node.op == "call_function":
                yield node
                self.compute(node)
            if recorder is not None:
                self._show(node, recorder)
            self._forget(last.get(node, ()))

    def _show(self, node: Node, recorder: Recorder) -> None:
        for values, sample in zip(self.values, self.samples, strict=True):
            if node in values:
                recorder.add(node, values[node], sample)

    @torch.no_grad()
    def rows(self, node: Node) -> list[Tensor]:
        """A node's value in each batch, over real tokens, as rows [n, channels].

        Raises:
            CalibrationError: a value is not finite.
        """
        found = [
            self.real.rows(node, self._load(node, values, {}), sample)
            for values, sample in zip(self.values, self.samples, strict=True)
        ]
        if not all(bool(torch.isfinite(rows).all()) for rows in found):
            raise CalibrationError(
                f"calibration data drives {node.name!r} to NaN or infinity. Check the data and "
                "the model's dtype."
            )
        return found

    def value_of_weight(self, node: Node) -> Tensor:
        """What a node gives that depends on weights alone."""
        return self._load(node, {}, {})

    def outputs(self, start: Node, instead: Mapping[Node, Instead]) -> Iterator[list[Tensor]]:
        """What each batch would give if some nodes from `start` on were computed in another way.

        To be asked in a visit of `start`, or of the first call after `begin`; what comes before is
        not computed again.
        """
        order = list(self.program.graph.nodes)
        order = order[order.index(start) :]
        last = _last_uses(order, set(order))
        for values in self.values:
            yield self._outputs(values, order, instead, last)

    @torch.no_grad()
    def _outputs(
        self,
        values: dict[Node, Any],
        order: Sequence[Node],
        instead: Mapping[Node, Instead],
        last: Mapping[Node, Sequence[Node]],
    ) -> list[Tensor]:
        made: dict[Node, Any] = {}
        for node in order:
            if node.op != "call_function":
                continue
            own = instead.get(node)
            if own is None:
                made[node] = self._call(node, values, made)
            else:
                made[node] = own(lambda source: self._load(source, values, made))
            for done in last.get(node, ()):
                made.pop(done, None)
        results: Any = order[-1].args[0]
        return [self._load(node, values, made) for node in results]

    def begin(self) -> None:
        """Hand each batch to the program's inputs; `run` does so by itself."""
        inputs = [node for node in self.program.graph.nodes if node.op == "placeholder"]
        for values, sample in zip(self.values, self.samples, strict=True):
            values.update(zip(inputs, sample.inputs, strict=True))

    @torch.no_grad()
    def compute(self, node: Node) -> None:
        """Compute a node as it is now, unless that was done already or nothing needs it."""
        if node not in self.needed or node in self.constant or node in self.values[0]:
            return
        made: dict[Node, Any] = {}  # what was put in front of this node, from weights alone
        if self._from_weights(node):
            self.constant[node] = self._call(node, {}, made)
            return
        for values, sample in zip(self.values, self.samples, strict=True):
            with fitting(sample.inputs):
                values[node] = self._call(node, values, made)

    def _call(self, node: Node, values: dict[Node, Any], made: dict[Node, Any]) -> Any:
        def load(source: Node) -> Any:
            return self._load(source, values, made)

        args: Any = map_arg(node.args, load)
        kwargs: Any = map_arg(node.kwargs, load)
        target: Any = node.target
        return target(*args, **kwargs)

    def _load(self, source: Node, values: dict[Node, Any], made: dict[Node, Any]) -> Any:
        for known in (made, values, self.constant):
            if source in known:
                return known[source]
        if source.op == "get_attr":
            return self.program.weight(str(source.target))
        found = self._call(source, values, made)
        if self._from_weights(source):
            made[source] = found
        return found

    def _from_weights(self, node: Node) -> bool:
        if node.op != "call_function":
            return node.op == "get_attr"
        sources = node.all_input_nodes
        return bool(sources) and all(
            source in self.constant or (source not in self.values[0] and self._from_weights(source))
            for source in sources
        )

    def _forget(self, done: Sequence[Node]) -> None:
        for known in (*self.values, self.constant):
            for node in done:
                known.pop(node, None)


def _leading_to(order: Sequence[Node], readers: Collection[Node]) -> set[Node]:
    """The nodes from which there is a way to some others."""
    found: set[Node] = set()
    for node in reversed(order):
        if node in found or node in readers:
            found.update(node.all_input_nodes)
    return found


def _last_uses(order: Sequence[Node], readers: Collection[Node]) -> dict[Node, list[Node]]:
    """For each node, the values that no reader after it reads."""
    last: dict[Node, Node] = {}
    for node in order:
        for source in node.all_input_nodes if node in readers else ():
            last[source] = node
    found: dict[Node, list[Node]] = {}
    for source, node in last.items():
        found.setdefault(node, []).append(source)
    return found
