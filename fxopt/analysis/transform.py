"""Apply a symmetry: change the basis of every tensor that follows it, in float64, rounded once.

scale     v[p] <- v[p] s   (or / s for inverse edits; (v + o) s - o where the use adds o)
permute   v[p(c)] <- v[p(order(c))]
rotate    v[p] <- R^T v[p],   R [size, size] per block, orthogonal
centre    v[p] <- v[p] - mean over the coordinates
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fxopt.analysis.relations import Kind
from fxopt.analysis.symmetry import Edit, Symmetry
from fxopt.errors import AnalysisError
from fxopt.ir.program import Program

# How far R R^T may be from the identity.
_ORTHOGONAL = 1e-6

StateChange = Callable[[Tensor], Tensor]


def apply(program: Program, symmetry: Symmetry, transform: Tensor | None = None) -> None:
    """Change the basis of a hidden axis in all weights that hold it.

    Args:
        program: what to edit; its weights are replaced, not written to.
        symmetry: one that `symmetries(program, ...)` found.
        transform: factors [blocks, size] for SCALE and SIGN; an order [blocks, size] of integers
            for PERMUTE (coordinate c takes what stood at order[c]); matrices [blocks, size, size]
            for ROTATE, of determinant 1 where the symmetry is `planar`; None for CENTRE.

    Raises:
        AnalysisError: the transform has the wrong shape, or is not one of the kind.
    """
    change = _checked(symmetry, transform)
    for edit in symmetry.weights:
        old = program.weight(edit.name)
        new = changed(old, edit, symmetry.kind, change)
        program.set_weight(edit.name, new)


def state_changes(symmetry: Symmetry, transform: Tensor | None) -> dict[str, StateChange]:
    """How a cache in the old basis is brought to the new one, by the name of the input."""
    change = _checked(symmetry, transform)

    def of(edit: Edit) -> StateChange:
        return lambda value: changed(value, edit, symmetry.kind, change)

    return {edit.name: of(edit) for edit in symmetry.edits if edit.role == "input"}


def changed(value: Tensor, edit: Edit, kind: Kind, transform: Tensor | None) -> Tensor:
    """One tensor in the new basis, in its own dtype."""
    axes = list(range(len(edit.axes)))
    moved = value.detach().movedim(edit.axes, axes)
    sizes = moved.shape[: len(axes)]
    flat = moved.flatten(0, len(axes) - 1) if axes else moved[None]
    positions = torch.from_numpy(edit.positions)  # [blocks, size, unit]
    if kind in (Kind.PERMUTE, Kind.SLICE):
        assert transform is not None  # noqa: S101 - _checked saw it
        order = transform[:, :, None].expand(positions.shape)
        result = flat.clone()
        result[positions.flatten()] = flat[positions.gather(1, order).flatten()]
    else:
        wide = flat.to(torch.float64) + edit.offset
        wide[positions.flatten()] = _mixed(wide[positions], edit, kind, transform).flatten(0, 2)
        result = (wide - edit.offset).to(value.dtype)
    restored = result.unflatten(0, sizes) if axes else result[0]
    return restored.movedim(axes, edit.axes).contiguous()


def _mixed(picked: Tensor, edit: Edit, kind: Kind, transform: Tensor | None) -> Tensor:
    """New coordinates [blocks, size, unit, ...] out of the old ones."""
    if kind is Kind.CENTRE:
        return picked - picked.mean(1, keepdim=True)
    assert transform is not None  # noqa: S101 - _checked saw it
    if kind is Kind.ROTATE:
        return torch.einsum("bcd,bcu...->bdu...", transform, picked)
    factor = transform.reshape(*transform.shape, *[1] * (picked.dim() - 2))
    return picked / factor if edit.inverse else picked * factor


def _checked(symmetry: Symmetry, transform: Tensor | None) -> Tensor | None:
    if symmetry.kind is Kind.CENTRE:
        return None
    shape = [symmetry.blocks, symmetry.size]
    expected = [*shape, symmetry.size] if symmetry.kind is Kind.ROTATE else shape
    if transform is None or list(transform.shape) != expected:
        found = "nothing" if transform is None else f"shape {list(transform.shape)}"
        raise AnalysisError(
            f"a {symmetry.kind.value} of {symmetry.path} needs a transform of shape {expected} and "
            f"got {found}."
        )
    if symmetry.kind in (Kind.PERMUTE, Kind.SLICE):
        _check_order(symmetry, transform)
        return transform.long()
    exact = transform.double()
    if not bool(torch.isfinite(exact).all()) or (
        symmetry.kind is Kind.SCALE and not bool((exact > 0).all())
    ):
        raise AnalysisError(
            f"the factors for {symmetry.path} are not all positive and finite; a "
            f"{symmetry.kind.value} cannot be undone with them."
        )
    if symmetry.kind is Kind.ROTATE:
        _check_rotation(symmetry, exact)
    return exact


def _check_rotation(symmetry: Symmetry, matrices: Tensor) -> None:
    unit = torch.eye(symmetry.size, dtype=matrices.dtype)
    if float((matrices @ matrices.mT - unit).abs().max()) > _ORTHOGONAL:
        raise AnalysisError(f"the matrices for {symmetry.path} are not orthogonal.")
    if symmetry.planar and not bool((torch.linalg.det(matrices) > 0).all()):
        raise AnalysisError(
            f"the matrices for {symmetry.path} reflect; rotary embedding turns pairs of these "
            "channels, so that only rotations (determinant 1) leave the function as it is."
        )


def _check_order(symmetry: Symmetry, order: Tensor) -> None:
    wanted = torch.arange(symmetry.size).expand(symmetry.blocks, -1)
    if not torch.equal(order.long().sort(1).values, wanted):
        raise AnalysisError(
            f"the order for {symmetry.path} is not a permutation of {symmetry.size} coordinates in "
            f"each of {symmetry.blocks} blocks."
        )


def random_orders(symmetry: Symmetry, seed: int) -> Tensor:
    """A permutation per block, different from the identity where there is one."""
    generator = torch.Generator().manual_seed(seed)
    rows: list[Tensor] = []
    for _ in range(symmetry.blocks):
        order = torch.randperm(symmetry.size, generator=generator)
        rows.append(order if not torch.equal(order, order.sort().values) else order.roll(1))
    return torch.stack(rows)
