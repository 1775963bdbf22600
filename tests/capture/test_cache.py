"""The cache in a model's result, by whatever name."""

from types import SimpleNamespace

import pytest
import torch
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPast
from transformers.utils import ModelOutput

from fxopt.capture.cache import returned_cache
from fxopt.ir.cache_names import CACHE_NAME, CACHE_NAMES


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_a_result_of_the_models_own_may_use_either_name(name):
    cache = DynamicCache()
    assert returned_cache(SimpleNamespace(**{name: cache})) is cache


def test_a_former_name_that_warns_is_not_read(monkeypatch):
    def warn(output):
        pytest.fail("a deprecated name was read")

    (former,) = {*CACHE_NAMES} - {CACHE_NAME}
    monkeypatch.setattr(ModelOutput, former, property(warn), raising=False)
    cache, hidden = DynamicCache(), torch.zeros(1, 2, 3)
    assert returned_cache(BaseModelOutput(last_hidden_state=hidden)) is None
    assert returned_cache(BaseModelOutputWithPast(**{CACHE_NAME: cache})) is cache
