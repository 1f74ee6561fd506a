"""Checks of a site before the first real job: `cellmap-pipe doctor`. Every fault comes with what to edit, and where."""

import getpass
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from cellmap_pipe.cluster.plan import plan_run
from cellmap_pipe.cluster.requests import Request, profile_file, read_profile, requests, sbatch_command
from cellmap_pipe.cluster.site import (
    Association,
    Node,
    Partition,
    associations,
    most_jobs_by_qos,
    partitions,
)
from cellmap_pipe.cluster.slurm import SlurmError, ask, installed
from cellmap_pipe.config import Config, load_config, merged
from cellmap_pipe.errors import CellmapError, ConfigError
from cellmap_pipe.files import read_json
from cellmap_pipe.machine import physical_memory
from cellmap_pipe.schema import load_yaml, nearest

OK, WARNING, FAILED, SKIPPED = "ok", "warning", "FAILED", "not checked"

PLACEHOLDER = "your_account"
# A job of a minute: most of it is the start of torch on a busy file system.
PROBE_MINUTES = 5
PROBE_MB = 4000
POLL_SECONDS = 1.0
# The clocks of nodes and file server may be so far apart before files look older than what they were made of.
SKEW_SECONDS = 5.0
# Less room makes one think, for before crops are converted and networks checked little can be foreseen.
LEAST_FREE_GB = 100.0
LEAST_FREE_FILES = 1_000_000
DATASETS_OPENED = 3


@dataclass(frozen=True)
class Finding:
    """The outcome of one check: ok, warning, FAILED or not checked; what was looked at; what was found."""

    outcome: str
    subject: str
    said: str

    def __str__(self) -> str:
        return f"{self.outcome:<12}{self.subject}: {self.said}"


@dataclass(frozen=True)
class Doctor:
    """The checks of one profile and configuration, run in the folder that the workflow is to run in.

    project: folder with config/ and workflow/. submit: whether to send a job of a minute to each partition.
    wait_minutes: how long such a job may wait.
    """

    profile: Path
    configfiles: tuple[Path, ...] = ()
    project: Path = Path()
    folder: Path = Path()
    submit: bool = True
    wait_minutes: float = 10.0

    def findings(self) -> Iterator[Finding]:
        """Yield the outcome of each check as soon as it is known."""
        try:
            _ = self.settings
        except ConfigError as error:
            yield Finding(FAILED, "profile", str(error))
            return
        config: Config | None = None
        planned: list[Request] = []
        try:
            config = self._config()
            planned = requests(self.profile, self.configfiles)
            jobs = sum(request.jobs for request in planned)
            yield Finding(
                OK, "configuration", f"`snakemake all` plans {jobs} jobs of {len(self._rules(planned))} rules"
            )
        except ConfigError as error:
            yield Finding(FAILED, "configuration", f"`snakemake all` cannot be planned: {error}")
        if self.on_slurm:
            yield from self._slurm(planned)
        else:
            yield Finding(SKIPPED, "Slurm", f"{self._file} names no `executor: slurm`; jobs run on this machine")
            yield from self._machine(planned)
        yield from self._room(config)
        if config:
            yield from self._data(config)

    @cached_property
    def settings(self) -> dict[str, Any]:
        return read_profile(self.profile)

    @property
    def on_slurm(self) -> bool:
        return self.settings.get("executor") == "slurm"

    @property
    def _file(self) -> Path:
        return profile_file(self.profile)

    def _key(self, request: Request, name: str) -> str:
        """Return the entry of the profile that decides a resource of a rule, with its file."""
        own = self.settings.get("set-resources", {}).get(request.rule, {})
        return f"{self._file}: " + (
            f"set-resources.{request.rule}.{name}" if name in own else f"default-resources.{name}"
        )

    def _amount_key(self, request: Request, name: str) -> str:
        """Return where to change an amount that a rule asks for: the configuration, or the profile."""
        own = self.settings.get("set-resources", {}).get(request.rule, {})
        section = {"train": "train", "search_dints": "train", "predict": "predict"}.get(request.rule)
        if name not in own and section:
            key = {"runtime": "runtime_min", "gpu": "gpus", "cpus_per_task": "threads"}.get(name, name)
            return f"resources.{section}.{key} in your configuration"
        return f"{self._file}: set-resources.{request.rule}.{name}"

    @staticmethod
    def _rules(planned: Sequence[Request]) -> list[str]:
        return list(dict.fromkeys(request.rule for request in planned))

    def _slurm(self, planned: Sequence[Request]) -> Iterator[Finding]:
        """Yield what there is to say of the cluster."""
        if not installed("sbatch"):
            yield Finding(FAILED, "Slurm", "no sbatch on this machine; run this on a login node of the cluster")
            return
        try:
            site = partitions()
        except SlurmError as error:
            yield Finding(FAILED, "Slurm", f"{error}; ask the site's help desk if this stays so")
            return
        yield Finding(OK, "Slurm", f"answers; partitions {', '.join(site)}")
        yield self._accounting()
        charged = associations(getpass.getuser())
        if charged is None:
            yield Finding(SKIPPED, "accounts", "sacctmgr tells nothing of your account here; sbatch is asked below")
        yield from self._crowd(planned, site, charged or (), most_jobs_by_qos())
        sound = []
        for request in planned:
            faults = [*self._access(request, site, charged), *self._fit(request, site)]
            yield from faults
            if not any(fault.outcome == FAILED for fault in faults):
                refused = self._tested(request)
                yield refused or Finding(OK, _title(request), f"{_asks(request)}; sbatch --test-only takes it")
                sound += [] if refused else [request]
        if not self.submit:
            yield Finding(SKIPPED, "nodes", "no job was sent (--no-submit)")
            return
        tried = {(request.text("slurm_partition"), bool(request.number("gpu"))): request for request in reversed(sound)}
        if not tried:
            yield Finding(SKIPPED, "nodes", "no job was sent, for none would be taken; see above")
        for request in reversed(tried.values()):
            yield from self._probed(request)

    def _accounting(self) -> Finding:
        """Return whether Snakemake can ask for the state of its jobs as the profile says."""
        chosen = str(self.settings.get("slurm-status-command") or ("sacct" if installed("sacct") else "squeue"))
        try:
            if chosen == "sacct":
                ask("sacct", "--allocations", "--clusters=all", "--noheader", "--starttime=now-1hour")
            else:
                ask("squeue", "--me", "--noheader")
        except SlurmError as error:
            remedy = "write squeue there, or Snakemake waits for ever" if chosen == "sacct" else "write sacct there"
            return Finding(FAILED, "job states", f"{error}; {self._file}: slurm-status-command is {chosen}; {remedy}")
        return Finding(OK, "job states", f"{chosen} answers")

    def _access(
        self, request: Request, site: Mapping[str, Partition], charged: Sequence[Association] | None
    ) -> Iterator[Finding]:
        """Yield why the user may not send these jobs: account, partition, QOS."""
        account, name, qos = request.account, request.text("slurm_partition"), request.text("qos")
        title = _title(request)
        partition = site.get(name)  # of several names, any of which may take the job, sbatch decides
        for part in filter(None, name.split(",")):
            if part not in site:
                known, where = nearest(part, list(site)), self._key(request, "slurm_partition")
                yield Finding(FAILED, title, f"there is no partition '{part}'; {known}; edit {where}")
        if partition and not partition.up:
            yield Finding(WARNING, title, f"partition {name} is down just now; its jobs wait until it is up")
        if not account:
            yield Finding(FAILED, title, f"no account; set {self._key(request, 'slurm_account')}")
        mine = [entry for entry in charged or () if entry.account.lower() == account.lower()]
        if charged is not None and account:
            accounts = ", ".join(dict.fromkeys(entry.account for entry in charged))
            if not mine:
                came = " (as it came)" if account == PLACEHOLDER else ""
                yield Finding(
                    FAILED,
                    title,
                    f"account is '{account}'{came}; yours: {accounts}; edit {self._key(request, 'slurm_account')}",
                )
            elif qos and not any(qos in entry.qos for entry in mine if entry.partition in ("", *name.split(","))):
                allowed = ", ".join(dict.fromkeys(name for entry in mine for name in entry.qos)) or "none"
                yield Finding(
                    FAILED,
                    title,
                    f"QOS '{qos}' is not open to account {account}; it has: {allowed}; "
                    f"edit {self._key(request, 'qos')}, or ask the site for it",
                )
        given = {qos} if qos else {entry.default_qos for entry in mine}
        if partition and partition.qos is not None and not given & set(partition.qos):
            said = f"QOS '{qos}'" if qos else "no QOS"
            yield Finding(
                FAILED,
                title,
                f"{said}, but partition {name} takes only {', '.join(partition.qos)}; "
                f"set {self._file}: set-resources.{request.rule}.qos",
            )
        if partition and account.lower() not in map(str.lower, partition.accounts or [account]):
            yield Finding(
                FAILED,
                title,
                f"partition {name} is not open to account {account}, only to {', '.join(partition.accounts or ())}; "
                f"edit {self._key(request, 'slurm_partition')}",
            )

    def _crowd(
        self,
        planned: Sequence[Request],
        site: Mapping[str, Partition],
        charged: Sequence[Association],
        by_qos: Mapping[str, int],
    ) -> Iterator[Finding]:
        """Yield which limits of jobs in the queue Snakemake would run into."""
        given = str(self.settings.get("jobs", "unlimited"))
        together = int(given) if given.isdigit() else sum(request.jobs for request in planned)
        wanted: dict[tuple[str, int], int] = {}
        for request in planned:
            mine = [entry for entry in charged if entry.account.lower() == request.account.lower()]
            partition = site.get(request.text("slurm_partition"))
            both = {
                request.text("qos") or next((entry.default_qos for entry in mine), ""),
                partition.own_qos if partition else "",
            }
            limits = {(f"QOS {qos}", by_qos[qos]) for qos in both if qos in by_qos}
            limits |= {(f"account {entry.account}", entry.most_jobs) for entry in mine if entry.most_jobs is not None}
            for limit in limits:
                wanted[limit] = wanted.get(limit, 0) + request.jobs
        for (whose, most), count in wanted.items():
            if min(together, count) > most:
                yield Finding(
                    WARNING,
                    "jobs",
                    f"up to {min(together, count)} at once (jobs: {given}), but {whose} takes {most} of yours in the "
                    f"queue; lower {self._file}: jobs, for sbatch refuses more; head.sh tries it again for a quarter "
                    "of an hour, Snakemake by itself not at all",
                )

    def _fit(self, request: Request, site: Mapping[str, Partition]) -> Iterator[Finding]:
        """Yield why no node of the partition can hold such a job, at its first attempt or at its last."""
        partition = site.get(request.text("slurm_partition"))
        if partition is None:
            return
        nodes = [node for node in partition.nodes if node.in_use]
        if not nodes:
            where = f"no node of partition {partition.name}"
            yield Finding(WARNING, _title(request), f"{where} is in use just now; its jobs wait")
            return
        ever = [*self._lacking(request, partition, partition.nodes)]
        yield from ever
        if any(fault.outcome == FAILED for fault in ever):
            return
        for fault in self._lacking(request, partition, nodes):
            if fault.outcome == FAILED:
                said = f"its jobs wait for nodes that are out of use just now ({fault.said})"
                yield Finding(WARNING, fault.subject, said)

    def _lacking(self, request: Request, partition: Partition, nodes: Sequence[Node]) -> Iterator[Finding]:
        """Yield why none of the nodes can hold such a job, at its first attempt or at its last."""
        title, where = _title(request), f"partition {partition.name}"
        runtime = request.number("runtime")
        if partition.max_minutes is not None and runtime > partition.max_minutes:
            yield Finding(
                FAILED,
                title,
                f"walltime of {runtime} min, but {where} ends jobs after {partition.max_minutes:g}; "
                f"lower {self._amount_key(request, 'runtime')} (a training resumes where it stopped)",
            )
        gpus = request.number("gpu")
        if gpus:
            model = request.text("gpu_model").lower()
            if model and model not in partition.gpu_types:
                types = ", ".join(filter(None, partition.gpu_types)) or "none of a named type"
                yield Finding(
                    FAILED,
                    title,
                    f"GPUs of type '{model}', but {where} has {types}; edit {self._key(request, 'gpu_model')}",
                )
                return
            most = max(node.gpus.get(model, 0) if model else sum(node.gpus.values()) for node in nodes)
            if gpus > most:
                yield Finding(
                    FAILED,
                    title,
                    f"{gpus} GPUs, but a node of {where} has {most}; lower {self._amount_key(request, 'gpu')}",
                )
            nodes = [node for node in nodes if (node.gpus.get(model) if model else node.gpus)] or nodes
        for name, asked, has, unit in (
            ("cpus_per_task", request.cpus, max(node.cpus for node in nodes), "CPU cores"),
            ("mem_mb", request.number("mem_mb"), max(node.mem_mb for node in nodes), "MB of memory"),
        ):
            if asked > has:
                yield Finding(
                    FAILED,
                    title,
                    f"{asked} {unit}, but no node of {where} has more than {has}; "
                    f"lower {self._amount_key(request, name)}",
                )
        attempts = int(self.settings.get("retries", 0)) + 1
        memory, most = request.number("mem_mb"), max(node.mem_mb for node in nodes)
        if memory <= most < memory * attempts:
            yield Finding(
                WARNING,
                title,
                f"attempt {most // memory + 1} would ask for {(most // memory + 1) * memory} MB, which no node of "
                f"{where} has ({most}): a job that is killed for memory so often is not taken any more",
            )

    def _tested(self, request: Request) -> Finding | None:
        """Return what sbatch says against the request as Snakemake will make it; None if it takes it."""
        try:
            ask(*sbatch_command(request, self.settings), "--test-only", "--wrap=true")
        except ConfigError as error:
            return Finding(FAILED, _title(request), f"{error}; edit {self._file}")
        except SlurmError as error:
            said = str(error).rpartition("failed: ")[2]
            return Finding(
                FAILED, _title(request), f"sbatch refuses {_asks(request)}: {said}; {self._remedy(request, said)}"
            )
        return None

    def _remedy(self, request: Request, said: str) -> str:
        """Return what to edit when sbatch said this."""
        low = said.lower()
        for words, name in (
            ("account", "slurm_account"),
            ("qos", "qos"),
            ("reservation", "slurm_extra"),
            ("partition", "slurm_partition"),
        ):
            if words in low:
                return f"edit {self._key(request, name)}"
        if "time limit" in low:
            return f"lower {self._amount_key(request, 'runtime')}"
        return f"edit {self._file}: set-resources.{request.rule}, or the request in your configuration"

    def _probed(self, request: Request) -> Iterator[Finding]:
        """Yield what a job of a minute finds on a node of the request's partition."""
        gpus = 1 if request.number("gpu") else 0
        small = {**request.resources, "mem_mb": PROBE_MB, "runtime": PROBE_MINUTES, "cpus_per_task": 1}
        small = {name: value for name, value in small.items() if name != "gpu"} | ({"gpu": 1} if gpus else {})
        subject = f"node of {request.text('slurm_partition')}"
        folder = Path(tempfile.mkdtemp(prefix="doctor-", dir=self.folder)).resolve()
        try:
            token = folder / "token"
            token.write_text(os.urandom(8).hex())
            skew = token.stat().st_mtime - time.time()
            if abs(skew) > SKEW_SECONDS:
                yield Finding(
                    WARNING, "clocks", f"the file system's clock is {skew:+.0f} s off this machine's; tell the site"
                )
            answer, log = folder / "answer.json", folder / "job.log"
            work = shlex.join([sys.executable, "-m", "cellmap_pipe.training.probe", str(answer), str(token)])
            asked = Request("doctor", 1, small, 1)
            command = [*sbatch_command(asked, self.settings), f"--output={log}", f"--chdir={folder}"]
            sent = time.time()
            job = ask(*command, f"--wrap={work}").strip().split(";")[0]
            try:
                state = self._await(job, answer)
            except BaseException:  # Ctrl-C, for one, while it waits
                subprocess.run(["scancel", job], timeout=60, check=False)
                raise
            if state:
                yield Finding(state[0], subject, state[1])
                return
            waited = 0.0
            while not answer.exists() and waited < 15:  # a shared file system shows new files late
                time.sleep(POLL_SECONDS)
                waited += POLL_SECONDS
                os.scandir(folder).close()
            if not answer.exists():
                yield Finding(FAILED, subject, self._unanswered(job, log, folder))
                return
            yield from probe_findings(read_json(answer), token.read_text(), gpus, sent, time.time(), subject)
        except SlurmError as error:
            yield Finding(FAILED, subject, f"the job of a minute was not taken: {error}")
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _await(self, job: str, answer: Path) -> tuple[str, str] | None:
        """Wait until the job has left the queue; return outcome and words if it did not start in time."""
        limit = time.monotonic() + 60 * self.wait_minutes
        while True:
            try:
                line = ask("squeue", "--noheader", f"--jobs={job}", "--format=%T|%r|%S").strip()
            except SlurmError as error:
                line = "" if "Invalid job id" in str(error) else "UNKNOWN|Slurm does not answer|N/A"
            state, reason, start = [*line.split("|"), "", ""][:3]
            if state in ("", "COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "OUT_OF_MEMORY"):
                return None
            if state == "PENDING" and time.monotonic() > limit:
                ask("scancel", job)
                expected = f", expected to start {start}" if start not in ("", "N/A") else ""
                return (
                    WARNING,
                    f"job {job} waited {self.wait_minutes:g} min in vain ({reason}{expected}) and was cancelled",
                )
            if time.monotonic() > limit + 60 * (PROBE_MINUTES + 2):
                ask("scancel", job)
                return (
                    FAILED,
                    f"job {job} did not end in {PROBE_MINUTES} min and was cancelled; is the file system slow?",
                )
            time.sleep(POLL_SECONDS)

    def _unanswered(self, job: str, log: Path, folder: Path) -> str:
        """Return why a job that ended left no answer."""
        if not log.exists():
            return (
                f"job {job} ended, but its files in {folder} are not seen here; work in a folder on a file system that "
                "login node and nodes share"
            )
        said = " ".join(log.read_text(errors="replace").split())[-300:] or "it said nothing"
        return (
            f"job {job} could not run {sys.executable}: {said}; install the environment on a file system that nodes see"
        )

    def _machine(self, planned: Sequence[Request]) -> Iterator[Finding]:
        """Yield what there is to say of a machine that runs the jobs itself."""
        from cellmap_pipe.training.lease import machine_gpus

        given = self.settings.get("resources", {})
        pairs = given.items() if isinstance(given, Mapping) else (entry.split("=", 1) for entry in given)
        limits = {name: int(value) for name, value in pairs if str(value).isdigit()}
        memory = physical_memory() // 10**6
        if limits.get("mem_mb", 0) > memory:
            yield Finding(
                WARNING,
                "memory",
                f"{self._file}: resources mem_mb={limits['mem_mb']}, but this machine has {memory} MB",
            )
        for request in planned:
            asked = request.number("mem_mb")
            most = limits.get("mem_mb", memory)
            if asked > most:
                yield Finding(
                    WARNING,
                    _title(request),
                    f"asks for {asked} MB of {most}; Snakemake runs it alone; "
                    f"lower {self._amount_key(request, 'mem_mb')} if it needs less",
                )
        gpus = machine_gpus()
        wanted = max((request.number("gpu") for request in planned), default=0)
        if not gpus:
            outcome = WARNING if wanted else OK
            yield Finding(
                outcome, "GPUs", "none here; trainings compute on the CPU" + (", which takes long" if wanted else "")
            )
        else:
            if limits.get("gpu", 0) != len(gpus):
                yield Finding(
                    WARNING,
                    "GPUs",
                    f"this machine has {len(gpus)}, but {self._file}: resources has gpu={limits.get('gpu', 0)}; "
                    "so many are used at once",
                )
            for request in planned:
                if request.number("gpu") > len(gpus):
                    yield Finding(
                        FAILED,
                        _title(request),
                        f"asks for {request.number('gpu')} GPUs of {len(gpus)}; "
                        f"lower {self._amount_key(request, 'gpu')}",
                    )
        with tempfile.TemporaryDirectory(prefix="doctor-", dir=self.folder) as folder:
            answer, token = Path(folder) / "answer.json", Path(folder) / "token"
            token.write_text("here")
            began = time.time()
            try:
                done = subprocess.run(
                    [sys.executable, "-m", "cellmap_pipe.training.probe", str(answer), str(token)],
                    capture_output=True,
                    text=True,
                    timeout=60 * PROBE_MINUTES,
                    check=False,
                )
                said = done.stderr
            except subprocess.TimeoutExpired:  # a compiler that hangs: what was found before is in the answer
                said = f"the check of torch did not end in {PROBE_MINUTES} min"
                yield Finding(WARNING, "environment", f"{sys.executable}: {said}")
            if not answer.exists():
                yield Finding(FAILED, "environment", f"{sys.executable}: {' '.join(said.split())[-300:]}")
                return
            yield from probe_findings(read_json(answer), "here", len(gpus), began, time.time(), "this machine")

    def _room(self, config: Config | None) -> Iterator[Finding]:
        """Yield whether the working folder's disk has room for the results, and what else of the plan cannot fit."""
        usage = os.statvfs(self.folder)
        free, files = usage.f_bavail * usage.f_frsize / 1e9, usage.f_favail
        place = self.folder.resolve()
        plan = plan_run(config, self.folder, retries=int(self.settings.get("retries", 0))) if config else None
        for fault in plan.faults if plan else ():
            yield Finding(FAILED, "plan", fault)
        known = f", the results that can be foreseen take {plan.disk_gb:.3g} GB" if plan and plan.disk_gb else ""
        yield Finding(
            WARNING if free < LEAST_FREE_GB else OK,
            "disk",
            f"{place} has {free:.0f} GB free{known} (a quota of yours may be less; `snakemake plan` says more)",
        )
        if usage.f_files > 0 and files < LEAST_FREE_FILES:
            yield Finding(WARNING, "disk", f"{place} takes {files} more files; predictions are stored in very many")

    def _data(self, config: Config) -> Iterator[Finding]:
        """Yield whether the data are where the configuration says and can be read."""
        from cellmap_pipe.prepare.crops import find_crops
        from cellmap_pipe.prepare.ngff import open_level, read_box, read_image

        if config.data.phantom:
            yield Finding(SKIPPED, "data", "data.phantom is set: the workflow makes them")
            return
        data = {name: getattr(config.data, name) for name in ("root", "em_path", "labels_path", "crops")}
        data["root"] = str(self.folder / data["root"])
        try:
            crops = find_crops(data)
        except (CellmapError, OSError) as error:
            yield Finding(FAILED, "data", f"{error} (`snakemake fetch` copies the challenge's)")
            return
        first = {crop.dataset: crop for crop in reversed(crops)}
        broken = 0
        for crop in list(reversed(first.values()))[:DATASETS_OPENED]:
            try:
                level = read_image(crop.em_path).levels[-1]
                read_box(open_level(level), level, (0, 0, 0), (1, 1, 1))
            except (CellmapError, OSError) as error:
                broken += 1
                yield Finding(FAILED, "data", f"EM of {crop.dataset}: {error}")
        yield Finding(
            FAILED if broken == len(first) else OK,
            "data",
            f"{data['root']}: {len(crops)} crops of {len(first)} datasets; EM of "
            f"{min(len(first), DATASETS_OPENED) - broken} of {min(len(first), DATASETS_OPENED)} opened",
        )
        if config.data.volumes and not (self.folder / config.data.volumes).is_file():
            yield Finding(FAILED, "data", f"data.volumes: '{config.data.volumes}' does not exist; give the CSV's path")

    def _config(self) -> Config:
        """Return the configuration as the workflow will read it. Raises ConfigError."""
        files = [self.project / "config/config.yaml", *self.configfiles]
        if not self.configfiles and (named := self.settings.get("configfile")):
            files += [self.project / name for name in ([named] if isinstance(named, str) else named)]
        values: dict[str, Any] = {}
        for path in files:
            values = merged(values, load_yaml(path))
        return load_config(
            values, schemas=self.project / "workflow/schemas", models=self.project / "config/models", files=files
        )


def probe_findings(
    answer: Mapping[str, Any], token: str, gpus: int, sent: float, seen: float, subject: str
) -> Iterator[Finding]:
    """Yield what the answer of a probe means.

    token: the text that it was to read. gpus: how many it was given. sent, seen: this machine's clock before it was
    sent and after its answer was seen.
    """
    host = answer["host"]
    if answer.get("token") != token:
        fault = answer.get("token_fault", "another text was read")
        yield Finding(FAILED, subject, f"{host} does not see a file written here ({fault}); use a shared file system")
    skew = max(sent - answer["time"], answer["time"] - seen, 0.0)
    if skew > SKEW_SECONDS:
        yield Finding(WARNING, subject, f"the clock of {host} is {skew:.0f} s off this machine's; tell the site")
    if fault := answer.get("fault"):
        yield Finding(FAILED, subject, f"{host}: torch cannot be used ({fault}); run `make install` again")
        return
    torch = f"torch {answer['torch']}"
    yield Finding(
        OK,
        subject,
        f"{host}: Python {answer['python_version']}, {torch}, files are seen, clocks agree within {SKEW_SECONDS:g} s",
    )
    if not gpus:
        return
    found = answer["gpus"]
    if not found:
        built = f"for CUDA {answer['cuda']}" if answer["cuda"] else "without CUDA: install its CUDA build"
        driver = answer["driver"] or "none found (nvidia-smi does not run)"
        yield Finding(
            FAILED,
            f"GPU of {subject}",
            f"{host}: {gpus} given (CUDA_VISIBLE_DEVICES={answer['visible']}), none works: driver {driver}; torch is "
            f"built {built}; tell the site, or set resources.train.device and resources.predict.device to cpu to try "
            "out the cluster without",
        )
        return
    if len(found) != gpus:
        yield Finding(
            FAILED,
            f"GPU of {subject}",
            f"{host}: {gpus} asked for, {len(found)} seen (CUDA_VISIBLE_DEVICES={answer['visible']}); tell the site",
        )
    for gpu in found:
        said = f"{host}: {gpu['name']}, {gpu['memory_gb']:.0f} GB, driver {answer['driver']}"
        if not gpu["float32"]:
            yield Finding(FAILED, f"GPU of {subject}", f"{said}: does not compute ({gpu.get('fault')}); tell the site")
        elif not gpu["bfloat16"]:
            yield Finding(
                WARNING, f"GPU of {subject}", f"{said}: no bfloat16; set train.amp: none in your configuration"
            )
        else:
            yield Finding(OK, f"GPU of {subject}", f"{said}, computes in float32 and bfloat16")
    if (compiled := answer.get("compiled", True)) is not True:
        yield Finding(
            WARNING,
            f"GPU of {subject}",
            f"{host}: torch.compile does not work there ({compiled}), trainings go on without it, slower; install a C "
            'compiler and Python\'s headers, or set train.compile: false, for all models in overrides["*"]',
        )


def diagnose(doctor: Doctor, say: Callable[[str], None]) -> int:
    """Print every finding as soon as it is known; return 1 if something failed, else 0."""
    counts: dict[str, int] = {}
    for finding in doctor.findings():
        counts[finding.outcome] = counts.get(finding.outcome, 0) + 1
        say(str(finding))
    failed, warnings = counts.get(FAILED, 0), counts.get(WARNING, 0)
    say(
        f"{failed} failed, {warnings} warning{'' if warnings == 1 else 's'}"
        + ("" if failed else "; the first job may be sent")
    )
    return 1 if failed else 0


def _title(request: Request) -> str:
    return f"rule {request.rule}"


def _asks(request: Request) -> str:
    """Return a request in words."""
    gpus, model = request.number("gpu"), request.text("gpu_model")
    parts = [
        request.text("slurm_partition"),
        f"QOS {request.text('qos')}" if request.text("qos") else "",
        f"{gpus} GPU{'s' if gpus > 1 else ''}" + (f" {model}" if model else "") if gpus else "",
        f"{request.cpus} core{'s' if request.cpus > 1 else ''}",
        f"{request.number('mem_mb') / 1000:g} GB",
        f"{request.number('runtime')} min",
        f"{request.jobs} job{'s' if request.jobs > 1 else ''}",
    ]
    return ", ".join(part for part in parts if part)
