"""Logging of one workflow job: everything into the rule's log file, one line naming the fault at its end."""

import logging
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"

# In a run directory: what all attempts of the training said. Snakemake deletes a job's own log before each.
ALL_ATTEMPTS = "train.log"
ATTEMPT = "attempt of process"  # where the words of the next one begin


def log_to(path: str) -> None:
    """Send the library's log records to the file `path`, which is begun anew."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    logging.basicConfig(filename=path, filemode="w", level=logging.INFO, format=FORMAT, force=True)
    logging.captureWarnings(True)


@contextmanager
def also_in(path: Path) -> Iterator[None]:
    """Append the log records of the block to the file `path`, too, which keeps what it holds."""
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter(FORMAT))
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()


@contextmanager
def job(snakemake: Any) -> Iterator[None]:
    """Log the job of a workflow script; on an exception write the traceback, then one `ERROR` line, and exit with 1.

    The line reads `ERROR <rule> <wildcards>: what, where, remedy` and goes to the log and to standard error.
    """
    path = snakemake.log[0]
    log_to(path)
    try:
        yield
    except Exception as error:
        wildcards = ",".join(f"{key}={value}" for key, value in snakemake.wildcards.items())
        message = " ".join(str(error).split()) or type(error).__name__
        line = f"ERROR {snakemake.rule} {wildcards or '-'}: {message}"
        logging.shutdown()
        with open(path, "a") as stream:
            stream.write(traceback.format_exc())
            stream.write(line + "\n")
        print(line, file=sys.stderr)
        sys.exit(1)
