"""What all tests share: one thread, fixed seeds, no network, and tests for a GPU that say why they skip."""

import os
import random
import subprocess
from collections.abc import Iterator
from types import SimpleNamespace

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import datasets
import launching
import numpy as np
import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
# Timings belong to bench/: a busy machine must not fail a test.
settings.register_profile("vlaquant", deadline=None, derandomize=True)
settings.load_profile("vlaquant")


@pytest.fixture(autouse=True)
def seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def datasets_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep what is read from temporary directories out of the user's cache."""
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")


@pytest.fixture(autouse=True, scope="session")
def _forked_verification() -> Iterator[None]:
    """Verification happens in a process of its own, as ever, but one that need not import everything again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vlaquant.export.verify.subprocess", SimpleNamespace(run=launching.run_fresh))
        yield


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests about the very process that verification starts."""
    monkeypatch.setattr("vlaquant.export.verify.subprocess", subprocess)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
