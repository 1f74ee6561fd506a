"""The jobs that wait and run on the cluster: which rule and wildcards each is, and why it waits, in words."""

import datetime
import re
from dataclasses import dataclass
from pathlib import Path

from cellmap_pipe.cluster.slurm import ask, seconds_of

# The names of the rules' wildcards, in the order in which the executor joins their values by `_`.
WILDCARDS = {
    "convert": ("grid", "shard"),
    "ceiling": ("grid", "shard"),
    "chunk": ("grid", "shard"),
    "nnunet": ("grid",),
    "network_check": ("model",),
    "train": ("model", "fold"),
    "predict": ("model", "fold", "subset", "shard"),
    "ensemble": ("subset", "fold"),
    "tune": ("source",),
    "segment": ("source", "fold", "subset"),
    "evaluate": ("source", "fold"),
}

COMMENT = re.compile(r"rule_(?P<rule>.+?)(?:_wildcards_(?P<values>.*))?")

# %k last: what a comment of others holds is nobody's business here
FORMAT = "%i|%T|%r|%P|%M|%l|%S|%N|%Z|%k"

# Why a job waits (squeue's Reason), by regular expression, first match first; {name}: what the expression caught.
REASONS = (
    ("Priority", "other jobs come first"),
    ("Resources", "the next in line; waits for a node with what it asks for to become free"),
    ("None", "not looked at by the scheduler yet"),
    ("BeginTime", "waits for its time to begin; after a requeue that is two minutes"),
    ("Dependency|DependencyNeverSatisfied", "waits for another job that it depends on"),
    ("JobHeldUser", "held; `scontrol release JOBID` lets it go"),
    ("JobHeldAdmin", "held by an administrator; ask them"),
    ("JobHoldMaxRequeue|.*[Ll]aunch.*held.*", "held after it failed to start too often; `scontrol release JOBID`"),
    (
        "(QOS|Assoc|Grp|Max).*(GRES|TRES|Cpu|CPU|Mem|Node|Billing).*",
        "the limit of what may be used at once is reached ({0}); waits until other jobs end",
    ),
    ("(QOS|Assoc).*(Jobs|Submit).*", "the limit of jobs at once is reached ({0}); waits until other jobs end"),
    ("(QOS|Assoc).*Wall.*", "asks for a longer walltime than its QOS or account allows ({0}); lower `runtime`"),
    ("InvalidQOS|QOSNotAllowed|InvalidAccount", "{0}: will never run; correct slurm_account or qos in the profile"),
    ("PartitionTimeLimit", "asks for a longer walltime than its partition allows; lower `runtime`"),
    ("PartitionNodeLimit|PartitionConfig|BadConstraints|AccountNotAllowed", "{0}: its partition will never run it"),
    ("PartitionDown|PartitionInactive", "its partition is switched off"),
    (
        "ReqNodeNotAvail.*|Nodes required for job are DOWN.*|NodeDown",
        "the nodes that could run it are down or reserved; an announced maintenance, perhaps (`scontrol show res`)",
    ),
    ("Reservation.*", "waits for its reservation to begin"),
    ("Licenses", "waits for a licence"),
)


@dataclass(frozen=True)
class Job:
    """One job that a Snakemake submitted and that waits or runs.

    state: Slurm's word, PENDING or RUNNING for most. rule: "" for a job that no Snakemake submitted. wildcards: by
    name; under "values" those of a rule that is not of this workflow, as one text. reason: Slurm's word for why it
    waits, "" if it does not. limit_s: its walltime, None without one. starts: by the local clock, when it started, or
    is expected to. node: "" while it waits. folder: where Snakemake works.
    """

    id: str
    state: str
    reason: str
    rule: str
    wildcards: dict[str, str]
    partition: str
    elapsed_s: int
    limit_s: int | None
    starts: datetime.datetime | None
    node: str
    folder: Path

    @property
    def waits(self) -> bool:
        """Whether it is in the queue and does not run."""
        return self.state in ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD")


def jobs(user: str | None = None, *, folder: Path | None = None) -> list[Job]:
    """Return the jobs in the queue, in the order of their numbers. Raises SlurmError if Slurm does not answer.

    user: whose, by default one's own. folder: only those of the Snakemake that works there.
    """
    whose = ["--me"] if user is None else ["--user", user]
    answer = ask("squeue", "--noheader", "--array", *whose, "--format", FORMAT)
    found = [_job(line) for line in answer.splitlines() if line.count("|") >= FORMAT.count("|")]
    if folder is not None:
        place = folder.resolve()
        found = [job for job in found if job.folder.resolve() == place]
    return sorted(found, key=lambda job: [int(part) for part in re.findall(r"\d+", job.id)])


def reason_in_words(reason: str) -> str:
    """Return why a job waits, of Slurm's word for it; a word that is not known stays as it is."""
    for pattern, words in REASONS:
        if re.fullmatch(pattern, reason):
            return words.format(reason)
    return reason


def named(comment: str) -> tuple[str, dict[str, str]]:
    """Return rule and wildcards of a job from the comment that the executor gave it; no rule if it is another's job."""
    match = COMMENT.fullmatch(comment)
    if match is None:
        return "", {}
    rule, values = match["rule"], match["values"]
    if values is None:
        return rule, {}
    names = WILDCARDS.get(rule)
    if names is None:
        return rule, {"values": values}
    # a model or grid may hold `_`, and comes first; the others are numbers and words without
    if names[0] == "subset":
        parts = values.split("_", len(names) - 1)
    else:
        parts = values.rsplit("_", len(names) - 1)
    return rule, dict(zip(names, parts, strict=False))


def _job(line: str) -> Job:
    number, state, reason, partition, elapsed, limit, starts, node, folder, comment = line.split("|", 9)
    rule, wildcards = named(comment)
    try:
        begin = datetime.datetime.fromisoformat(starts)
    except ValueError:
        begin = None
    return Job(
        id=number,
        state=state,
        reason=reason if state == "PENDING" else "",
        rule=rule,
        wildcards=wildcards,
        partition=partition,
        elapsed_s=seconds_of(elapsed) or 0,
        limit_s=seconds_of(limit),
        starts=begin,
        node=node,
        folder=Path(folder),
    )
