"""What a run will take before anything is queued: jobs, hours, memory and disk by rule and model, and what cannot fit.

Counted from the configuration; from what the run knows already of its crops, networks and trainings it gets better.
"""

import csv
import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from cellmap_pipe.cluster.status import read_object
from cellmap_pipe.config import Config, JobResources, Model
from cellmap_pipe.errors import ConfigError
from cellmap_pipe.files import replacing
from cellmap_pipe.geometry import vec3
from cellmap_pipe.prediction.plan import OUTPUTS, count_windows, make_plans
from cellmap_pipe.text import aligned
from cellmap_pipe.training.usage import CPU, Usage, read_usage

# Dense bf16 (or fp16) peak of a GPU in TFLOP/s and its memory in 10^9 bytes, by the makers' data sheets.
GPUS = {
    "l40s": (362.0, 48.0),
    "l40": (181.0, 48.0),
    "a100": (312.0, 80.0),
    "a40": (150.0, 48.0),
    "v100": (125.0, 32.0),
    "h100": (989.0, 80.0),
    "h200": (989.0, 141.0),
}
ASSUMED_GPU = "l40s"

# Share of the peak that a training gets. 3D networks reach 35 % at best; a third of that is what was seen of such
# trainings on two L40S (10 patches of 128^3 per second and GPU with SegResNetDS).
EFFICIENCY = 0.35 / 3
FLOAT32_SHARE = 0.5  # TF32 has half of bf16's peak
# TFLOP/s of one CPU core in float32: 0.49 TFLOP of SegResNetDS at 64^3 in 7.7 core seconds.
CORE_TFLOPS = 0.06

MIN_STEPS = 20  # measured ones that tell the speed of a training
LEAST_PROCESS_GB = 1.0  # of host memory, of a training process with torch and MONAI, without data
BATCHES_AHEAD = 4


@dataclass(frozen=True)
class Row:
    """What is left to do of one rule, for one model where it has one.

    jobs: in all; left: without their result yet. gpus, cores, memory_gb (first attempt), walltime_h, attempts: of one
    job, None where the profile was not asked. hours_each: by the wall clock, None where nothing tells it. gpu_hours,
    cpu_hours (of all cores), disk_gb: of the jobs left together. basis: what the hours rest on.
    """

    rule: str
    model: str
    jobs: int
    left: int
    gpus: int
    cores: int | None
    memory_gb: float | None
    walltime_h: float | None
    attempts: int | None
    hours_each: float | None = None
    gpu_hours: float | None = None
    cpu_hours: float | None = None
    disk_gb: float | None = None
    basis: str = ""


COLUMNS = tuple(each.name for each in fields(Row))


@dataclass(frozen=True)
class Plan:
    """The rows, what cannot fit (`faults`), what may not (`warnings`), and what the estimates assume (`notes`)."""

    rows: list[Row]
    faults: list[str]
    warnings: list[str]
    notes: list[str]
    free_gb: float

    @property
    def disk_gb(self) -> float:
        """What the jobs left will write."""
        return sum(row.disk_gb or 0.0 for row in self.rows)

    def check(self) -> None:
        """Raise ConfigError, naming all of it, if something cannot fit."""
        if self.faults:
            raise ConfigError("the run cannot fit: " + "; ".join(self.faults))


@dataclass(frozen=True)
class Asked:
    """What one job asks for, as the profile leaves it."""

    gpus: int
    cores: int
    memory_gb: float
    walltime_h: float
    gpu_model: str | None = None


def plan_run(
    config: Config,
    folder: Path,
    *,
    asked: Mapping[str, Mapping[str, Any]] | None = None,
    retries: int | None = None,
) -> Plan:
    """Return the plan of `all` for the run in `folder`.

    asked: what the profile makes a job ask for, as fields of `Asked`, by rule, of train and predict by rule:model;
    without it the configuration counts. retries: how often a failed job is submitted again, None if that is not known.
    """
    return _Planner(config, folder, {name: Asked(**values) for name, values in (asked or {}).items()}, retries).plan()


def write_plan(out_csv: str | Path, plan: Plan) -> str:
    """Write the rows of a plan to `out_csv` and return it as text."""
    with replacing(out_csv) as partial, open(partial, "w", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: _cell(value) for name, value in asdict(row).items()} for row in plan.rows)
    return as_text(plan)


def as_text(plan: Plan) -> str:
    """Return the table, its sums, and what is to be said of it."""
    rows = [{name: _cell(value) for name, value in asdict(row).items()} for row in plan.rows]
    shown = [name for name in COLUMNS if any(row[name] for row in rows)]
    total = dict.fromkeys(COLUMNS, "") | {
        "rule": "total",
        "jobs": str(sum(row.jobs for row in plan.rows)),
        "left": str(sum(row.left for row in plan.rows)),
        **{
            name: _cell(sum(getattr(row, name) or 0.0 for row in plan.rows))
            for name in ("gpu_hours", "cpu_hours", "disk_gb")
        },
    }
    lines = [
        aligned([*rows, total], shown),
        f"disk: {plan.disk_gb:.3g} GB to be written, {plan.free_gb:.3g} GB free",
        *plan.notes,
        *(f"warning: {text}" for text in plan.warnings),
        *(f"cannot fit: {text}" for text in plan.faults),
    ]
    return "\n".join(lines)


@dataclass
class _Planner:
    config: Config
    folder: Path
    asked: Mapping[str, Asked]
    retries: int | None
    faults: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def plan(self) -> Plan:
        rows = [row for row in self._rows() if row.jobs]
        free = shutil.disk_usage(self.folder).free / 1e9
        plan = Plan(rows, self.faults, self.warnings, self.notes, free)
        if plan.disk_gb > free:
            self.faults.append(
                f"{self.folder.resolve()}: {plan.disk_gb:.3g} GB will be written and {free:.3g} GB are free; make "
                "room, or give --directory on a larger disk"
            )
        self._say()
        return plan

    # -- what there is to do --------------------------------------------------------------------------------------

    def _rows(self) -> Iterable[Row]:
        config, models = self.config, [self.config.model(name) for name in self.config.models]
        grids, shards, validated = config.grids_in_use, range(config.shards), config.folds.validated
        sources = [*config.models, "ensemble"]
        volumes = bool(config.data.volumes)
        tuned = config.segment["tune"] and bool(validated)
        if config.data.phantom:
            yield self._row("phantom", ["results/phantom.json"])
        converted = self._voxels() * 2 / 1e9  # image and label map, before they are compressed
        stored = sum(row["train_mb"] for grid in grids for row in self._crops(grid)) / 1e3
        by_shard = [(grid, shard) for grid in grids for shard in shards]
        yield self._row("convert", [f"results/convert/{g}/shard{s}.json" for g, s in by_shard], disk=converted)
        yield self._row("ceiling", [f"results/ceiling/{g}/shard{s}.json" for g, s in by_shard])
        yield self._row("chunk", [f"results/chunks/{g}/shard{s}.json" for g, s in by_shard], disk=stored)
        yield self._row("network_check", [f"results/networks/{model.name}.json" for model in models])
        for model in models:
            yield self._training(model)
        for model in models:
            if validated:
                yield self._prediction(model, "validation", validated)
            if volumes:
                yield self._prediction(model, "test", config.folds.run)
        test = ["results/ensemble/test/foldall.json"] if volumes else []
        written = {subset: self._ensemble_gb(models, subset) for subset in ("validation", "test")}
        merged = [f"results/ensemble/validation/fold{fold}.json" for fold in validated]
        yield self._row("ensemble", merged + test, disk=written["validation"] + written["test"])
        yield self._row("tune", [f"results/tune/{source}.json" for source in sources] if tuned else [])
        segmented = [f"results/segment/{source}/fold{fold}/validation.json" for source in sources for fold in validated]
        segmented += ["results/segment/ensemble/foldall/test.json"] if volumes else []
        masks = written["validation"] * len(sources) + written["test"]
        yield self._row("segment", segmented, disk=masks)
        scored = [f"results/scores/{source}/fold{fold}.json" for source in sources for fold in validated]
        yield self._row("evaluate", scored)
        if volumes:
            yield self._row("submission", ["results/submission/submission.zip"], disk=written["test"])
            if config.data.truth:
                yield self._row("score_submission", ["results/submission/scores.json"])

    def _row(self, rule: str, outputs: Sequence[str], *, disk: float | None = None) -> Row:
        """Return the row of a rule whose hours nothing tells. disk: 10^9 bytes of all its jobs."""
        left = [path for path in outputs if not (self.folder / path).is_file()]
        asked = self.asked.get(rule)
        most = ""
        if asked and left:
            most = f"unknown; by the walltime at most {_cell(len(left) * asked.cores * asked.walltime_h)} core hours"
        return Row(
            rule,
            "",
            len(outputs),
            len(left),
            **self._job(asked),
            disk_gb=disk * len(left) / len(outputs) if disk and outputs else None,
            basis=most,
        )

    def _training(self, model: Model) -> Row:
        folds = self.config.folds.run
        job = self.asked.get(f"train:{model.name}") or _of(model.training_job)
        network = self._network(model)
        outputs = {fold: self.folder / f"results/train/{model.name}/fold{fold}/model.pt" for fold in folds}
        left = [fold for fold, path in outputs.items() if not path.is_file()]
        runs = {fold: read_usage(self.folder / f"runs/{model.name}/fold{fold}") for fold in folds}
        seconds, basis = self._step_seconds(model, job, network, runs)
        hours: list[float] = []
        if seconds is not None:
            steps = model.train["max_steps"]
            hours = [seconds * max(steps - max([u.step for u in runs[fold]], default=0), 0) / 3600 for fold in left]
        each = max(hours, default=None)
        if each is not None:
            self._check_walltime(model, job, each, basis)
        self._check_memory(model, job, network)
        total = sum(hours) if hours else None
        return Row(
            "train",
            model.name,
            len(folds),
            len(left),
            **self._job(job),
            hours_each=each,
            gpu_hours=None if total is None or not job.gpus else total * job.gpus,
            cpu_hours=None if total is None else total * job.cores,
            disk_gb=_run_gb(model, network) * len(left) if network else None,
            basis=basis if left else "",
        )

    def _prediction(self, model: Model, subset: str, folds: Sequence[str]) -> Row:
        shards = range(model.predict["shards"][subset])
        job = self.asked.get(f"predict:{model.name}") or _of(model.prediction_job)
        outputs = [f"results/predict/{model.name}/fold{fold}/{subset}/shard{n}.json" for fold in folds for n in shards]
        left = [path for path in outputs if not (self.folder / path).is_file()]
        needs = self._needs(model, subset, job)
        network = self._network(model)
        hours, basis = None, ""
        if left and needs is None:
            basis = "unknown: " + ("no results/predict/plan_models.csv yet" if subset == "test" else "no quality table")
        elif left and network is None:
            basis = f"unknown: no results/networks/{model.name}.json yet"
        elif left and needs is not None and network is not None:
            work = needs.windows * network["forward_gflop"] / network["batch"] / 1e3
            # of all folds: each validates its own crops, and each predicts all volumes
            work *= len(folds) / (self.config.folds.n if subset == "validation" else 1)
            speed, device = self._speed(job, network, on_cpu=_on_cpu(model.prediction_job, job))
            hours, basis = work / speed / 3600 / len(outputs), f"{needs.windows} windows, FLOPs on {device}"
        total = None if hours is None else hours * len(left)
        disk = None
        if needs is not None:
            disk = needs.output_gb * (len(folds) if subset == "test" else len(folds) / self.config.folds.n)
            disk *= len(left) / len(outputs)
        return Row(
            f"predict ({subset})",
            model.name,
            len(outputs),
            len(left),
            **self._job(job),
            hours_each=hours,
            gpu_hours=None if total is None or not job.gpus else total * job.gpus,
            cpu_hours=None if total is None else total * job.cores,
            disk_gb=disk,
            basis=basis,
        )

    # -- how long it takes ------------------------------------------------------------------------------------------

    def _step_seconds(
        self,
        model: Model,
        job: Asked,
        network: Mapping[str, Any] | None,
        runs: Mapping[str, Sequence[Usage]],
    ) -> tuple[float | None, str]:
        """Return the seconds of a training step, validations included, and what tells them: measured is better."""
        wanted = [
            line
            for lines in runs.values()
            for line in lines[1:]
            if (line.device == CPU) == _on_cpu(model.training_job, job) and line.processes == max(job.gpus, 1)
        ]
        steps = sum(line.steps for line in wanted)
        if steps >= MIN_STEPS:
            devices = ", ".join(dict.fromkeys(line.device for line in wanted))
            return sum(line.seconds for line in wanted) / steps, f"measured over {steps} steps on {devices}"
        if network is None:
            return None, f"unknown: no results/networks/{model.name}.json yet"
        speed, device = self._speed(job, network, on_cpu=_on_cpu(model.training_job, job))
        each = 3 * network["forward_gflop"] / network["batch"] * model.train["batch"] * model.train["accumulate"] / 1e3
        tiles = self._tiles(model)
        validation = 0.0
        if tiles is not None:
            passes = tiles * network["forward_gflop"] / network["batch"] / 1e3 / max(job.gpus, 1)
            validation = passes / (model.train["steps_per_epoch"] * model.train["validate_every"])
        return (each + validation) / speed, f"FLOPs on {device}"

    def _speed(self, job: Asked, network: Mapping[str, Any], *, on_cpu: bool) -> tuple[float, str]:
        """Return the TFLOP/s of each of a job's processes, and of what device."""
        if on_cpu:
            return CORE_TFLOPS * max(job.cores // max(job.gpus, 1), 1), f"{job.cores} CPU core(s)"
        name = (job.gpu_model or ASSUMED_GPU).lower()
        peak, _ = GPUS.get(name, GPUS[ASSUMED_GPU])
        known = name.upper() if name in GPUS else f"{ASSUMED_GPU.upper()} (nothing is known of {name})"
        share = 1.0 if network["precision"] == "bf16" else FLOAT32_SHARE
        return peak * share * EFFICIENCY, known

    def _check_walltime(self, model: Model, job: Asked, hours: float, basis: str) -> None:
        if hours <= job.walltime_h:
            return
        said = f"model {model.name}: a training takes about {hours:.3g} h ({basis}) and a job's walltime is "
        key = "resources.train.runtime_min (or `runtime` of train in the profile)"
        if self.retries is None:
            self.warnings.append(f"{said}{job.walltime_h:.3g} h; it needs {math.ceil(hours / job.walltime_h)} attempts")
        elif hours > job.walltime_h * (self.retries + 1):
            self.faults.append(
                f"{said}{job.walltime_h:.3g} h, in {self.retries + 1} attempts; raise {key}, or `retries` to "
                f"{math.ceil(hours / job.walltime_h) - 1}, or lower train.max_steps"
            )

    # -- what fits ----------------------------------------------------------------------------------------------------

    def _check_memory(self, model: Model, job: Asked, network: Mapping[str, Any] | None) -> None:
        if network is not None and job.gpus:
            need, limit = network["memory_gb"]["total"], model.training_job.gpu_gb
            has = GPUS.get((job.gpu_model or "").lower())
            said = f"model {model.name}: training needs about {need:.3g} GB on a GPU"
            remedy = "lower train.batch (and raise train.accumulate) or train.patch"
            if limit is not None and need > limit:
                self.faults.append(f"{said}, resources.train.gpu_gb is {limit:g}; {remedy}")
            elif limit is None and has and need > has[1]:
                self.warnings.append(f"{said}, a {job.gpu_model} has {has[1]:g} GB; {remedy}")
        processes = max(job.gpus, 1)
        patch = model.train["batch"] * math.prod(model.train["patch"]) / 1e9
        # image and label map of the batches that are read ahead, and twice the image in float32 on CPUs
        host = processes * (LEAST_PROCESS_GB + patch * (2 * BATCHES_AHEAD + (0 if job.gpus else 8)))
        if host > job.memory_gb:
            self.faults.append(
                f"model {model.name}: {processes} training processes with batches of {model.train['batch']} patches "
                f"take at least {host:.3g} GB and the job has {job.memory_gb:.3g} GB; raise resources.train.mem_mb"
            )
        crops = self._crops(model.grid)
        largest = max(crops, key=lambda row: row["train_mb"], default=None)
        if largest and largest["train_mb"] / 1e3 > job.memory_gb:
            self.warnings.append(
                f"model {model.name}: crop {largest['crop']} alone takes {largest['train_mb'] / 1e3:.3g} GB in "
                f"training and the job has {job.memory_gb:.3g} GB, so that its patches come from the disk; raise "
                "resources.train.mem_mb"
            )

    def _needs(self, model: Model, subset: str, job: Asked) -> "_Needs | None":
        """Return what predicting a subset takes, None if nothing tells it; find what needs more memory than it gets."""
        if subset == "test":
            rows = [row for row in self._volumes if row["model"] == model.name]
            if not rows:
                return None
            found = [(row["volume"], _number(row["memory_gb"])) for row in rows]
            needs = _Needs(
                sum(int(row["windows"] or 0) for row in rows), sum(_number(row["output_gb"]) for row in rows)
            )
        else:
            crops = self._crops(model.grid)
            if not crops:
                return None
            found = [(row["crop"], row["predict_mb"] / 1e3) for row in crops]
            voxels = sum(math.prod(row["shape"]) for row in crops)
            bytes_each = len(model.classes) * OUTPUTS[model.predict["output"]].itemsize
            needs = _Needs(sum(self._windows(model, row["shape"]) for row in crops), voxels * bytes_each / 1e9)
        name, most = max(found, key=lambda item: item[1])
        attempts = (self.retries or 0) + 1
        if most > job.memory_gb * attempts:
            self.faults.append(
                f"model {model.name}: {name} takes {most:.3g} GB to predict and the job has {job.memory_gb:.3g} GB"
                + (f" ({job.memory_gb * attempts:.3g} GB in the last attempt)" if attempts > 1 else "")
                + "; raise resources.predict.mem_mb, or set predict.memory_gb, which cuts the volume into columns"
            )
        elif most > job.memory_gb:
            self.warnings.append(
                f"model {model.name}: {name} takes {most:.3g} GB to predict, more than the first attempt's "
                f"{job.memory_gb:.3g} GB"
            )
        return needs

    def _windows(self, model: Model, shape: Sequence[int]) -> int:
        predict = model.predict
        voxel = self.config.grids[model.grid]
        sizes = (1.0, 1.0, 1.0) if isinstance(voxel, str) else voxel
        plans = make_plans(
            shape,
            model.train["patch"],
            predict["overlap"],
            predict["blending"],
            planes=predict["planes"],
            voxel_nm=vec3(sizes),
        )
        whole = ((0, 0, 0), (shape[0], shape[1], shape[2]))
        return count_windows(plans, whole) * int(predict["tta"])

    def _tiles(self, model: Model) -> float | None:
        """Return how many patches the validation of a fold looks at, None before the quality table is there."""
        crops, validated = self._crops(model.grid), self.config.folds.validated
        if not crops or not validated:
            return 0.0 if not validated else None
        tiles = sum(
            math.prod(math.ceil(n / size) for n, size in zip(row["shape"], model.train["patch"], strict=True))
            for row in crops
        )
        return tiles / self.config.folds.n

    def _ensemble_gb(self, models: Sequence[Model], subset: str) -> float:
        """Return what the mean of all models takes: every class of a grid once."""
        total = 0.0
        for grid in self.config.grids_in_use:
            here = [model for model in models if model.grid == grid]
            if subset == "test":
                sizes = [
                    sum(_number(row["output_gb"]) for row in self._volumes if row["model"] == model.name)
                    for model in here
                ]
                total += max(sizes, default=0.0)
            else:
                voxels = sum(math.prod(row["shape"]) for row in self._crops(grid))
                names = {name for model in here for name in model.classes}
                total += voxels * len(names) / 1e9 * len(self.config.folds.validated) / self.config.folds.n
        return total

    # -- what is known --------------------------------------------------------------------------------------------

    def _crops(self, grid: str) -> list[dict[str, Any]]:
        """Return the crops that are used: name, shape in voxels, train_mb and predict_mb; none before `quality`."""
        if grid not in self._tables:
            columns = {"crop", "verdict", "shape", "train_mb", "predict_mb"}
            rows = _rows_of(self.folder / f"results/quality/{grid}/crops.csv", columns)
            self._tables[grid] = [
                {
                    "crop": row["crop"],
                    "shape": [int(n) for n in row["shape"].split(";")],
                    "train_mb": _number(row["train_mb"]),
                    "predict_mb": _number(row["predict_mb"]),
                }
                for row in rows
                if row["verdict"] != "reject" and row["shape"]
            ]
        return self._tables[grid]

    @cached_property
    def _tables(self) -> dict[str, list[dict[str, Any]]]:
        return {}

    @cached_property
    def _volumes(self) -> list[dict[str, str]]:
        columns = {"model", "volume", "windows", "memory_gb", "output_gb"}
        return _rows_of(self.folder / "results/predict/plan_models.csv", columns)

    def _voxels(self) -> int:
        return sum(math.prod(row["shape"]) for grid in self.config.grids_in_use for row in self._crops(grid))

    def _network(self, model: Model) -> dict[str, Any] | None:
        """Return what the model's network check found; None before it, or if it was of another patch or network."""
        found = read_object(self.folder / f"results/networks/{model.name}.json")
        same = found.get("patch") == list(model.train["patch"]) and found.get("network") == model.network
        return found if same and found.keys() >= {"batch", "forward_gflop", "memory_gb", "precision"} else None

    def _job(self, asked: Asked | None) -> dict[str, Any]:
        attempts = None if self.retries is None else self.retries + 1
        if asked is None:
            return {"gpus": 0, "cores": None, "memory_gb": None, "walltime_h": None, "attempts": attempts}
        return {
            "gpus": asked.gpus,
            "cores": asked.cores,
            "memory_gb": asked.memory_gb,
            "walltime_h": asked.walltime_h,
            "attempts": attempts,
        }

    def _say(self) -> None:
        """Note what the estimates assume, and what would make them better."""
        models = [self.config.model(name) for name in self.config.models]
        self.notes.append(
            f"hours by FLOPs assume {EFFICIENCY:.0%} of a GPU's bf16 peak (not measured here; a starved loader is "
            f"slower), {CORE_TFLOPS:g} TFLOP/s of a CPU core; those of a training count from where it stands"
        )
        if lacking := [model.name for model in models if self._network(model) is None]:
            self.notes.append(f"`snakemake network_checks` tells what training takes of {', '.join(lacking)}")
        if lacking := [grid for grid in self.config.grids_in_use if not self._crops(grid)]:
            self.notes.append(
                f"no quality table yet of {', '.join(lacking)}: disk and memory of its crops are not counted "
                f"(`snakemake {' '.join(f'results/quality/{grid}/crops.csv' for grid in lacking)}`)"
            )
        if self.config.data.volumes and not self._volumes:
            self.notes.append("`snakemake results/predict/plan.csv` tells what the volumes to segment take")


@dataclass(frozen=True)
class _Needs:
    """What predicting all volumes of a subset with one model takes: windows of the network, 10^9 bytes on disk."""

    windows: int
    output_gb: float


def _run_gb(model: Model, network: Mapping[str, Any]) -> float:
    """Return the 10^9 bytes that a training leaves: checkpoints, the last two best weights, model.pt."""
    memory = network["memory_gb"]
    weights = memory["weights"]
    state = weights + memory["average"] + memory["optimizer"]
    kept = model.train["max_steps"] // model.train["keep_every"] if model.train["keep_every"] else 0
    return float(state * (2 + kept) + 3 * weights)


def _on_cpu(resources: JobResources, job: Asked) -> bool:
    return not job.gpus or resources.device == CPU


def _of(job: JobResources) -> Asked:
    return Asked(job.gpus, job.threads, job.mem_mb / 1e3, job.runtime_min / 60)


def _rows_of(path: Path, columns: set[str]) -> list[dict[str, str]]:
    """Return the rows of a table, none of one that is not there, not readable, or of another version's columns."""
    try:
        with path.open(newline="") as stream:
            rows = list(csv.DictReader(stream))
    except (OSError, ValueError, csv.Error):
        return []
    return rows if rows and rows[0].keys() >= columns else []


def _number(text: str) -> float:
    return float(text) if text else 0.0


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"
    return str(value)
