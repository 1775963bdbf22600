from collections.abc import Iterator

import pytest
import torch

import fxopt.kernels
from fxopt.kernels import KERNELS, native_status


@pytest.fixture(scope="session")
def native() -> None:
    """The native kernels, built; the tests of machines without a compiler end here."""
    if not fxopt.kernels.ensure_native():
        pytest.skip(native_status().reason)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def own_threads() -> Iterator[None]:
    """Kernels split their work among threads; on a worker's single one nothing could race.

    Whatever a test sets is put back: with another number the tests that follow would sum in
    another order than the processes they compare themselves with.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(max(before, 2))
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["native", "aten"])
def run(request: pytest.FixtureRequest):
    """Calls an operator by name: the dispatcher with native code, or the ATen stand-in."""
    if request.param == "native":
        request.getfixturevalue("native")
        return lambda name, *args: KERNELS[name].overload(*args)
    return lambda name, *args: (KERNELS[name].aten or KERNELS[name].reference)(*args)
