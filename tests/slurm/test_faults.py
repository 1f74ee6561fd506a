"""What goes wrong on a cluster, on a real one: trainings are stopped in every way there, and nothing is lost.

The trainings run side by side. Each is held still (SIGSTOP) at its first checkpoint until the fault has struck, so that
a test takes the time of the fault and hardly any of the machine's; in the end each must have made, bit by bit, the
weights of one that ran without Slurm and without a stop.
"""

import contextlib
import csv
import datetime
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml

from cellmap_pipe.log import ALL_ATTEMPTS
from cellmap_pipe.training.usage import read_usage

from .cluster import ACCOUNT, PROFILE, ROOT, Cluster

HERE = Path(__file__).parent
PATIENCE = 900.0  # seconds that anything may take, on a machine that does much else

# of one process, and of one per GPU
ALONE, TOGETHER = "segresnet_ds", "unet_3d"
GPUS = {ALONE: 1, TOGETHER: 2}
# long enough that a training is met in the middle, once and twice; a checkpoint each second
STEPS = {ALONE: 40, TOGETHER: 100}
# where a node fails, and where everything else runs
FAILING, STEADY = "g1801l4001", "g1801l4002"


# set when the tests end, in the middle of something or not
OVER = threading.Event()


def until(holds: Callable[[], Any], what: str, seconds: float = PATIENCE) -> Any:
    """Return what `holds` returns once it is true."""
    limit = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < limit, f"waited {seconds:g} s for {what}"
        assert not OVER.is_set(), f"the tests were over before {what}"
        time.sleep(0.02)
    return found


class Run:
    """One training in a working directory of its own, by a Snakemake that its profile makes submit to Slurm.

    resources: of the training, in addition to those of `configuration`. profile: in addition to the profile's.
    """

    def __init__(self, cluster: Cluster, folder: Path, model: str, profile: dict[str, Any], **resources: Any) -> None:
        self.cluster, self.folder, self.model = cluster, folder, model
        self.run_dir = folder / f"runs/{model}/fold0"
        self.weights = folder / f"results/train/{model}/fold0/model.pt"
        self.log = folder / f"logs/train/{model}_fold0.log"
        self.heads: list[subprocess.Popen[bytes]] = []
        self.held: set[int] = set()
        self.no_database = folder / "no_database"  # while it is there, Snakemake learns no state of its jobs
        (folder / "bin").mkdir()
        sacct = f'#!/bin/sh\ntest -e {self.no_database} && exit 1\nexec {shutil.which("sacct")} "$@"\n'
        (folder / "bin/sacct").write_text(sacct)
        (folder / "bin/sacct").chmod(0o755)
        (folder / "profile").mkdir()
        (folder / "profile/config.v9+.yaml").write_text(yaml.safe_dump(profile))
        (folder / "faults.yaml").write_text(configuration(model, **resources))

    def head(self, *options: str) -> subprocess.Popen[bytes]:
        """Start Snakemake."""
        # a shell that runs tests in the background has SIGINT ignored
        command = ["env", "--default-signal=INT", sys.executable, str(HERE / "impatient.py"), *options]
        command += ["--profile", str(self.folder / "profile"), *arguments(self.folder, self.folder / "faults.yaml")]
        variables = environment(self.cluster)
        variables["PATH"] = f"{self.folder / 'bin'}:{variables['PATH']}"
        with (self.folder / f"head{len(self.heads)}.txt").open("wb") as said:
            head = subprocess.Popen(command, cwd=ROOT, env=variables, stdout=said, stderr=said, start_new_session=True)
        self.heads.append(head)
        return head

    def train(self, *options: str) -> subprocess.Popen[bytes]:
        """Start Snakemake to make the weights."""
        return self.head(str(self.weights.relative_to(self.folder)), *options)

    def end(self, status: int) -> str:
        """Return what the last Snakemake said, which must end with this status."""
        assert self.heads[-1].wait(PATIENCE) == status, self.all_said()
        return self.said(-1)

    def said(self, number: int) -> str:
        return (self.folder / f"head{range(len(self.heads))[number]}.txt").read_text(errors="replace")

    def all_said(self) -> str:
        """Return what there is to find out by why a test failed."""
        texts = [self.said(number)[-3000:] for number in range(len(self.heads))]
        logs = [path.read_text(errors="replace")[-2000:] for path in [self.log, *self.slurm_logs()] if path.exists()]
        return "\n==\n".join([*texts, *logs, *map(str, self.records())])

    def slurm_logs(self) -> list[Path]:
        return sorted((self.folder / ".snakemake/slurm_logs").rglob("*.log"))

    def errors(self) -> list[str]:
        """Return the `ERROR` lines of the Slurm jobs, in their order."""
        texts = (path.read_text(errors="replace") for path in self.slurm_logs())
        return [line for text in texts for line in text.splitlines() if line.startswith("ERROR ")]

    def jobs(self) -> list[str]:
        """Return the numbers of the Slurm jobs, in their order."""
        texts = (self.said(number) for number in range(len(self.heads)))
        return [job for text in texts for job in re.findall(r"submitted with SLURM jobid (\d+)", text)]

    def records(self) -> list[dict[str, str]]:
        """Return what Slurm recorded of the jobs, starts of the same job one by one."""
        if not self.jobs():
            return []
        names = ["JobID", "State", "NodeList", "ReqMem", "TimelimitRaw", "ElapsedRaw", "ExitCode"]
        listed = self.cluster.run(
            *["sacct", "-X", "-n", "-P", "--duplicates", "-j", ",".join(self.jobs()), "-o", ",".join(names)]
        ).stdout
        return [dict(zip(names, line.split("|"), strict=True)) for line in listed.splitlines()]

    def states(self) -> list[str]:
        """Return how the jobs ended, or stand, in a word each."""
        return [record["State"].split()[0] for record in self.records()]

    def owner(self) -> dict[str, Any]:
        try:
            content: dict[str, Any] = json.loads((self.run_dir / "owner.json").read_text())
        except FileNotFoundError:
            return {}
        return content

    def steps(self) -> list[int]:
        return sorted(int(path.name[4:13]) for path in self.run_dir.glob("step*.pt"))

    def hold(self, start: int) -> int:
        """Stop the clock of the training's start number `start` (the first is 1) and return the step it has saved."""
        saved = max(self.steps(), default=0)

        def advanced() -> bool:
            assert self.heads[-1].poll() is None, self.all_said()
            begun = self.owner().get("job") in self.jobs()[start - 1 :]
            return begun and max(self.steps(), default=0) > saved

        until(advanced, f"step {saved + 1} of start {start}")
        pid = self.owner()["pid"]
        os.kill(pid, signal.SIGSTOP)
        self.held.add(pid)
        reached = max(self.steps())
        assert reached < STEPS[self.model], "it was over before it could be held: give it more steps"
        return reached

    def let_go(self) -> None:
        for pid in self.held:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        self.held.clear()

    def clean(self) -> None:
        """Leave no process of this test behind."""
        for head in self.heads:
            if head.poll() is None:
                head.kill()
                head.wait()
        if self.jobs():
            self.cluster.run("scancel", *self.jobs(), check=False)
        self.let_go()
        # without control groups Slurm loses sight of what its own processes leave when they are killed
        marks = {f"SLURM_JOB_ID={job}".encode() for job in self.jobs()}
        for pid in self.cluster.leftovers():
            with contextlib.suppress(OSError):
                if marks & set(Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")):
                    os.kill(pid, signal.SIGKILL)

    def resumed(self) -> int:
        """Return the step after which the last start of the training went on."""
        found = re.findall(r"resumed after step (\d+)", self.log.read_text())
        assert found, self.log.read_text()
        return int(found[-1])


def environment(cluster: Cluster) -> dict[str, str]:
    return {**cluster.environment, "OMP_NUM_THREADS": "1"}


def configuration(model: str, **resources: Any) -> str:
    """Return the configuration file of the tests, with more resources of the training of one model."""
    train = {"threads": 1, "mem_mb": 3000, "runtime_min": 20, "device": "cpu"}
    settings = {"validate_every": 2, "checkpoint_minutes": 0.005}
    overrides: dict[str, Any] = {"*": {"train": settings, "resources": {"train": train}}}
    for name, gpus in GPUS.items():
        own = resources if name == model else {}
        overrides[name] = {
            "train": {"max_steps": STEPS[name], "steps_per_epoch": STEPS[name] // 2},
            "resources": {"train": {"gpus": gpus, "threads": gpus, **own}},
        }
    return yaml.safe_dump({"overrides": overrides})


def arguments(folder: Path, settings: Path) -> list[str]:
    files = ["config/demo.yaml", str(HERE / "demo.yaml"), str(settings)]
    return ["--directory", str(folder), "--snakefile", "workflow/Snakefile", "--configfile", *files]


def copied(demo: Path, folder: Path) -> None:
    """Copy a working directory without its trainings; big files are linked, for nobody writes into one."""
    for name in ("challenge", "results"):
        trained = shutil.ignore_patterns("train", "predict", "segment", "ensemble", "submission", "report")
        shutil.copytree(demo / name, folder / name, copy_function=os.link, ignore=trained, dirs_exist_ok=True)
    shutil.copytree(demo / ".snakemake/metadata", folder / ".snakemake/metadata")


@pytest.fixture(scope="module")
def whole(slurm_demo: Path, cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory in which both trainings ran at a stretch, without Slurm."""
    folder = tmp_path_factory.mktemp("whole")
    copied(slurm_demo, folder)
    (folder / "faults.yaml").write_text(configuration(ALONE))
    targets = [f"results/train/{model}/fold0/model.pt" for model in GPUS]
    command = [sys.executable, "-m", "snakemake", *targets, "--cores", "2"]
    command += ["--rerun-triggers", "mtime", "params", "input", *arguments(folder, folder / "faults.yaml")]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(cluster), capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def futures(
    whole: Path, slurm_demo: Path, cluster: Cluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[dict[str, Any]]]]:
    """What each of the trainings met, to be waited for."""
    quick = yaml.safe_load((HERE / "quick/config.v9+.yaml").read_text())
    runs: list[Run] = []

    on_gpus = PROFILE["set-resources"]["train"]
    steady = {**on_gpus, "slurm_extra": f"'--exclude={FAILING}'"}

    def begin(
        story: Callable[[Run], dict[str, Any]], model: str, place: dict[str, Any], **resources: Any
    ) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp(story.__name__)
        copied(whole, folder)
        profile = {**PROFILE, **quick, "set-resources": {**PROFILE["set-resources"], "train": place}}
        run = Run(cluster, folder, model, profile, **resources)
        runs.append(run)
        try:
            told = story(run)
        except BaseException as error:
            raise AssertionError(f"{error}\n{run.all_said()}") from error
        finally:
            run.clean()
        assert run.weights.read_bytes() == (whole / run.weights.relative_to(run.folder)).read_bytes()
        assert not run.owner()
        return {"run": run, **told}

    with ThreadPoolExecutor(4) as pool:
        try:
            yield {
                "walltime": pool.submit(begin, walltime, TOGETHER, steady),
                "node": pool.submit(begin, node, ALONE, on_gpus),
                "killed": pool.submit(begin, killed, ALONE, steady),
                "memory": pool.submit(begin, memory, ALONE, steady, mem_mb=too_little_mb(slurm_demo)),
                "cancelled": pool.submit(begin, cancelled, ALONE, steady),
                "interrupted": pool.submit(begin, interrupted, ALONE, steady),
                "preempted": pool.submit(begin, preempted, ALONE, {"slurm_partition": "spare"}, gpus=0),
            }
        finally:
            OVER.set()
            pool.shutdown(wait=False, cancel_futures=True)
            for run in runs:
                run.clean()


# -- the walltime ----------------------------------------------------------------------------------------------------


def walltime(run: Run) -> dict[str, Any]:
    run.train()
    reached, spared = [], []
    for attempt in (1, 2):
        reached.append(run.hold(attempt))
        job = run.jobs()[attempt - 1]
        ends = run.cluster.run("squeue", "-h", "-j", job, "-o", "%e").stdout.strip()
        said = r"^(\S+ \S+) INFO .*: saves and stops at (\S+ \S+), before the walltime ends$"
        *_, words = re.findall(said, run.log.read_text(), re.MULTILINE)
        end, then, stop = (datetime.datetime.fromisoformat(moment) for moment in (ends, *words))
        spared.append(((end - then).total_seconds(), (end - stop).total_seconds()))
        # the walltime is over now: the rest of it would be the same but for the wait
        run.cluster.run("scontrol", "update", f"JobId={job}", f"EndTime={soon()}")
        until(lambda nth=attempt - 1: run.states()[nth] == "TIMEOUT", "the end of the walltime")
        run.let_go()
    return {"said": run.end(0), "reached": reached, "spared": spared}


def soon() -> str:
    """Return the next second but one, as Slurm writes it."""
    return (datetime.datetime.now() + datetime.timedelta(seconds=2)).isoformat(timespec="seconds")


def test_a_training_that_meets_its_walltime_twice_ends_as_one_that_was_left_alone(futures):
    told = futures["walltime"].result(PATIENCE)
    run = told["run"]
    assert run.states() == ["TIMEOUT", "TIMEOUT", "COMPLETED"]
    assert told["said"].count("SLURM status is: 'TIMEOUT'") == 2
    for line in run.errors():
        assert re.search(r"ERROR train model=unet_3d,fold=0: stopped by (SIGTERM|a signal) after step \d+; start", line)
    first, second = told["reached"]
    assert 0 < first < second <= run.resumed()


def test_a_training_knows_from_slurm_when_its_walltime_ends_and_would_stop_before(futures):
    # 5 minutes before, but a tenth at most of what is left when it says so: the walltime began before the training did.
    # The moment to stop is told in whole seconds, cut off. By the rule's walltime, counted from the training's own
    # begin, it would be off by all that came before that: Snakemake's start in the job takes several seconds.
    for left, kept_back in futures["walltime"].result(PATIENCE)["spared"]:
        assert left < 1200
        assert -0.5 < kept_back - left / 10 < 2


# -- memory ----------------------------------------------------------------------------------------------------------


def too_little_mb(demo: Path) -> int:
    """Return an amount of memory that the training exceeds, and three times of which is enough.

    It is taken from what the demo's training needed here, because another processor or build of torch needs another
    amount. Slurm, which looks every second, meets the peak or not: it told 764 and 938 MB of the same training, which
    for its most part holds 0.8 to 0.9 of its peak. 0.6 is below that, and 1.8 above the peak, in either case.
    """
    (report,) = demo.glob("efficiency_report_*.csv")
    with report.open() as stream:
        rows = [row for row in csv.DictReader(stream) if row["RuleName"] == f"rule_train_wildcards_{ALONE}_0"]
    # odd, for Slurm would write whole gigabytes in another unit
    return round(0.6 * max(float(row["MaxRSS_MB"]) for row in rows)) | 1


def memory(run: Run) -> dict[str, Any]:
    run.train()
    return {"said": run.end(0)}


def test_a_job_killed_for_its_memory_comes_back_with_more(futures, slurm_demo):
    little = too_little_mb(slurm_demo)
    run = futures["memory"].result(PATIENCE)["run"]
    # twice as much may be just too little for the peak
    assert run.states() in (["FAILED", "COMPLETED"], ["FAILED", "FAILED", "COMPLETED"])
    asked = [record["ReqMem"] for record in run.records()]
    assert asked == [f"{attempt * little}M" for attempt in range(1, len(asked) + 1)]
    assert any("exceeded memory limit" in path.read_text(errors="replace") for path in run.slurm_logs())


# -- nodes -----------------------------------------------------------------------------------------------------------


def node(run: Run) -> dict[str, Any]:
    def told(name: str) -> str:
        return run.cluster.run("sinfo", "-h", "-n", name, "-N", "-p", "l40-gpu", "-o", "%T").stdout.strip()

    # Slurm puts it where it likes: on this node while the other takes none
    run.cluster.run("scontrol", "update", f"NodeName={STEADY}", "State=DRAIN", "Reason=test")
    try:
        run.train()
        until(lambda: "RUNNING" in run.states(), "a job on the node that is to fail")
    finally:
        run.cluster.run("scontrol", "update", f"NodeName={STEADY}", "State=RESUME")
    reached = run.hold(1)
    job = run.jobs()[0]
    assert run.records()[0]["NodeList"] == FAILING
    try:
        run.cluster.run("scontrol", "update", f"NodeName={FAILING}", "State=DRAIN", "Reason=test")
        drained = (told(FAILING), run.states(), run.heads[-1].poll())
        run.cluster.run("scontrol", "update", f"NodeName={FAILING}", "State=DOWN", "Reason=test")
        # Slurm lets a job that it starts anew wait for two minutes
        until(lambda: "PENDING" in run.states(), "the job's return to the queue")
        run.let_go()
        until(lambda: not Path(f"/proc/{run.owner().get('pid', 0)}/cwd").exists(), "the end on the failed node")
        run.cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now")
        run.end(0)
    finally:
        run.cluster.run("scontrol", "update", f"NodeName={FAILING}", "State=RESUME", check=False)
    return {"reached": reached, "drained": drained}


def test_a_drained_node_ends_its_jobs_and_a_failed_one_s_go_on_elsewhere(futures):
    told = futures["node"].result(PATIENCE)
    run = told["run"]
    assert told["drained"] == ("draining", ["RUNNING"], None)
    assert len(run.jobs()) == 1, "Slurm starts it again, not Snakemake"
    assert [(record["State"], record["NodeList"]) for record in run.records()] == [
        ("NODE_FAIL", FAILING),
        ("COMPLETED", STEADY),
    ]
    assert run.resumed() >= told["reached"]


# -- who ends what ---------------------------------------------------------------------------------------------------


def cancelled(run: Run) -> dict[str, Any]:
    run.train()
    reached = run.hold(1)
    run.cluster.run("scancel", run.jobs()[0])
    run.let_go()
    return {"reached": reached, "said": run.end(0)}


def test_a_cancelled_training_saves_and_is_submitted_again(futures):
    told = futures["cancelled"].result(PATIENCE)
    run = told["run"]
    assert run.states() == ["CANCELLED", "COMPLETED"]
    assert re.search(rf"SLURM-job '{run.jobs()[0]}' failed, SLURM status is: 'CANCELLED'", told["said"])
    assert "Trying to restart job" in told["said"]
    assert run.errors(), run.all_said()
    assert re.search(r"stopped by SIGTERM after step \d+; start it again to go on", run.errors()[0])
    assert run.resumed() >= told["reached"]


def preempted(run: Run) -> dict[str, Any]:
    """Without GPUs, in a partition whose jobs end when those of the node's owners begin."""
    run.train()
    reached = run.hold(1)
    run.cluster.run("sbatch", "-p", "owners", "--exclusive", "-o", "/dev/null", "-D", "/tmp", "--wrap", "true")
    # soon: Slurm kills a minute after it told the training to end
    queued = ("squeue", "-h", "-j", run.jobs()[0], "-o", "%T")
    until(lambda: "RUNNING" not in run.cluster.run(*queued).stdout, "the owners' coming")
    run.let_go()
    return {"reached": reached, "said": run.end(0)}


def test_a_preempted_training_that_slurm_does_not_start_again_saves_and_is_submitted_again(futures):
    told = futures["preempted"].result(PATIENCE)
    run = told["run"]
    assert run.states() == ["PREEMPTED", "COMPLETED"]
    assert f"Slurm job {run.jobs()[0]} was preempted, and Slurm does not start it again" in told["said"]
    assert run.errors(), run.all_said()
    assert re.search(r"stopped by SIGTERM after step \d+; start it again to go on", run.errors()[0])
    assert run.resumed() >= told["reached"]


def interrupted(run: Run) -> dict[str, Any]:
    """While the accounting database is away, too, which makes Snakemake know of no job."""
    head = run.train()
    reached = run.hold(1)
    run.no_database.touch()
    until(lambda: run.said(-1).count("Slurm does not tell the states of jobs") > 1, "the second look in vain")
    head.send_signal(signal.SIGINT)
    until(lambda: run.states()[0] not in ("RUNNING", "PENDING"), "the end of the job")
    run.let_go()
    said = run.end(1)
    run.no_database.unlink()
    until(lambda: not run.owner(), "the training's end")
    # what a node leaves that fails under a training: its name, another machine's process, an old heartbeat, the job
    dead = {"token": "dead", "host": "elsewhere", "boot": "other", "namespace": "pid:[1]", "pid": 1, "started": 1}
    (run.run_dir / "owner.json").write_text(json.dumps({**dead, "job": run.jobs()[0], "heartbeat": time.time() - 300}))
    run.train("--rerun-incomplete")
    run.end(0)
    return {"reached": reached, "said": said}


def test_an_interrupted_snakemake_cancels_its_jobs_and_the_trainings_save(futures):
    told = futures["interrupted"].result(PATIENCE)
    run = told["run"]
    assert run.states() == ["CANCELLED", "COMPLETED"]
    assert run.errors(), run.all_said()
    assert re.search(r"stopped by SIGTERM after step \d+; start it again to go on", run.errors()[0])
    assert run.resumed() >= told["reached"]


def test_the_owner_file_of_a_dead_node_is_taken_over(futures):
    run = futures["interrupted"].result(PATIENCE)["run"]
    assert f"from process 1 on elsewhere, Slurm job {run.jobs()[0]}, gone" in run.log.read_text()


def killed(run: Run) -> dict[str, Any]:
    head = run.train()
    run.hold(1)
    head.kill()
    head.wait()
    owner = run.owner()
    # as on a cluster of more than one machine, where the process of another node cannot be looked for
    (run.run_dir / "owner.json").write_text(json.dumps({**owner, "boot": "that of another node"}))
    run.train("--rerun-incomplete")
    locked = run.end(1)
    run.head("--unlock")
    run.end(0)
    run.train("--rerun-incomplete", "--retries", "0")
    run.end(1)
    orphan = run.jobs()[0]
    states, errors = run.states(), run.errors()
    run.let_go()
    until(lambda: run.states()[0] == "COMPLETED", "the orphan's end")
    run.train("--rerun-incomplete")
    return {
        "owner": owner,
        "locked": locked,
        "orphan": orphan,
        "states": states,
        "errors": errors,
        "then": run.end(0),
    }


def test_the_second_copy_of_a_training_that_still_runs_ends_with_one_line_and_costs_no_work(futures):
    told = futures["killed"].result(PATIENCE)
    run = told["run"]
    assert "Directory cannot be locked" in told["locked"]
    assert told["states"] == ["RUNNING", "FAILED"]
    holder = f"process {told['owner']['pid']} on {told['owner']['host']}, Slurm job {told['orphan']}"
    assert told["errors"] == [
        f"ERROR train model=segresnet_ds,fold=0: runs/segresnet_ds/fold0 is in use by {holder}; wait for it or end it "
        "(a dead one is recognised by itself)"
    ]
    # Snakemake deleted the orphan's log before the second copy began; the run directory's has all of it
    assert "patches per step" not in run.log.read_text()
    kept = (run.run_dir / ALL_ATTEMPTS).read_text()
    began, second = kept.index(f"begins, Slurm job {told['orphan']}"), kept.index("is in use by")
    assert began < kept.index("patches per step") < second < kept.index(f"finished after {STEPS[ALONE]} steps")
    # the orphan went on to its end, and Snakemake takes what it made for what it is
    assert run.states()[0] == "COMPLETED"
    assert "Nothing to be done" in told["then"]
    trained = [line for line in read_usage(run.run_dir) if line.steps]
    assert {line.job for line in trained} == {told["orphan"]}
    assert sum(line.steps for line in trained) == STEPS[ALONE]


# -- the account -----------------------------------------------------------------------------------------------------


def test_an_account_that_slurm_does_not_know_is_one_line_before_any_job(whole, cluster, tmp_path):
    copied(whole, tmp_path)
    wrong = {**PROFILE, "default-resources": {**PROFILE["default-resources"], "slurm_account": "nobodys_lab"}}
    run = Run(cluster, tmp_path, ALONE, wrong)
    run.train()
    said = run.end(1)
    run.clean()
    assert not run.jobs()
    (line,) = [line for line in said.splitlines() if "nobodys_lab" in line]
    assert line.startswith("ERROR slurm_account: 'nobodys_lab' is no Slurm account of user ")
    assert ACCOUNT in line and "profiles/longleaf/config.v9+.yaml" in line
    assert "Traceback" not in said and "Exception" not in said
