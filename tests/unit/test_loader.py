"""Batches are the same for any number of workers and ranks; their memory is reused, but not while they are in use."""

import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from training_case import CLASSES, SETTINGS, write_store

from cellmap_pipe.errors import ContractError
from cellmap_pipe.prepare.layout import BLOCKED, MAPPED, BlockedVolume, MappedVolume
from cellmap_pipe.prepare.store import Store
from cellmap_pipe.training import loader as loader_module
from cellmap_pipe.training.loader import Batch, Loader
from cellmap_pipe.training.sampling import Patch, Patches, Sampler

CROPS = ["set-0/crop0", "set-1/crop1"]


@pytest.fixture(scope="module")
def indices(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {layout: write_store(tmp_path_factory.mktemp(layout), layout=layout) for layout in (MAPPED, BLOCKED)}


def open_loader(
    index: Path,
    *,
    last: int = 5,
    workers: int = 1,
    rank: int = 0,
    world: int = 1,
    patch: tuple[int, int, int] = (12, 40, 16),  # larger than the crops along one axis
    **settings: Any,
) -> Loader:
    patches = Patches(Store(index), CROPS, CLASSES, patch)
    sampler = Sampler(patches, seed=3, centred_fraction=0.5, class_power=-0.5, planes="all")
    options = {**SETTINGS, **settings}
    return Loader(sampler, options, rank=rank, world=world, first=2, last=last, pinned=False, workers=workers)


def contents(batch: Batch) -> list[Any]:
    """Return all that a batch holds, copied."""
    arrays = [batch.image.numpy().tobytes(), batch.label.numpy().tobytes()]
    return [batch.step, batch.size, *arrays, batch.crops, batch.variations, batch.mixed]


def stream(*arguments: Any, **options: Any) -> list[list[Any]]:
    loader = open_loader(*arguments, **options)
    try:
        return [contents(batch) for batch in loader]
    finally:
        loader.close()


def wait_until_full(loader: Loader) -> None:
    """Return when every buffer that is not in use holds a batch."""
    with loader._changed:
        assert loader._changed.wait_for(lambda: not loader._free and len(loader._ready) > len(loader._threads), 10)


def threads_of_loaders() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("loader")]


@pytest.mark.parametrize("workers", [2, 5])
@pytest.mark.parametrize("layout", [MAPPED, BLOCKED])
@pytest.mark.parametrize("patch", [(12, 40, 16), (1, 40, 16)])
def test_batches_do_not_depend_on_workers_or_layout(
    indices: dict[str, Path], patch: tuple[int, int, int], layout: str, workers: int
) -> None:
    expected = stream(indices[MAPPED], last=9, accumulate=2, patch=patch)
    assert [step for step, *_ in expected] == [step for step in range(2, 9) for _ in range(2)]
    assert any(mixed for *_, mixed in expected)
    assert stream(indices[layout], last=9, accumulate=2, workers=workers, patch=patch) == expected


def test_batches_go_on_where_an_earlier_loader_ended(indices: dict[str, Path]) -> None:
    assert stream(indices[MAPPED], last=20)[:3] == stream(indices[MAPPED], last=5)


def test_ranks_and_passes_share_the_stream_of_one_process(indices: dict[str, Path]) -> None:
    def samples(**options: Any) -> dict[int, list[tuple[Any, ...]]]:
        """Return each step's samples: voxels, variation and, where it is mixed, share and voxels of the partner."""
        loader = open_loader(indices[MAPPED], mixup={"probability": 0.5, "alpha": 0.4}, **options)
        found: dict[int, list[tuple[Any, ...]]] = {}
        for batch in loader:
            rows = [
                (image.numpy().tobytes(), label.numpy().tobytes(), crop, variation)
                for image, label, crop, variation in zip(
                    batch.image, batch.label, batch.crops, batch.variations, strict=True
                )
            ]
            partners = {row: (share, rows[partner]) for row, partner, share in batch.mixed}
            found.setdefault(batch.step, []).extend((rows[row], partners.get(row)) for row in range(batch.size))
        loader.close()
        return found

    whole = samples(batch=8, accumulate=1)
    parts = [samples(batch=2, accumulate=2, rank=rank, world=2, workers=2) for rank in range(2)]
    assert list(whole) == [2, 3, 4]
    for step, expected in whole.items():
        first, second = (part[step] for part in parts)
        assert first[:2] + second[:2] + first[2:] + second[2:] == expected
        assert not {sample[0][:2] for sample in first} & {sample[0][:2] for sample in second}


def test_batch_is_left_alone_until_the_next_is_asked_for(indices: dict[str, Path]) -> None:
    loader = open_loader(indices[MAPPED], last=30, workers=3)
    seen, memory = [], set()
    for batch in loader:
        before = contents(batch)
        if batch.step < 10:
            wait_until_full(loader)
        assert contents(batch) == before
        seen.append(before)
        memory.add(batch.image.data_ptr())
    loader.close()
    assert seen == stream(indices[MAPPED], last=30)
    assert len(memory) <= 3 + 1 + loader_module.AHEAD  # and none is taken anew


@pytest.mark.parametrize("patch", [(12, 40, 16), (5, 7, 5)])
def test_labels_of_large_tables_are_shipped_as_signed_integers(
    indices: dict[str, Path], monkeypatch: pytest.MonkeyPatch, patch: tuple[int, int, int]
) -> None:
    options: dict[str, Any] = {"last": 3, "patch": patch, "batch": 1, "mixup": {"probability": 0.0, "alpha": 0.4}}
    plain = stream(indices[MAPPED], **options)
    table = Store.table
    grown = lambda store, crop: np.concatenate([table(store, crop), np.full((44, len(CLASSES)), 2, np.uint8)])  # noqa: E731
    monkeypatch.setattr(Store, "table", grown)
    loader = open_loader(indices[MAPPED], **options)
    (batch,) = loader
    loader.close()
    assert batch.label.dtype == torch.int16
    assert batch.label.to(torch.uint8).numpy().tobytes() == plain[0][3]


@pytest.mark.parametrize(("size", "last", "axes"), [((12, 40, 16), 5, {0}), ((1, 40, 16), 9, {0, 1, 2})])
def test_what_is_copied_from_blocks_was_asked_for_one_batch_earlier(
    indices: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    size: tuple[int, int, int],
    last: int,
    axes: set[int],
) -> None:
    calls: list[tuple[str, Any]] = []
    copy, prefetch = Patches.copy, BlockedVolume.prefetch

    def note_copy(patches: Patches, patch: Patch, image: Any, label: Any) -> None:
        copy(patches, patch, image, label)
        calls.append(("copied", patch))

    def note_hint(volume: BlockedVolume, origin: Any, shape: Any) -> None:
        prefetch(volume, origin, shape)
        calls.append(("hinted", (volume.path.name, tuple(origin), tuple(shape))))

    monkeypatch.setattr(Patches, "copy", note_copy)
    monkeypatch.setattr(BlockedVolume, "prefetch", note_hint)
    monkeypatch.setattr(MappedVolume, "prefetch", lambda *_: pytest.fail("a mapped store needs no hint"))
    stream(indices[MAPPED], patch=size)
    calls.clear()
    batches = stream(indices[BLOCKED], last=last, patch=size, mixup={"probability": 0.0, "alpha": 0.4})
    assert len(batches) == last - 2
    assert [kind for kind, _ in calls] == (["hinted"] * 4 + ["copied"] * 2) * (last - 3) + ["copied"] * 2
    store = Store(indices[BLOCKED])
    hinted = [box for kind, box in calls if kind == "hinted" and "image" in box[0]]
    copied = [patch for kind, patch in calls if kind == "copied"][2:]
    assert {patch.axis for patch in copied} == axes
    for (name, origin, shape), patch in zip(hinted, copied, strict=True):
        crop = CROPS[patch.crop]
        assert Path(store.crops[crop]["files"]["image"]["path"]).name == name
        box = np.insert(size[1:], patch.axis, size[0]).tolist()
        ends = zip(patch.origin, box, store.shape(crop), strict=True)
        assert origin == tuple(max(start, 0) for start in patch.origin)
        assert tuple(map(sum, zip(origin, shape, strict=True))) == tuple(min(a + n, size) for a, n, size in ends)


@pytest.mark.parametrize("workers", [1, 3])
def test_damage_is_raised_where_the_batch_is_awaited(tmp_path: Path, workers: int) -> None:
    index = write_store(tmp_path)
    settings = {"batch": 1, "mixup": {"probability": 0.0, "alpha": 0.4}}
    crops = [batch[4] for batch in stream(index, last=30, **settings)]
    intact = crops.index([1])
    assert intact > 1
    image = Store(index).crops[CROPS[1]]["files"]["image"]
    (tmp_path / "store" / image["path"]).write_bytes(bytes(image["size"]))
    loader = open_loader(index, last=30, workers=workers, **settings)
    batches = iter(loader)
    assert [next(batches).crops for _ in range(intact)] == crops[:intact]
    with pytest.raises(ContractError, match=r"crop1_image.*cannot be read"):
        next(batches)
    loader.close()
    assert not threads_of_loaders()


def test_closing_ends_workers_that_wait_for_memory(indices: dict[str, Path]) -> None:
    loader = open_loader(indices[MAPPED], last=1000, workers=3)
    next(iter(loader))
    wait_until_full(loader)
    assert len(threads_of_loaders()) == 3
    loader.close()
    assert not threads_of_loaders()
    loader.close()  # once more does no harm


def test_closing_ends_who_waits_for_a_batch(indices: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    asked, go_on = threading.Event(), threading.Event()

    def stuck(*_: Any) -> None:
        asked.set()
        assert go_on.wait(10)

    monkeypatch.setattr(Patches, "copy", stuck)
    loader = open_loader(indices[MAPPED])
    received: list[Batch] = []
    reader = threading.Thread(target=lambda: received.extend(loader))
    reader.start()
    assert asked.wait(10)
    closer = threading.Thread(target=loader.close)
    closer.start()
    reader.join(10)
    assert not reader.is_alive()
    assert not received
    go_on.set()
    closer.join(10)
    assert not closer.is_alive()
    assert not threads_of_loaders()


def test_threads_end_with_the_last_batch(indices: dict[str, Path]) -> None:
    loader = open_loader(indices[MAPPED], workers=4)
    assert len(list(loader)) == 3
    for thread in loader._threads:
        thread.join(10)
    assert not threads_of_loaders()
    empty = open_loader(indices[MAPPED], last=2)  # a training that is finished already
    assert list(empty) == []
    empty.close()
