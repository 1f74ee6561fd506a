"""Ranks of one machine that notice when one of them is gone.

With NCCL a rank whose sibling died may wait for it in the middle of a step, deaf to signals, until torchrun kills it:
ten minutes, so that a last checkpoint is not cut off. The GPUs would idle, and whoever asked would get no answer.
"""

import os
import threading
from collections.abc import Mapping

from cellmap_pipe.training.owner import start_ticks

LOOK_SECONDS = 5.0

# A rank that is not in the middle of a step reports what happened, and saves, in this time.
GRACE_SECONDS = 20.0


def alive(siblings: Mapping[int, int | None]) -> bool:
    """Return whether all processes live. siblings: the start of each, in clock ticks, by its number."""
    return all(started is not None and start_ticks(pid) == started for pid, started in siblings.items())


def leave_with(
    siblings: Mapping[int, int | None],
    over: threading.Event,
    *,
    look: float = LOOK_SECONDS,
    grace: float = GRACE_SECONDS,
) -> None:
    """Have this process leave, with status 1, `grace` seconds after one of the siblings is gone, until `over` is set.

    look: seconds between two looks at them.
    """

    def watch() -> None:
        while not over.wait(look):
            if not alive(siblings):
                if not over.wait(grace):
                    os.write(2, f"process {os.getpid()} leaves, as another process of the training is gone\n".encode())
                    os._exit(1)
                return

    threading.Thread(target=watch, name="siblings", daemon=True).start()
