"""A checkpoint is complete or it is not used."""

import logging
import resource
from pathlib import Path
from typing import Any

import pytest
import torch

from cellmap_pipe.files import file_digest
from cellmap_pipe.training import checkpoint


def state(step: int) -> dict[str, Any]:
    return {"step": step, "weights": torch.full((100,), float(step)), "history": [{"dice": None}]}


def test_newest_is_read_and_the_last_two_are_kept(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path) is None
    for step in (9, 10, 200):
        checkpoint.save(tmp_path, step, state(step))
    assert [path.name[:13] for path in sorted(tmp_path.iterdir())] == ["step000000010", "step000000200"]
    found = checkpoint.latest(tmp_path)
    assert found is not None
    assert found["step"] == 200
    assert torch.equal(found["weights"], state(200)["weights"])
    assert found["history"] == [{"dice": None}]


def test_of_one_step_the_last_is_kept(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, state(1))
    for value in (2, 3, 3):
        path = checkpoint.save(tmp_path, 2, state(value))
    found = checkpoint.latest(tmp_path)
    assert found is not None
    assert found["step"] == 3
    assert [entry.name[:13] for entry in sorted(tmp_path.iterdir())] == ["step000000001", path.name[:13]]


@pytest.mark.parametrize("damage", ["torn", "flipped", "empty"])
def test_damaged_one_is_passed_over_for_the_one_before(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint.save(tmp_path, 1, state(1))
    path = checkpoint.save(tmp_path, 2, state(2))
    data = bytearray(path.read_bytes())
    if damage == "flipped":
        data[len(data) // 2] ^= 1
    path.write_bytes({"torn": data[:-100], "flipped": data, "empty": b""}[damage])
    with caplog.at_level(logging.WARNING):
        found = checkpoint.latest(tmp_path)
    assert found is not None
    assert found["step"] == 1
    assert f"{path} is damaged" in caplog.text


@pytest.mark.parametrize("limit", [0, 500, 3000])
def test_failed_write_leaves_nothing_and_keeps_what_was(tmp_path: Path, limit: int) -> None:
    checkpoint.save(tmp_path, 1, state(1))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        for write in (checkpoint.save, lambda folder, _, content: checkpoint.write_model(folder / "best.pt", content)):
            with pytest.raises(OSError, match="File too large"):
                write(tmp_path, 2, {**state(2), "more": torch.zeros(1000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name[:13] for path in tmp_path.iterdir()] == ["step000000001"]


def test_chosen_steps_are_kept_for_good(tmp_path: Path) -> None:
    for step in (0, 3, 4, 6, 7, 8, 8, 10, 10):
        checkpoint.save(tmp_path, step, state(step), keep_every=4)
    assert [int(path.name[4:13]) for path in sorted(tmp_path.iterdir())] == [4, 8, 10]


def test_damaged_one_of_a_later_step_goes_before_good_ones_do(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 8, state(8))
    checkpoint.save(tmp_path, 10, state(10)).write_bytes(b"torn")
    checkpoint.save(tmp_path, 9, state(9)).write_bytes(b"torn, too")
    found = checkpoint.latest(tmp_path)
    assert found is not None
    assert found["step"] == 8


def test_name_is_the_digest_of_the_bytes_whatever_their_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "SYNC_BYTES", 1000)
    path = checkpoint.save(tmp_path, 1, {"weights": torch.arange(10_000), "empty": torch.zeros(0)})
    assert path.name == f"step000000001-{file_digest(path)[:16]}.pt"
    found = checkpoint.latest(tmp_path)
    assert found is not None
    assert torch.equal(found["weights"], torch.arange(10_000))


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, state(1))
    (tmp_path / ".partial-1234-step000000002-ab.pt").write_bytes(b"half")
    assert checkpoint.latest(tmp_path, clean=True) is not None
    assert len(list(tmp_path.iterdir())) == 1


def test_equal_states_are_equal_bytes(tmp_path: Path) -> None:
    checkpoint.write_model(tmp_path / "a.pt", state(3))
    checkpoint.write_model(tmp_path / "other-name.pt", state(3))
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "other-name.pt").read_bytes()
