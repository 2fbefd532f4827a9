"""Memory that workers keep for their batches: taken, given back, written over only then."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from torchmae.data import loader as module
from torchmae.data.layouts import open_splits
from torchmae.data.loader import PER_WORKER, ImageLoader, Plan, Slots, View
from torchmae.data.reading import BadFiles
from torchmae.data.transforms import Normalisation


def images(*values: int, size: int = 6) -> list[torch.Tensor]:
    return [torch.full((size, 2), value, dtype=torch.uint8) for value in values]


@pytest.fixture
def in_worker_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "get_worker_info", lambda: SimpleNamespace(id=1))


def test_the_main_process_has_memory_of_its_own() -> None:
    batch, slot = Slots(2).stack(images(1, 2))
    assert slot is None
    assert batch.tolist() == torch.stack(images(1, 2)).tolist()
    Slots(0).give_back(None)


@pytest.mark.usefixtures("in_worker_1")
def test_a_worker_without_slots_takes_new_memory() -> None:
    assert Slots(0).stack(images(1, 2))[1] is None


@pytest.mark.usefixtures("in_worker_1")
def test_what_is_given_back_is_written_over_and_nothing_else() -> None:
    slots = Slots(3)
    held = [slots.stack(images(i, i + 1)) for i in range(PER_WORKER)]
    assert [slot for _, slot in held] == list(range(PER_WORKER, 2 * PER_WORKER))
    assert all(batch.is_shared() for batch, _ in held)
    spare, none = slots.stack(images(77, 78))
    assert none is None
    slots.give_back(held[2][1])
    again, slot = slots.stack(images(99))  # a smaller batch
    assert slot == held[2][1]
    assert again.data_ptr() == held[2][0].data_ptr()
    assert again.tolist() == torch.stack(images(99)).tolist()
    for i in (0, 1, 3):
        assert held[i][0].tolist() == torch.stack(images(i, i + 1)).tolist()
    assert spare.tolist() == torch.stack(images(77, 78)).tolist()


@pytest.mark.usefixtures("in_worker_1")
@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.float32])
def test_batches_of_another_size_and_type(dtype: torch.dtype) -> None:
    slots = Slots(2)
    small, slot = slots.stack(images(3))
    slots.give_back(slot)
    large = [torch.arange(24).view(4, 3, 2).to(dtype), torch.arange(24, 48).view(4, 3, 2).to(dtype)]
    batch, again = slots.stack(large)
    assert again == slot
    assert (batch.dtype, batch.shape) == (dtype, (2, 4, 3, 2))
    assert batch.tolist() == torch.arange(48).view(2, 4, 3, 2).to(dtype).tolist()
    assert small.tolist() == torch.stack(images(3)).tolist()  # larger ones have other memory


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_are_those_of_one_process(tmp_path: Path, workers: int) -> None:
    random = np.random.default_rng(0)
    for i in range(50):
        Image.fromarray(random.integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(tmp_path / f"{i:02d}.png")
    source = open_splits(str(tmp_path))["train"]

    def batches(num_workers: int) -> list[torch.Tensor]:
        """Of three epochs, all held until the end: far more than there are slots."""
        loader = ImageLoader(
            source,
            None,
            view=View((8, 8), (0.2, 1.0), (0.75, 1.3333), True),
            normalisation=Normalisation((0.5,) * 3, (0.25,) * 3),
            device=torch.device("cpu"),
            num_workers=num_workers,
            bad=BadFiles(50, 0),
        )
        return [batch.images for batch in loader.train_batches(Plan(50, 4, 0), 0, 39)]

    alone, together = batches(0), batches(workers)
    assert len(alone) == len(together) == 39
    assert all(torch.equal(*pair) for pair in zip(alone, together, strict=True))
