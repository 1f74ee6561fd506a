import os
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from training_case import finish, in_process

from cellmap_pipe.training.owner import start_ticks
from cellmap_pipe.training.siblings import alive, leave_with


def wait(sibling: int, said: str) -> None:
    """Wait in the middle of nothing, watching a process; note what was set up."""
    leave_with({sibling: start_ticks(sibling)}, threading.Event(), look=0.05, grace=0.2)
    Path(said).write_text("watching")
    time.sleep(100)


def test_a_rank_that_waits_for_one_that_is_gone_leaves(tmp_path):
    first = in_process(time.sleep, 100)
    second = in_process(wait, first.pid, str(tmp_path / "said"))
    while not (tmp_path / "said").exists():
        assert second.is_alive()
        time.sleep(0.01)
    assert first.is_alive() and second.is_alive()
    began = time.monotonic()
    first.kill()
    assert finish(second) == [1]
    assert time.monotonic() - began < 60  # and not the hundred seconds that it would wait
    finish(first)


def test_nobody_leaves_once_the_training_is_over():
    over = threading.Event()
    over.set()
    gone = {os.getpid(): (start_ticks(os.getpid()) or 0) + 1}  # a number that another process has by now
    assert not alive(gone)
    leave_with(gone, over, look=0.01, grace=0.01)
    time.sleep(0.2)


def test_a_single_process_has_no_siblings_to_miss():
    assert alive({})
