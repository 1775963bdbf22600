"""Move the weights of a model that is given up to disk, from where they can still come back."""

from collections.abc import Iterator
from typing import Self

import torch
from torch import Tensor, nn

from fxopt.analysis.promotion import on_disk
from fxopt.ir.memory import release_freed_memory
from fxopt.ir.program import Program, iterate_weights

# A file for less costs more than it saves.
_WORTH_A_FILE = 1 << 20


class Parking:
    """Holds replaced weights in temporary files until the model is given up or handed back.

    Once a pass has replaced a weight, the original is needed only to check that pass, and to hand
    the model back if something fails later. Both can be done from a file without a name, which
    the system reads in where it is used and which no memory need be held for.
    """

    def __init__(self) -> None:
        self.held: list[Tensor] = []
        self.parked: list[list[Tensor]] = []  # the model's tensors, those of one storage together

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            self.restore()

    def watch(self, model: nn.Module, captured: Program) -> None:
        """Name the model that is given up, and the program that reads its weights as they are."""
        self.held = [*model.parameters(), *model.buffers(), *captured.weights().values()]

    def park(self, before: Program, after: Program) -> None:
        """Move what `before` and the model hold, and no operator of `after` reads, to disk.

        `after` may be in the middle of a pass: what it still names can be read from the file.
        """
        settled = {_place(tensors[0]) for tensors in self.parked}
        settled |= {_place(tensor) for tensor in _read_weights(after)}
        theirs, still_named = _by_storage(self.held), _by_storage(list(after.weights().values()))
        moved = 0
        for place, mine in _by_storage(list(before.weights().values())).items():
            storage = mine[0].untyped_storage()
            if place in settled or place not in theirs or not _worthwhile(storage):
                continue
            try:
                file = on_disk(_bytes_of(storage)).untyped_storage()
            except OSError:
                break  # no room on the disk: the rest stays in memory
            moved += storage.nbytes()
            _move([*mine, *theirs[place], *still_named.get(place, ())], file)
            self.parked.append(theirs[place])
        if moved:
            release_freed_memory(moved)

    def restore(self) -> None:
        """Bring the model's weights back into memory: it is as it was."""
        for tensors in self.parked:
            stored = _bytes_of(tensors[0].untyped_storage())
            _move(tensors, stored.clone().untyped_storage())
        self.parked.clear()


def _read_weights(program: Program) -> Iterator[Tensor]:
    used = {str(n.target) for n in program.graph.nodes if n.op == "get_attr" and n.users}
    return (tensor for name, tensor in iterate_weights(program.graph_module) if name in used)


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _by_storage(tensors: list[Tensor]) -> dict[int, list[Tensor]]:
    found: dict[int, list[Tensor]] = {}
    for tensor in tensors:
        found.setdefault(_place(tensor), []).append(tensor)
    return found


def _worthwhile(storage: torch.UntypedStorage) -> bool:
    return storage.device.type == "cpu" and storage.nbytes() >= _WORTH_A_FILE


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(storage)  # type: ignore[call-overload]


def _move(tensors: list[Tensor], storage: torch.UntypedStorage) -> None:
    """Let tensors read the same places of another storage."""
    for tensor in tensors:
        empty = torch.empty(0, dtype=tensor.dtype)
        tensor.data = empty.set_(storage, tensor.storage_offset(), tensor.size(), tensor.stride())
