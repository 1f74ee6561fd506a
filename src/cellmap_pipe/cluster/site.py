"""A Slurm site as Slurm describes it: partitions, their nodes and GPUs, and what the user may use."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from cellmap_pipe.cluster.slurm import SlurmError, ask, seconds_of

# A node in these states takes no job before somebody has looked after it.
OUT_OF_USE = ("down", "drain", "fail", "error", "unknown", "maint", "future", "inval")


@dataclass(frozen=True)
class Node:
    """A machine: CPU cores, memory in MB, and its GPUs by type (in small letters, as Slurm compares them)."""

    name: str
    state: str
    cpus: int
    mem_mb: int
    gpus: Mapping[str, int]

    @property
    def in_use(self) -> bool:
        return not any(word in self.state for word in OUT_OF_USE)


@dataclass(frozen=True)
class Partition:
    """A queue.

    max_minutes: None = no limit. qos, accounts: those it is open to, None = all. own_qos: whose limits hold for every
    job in it, beside those of the job's own.
    """

    name: str
    up: bool
    max_minutes: float | None
    qos: tuple[str, ...] | None
    accounts: tuple[str, ...] | None
    nodes: tuple[Node, ...]
    own_qos: str = ""

    @property
    def gpu_types(self) -> tuple[str, ...]:
        """The types of GPU in the partition, each once."""
        return tuple(dict.fromkeys(name for node in self.nodes for name in node.gpus))


@dataclass(frozen=True)
class Association:
    """What a user may charge: an account, perhaps in one partition only, with these QOS.

    default_qos: that of jobs that name none, empty if Slurm decides. most_jobs: in the queue at once, None = no limit.
    """

    account: str
    partition: str
    qos: tuple[str, ...]
    default_qos: str = ""
    most_jobs: int | None = None


def gpus_of(gres: str) -> dict[str, int]:
    """Return the number of GPUs by type in Slurm's list of generic resources: gpu:l40s:8(S:0-1) -> {l40s: 8}."""
    found: dict[str, int] = {}
    for kind, number in re.findall(r"(?:^|,)gpu:(?:([^:,()]+):)?(\d+)", gres):
        found[kind.lower()] = found.get(kind.lower(), 0) + int(number)
    return found


def partitions() -> dict[str, Partition]:
    """Return the partitions by name. Raises SlurmError if Slurm does not answer."""
    nodes: dict[str, list[Node]] = {}
    for line in ask("sinfo", "--all", "--noheader", "--Node", "--format=%R|%N|%T|%c|%m|%G").splitlines():
        partition, name, state, cpus, memory, gres = line.split("|")
        node = Node(name, state.lower(), _number(cpus), _number(memory), gpus_of(gres))
        nodes.setdefault(partition, []).append(node)
    found = {}
    for line in ask("scontrol", "--all", "--oneliner", "show", "partition").splitlines():
        values = dict(re.findall(r"(\w+)=(\S*)", line))
        limit = seconds_of(values.get("MaxTime", ""))
        if title := values.get("PartitionName"):
            found[title] = Partition(
                name=title,
                up=values.get("State", "UP") == "UP",
                max_minutes=None if limit is None else limit / 60,
                qos=_allowed(values.get("AllowQos", "ALL")),
                accounts=_allowed(values.get("AllowAccounts", "ALL")),
                nodes=tuple(nodes.get(title, ())),
                own_qos=values.get("QoS", "N/A").replace("N/A", ""),
            )
    return found


def associations(user: str) -> list[Association] | None:
    """Return what the user may charge; None where the site keeps no accounts, or does not tell."""
    try:
        listed = ask(
            *["sacctmgr", "--noheader", "--parsable2", "show", "associations", f"user={user}"],
            "format=account,partition,qos,defaultqos,maxsubmitjobs,grpsubmitjobs",
        )
    except SlurmError:
        return None
    rows = [line.split("|") for line in listed.splitlines() if line.count("|") == 5]
    return [
        Association(account, partition, tuple(filter(None, qos.split(","))), default, _least(*limits))
        for account, partition, qos, default, *limits in rows
    ] or None


def most_jobs_by_qos() -> dict[str, int]:
    """Return how many jobs of one user the QOS that limit it take in the queue at once; none where it is not told.

    Where a QOS limits the jobs of all its users together, one user has no more than these.
    """
    columns = "format=name,maxsubmitjobsperuser,grpsubmitjobs"
    try:
        listed = ask("sacctmgr", "--noheader", "--parsable2", "show", "qos", columns)
    except SlurmError:
        return {}
    rows = [line.split("|") for line in listed.splitlines() if line.count("|") == 2]
    return {name: most for name, *limits in rows if (most := _least(*limits)) is not None}


def _least(*limits: str) -> int | None:
    """Return the least of the numbers that sacctmgr gave, which leaves those empty that are not set."""
    return min((int(limit) for limit in limits if limit.isdigit()), default=None)


def _allowed(text: str) -> tuple[str, ...] | None:
    return None if text in ("ALL", "") else tuple(text.split(","))


def _number(text: str) -> int:
    """Return a number of sinfo's, which marks the least of several by a +."""
    digits = re.match(r"\d+", text)
    return int(digits[0]) if digits else 0
