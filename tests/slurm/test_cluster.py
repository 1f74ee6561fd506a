"""The cluster of these tests: it comes up, refuses company, comes up again after a kill, and leaves nothing behind."""

import contextlib
import json
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from .cluster import CONFIGURATION, NODES, PORT, Cluster, ClusterError


def waited(until: Callable[[], object], seconds: float = 120) -> bool:
    limit = time.monotonic() + seconds
    while not until():
        if time.monotonic() > limit:
            return False
        time.sleep(0.1)
    return True


def processes_that_name(text: str) -> list[str]:
    """Return the command lines of the processes that have a text in their arguments or environment."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                arguments = (entry / "cmdline").read_bytes()
                if text.encode() in arguments + (entry / "environ").read_bytes():
                    found.append(arguments.replace(b"\0", b" ").decode(errors="replace"))
    return found


def test_the_nodes_take_jobs(cluster):
    # a job of another test may run on it
    states = dict(line.split() for line in cluster.run("sinfo", "-h", "-N", "-o", "%N %T").stdout.splitlines())
    assert set(states) == set(NODES) and set(states.values()) <= {"idle", "mixed", "allocated"}


def test_a_second_cluster_is_refused_in_one_line(cluster, tmp_path):
    with pytest.raises(ClusterError) as caught:
        Cluster(tmp_path).start()
    assert str(caught.value).startswith("/etc/slurm/slurm.conf exists") and "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
    assert cluster.run("scontrol", "ping").returncode == 0


def test_a_cluster_that_runs_is_not_started_twice(cluster):
    with pytest.raises(ClusterError, match=f"port {PORT} is taken"):
        Cluster(cluster.folder).start()
    assert CONFIGURATION.resolve() == cluster.folder / "slurm.conf"
    assert cluster.run("scontrol", "ping").returncode == 0


def test_a_slurm_that_is_set_up_already_is_refused_and_left_alone(cluster, tmp_path):
    configuration = tmp_path / "slurm.conf"
    configuration.write_text("ClusterName=theirs\n")
    second = Cluster(tmp_path / "state", port=PORT + 50, configuration=configuration)
    with pytest.raises(ClusterError, match="another Slurm is set up here"):
        second.start()
    second.stop()
    assert configuration.read_text() == "ClusterName=theirs\n"


@pytest.mark.parametrize("offset", [0, 2, 5])
def test_a_port_that_is_taken_is_named_before_anything_starts(cluster, tmp_path, offset):
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", PORT + 50 + offset))
        other.listen()
        with pytest.raises(ClusterError) as caught:
            Cluster(tmp_path / "state", port=PORT + 50, configuration=tmp_path / "slurm.conf").start()
    assert str(caught.value).startswith(f"port {PORT + 50 + offset} is taken") and "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_killed_cluster_starts_again_and_the_end_leaves_nothing_behind(cluster, tmp_path):
    """Also what a job left behind, out of Slurm's sight, and with the accounting as it was before the kill."""
    mounts = Path("/proc/mounts").read_text()
    configuration = tmp_path / "slurm.conf"
    folder = tmp_path / "state"
    with Cluster(folder, port=PORT + 50, configuration=configuration) as killed:
        assert configuration.readlink() == folder / "slurm.conf"
        first = killed.run("sbatch", "--parsable", "-D", str(tmp_path), "--wrap", "true").stdout.strip()
        assert waited(lambda: "COMPLETED" in state(killed, first))
        for pid in json.loads((folder / "pids.json").read_text()).values():
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)

        again = Cluster(folder, port=PORT + 50, configuration=configuration)
        with again:
            assert "COMPLETED" in state(again, first)
            # the job ends, and its child, in a session of its own, does not
            script = "setsid bash -c 'touch here; exec sleep 600' & while ! test -e here; do sleep 0.1; done"
            second = again.run("sbatch", "--parsable", "-D", str(tmp_path), "--wrap", script).stdout.strip()
            assert int(second) > int(first)
            assert waited((tmp_path / "here").exists)
            assert any("sleep 600" in command for command in processes_that_name(f"{folder}/"))
    assert not processes_that_name(f"{folder}/")
    assert not configuration.is_symlink()
    assert Path("/proc/mounts").read_text() == mounts
    for port in again.ports:
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", port)), port
    assert cluster.run("scontrol", "ping").returncode == 0  # the other one goes on


def state(cluster: Cluster, job: str) -> str:
    return cluster.run("sacct", "-X", "-n", "-j", job, "-o", "state", check=False).stdout
