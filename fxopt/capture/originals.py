"""A capture runs the model, and runs change some models; this puts everything back."""

import contextlib
from collections.abc import Generator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxopt.errors import CaptureError


@contextlib.contextmanager
def left_as_it_was(model: nn.Module) -> Generator[None]:
    """Capture inside; buffers, attributes and submodules of the model are as before afterwards.

    Raises:
        CaptureError: the capture raised it; it names the buffers that the model wrote to, if any.
    """
    before = _Before(model)
    try:
        yield
    except CaptureError as error:
        if written := before.written():
            raise CaptureError(
                f"{type(model).__name__} writes to its buffers {', '.join(written)} when it runs. "
                "A program holds no such state: every run computes the same. Return the new values "
                f"as outputs, or leave the buffers alone at inference. ({error})"
            ) from error
        raise
    finally:
        before.restore()


class _Before:
    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.attributes = [(vars(module), _copied(vars(module))) for module in model.modules()]
        self.values = [(name, t, t.detach().clone()) for name, t in model.named_buffers()]

    def written(self) -> list[str]:
        """The buffers that hold other values than before, or are other tensors with others."""
        now = dict(self.model.named_buffers())
        return [n for n, _, value in self.values if n in now and not _same(now[n], value)]

    @torch.no_grad()
    def restore(self) -> None:
        for own, saved in self.attributes:
            _put_back(own, saved)
        for _, buffer, value in self.values:
            if not _same(buffer, value):
                buffer.copy_(value)


# The tables of nn.Module itself: parameters, buffers and submodules are replaced in them.
_TABLES = ("_parameters", "_buffers", "_modules")


def _copied(own: Mapping[str, Any]) -> dict[str, Any]:
    return {key: dict(value) if key in _TABLES else value for key, value in own.items()}


def _put_back(own: dict[str, Any], saved: Mapping[str, Any]) -> None:
    for table in _TABLES:
        _refill(own[table], saved[table])
    _refill(own, {key: own[key] if key in _TABLES else value for key, value in saved.items()})


def _refill(own: dict[str, Any], saved: Mapping[str, Any]) -> None:
    if list(own) != list(saved) or any(own[key] is not saved[key] for key in saved):
        own.clear()
        own.update(saved)


def _same(buffer: Tensor, value: Tensor) -> bool:
    if type(buffer) is not Tensor or buffer.is_meta or buffer.is_quantized:
        return True  # nothing to compare
    # Bytes, for NaN is not equal to itself and not every dtype can be compared.
    return torch.equal(_bytes(buffer), _bytes(value))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
