"""Snakemake itself as a job: runs of profiles/longleaf/head.sh on a real Slurm, with a small workflow of their own."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .cluster import ROOT, Cluster

BIN = Path(sys.executable).parent
HEAD = "profiles/longleaf/head.sh"

# The job waits for a file, so that the test decides when it ends; it fails if two of it run at once.
SNAKEFILE = """
rule all:
    input: "done.txt"
    localrule: True

rule work:
    output: "work.txt"
    resources: mem_mb=600, runtime=30
    shell:
        "mkdir running; echo $SLURM_JOB_ID >> starts.txt; trap 'rmdir running; exit 1' TERM; "
        "for i in $(seq 6000); do if test -e go; then break; fi; sleep 0.2; done; "
        "rmdir running; cp go {output}"

rule gather:
    input: rules.work.output
    output: "done.txt"
    localrule: True
    shell: "cp {input} {output}"
"""


class Head:
    """A run of head.sh in a folder of its own."""

    def __init__(self, cluster: Cluster, folder: Path, *options: str) -> None:
        self.cluster = cluster
        self.folder = folder
        self.log = folder / "head.log"
        (folder / "Snakefile").write_text(SNAKEFILE)
        environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SNAKEMAKE"))},
            "SLURM_CONF": str(cluster.folder / "slurm.conf"),
            "CELLMAP_ORPHAN_SECONDS": "1",
            "CELLMAP_STOP_SECONDS": "6",  # the plugin for Slurm sleeps longer
            "PATH": f"{BIN}:{os.environ['PATH']}",
        }
        waits = ["--slurm-init-seconds-before-status-checks", "1", "--seconds-between-status-checks", "1"]
        waits += ["--latency-wait", "5", "--slurm-logdir", str(folder / "slurm_logs")]
        done = subprocess.run(
            [
                *["sbatch", "--parsable", f"--output={self.log}", "--mem=1G", "--cpus-per-task=1", *options, HEAD],
                *["all", "--snakefile", str(folder / "Snakefile"), "--directory", str(folder), *waits],
            ],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        self.job = done.stdout.strip()

    def state(self) -> str:
        return self.cluster.run("squeue", "-h", "-j", self.job, "-o", "%T", check=False).stdout.strip()

    def jobs(self, states: str = "PENDING,RUNNING,COMPLETING") -> list[str]:
        """Return the jobs in the queue that this head submitted. states: without COMPLETING not those that end."""
        lines = self.cluster.run("squeue", "-h", "-t", states, "-o", "%i %j").stdout.splitlines()
        return [line.split()[0] for line in lines if f" cellmap-{self.job}_" in line]

    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def wait(self, what: str, until: Callable[[], Any], seconds: float = 600) -> None:
        limit = time.monotonic() + seconds
        while not until():
            assert time.monotonic() < limit, f"waited in vain for {what}; {self.state()}\n{self.said()}"
            time.sleep(0.2)

    def working(self) -> bool:
        return (self.folder / "running").is_dir() and (self.folder / "starts.txt").exists()

    def skip_the_delay(self) -> None:
        """Let a job that was queued again start now, for an hour: Slurm's delay of two is not what is tested."""
        self.wait("the job back in the queue", lambda: self.state() == "PENDING")
        time.sleep(1.5)  # its new credential must be younger than the end of the old one
        self.cluster.run("scontrol", "update", f"JobId={self.job}", "StartTime=now", "TimeLimit=60")

    def let_finish(self) -> None:
        (self.folder / "go").write_text("worked\n")

    def wait_for_the_end(self) -> None:
        self.wait("the end", lambda: not self.state() or self.state() in ("COMPLETED", "FAILED"))

    def outcome(self) -> str:
        """Return how Slurm's records say that the head job ended."""
        command = ("sacct", "-n", "-X", "-P", "-j", self.job, "-o", "State")
        self.wait("the record", lambda: self.cluster.run(*command).stdout.split()[-1:] not in (["RUNNING"], []))
        return self.cluster.run(*command).stdout.split()[-1]

    def starts(self) -> int:
        return len((self.folder / "starts.txt").read_text().split())


@contextmanager
def heads(cluster: Cluster, folder: Path) -> Iterator[Callable[..., Head]]:
    """Yield what makes runs of head.sh; they are ended, with the jobs that they submitted, after the block."""
    made: list[Head] = []

    def make(*options: str) -> Head:
        place = folder / str(len(made))
        place.mkdir()
        made.append(Head(cluster, place, *options))
        return made[-1]

    try:
        yield make
    finally:
        for head in made:
            cluster.run("scancel", head.job, *head.jobs(), check=False)
            head.wait("the end of its jobs", lambda head=head: not head.jobs())


def story(cluster: Cluster, folder: Path) -> dict[str, Any]:
    """Run head.sh to its end, past its walltime, past a kill, and until it is ended, at once; return what was seen."""
    told: dict[str, Any] = {}
    with heads(cluster, folder) as make:
        # an option that the head job was given by its environment would have its jobs refused
        normal = make("--export=ALL,SBATCH_QOS=no_such_qos")
        # Slurm looks every 30 s and tells up to so much sooner: after 45 to 75 s. Of one minute it might tell a job
        # that has just begun, before head.sh can hear it.
        limited, killed = make("--signal=B:USR1@45", "--time=2"), make("--mail-user=me@unc.edu")
        # the plugin for Slurm may sleep as long
        ended = make("--export=ALL,CELLMAP_STOP_SECONDS=180")
        for head in (normal, killed, ended):
            head.wait("its first job", head.working)

        # somebody ends it
        cluster.run("scancel", "--batch", "--signal=TERM", ended.job)

        # a normal run
        normal.let_finish()

        # its node is lost: no process of it lives on, and Slurm queues it again
        for process in processes_of(killed.job):
            os.kill(process, signal.SIGKILL)
        killed.wait("its end", lambda: killed.state() != "RUNNING")
        cluster.run("scontrol", "requeue", killed.job)
        (told["orphan"],) = killed.jobs()

        # its own walltime
        limited.wait("the requeue", lambda: "queued again" in limited.said())
        told["left by the walltime"] = limited.jobs("PENDING,RUNNING")

        killed.skip_the_delay()
        limited.skip_the_delay()
        limited.let_finish()
        known = f"waits for jobs of the start before, whose work counts: {told['orphan']} "
        killed.wait("what it says of the orphan", lambda: known in killed.said())
        told["beside the orphan"] = killed.jobs()
        killed.let_finish()

        for head in (normal, limited, killed, ended):
            head.wait_for_the_end()
        told["left by the end"] = ended.jobs("PENDING,RUNNING")
        outcomes = {head: head.outcome() for head in (normal, limited, killed, ended)}
    return {**told, "normal": normal, "limited": limited, "killed": killed, "ended": ended, "outcomes": outcomes}


def processes_of(job: str) -> list[int]:
    """Return the processes that belong to the head job alone, by the file that their output goes to."""
    listed = subprocess.run(["pgrep", "-f", f"cellmap-{job}$|job0*{job}/slurm_script"], capture_output=True, text=True)
    return [int(pid) for pid in listed.stdout.split()]
