"""What every test runs under, and where larger test data lies."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of this process, before torch is loaded, and of those that tests start

import multiprocessing
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from torchmae import visualize

# Deadlines would make slow machines fail; derandomised examples make two runs of the suite the same.
settings.register_profile("torchmae", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("torchmae")

# What processes of tests load, once for all of a worker: each is forked from a process that has loaded it.
multiprocessing.set_forkserver_preload(
    [
        *("torchmae.api", "torchmae.report.table", "torchmae.training.sharded", "torchmae.evaluation.augment"),
        *("torch.distributed.fsdp", "torch._dynamo", "torch.utils.tensorboard"),
        *("sklearn.datasets", "sklearn.linear_model", "matplotlib.figure"),
    ]
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The longest first: no process is left alone with one of them at the end.
    items.sort(key=lambda item: "docs" not in item.path.parts)


@pytest.fixture(autouse=True, scope="session")
def _threads() -> None:
    # Small tensors gain nothing from threads, and lose much where other work shares the processor.
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _no_pictures_of_features() -> Iterator[None]:
    # They take seconds at the end of each run, and hundreds of runs nobody looks at; `pictures_of_features` draws them.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torchmae.runs.write_pictures", lambda *_: [])
        yield


@pytest.fixture(autouse=True, scope="session")
def _no_waiting_for_the_disk() -> Iterator[None]:
    # No test outlives a power cut, and thousands of files are flushed, 6 ms each.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(scope="module")
def pictures_of_features() -> Iterator[None]:
    """Runs end as they do outside the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torchmae.runs.write_pictures", visualize.write_pictures)
        yield


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _cache_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHMAE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of data sets that are too large for the repository."""
    given = os.environ.get("TORCHMAE_TEST_DATA")
    folder = Path(given) if given else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no test data at {folder}: set TORCHMAE_TEST_DATA to a folder of data sets")
    return folder
