"""Slurm's commands, asked for their answer."""

import os
import re
import shutil
import subprocess

from cellmap_pipe.errors import CellmapError

ANSWER_SECONDS = 30.0
# What users set to have Slurm answer them otherwise: other columns, states and partitions, other dates.
HABITS = ("SQUEUE_", "SINFO_", "SACCT_", "SLURM_TIME_FORMAT")


class SlurmError(CellmapError):
    """A command of Slurm is missing, fails or does not answer; the message names it and what it said."""


def installed(program: str = "sbatch") -> bool:
    """Return whether this machine has the command."""
    return shutil.which(program) is not None


def ask(*command: str, seconds: float = ANSWER_SECONDS) -> str:
    """Return what a command of Slurm prints. Raises SlurmError if it is missing, fails or takes too long."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(HABITS)}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=environment, check=False)
    except FileNotFoundError:
        raise SlurmError(f"{command[0]} is not installed here; a login node of the cluster has it") from None
    except OSError as error:
        raise SlurmError(f"`{' '.join(command)}` could not be started: {error}") from None
    except subprocess.TimeoutExpired:
        raise SlurmError(f"`{' '.join(command)}` did not answer within {seconds:g} s; Slurm is down or busy") from None
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split()) or f"exit status {done.returncode}"
        raise SlurmError(f"`{' '.join(command)}` failed: {said}")
    return done.stdout


def seconds_of(duration: str) -> int | None:
    """Return the seconds of a duration as Slurm writes it; None for UNLIMITED, and for what is no duration.

    days-hours[:minutes[:seconds]], hours:minutes:seconds, minutes:seconds, or minutes.
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", duration)
    if match is None:
        return None
    first, second, third = (int(part or 0) for part in match.groups()[1:])
    if match[1] is not None or match[4] is not None:
        hours, minutes, seconds = first, second, third
    else:
        hours, minutes, seconds = 0, first, second
    return ((int(match[1] or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
