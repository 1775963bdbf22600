import shutil
from pathlib import Path

import pytest

from tests.tiny import save, small_program


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "small"
    save(path, small_program(), generation_config={"max_length": 5})
    return path


@pytest.fixture
def copied(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))
