"""A real Slurm cluster on this machine, that imitates Longleaf: partitions, QOS, an account, pretended L40S GPUs.

Debian's munged, mariadbd, slurmdbd, slurmctld and one slurmd per pretended node, all on 127.0.0.1, without systemd,
with all state in one folder. `python tests/slurm/cluster.py start FOLDER`, `... stop FOLDER`, `with Cluster(folder):`.
Needs root and the packages of PACKAGES.
"""

import contextlib
import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
PACKAGES = ("munge", "mariadb-server", "slurmdbd", "slurm-wlm", "slurm-wlm-mysql-plugin")
PROGRAMS = ("munged", "mariadbd", "mariadb-install-db", "slurmdbd", "slurmctld", "slurmd", "sacctmgr")

# slurm-jobstep deletes SLURM_CONF with all other SLURM_* variables before its inner srun, which then looks here.
CONFIGURATION = Path("/etc/slurm/slurm.conf")
PORT = 27100  # of slurmctld; those of slurmdbd, MariaDB and the nodes follow
NODES = {"g1801l4001": 8, "g1801l4002": 8, "c1801": 0, "c1802": 0}  # by name, with L40S GPUs

PROFILE = yaml.safe_load((ROOT / "profiles/longleaf/config.v9+.yaml").read_text())
ACCOUNT = PROFILE["default-resources"]["slurm_account"]
QOS = "gpu_access"

SLURM_CONF = r"""
ClusterName=longleaf
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CryptoType=crypto/munge
# 127.0.0.1 alone, never 0.0.0.0
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={folder}/ctld
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
MailProg={folder}/mail
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=1
# without control groups: the memory in use is looked at every second
JobAcctGatherParams=OverMemoryKill
ReturnToService=2
# the machine is smaller than what its nodes pretend
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_min_interval=0,batch_sched_delay=0,sched_interval=2
KillWait={kill_wait}
OverTimeLimit=0
MinJobAge=300
PropagateResourceLimits=NONE
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
# a job that its partition would never run is refused at once
EnforcePartLimits=ALL
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=localhost
AccountingStoragePort={dbd_port}
AccountingStoragePass={folder}/munge/socket
AccountingStorageTRES=gres/gpu,gres/gpu:l40s
AccountingStoreFlags=job_comment
AccountingStorageEnforce=associations,limits,qos
{nodes}
PartitionName=general Nodes=c1801 Default=YES State=UP MaxTime=11-00:00:00 DefaultTime=01:00:00 DefMemPerCPU=4000
PartitionName=l40-gpu Nodes=g1801l40[01-02] State=UP MaxTime=6-00:00:00 DefaultTime=01:00:00 DefMemPerCPU=4000 \
    AllowQos={qos}
# a node whose owners end the jobs of others
PartitionName=owners Nodes=c1802 State=UP MaxTime=1-00:00:00 PriorityTier=2
PartitionName=spare Nodes=c1802 State=UP MaxTime=1-00:00:00 PriorityTier=1 PreemptMode=CANCEL
"""

SLURMDBD_CONF = """
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={dbd_port}
CommunicationParameters=NoInAddrAny
SlurmUser=root
LogFile={folder}/log/slurmdbd.log
PidFile={folder}/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={sql_port}
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm_acct_db
CommitDelay=0
"""

SQL = """
CREATE DATABASE IF NOT EXISTS slurm_acct_db;
CREATE USER IF NOT EXISTS 'slurm'@'127.0.0.1' IDENTIFIED BY 'slurm';
CREATE USER IF NOT EXISTS 'slurm'@'localhost' IDENTIFIED BY 'slurm';
GRANT ALL ON slurm_acct_db.* TO 'slurm'@'127.0.0.1';
GRANT ALL ON slurm_acct_db.* TO 'slurm'@'localhost';
"""


def why_not() -> str | None:
    """Return why there can be no cluster here, or None."""
    if os.getuid():
        return "a Slurm cluster needs root"
    if missing := [name for name in PROGRAMS if shutil.which(name) is None]:
        return f"{', '.join(missing)} not installed: apt-get install -y --no-install-recommends {' '.join(PACKAGES)}"
    return None


class ClusterError(Exception):
    """The cluster does not come up; the message ends with what its daemons said last."""


class Cluster:
    """The cluster with its state in `folder`; runs during a `with` block.

    kill_wait: seconds between SIGTERM and SIGKILL at a job's end; a training must have saved by then on a machine that
    does much else. A second cluster beside this one has other ports, from `port`, and another link to its
    `configuration`; Snakemake's jobs find only that of CONFIGURATION.
    """

    def __init__(
        self, folder: Path, kill_wait: int = 60, *, port: int = PORT, configuration: Path = CONFIGURATION
    ) -> None:
        self.folder = folder
        self.kill_wait = kill_wait
        self.configuration = configuration
        self.ports = range(port, port + 3 + len(NODES))
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "LC_ALL": "C"}
        self._pids: dict[str, int] = {}

    def __enter__(self) -> "Cluster":
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start all daemons and wait until every node takes jobs. Raises ClusterError."""
        self._refuse_another()
        try:
            self._write()
            self._munge()
            self._database()
            self._accounting()
            self._controller()
        except BaseException:
            self.stop()
            raise

    def _refuse_another(self) -> None:
        """Raise ClusterError if a Slurm is set up here, or one of the ports is taken."""
        link = self.configuration
        if link.exists() and not self._linked():
            raise ClusterError(
                f"{link} exists ({link.resolve()}): another Slurm is set up here; if it is one of these tests', end it:"
                f" python tests/slurm/cluster.py stop {link.resolve().parent}"
            )
        for port in self.ports:
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind(("127.0.0.1", port))
                except OSError:
                    raise ClusterError(
                        f"port {port} is taken: `ss -ltnp` shows by which process; stop it, it may be another cluster"
                    ) from None

    def _linked(self) -> bool:
        """Return whether the configuration that Slurm's commands find is this cluster's."""
        return self.configuration.is_symlink() and self.configuration.readlink() == self.folder / "slurm.conf"

    def stop(self) -> None:
        """End the jobs, the daemons and whatever jobs left behind; only what this cluster started is touched."""
        self._pids = {**self._recorded(), **self._pids}
        if self._alive("slurmctld"):
            self.run("scancel", "--user", pwd.getpwuid(os.getuid()).pw_name, check=False)
            for _ in range(2):
                with contextlib.suppress(ClusterError):
                    self._wait(15, lambda: not self.run("squeue", "-h", check=False).stdout.strip(), "the jobs' end")
                    break
                # Slurm would do so only after `kill_wait`, and its daemons wait for that
                self._kill(set(self.leftovers()) - set(self._pids.values()))
        for name in list(reversed(self._pids)):
            self._end(name)
        self._kill(self.leftovers())
        if self._linked():
            self.configuration.unlink()

    def run(self, *command: str, check: bool = True, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        """Return a finished Slurm command, with its output as text."""
        return subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=timeout, check=check
        )

    def add(self, *words: str) -> None:
        """Have sacctmgr add what these words say, unless it is there already. Raises ClusterError."""
        done = self.run("sacctmgr", "-i", "add", *words, check=False)
        if done.returncode and "exists" not in done.stdout + done.stderr and "Nothing new" not in done.stdout:
            raise ClusterError(f"sacctmgr add {' '.join(words)}: {done.stdout}{done.stderr}")

    def leftovers(self) -> list[int]:
        """Return the processes of jobs and daemons of this cluster that still run."""
        mark = f"{self.folder}/".encode()
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) in (os.getpid(), os.getppid()):
                continue
            with contextlib.suppress(OSError):
                environment = (entry / "environ").read_bytes().split(b"\0")
                arguments = (entry / "cmdline").read_bytes()
                of_daemon = b"slurm" in arguments[:40] and mark in arguments
                of_job = any(part.startswith(b"SLURM_JOB_ID=") for part in environment)
                if of_daemon or (of_job and any(part.startswith(b"SLURM_CONF=" + mark) for part in environment)):
                    found.append(int(entry.name))
        return found

    def _write(self) -> None:
        """Write the configuration into the folder."""
        for name in ("log", "ctld", "munge", "dev", *(f"spool-{node}" for node in NODES)):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        (self.folder / "ctld").chmod(0o700)
        (self.folder / "munge").chmod(0o755)
        names: dict[str, Any] = {
            "folder": self.folder,
            "host": socket.gethostname().split(".")[0],
            "kill_wait": self.kill_wait,
            "qos": QOS,
            "port": self.ports[0],
            "dbd_port": self.ports[1],
            "sql_port": self.ports[2],
        }
        lines, gres = [], ["AutoDetect=off"]
        for index, (node, gpus) in enumerate(NODES.items()):
            shape = "Sockets=2 CoresPerSocket=32 ThreadsPerCore=1 CPUs=64 RealMemory=1000000"
            line = f"NodeName={node} NodeHostname={names['host']} NodeAddr=127.0.0.1 Port={self.ports[3 + index]} "
            lines.append(line + shape + (f" Gres=gpu:l40s:{gpus}" if gpus else ""))
            for gpu in range(gpus):  # links, of which Slurm takes the numbers: CUDA_VISIBLE_DEVICES is set by them
                link = self.folder / "dev" / f"nvidia{gpu}"
                link.unlink(missing_ok=True)
                link.symlink_to("/dev/null")
            if gpus:
                gres.append(f"NodeName={node} Name=gpu Type=l40s File={self.folder}/dev/nvidia[0-{gpus - 1}]")
        (self.folder / "slurm.conf").write_text(SLURM_CONF.format(nodes="\n".join(lines), **names))
        (self.folder / "gres.conf").write_text("\n".join(gres) + "\n")
        (self.folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
        (self.folder / "slurmdbd.conf").write_text(SLURMDBD_CONF.format(**names))
        (self.folder / "slurmdbd.conf").chmod(0o600)
        mail = self.folder / "mail"  # what Slurm would send lands in a file
        mail.write_text(f'#!/bin/sh\nprintf "%s\\n" "$*" >>{self.folder}/log/mail.txt\n')
        mail.chmod(0o755)
        self.configuration.parent.mkdir(parents=True, exist_ok=True)
        if self.configuration.is_symlink():
            self.configuration.unlink()  # of this cluster, which was killed, or of one whose folder is gone
        self.configuration.symlink_to(self.folder / "slurm.conf")

    def _munge(self) -> None:
        key = self.folder / "munge" / "key"
        if not key.exists():
            key.touch(mode=0o600)
            key.write_bytes(os.urandom(128))
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        options = [f"--{name}={self.folder}/munge/{file}" for name, file in files.items()]
        self._daemon("munged", "munged", "--foreground", "--force", "--num-threads=2", *options)
        self._ready(60, "munged", "munge", "-n", "-S", f"{self.folder}/munge/socket")

    def _database(self) -> None:
        folder = self.folder / "sql"
        # As root, like all of this cluster: pytest closes its folders to other users whenever another pytest begins.
        if not (folder / "mysql").is_dir():
            folder.mkdir(exist_ok=True)
            self.run(
                *["mariadb-install-db", "--no-defaults", "--user=root", f"--datadir={folder}", "--skip-test-db"],
                "--auth-root-authentication-method=normal",
                timeout=300,
            )
        self._daemon(
            *["mariadbd", "mariadbd", "--no-defaults", "--user=root", f"--datadir={folder}"],
            *[f"--socket={folder}/socket", f"--pid-file={folder}/pid", "--bind-address=127.0.0.1"],
            *[f"--port={self.ports[2]}", "--innodb-buffer-pool-size=64M", "--innodb-lock-wait-timeout=900"],
            "--innodb-flush-log-at-trx-commit=2",  # what was recorded survives a kill
        )
        client = ["mariadb", "--no-defaults", "-S", f"{folder}/socket", "-u", "root"]
        self._ready(60, "mariadbd", *client, "-e", "SELECT 1")
        self.run(*client, "-e", SQL)

    def _accounting(self) -> None:
        """Start slurmdbd, up to three times: it was seen not to come up once, for no cause that it told."""
        for attempt in range(3):
            self._daemon("slurmdbd", "slurmdbd", "-D")
            try:
                self._ready(30, "slurmdbd", "sacctmgr", "-n", "list", "cluster")
                break
            except ClusterError:
                if attempt == 2:
                    raise
                self._end("slurmdbd")
        user = pwd.getpwuid(os.getuid()).pw_name
        for words in (
            ["cluster", "longleaf"],
            ["qos", QOS],
            ["account", ACCOUNT, "Description=lab", "Organization=lab"],
            ["user", user, f"Account={ACCOUNT}", f"DefaultAccount={ACCOUNT}", f"QOS=normal,{QOS}"],
        ):
            self.add(*words)

    def _controller(self) -> None:
        self._daemon("slurmctld", "slurmctld", "-D")
        self._ready(120, "slurmctld", "scontrol", "ping")
        for node in NODES:
            self._daemon(f"slurmd-{node}", "slurmd", "-D", "-N", node)

        def ready() -> bool:
            states = self.run("sinfo", "-h", "-N", "-o", "%N %T", check=False).stdout.split("\n")
            return {state.split()[0] for state in states if state.endswith(" idle")} == set(NODES)

        self._wait(120, ready, "the nodes")

    def _daemon(self, name: str, *command: str) -> None:
        with open(self.folder / "log" / f"{name}.out", "ab") as out:
            process = subprocess.Popen(
                command,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        self._pids[name] = process.pid
        (self.folder / "pids.json").write_text(json.dumps(self._pids))

    def _recorded(self) -> dict[str, int]:
        path = self.folder / "pids.json"
        recorded: dict[str, int] = json.loads(path.read_text()) if path.is_file() else {}
        return recorded

    def _alive(self, name: str) -> bool:
        """Return whether a daemon runs: its number, as the program that it was."""
        try:
            program = Path(f"/proc/{self._pids.get(name, 0)}/exe").readlink().name
        except OSError:
            return False
        return name.split("-")[0] in program

    def _kill(self, pids: Iterable[int]) -> None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _end(self, name: str) -> None:
        """End a daemon, which may be a child of this process or not."""
        pid = self._pids[name]
        for number, seconds in ((signal.SIGTERM, 15.0), (signal.SIGKILL, 5.0)):
            if not self._alive(name):
                break
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
            with contextlib.suppress(ClusterError):
                self._wait(seconds, lambda: self._gone(name), f"the end of {name}")
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)
        del self._pids[name]

    def _gone(self, name: str) -> bool:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self._pids[name], os.WNOHANG)
        return not self._alive(name)

    def _ready(self, seconds: float, name: str, *command: str) -> None:
        """Wait until a command succeeds, or fail at once if the daemon that it asks has ended."""

        def answers() -> bool:
            if self._gone(name):
                raise ClusterError(f"{name} ended by itself\n{self._said(name)}")
            try:
                return not self.run(*command, check=False, timeout=10).returncode
            except subprocess.TimeoutExpired:
                return False

        try:
            self._wait(seconds, answers, name)
        except ClusterError as error:
            raise ClusterError(f"{error}\n{self._said(name)}") from None

    def _said(self, name: str) -> str:
        texts = [path.read_text(errors="replace")[-2000:] for path in sorted((self.folder / "log").glob(f"{name}.*"))]
        return "\n".join(texts)

    def _wait(self, seconds: float, until: Callable[[], Any], what: str) -> None:
        limit = time.monotonic() + seconds
        while not until():
            if time.monotonic() > limit:
                raise ClusterError(f"waited {seconds:g} s for {what} in vain")
            time.sleep(0.1)


def main(verb: str, folder: str) -> int:
    """Start a cluster that outlives this process, or stop one."""
    if reason := why_not():
        sys.stderr.write(reason + "\n")
        return 1
    cluster = Cluster(Path(folder).resolve())
    if verb == "start":
        try:
            cluster.start()
        except ClusterError as error:
            sys.stderr.write(f"{error}\n")
            return 1
        sys.stdout.write(f"export SLURM_CONF={folder}/slurm.conf\n")
    else:
        cluster.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
