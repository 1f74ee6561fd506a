"""What the workflow will ask of the machine, as Snakemake itself resolves profile, rules and configuration."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from cellmap_pipe.errors import ConfigError
from cellmap_pipe.schema import load_yaml

PLAN_SECONDS = 300.0
# More than any rule has threads: Snakemake would cut them to the cores of the machine that it plans on.
CORES = 1000


@dataclass(frozen=True)
class Request:
    """What the jobs of one rule ask for, as Snakemake's resources, with how many jobs ask for it."""

    rule: str
    threads: int
    resources: Mapping[str, int | str]
    jobs: int

    def number(self, name: str) -> int:
        """Return a resource that is a number, 0 if it is not asked for."""
        value = self.resources.get(name, 0)
        return value if isinstance(value, int) else 0

    def text(self, name: str) -> str:
        """Return a resource as text, empty if it is not asked for."""
        return str(self.resources.get(name, ""))

    @property
    def account(self) -> str:
        """The account that is charged: of several, parted by commas or blanks, the plugin takes the first."""
        return next(iter(self.text("slurm_account").replace(",", " ").split()), "")

    @property
    def cpus(self) -> int:
        return self.number("cpus_per_task") or self.threads


def profile_file(profile: Path) -> Path:
    """Return the file of a profile's folder that Snakemake reads. Raises ConfigError if there is none."""
    found = sorted(profile.glob("config.v*+.yaml")) + sorted(profile.glob("config.yaml"))
    if not found:
        raise ConfigError(
            f"{profile}: no profile there (config.yaml or config.v9+.yaml); give the folder of one by --profile"
        )
    return found[0]


def read_profile(profile: Path) -> dict[str, Any]:
    """Return the settings in a profile's folder. Raises ConfigError if there are none, or the file is not YAML."""
    return dict(load_yaml(profile_file(profile)))


def requests(profile: Path, configfiles: Sequence[Path] = (), target: str = "all") -> list[Request]:
    """Return what every job that `target` needs from nothing will ask for, one entry for jobs that ask for the same.

    Rules that run beside Snakemake itself are left out. Raises ConfigError if Snakemake cannot plan.
    """
    command = [
        sys.executable,
        "-m",
        "snakemake",
        target,
        "--dry-run",
        "--forceall",
        "--nocolor",
        "--profile",
        str(profile),
    ]
    command += ["--cores", str(CORES)]
    if configfiles:
        command += ["--configfile", *map(str, configfiles)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SNAKEMAKE")}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=PLAN_SECONDS, env=environment, check=False
        )
    except subprocess.TimeoutExpired:
        raise ConfigError(f"`{shlex.join(command)}` did not end within {PLAN_SECONDS:g} s") from None
    said = done.stdout + done.stderr
    if done.returncode:
        lines = [line.strip() for line in said.splitlines() if line.strip() and not line.startswith("Using profile")]
        named = [line.removeprefix("ERROR ") for line in lines if line.startswith("ERROR ")] or lines[-1:]
        raise ConfigError(" ".join(named) or f"`{shlex.join(command)}` ended with status {done.returncode}")
    return parse_plan(said, local_rules(Path("workflow")))


def parse_plan(text: str, local: Iterable[str] = ()) -> list[Request]:
    """Return the requests in what a dry run of Snakemake prints; `local`: rules to leave out."""
    found: dict[tuple[Any, ...], int] = {}
    for block in re.split(r"^(?=(?:local)?(?:rule|checkpoint) \w+:$)", text, flags=re.MULTILINE):
        head = re.match(r"(local)?(?:rule|checkpoint) (\w+):$", block, re.MULTILINE)
        line = re.search(r"^ +resources: (.*)$", block, re.MULTILINE)
        if not head or head[1] or head[2] in local or not line:
            continue
        threads = re.search(r"^ +threads: (\d+)$", block, re.MULTILINE)
        resources = {
            name: int(value) if re.fullmatch(r"-?[1-9]\d*|0", value) else value  # an account may be 007
            for name, value in re.findall(r"(\w+)=(.*?)(?=, \w+=|$)", line[1])
            if "<TBD>" not in value and name not in ("tmpdir", "mem", "mem_mib", "disk", "disk_mib")
        }
        key = (head[2], int(threads[1]) if threads else 1, tuple(sorted(resources.items())))
        found[key] = found.get(key, 0) + 1
    return [Request(rule, threads, dict(resources), jobs) for (rule, threads, resources), jobs in found.items()]


def local_rules(workflow: Path) -> set[str]:
    """Return the rules that run beside Snakemake itself; a dry run does not tell."""
    found = set()
    for path in [workflow / "Snakefile", *sorted((workflow / "rules").glob("*.smk"))]:
        text = path.read_text() if path.is_file() else ""
        for name, body in re.findall(r"^rule (\w+):\n((?:[ \t].*\n|\n|#.*\n)*)", text, re.MULTILINE):
            if re.search(r"^ +localrule: True", body, re.MULTILINE):
                found.add(name)
    return found


def sbatch_command(request: Request, settings: Mapping[str, Any]) -> list[str]:
    """Return the call of sbatch that Snakemake's plugin makes of a request, without the command to run.

    settings: of the profile. Raises ConfigError for what the plugin refuses.
    """
    from snakemake_executor_plugin_slurm.submit_string import get_submit_command
    from snakemake_executor_plugin_slurm.utils import set_gres_string
    from snakemake_executor_plugin_slurm.validation import validate_slurm_extra
    from snakemake_interface_common.exceptions import WorkflowError

    job = SimpleNamespace(threads=request.threads, resources=_Resources(request.resources))
    names = {
        "run_uuid": "cellmap-doctor",
        "slurm_logfile": "/dev/null",
        "comment_str": f"rule_{request.rule}",
        "account": f"-A {shlex.quote(request.account)}" if request.account else "",
        "partition": f"-p {shlex.quote(request.text('slurm_partition'))}" if request.text("slurm_partition") else "",
        "workdir": None,
    }
    options = SimpleNamespace(
        requeue=bool(settings.get("slurm-requeue")),
        no_requeue=bool(settings.get("slurm-no-requeue")),
        qos=settings.get("slurm-qos"),
        reservation=settings.get("slurm-reservation"),
    )
    try:
        validate_slurm_extra(job)
        return shlex.split(get_submit_command(job, names, settings=options) + set_gres_string(job))
    except WorkflowError as error:
        raise ConfigError(f"set-resources of rule {request.rule}: {error}") from None


class _Resources(dict[str, Any]):
    """Resources by attribute and by `get`, as Snakemake's jobs have them."""

    def __getattr__(self, name: str) -> Any:
        return self.get(name)
