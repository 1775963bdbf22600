"""Hand the weights of a program back to the model that it was captured from."""

import torch
from torch import Tensor, nn

from fxopt.errors import StateDictError
from fxopt.ir.program import CONSTANTS, Level, PassRecord, Program


def original_weights(program: Program, model: nn.Module) -> dict[str, Tensor]:
    """Weights for `model.load_state_dict` with which the model computes what the program does.

    Args:
        program: one to which only passes were applied that change the values of weights.
        model: of the class and configuration that the program was captured from.

    Raises:
        StateDictError: the program computes what no weights of the model can express.
    """
    for record in program.history:
        _check_record(record)
    if program.level > Level.CANONICAL:
        raise StateDictError(
            f"the program is at level {program.level.name}: its integers and kernels are not the "
            "model's. Ask before it is quantized: optimize with a recipe of equivalences only."
        )
    held = _under_all_names(program)
    expected: dict[str, Tensor] = dict(model.state_dict())
    _check_names(held, expected, model)
    result = {name: held[name] if name in held else expected[name].detach() for name in expected}
    for name, value in expected.items():
        _check_entry(name, result[name], value)
    _check_ties(result, model)
    return result


def _check_record(record: PassRecord) -> None:
    if record.beyond_weights:
        raise StateDictError(
            f"pass {record.name!r} did more than change the weights: {record.beyond_weights}. The "
            "original model cannot express that. Leave the pass out, or choose options with which "
            "it only edits weights."
        )
    if record.exactness == "approximate" and record.sites:
        raise StateDictError(
            f"pass {record.name!r} is approximate: with its weights the model would no longer be "
            "the original. Leave the pass out; only equivalences are handed back."
        )


def _under_all_names(program: Program) -> dict[str, Tensor]:
    """Each weight as the model lays it out, tied ones under every name."""
    held: dict[str, Tensor] = {}
    for name, value in program.weights().items():
        turned = program.layouts.get(name) == "transposed"
        held[name] = value.detach().t().contiguous() if turned else value.detach()
    aliases = program.aliases.items()
    return held | {alias: held[name] for alias, name in aliases if name in held}


def _check_names(held: dict[str, Tensor], expected: dict[str, Tensor], model: nn.Module) -> None:
    buffers = dict(model.named_buffers(remove_duplicate=False))
    for name, value in held.items():
        if name in expected or name.startswith(CONSTANTS):
            continue
        if name not in buffers:
            raise StateDictError(
                f"the program holds {name!r} and a {type(model).__name__} has no such weight. Pass "
                "a model of the class and configuration that was optimized."
            )
        if not _equal(value, buffers[name]):
            raise StateDictError(
                f"buffer {name!r} is not saved with the model, and the program's differs from it. "
                "Pass a model with the configuration that was optimized, or leave out the pass "
                "that changed it."
            )


def _check_entry(name: str, value: Tensor, expected: Tensor) -> None:
    if value.shape != expected.shape or value.dtype != expected.dtype:
        raise StateDictError(
            f"weight {name!r} is {list(value.shape)} of {value.dtype}; the model takes "
            f"{list(expected.shape)} of {expected.dtype}. Pass a model with the configuration and "
            "dtype that was optimized."
        )


def _check_ties(result: dict[str, Tensor], model: nn.Module) -> None:
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        other = first.setdefault(id(parameter), name)
        if other == name or name not in result or other not in result:
            continue
        if result[name] is not result[other] and not _equal(result[name], result[other]):
            raise StateDictError(
                f"the program holds {name!r} and {other!r} apart, and the model ties them: one "
                "tensor cannot hold both. Pass a model built with tie_word_embeddings=False."
            )


def _equal(a: Tensor, b: Tensor) -> bool:
    same_kind = a.shape == b.shape and a.dtype == b.dtype
    return same_kind and (a.data_ptr() == b.data_ptr() or torch.equal(a.cpu(), b.cpu()))
