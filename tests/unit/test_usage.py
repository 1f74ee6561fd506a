"""What a training takes of the machine is noted beside it, whatever ends it."""

import datetime
import logging
import subprocess
import sys
import time
from dataclasses import replace
from datetime import UTC
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from training_case import finish, start, start_ranks, wait_for_step, write_request

from cellmap_pipe.training.usage import COLUMNS, NAME, Usage, UsageLog, cost, read_usage

MOMENT = datetime.datetime(2026, 11, 22, 7, 0, tzinfo=UTC)
LINE = Usage(
    attempt="a",
    began=MOMENT,
    utc=MOMENT,
    step=10,
    seconds=3600.0,
    steps=10,
    patches=20,
    waiting=0.0,
    memory_gib=1.0,
    gpu_memory_gib=None,
    processes=1,
    device="cpu",
    host="c1801",
    job=None,
)


def test_training_notes_its_start_steps_and_validations_in_every_attempt(tmp_path: Path) -> None:
    request = write_request(tmp_path, max_steps=400, steps_per_epoch=4, batch=2)
    began = datetime.datetime.now(UTC).replace(microsecond=0)
    first = start(request)
    wait_for_step(request, 8, first)
    first.terminate()
    assert finish(first) == [1]
    stopped = read_usage(Path(request["run_dir"]))
    reached = stopped[-1].step
    assert {line.attempt for line in stopped} == {stopped[0].attempt}
    assert (stopped[0].steps, stopped[0].step) == (0, 0)
    assert stopped[0].seconds > 0
    assert sum(line.steps for line in stopped) == reached >= 8
    assert all(began <= line.began <= line.utc <= datetime.datetime.now(UTC) for line in stopped)
    # a validation is a line of its own after the epoch's steps
    ended = next(number for number, line in enumerate(stopped) if line.step == 4)
    assert [line.steps for line in stopped[ended : ended + 2]] == [4, 0]

    second = start(request)
    wait_for_step(request, reached + 4, second)
    second.kill()  # what was done since the last line is lost, and nothing else
    finish(second)
    lines = read_usage(Path(request["run_dir"]))
    assert lines[: len(stopped)] == stopped
    assert cost(lines).attempts == 2
    assert lines[len(stopped)].step == reached
    assert {(line.processes, line.device, line.gpu_memory_gib, line.job) for line in lines} == {(1, "cpu", None, None)}
    assert all(line.patches == 2 * line.steps and 0 <= line.waiting <= 1 and line.memory_gib > 0 for line in lines)
    assert sum(line.seconds for line in stopped) == pytest.approx(
        (stopped[-1].utc - stopped[0].began).total_seconds(), abs=2.1
    )


def test_first_rank_alone_notes_what_all_do(tmp_path: Path) -> None:
    request = write_request(tmp_path, max_steps=4, steps_per_epoch=4)
    assert finish(*start_ranks(request, 2)) == [0, 0], Path(request["log"]).read_text()
    lines = read_usage(Path(request["run_dir"]))
    assert len({line.attempt for line in lines}) == 1
    assert {line.processes for line in lines} == {2}
    assert (sum(line.steps for line in lines), sum(line.patches for line in lines)) == (4, 16)


def test_steps_count_for_the_line_that_follows_them_and_waiting_for_their_time(tmp_path: Path) -> None:
    usage = UsageLog(tmp_path, 4, "NVIDIA L40S")
    usage.count(3, 24, seconds=2.0, waited=0.5)
    usage.count(1, 8, seconds=2.0, waited=0.5)
    usage.write(4, gpu_memory_gib=30.5)
    usage.write(4)
    lines = read_usage(tmp_path)
    assert [(line.steps, line.patches, line.waiting) for line in lines] == [(4, 32, 0.25), (0, 0, 0.0)]
    assert [(line.gpu_memory_gib, line.processes, line.device) for line in lines] == [
        (30.5, 4, "NVIDIA L40S"),
        (None, 4, "NVIDIA L40S"),
    ]


def test_slurm_job_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    UsageLog(tmp_path, 1, "cpu").write(0)
    assert [line.job for line in read_usage(tmp_path)] == ["4711"]


@pytest.mark.parametrize("kept", [1, 30, 60])
def test_line_that_a_kill_cut_short_is_passed_over_and_spoils_no_other(tmp_path: Path, kept: int) -> None:
    UsageLog(tmp_path, 1, "cpu").write(1)
    path = tmp_path / NAME
    whole = path.read_bytes()
    torn = whole.splitlines(keepends=True)[1][:kept]
    path.write_bytes(whole + torn)
    assert [line.step for line in read_usage(tmp_path)] == [1]
    UsageLog(tmp_path, 1, "cpu").write(2)
    assert [line.step for line in read_usage(tmp_path)] == [1, 2]
    assert path.read_bytes().startswith(whole)
    assert path.read_bytes().count(b"\n") == 3


def test_spoilt_line_hides_none_that_follow(tmp_path: Path) -> None:
    UsageLog(tmp_path, 1, 'GPU "A", rev. 1').write(1)
    path = tmp_path / NAME
    spoilt = b'"\xff, then a block of zeros:' + b"\0" * 200_000 + b"\n"
    path.write_bytes(path.read_bytes() + spoilt)
    UsageLog(tmp_path, 1, "cpu").write(2)
    assert [(line.step, line.device) for line in read_usage(tmp_path)] == [(1, 'GPU "A", rev. 1'), (2, "cpu")]


def test_line_that_lacks_only_its_end_is_no_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    UsageLog(tmp_path, 1, "cpu").write(1)
    path = tmp_path / NAME
    path.write_bytes(path.read_bytes()[:-2])  # it would read as a line of job 471
    assert read_usage(tmp_path) == []


def test_torn_header_is_written_anew(tmp_path: Path) -> None:
    (tmp_path / NAME).write_text("attempt,be")
    UsageLog(tmp_path, 1, "cpu").write(7)
    assert (tmp_path / NAME).read_text().splitlines()[0] == ",".join(COLUMNS)
    assert [line.step for line in read_usage(tmp_path)] == [7]


def test_full_disk_costs_one_warning_and_the_next_line_tells_of_that_time(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    usage = UsageLog(tmp_path, 1, "cpu")
    (tmp_path / NAME).symlink_to("/dev/full")
    with caplog.at_level(logging.WARNING):
        usage.count(5, 10, seconds=1.0, waited=0.0)
        usage.write(5)
        time.sleep(0.05)
        usage.write(5)
    assert len(caplog.messages) == 1
    assert "No space left on device" in caplog.messages[0]
    (tmp_path / NAME).unlink()
    usage.count(1, 2, seconds=1.0, waited=1.0)
    usage.write(6)
    (line,) = read_usage(tmp_path)
    assert (line.step, line.steps, line.patches, line.waiting) == (6, 6, 12, 0.5)
    assert line.seconds >= 0.05


def test_training_of_before_has_no_lines_and_costs_nothing_that_is_known(tmp_path: Path) -> None:
    assert read_usage(tmp_path) == []
    nothing = cost([])
    assert (nothing.attempts, nothing.hours, nothing.device) == (0, 0.0, "")
    assert (nothing.patches_per_s, nothing.waiting, nothing.memory_gib, nothing.gpu_memory_gib) == (None,) * 4


def test_cost_adds_up_attempts_and_tells_gpus_from_cpus() -> None:
    lines = [
        replace(LINE, steps=0, patches=0, seconds=1800.0, memory_gib=3.0),
        replace(LINE, steps=90, patches=7200, waiting=0.1),
        replace(LINE, attempt="b", device="NVIDIA L40S", processes=4, seconds=7200.0, gpu_memory_gib=20.0, waiting=0.4),
        replace(LINE, attempt="b", device="NVIDIA L40S", processes=2, seconds=3600.0, gpu_memory_gib=22.0, steps=0),
    ]
    found = cost(lines)
    assert (found.attempts, found.hours) == (2, 4.5)
    assert (found.gpu_hours, found.cpu_hours) == (10.0, 1.5)
    assert found.patches_per_s == pytest.approx((7200 + 20) / 10800)  # the seconds of the lines with steps
    assert found.waiting == pytest.approx(0.3)
    assert (found.memory_gib, found.gpu_memory_gib) == (3.0, 22.0)
    assert found.device == "cpu, NVIDIA L40S"


def test_usage_is_read_without_torch() -> None:
    code = "import sys, cellmap_pipe.training.usage; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
