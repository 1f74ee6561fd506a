"""One job of the rule `predict`: a model's class probabilities for its share of the volumes, block by block.

The blocks of all volumes, in order, are cut into equal shares, one per job; several jobs may write one volume. Blocks
are recorded as they are finished; a job that was killed goes on with the next one, and the result is the same, bit for
bit, however many jobs there are. A block that fails is named, the others go on, and the job fails at its end.
"""

import errno
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cellmap_pipe.config import RESULT_VERSIONS
from cellmap_pipe.errors import ConfigError, ContractError
from cellmap_pipe.files import digest, write_json
from cellmap_pipe.geometry import Lattice, shape3
from cellmap_pipe.intensity import intensity_range, is_measured, lookup_table
from cellmap_pipe.prediction.assignment import Served, Service, service
from cellmap_pipe.prediction.plan import OUTPUTS, Box, Plan, columns, make_plans
from cellmap_pipe.prediction.sliding_window import Network, PredictionError, predict_box
from cellmap_pipe.prediction.store import (
    BlockStore,
    blocks_of,
    file_stem,
    remove_other_volumes,
    remove_outdated,
    runs_of,
    shares,
)
from cellmap_pipe.prediction.symmetries import Symmetry, symmetries
from cellmap_pipe.prediction.volumes import (
    READ_PLANES,
    EMVolume,
    Survey,
    Volume,
    VoxelSize,
    check_survey,
    grid_lattice,
    reach_of,
)
from cellmap_pipe.training.inference import Trained, load_model

logger = logging.getLogger(__name__)

# Failures that are spelled out in the error; the log has all.
MOST_NAMED = 8


@dataclass(frozen=True)
class PredictionSettings:
    """How volumes are predicted: `predict` of config.yaml, and `max_upsample`.

    thresholds: by class, and "default"; needed where output is "mask", else of no effect.
    """

    overlap: float
    blending: str
    batch: int
    memory_gb: float | None
    max_oversampling: float
    allow_oversampling: bool
    max_upsample: float
    tta: int
    planes: str
    output: str
    thresholds: Mapping[str, float] | None = None

    # What decides only where and whether a result is made, not which; and what enters the fingerprint in another form
    NEUTRAL = ("memory_gb", "max_oversampling", "allow_oversampling", "shards", "planes", "thresholds")

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> "PredictionSettings":
        """Return the entries of `settings` that are known here. Raises ConfigError for one that is missing or wrong."""
        needed = [field.name for field in fields(cls) if field.default is MISSING]
        if settings.get("output") == "mask":
            needed.append("thresholds")
        lacking = [name for name in needed if name not in settings]
        if lacking:
            raise ConfigError(f"predict.{lacking[0]} is missing from the settings of this prediction")
        if settings["output"] not in OUTPUTS:
            raise ConfigError(f"predict.output: unknown '{settings['output']}'; allowed: {', '.join(OUTPUTS)}")
        return cls(**{field.name: settings[field.name] for field in fields(cls) if field.name in settings})

    def thresholds_of(self, classes: Sequence[str]) -> list[float] | None:
        """Return the threshold of each class where masks are written, else None."""
        if self.output != "mask" or self.thresholds is None:
            return None
        return [float(self.thresholds.get(name, self.thresholds["default"])) for name in classes]


def predict_shard(
    weights_pt: str | Path,
    volumes: Sequence[Volume],
    out_json: str | Path,
    *,
    data_root: str | Path,
    shard: int,
    shards: int,
    store_dir: str | Path,
    settings: Mapping[str, Any],
    served: Served,
    model: str,
    fold: int | str,
    subset: str,
    classes: Sequence[str] | None = None,
    device: str = "auto",
) -> None:
    """Write the probabilities of the blocks that belong to this shard, then the JSON that lists their volumes.

    volumes: dicts as `volumes` describes them; the blocks of all of them are shared out, see `store.shares`.
    settings: see PredictionSettings; further entries, such as a revision, only enter the fingerprint.
    served: voxel size (z, y, x) in nm, or "native", and classes, of the grids of all models in use, by name; what
    another grid serves is not predicted but listed under `elsewhere` of the volume's record, and a volume of which
    nothing is left is listed, by shard 0, as "not served".
    classes: of the model as it is configured, None if that is not known. device: auto, cpu or cuda.
    Raises ContractError for weights of other classes. Raises PredictionError naming the blocks and volumes that failed,
    after all others are done, and nothing is listed then; at once where memory or disk are full.
    """
    used = PredictionSettings.of(settings)
    out_json, store_dir = Path(out_json), Path(store_dir)
    store_dir.mkdir(parents=True, exist_ok=True)
    place = choose_device(device)
    trained = load_model(weights_pt, device=str(place))
    if classes is not None and list(trained.classes) != list(classes):
        raise ContractError(
            f"{weights_pt} predicts {', '.join(trained.classes)}, but model {model} is configured for "
            f"{', '.join(classes)}; train it anew (`-R train`)"
        )
    job = _Job(trained, used, settings, served, Path(data_root), store_dir, place)
    choices = [(volume, job.service(volume)) for volume in sorted(volumes, key=lambda volume: str(volume["name"]))]
    listed = [(volume, choice) for volume, choice in choices if choice.classes]
    planes = shares([shape3(volume["lattice"]["shape"]) for volume, _ in listed], shard, shards)
    mine = [(*entry, span) for entry, span in zip(listed, planes, strict=True) if span[0] < span[1]]
    records, failures = [], []
    if shard == 0:
        remove_other_volumes(store_dir, (volume["name"] for volume, _ in listed))
        records = [_record(volume, used, choice) for volume, choice in choices if not choice.classes]
    for number, (volume, choice, (first, last)) in enumerate(mine):
        name = str(volume["name"])
        try:
            opened = job.open(volume, choice.classes)
            if first == 0 and opened.em_whole:  # one job does so; EM that is mended may be what it was
                remove_outdated(store_dir, name, opened.fingerprint)
            found = [(f"{name}, block {_shown(block)}", error) for block, error in job.predict(opened, first, last)]
        except Exception as error:  # whatever it is, the other volumes must not suffer from it
            rest = [(entry, len(of.classes), span) for entry, of, span in mine[number:]]
            stop = _hopeless(error, used, store_dir, rest)
            if stop:
                raise PredictionError(f"{name}: {stop}") from error
            logger.exception("%s failed", name)
            found = [(name, error)]
        failures += found
        if not found:
            path = os.path.relpath(opened.store.path, out_json.parent)
            records.append(_record(volume, used, choice, path=path, **opened.notes))
    if failures:
        raise _summary(failures, len(mine)) from failures[0][1]
    for record in records:
        logger.info("%s: %s %s", record["name"], record["status"], record["cause"])
    contents = {"model": model, "fold": str(fold), "subset": subset, "shard": shard, "shards": shards}
    records.sort(key=lambda record: str(record["name"]))
    write_json(out_json, {**contents, "records": records, "weights_sha256": trained.digest})


def _record(
    volume: Volume, used: PredictionSettings, choice: Service, *, path: str | None = None, **notes: Any
) -> dict[str, Any]:
    """Return what is listed of a volume: the same, whichever job lists it."""
    return {
        **{key: volume[key] for key in ("name", "dataset", "lattice", "target")},
        "classes": choice.classes,
        "elsewhere": choice.elsewhere,
        "path": path,
        "shape": [len(choice.classes), *volume["lattice"]["shape"]] if choice.classes else None,
        "output": used.output,
        "status": "ok" if choice.classes else "not served",
        "cause": choice.cause,
        "fingerprint": None,
        **notes,
    }


def _summary(failures: Sequence[tuple[str, Exception]], volumes: int) -> PredictionError:
    """Return the error that names what failed."""
    failed = len({where.split(",")[0] for where, _ in failures})
    causes = "; ".join(f"{where}: {_one_line(error)}" for where, error in failures[:MOST_NAMED])
    more = f"; and {len(failures) - MOST_NAMED} more, see the log" if len(failures) > MOST_NAMED else ""
    return PredictionError(
        f"{failed} of {volumes} volumes failed: {causes}{more}. Finished blocks are kept; mend the cause "
        "or take the volume off the list, and run again"
    )


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _shown(box: Box) -> str:
    (z0, y0, x0), (z1, y1, x1) = box
    return f"[{z0}:{z1} {y0}:{y1} {x0}:{x1}]"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _hopeless(
    error: Exception,
    used: PredictionSettings,
    store_dir: Path,
    rest: Sequence[tuple[Volume, int, tuple[int, int]]],
) -> str:
    """Return in words why no other block can succeed either, "" if one can.

    rest: volume, number of classes and planes [first, last) of what this job has yet to do.
    """
    for cause in _causes(error):
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            voxels = sum(
                n * (last - first) * v["lattice"]["shape"][1] * v["lattice"]["shape"][2] for v, n, (first, last) in rest
            )
            need, free = voxels * OUTPUTS[used.output].itemsize / 1e9, shutil.disk_usage(store_dir).free / 1e9
            return (
                f"{_one_line(cause)}: this job's volumes from here on take up to {need:.3g} GB in {store_dir}, "
                f"{free:.3g} GB are free; make room and run again, finished blocks are kept"
            )
        if isinstance(cause, torch.OutOfMemoryError):
            return (
                f"the GPU's memory ran out; lower predict.batch (now {used.batch}) and run again; with another batch "
                "the last bit of a probability may differ, so finished blocks are done again"
            )
        if isinstance(cause, MemoryError) or "DefaultCPUAllocator" in str(cause):
            return (
                f"memory ran out; set predict.memory_gb lower (now {used.memory_gb}) or give the job more "
                "(resources), and run again"
            )
    return ""


def choose_device(device: str) -> torch.device:
    """Return the device that "auto", "cpu" or "cuda" stands for. Raises ConfigError for cuda without a GPU."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(
            "torch sees none of the GPUs that this job was given (no driver, or a torch for CPUs); mend that, or set "
            "resources.predict.gpus to 0 to predict on the CPU"
        )
    return torch.device(device)


def _voxel(trained: Trained) -> VoxelSize:
    return trained.voxel_nm if isinstance(trained.voxel_nm, str) else tuple(trained.voxel_nm)


def arithmetic(trained: Trained, device: torch.device) -> str:
    """Return how the network is run: "bf16", on a GPU if it was trained so there, or "float32", by device.

    A GPU convolves float32 with fewer bits (TF32): blocks of both devices would meet at seams.
    """
    if device.type != "cuda":
        return "float32"
    return "bf16" if trained.contents["settings"]["amp"] == "bf16" else "float32 on a GPU"


def mixed_precision(trained: Trained, device: torch.device) -> Network:
    """Return the network as it is run on `device`, see `arithmetic`."""
    if arithmetic(trained, device) != "bf16":
        return trained.network

    def network(images: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            return trained.network(images)

    return network


@dataclass(frozen=True)
class _Opened:
    """A volume that is ready to be predicted.

    em_whole: whether all of its EM can be read. notes: what its record says about how it is made.
    """

    classes: list[str]
    em: EMVolume
    em_whole: bool
    plans: tuple[Plan, ...]
    symmetries: tuple[Symmetry, ...]
    normalise: np.ndarray
    fingerprint: str
    store: BlockStore
    notes: dict[str, Any]


class _Job:
    """What the volumes of one job share: the network and how it is used."""

    def __init__(
        self,
        trained: Trained,
        used: PredictionSettings,
        settings: Mapping[str, Any],
        served: Served,
        root: Path,
        store_dir: Path,
        device: torch.device,
    ) -> None:
        self.trained, self.used, self.root, self.store_dir, self.device = trained, used, root, store_dir, device
        self._network = mixed_precision(trained, device)
        self._determining = {key: value for key, value in settings.items() if key not in PredictionSettings.NEUTRAL}
        others = served.get(trained.grid, {}).get("classes", [])
        own = {"voxel_nm": _voxel(trained), "classes": list(dict.fromkeys([*others, *trained.classes]))}
        self._served = {**served, trained.grid: own}

    def service(self, volume: Volume) -> Service:
        """Return which of the network's classes are to be predicted of a volume."""
        limits = self.used.max_oversampling, self.used.allow_oversampling
        return service(volume, self.trained.grid, self.trained.classes, self._served, *limits)

    def open(self, volume: Volume, classes: list[str]) -> _Opened:
        """Return the volume with its store, which is made if it is not there."""
        lattice = Lattice.from_dict(volume["lattice"])
        self._check_grid(volume, lattice)
        used, patch = self.used, shape3(self.trained.patch)
        views = symmetries(used.tta, patch, lattice.voxel_nm)
        reach = reach_of(patch, used.planes)
        em = EMVolume(self.root / volume["em"], lattice, max_upsample=used.max_upsample, reach=reach)
        survey = em.survey(self.store_dir / f"{file_stem(volume['name'])}.survey.json")
        check_survey(survey, em.path)
        normalisation, source = self._intensity_range(volume, survey)
        plans = make_plans(
            lattice.shape,
            patch,
            used.overlap,
            used.blending,
            em.context,
            planes=used.planes,
            voxel_nm=lattice.voxel_nm,
        )
        fingerprint = digest(
            {
                "version": RESULT_VERSIONS["predict"],
                "weights": self.trained.digest,
                "em": survey.digest,
                "classes": classes,
                "normalisation": normalisation,
                "patch": list(patch),
                "plans": len(plans),
                "arithmetic": arithmetic(self.trained, self.device),
                "settings": self._determining,
                "thresholds": used.thresholds_of(classes),
            }
        )
        notes = {
            "fingerprint": fingerprint,
            "normalisation": {"range": normalisation, "from": source},
            "em_level": em.level.path.rsplit("/", 1)[-1],
        }
        store = BlockStore(self.store_dir, volume["name"], lattice, classes, fingerprint, notes, used.output)
        return _Opened(
            classes, em, not survey.damaged, plans, views, lookup_table(*normalisation), fingerprint, store, notes
        )

    def predict(self, opened: _Opened, first: int, last: int) -> list[tuple[Box, Exception]]:
        """Write the blocks over the planes [first, last) that are not finished; return those that failed, with causes.

        first, last: multiples of the store's chunks, or the volume's end.
        """
        used, store = self.used, opened.store
        depth, *grain = store.array.chunks[1:]
        boxes = columns(
            opened.plans,
            len(opened.classes),
            depth,
            used.batch,
            (grain[0], grain[1]),
            used.memory_gb,
            READ_PLANES,
            output=used.output,
            symmetries=used.tta,
        )
        store.remove_partials(first, last)
        failures = []
        for (_, y0, x0), (_, y1, x1) in boxes:
            blocks = blocks_of(((first, y0, x0), (last, y1, x1)), depth)
            waiting = [block for block in blocks if not store.finished(block)]
            alone = (
                False  # a run may fail by what lies ahead of its first block, which is then tried without the others
            )
            while waiting:
                run = waiting[0] if alone else runs_of(waiting)[0]
                single = run == waiting[0]
                try:
                    self._predict_run(opened, run)
                    waiting = [block for block in waiting if block[0][0] >= run[1][0]]
                    alone = False
                except Exception as error:
                    if _hopeless(error, used, self.store_dir, []):
                        raise
                    if single:
                        logger.exception("%s: block %s failed", store.path, _shown(run))
                        failures.append((run, error))
                    waiting = [block for block in waiting if block != run and not store.finished(block)]
                    alone = not single
        return failures

    def _predict_run(self, opened: _Opened, run: Box) -> None:
        """Write the blocks of one column that follow each other without a gap, and record each."""
        store = opened.store
        (_, y0, x0), (_, y1, x1) = run
        depth = store.array.chunks[1]

        def write(first: int, last: int, probabilities: np.ndarray) -> None:
            store.array[:, first:last, y0:y1, x0:x1] = probabilities
            for block in blocks_of(((first, y0, x0), (last, y1, x1)), depth):
                store.finish(block)
                logger.info("%s: block %s done", store.path.name, _shown(block))

        predict_box(
            self._network,
            opened.em,
            opened.plans,
            run,
            write,
            channels=[list(self.trained.classes).index(name) for name in opened.classes],
            depth=depth,
            normalise=opened.normalise,
            batch=self.used.batch,
            device=self.device,
            network_channels=len(self.trained.classes),
            output=self.used.output,
            thresholds=self.used.thresholds_of(opened.classes),
            symmetries=opened.symmetries,
        )

    def _intensity_range(self, volume: Volume, survey: Survey) -> tuple[list[float], str]:
        """Return the intensities of a volume that become 0 and 1, and where they were found.

        A dataset that was not trained on is measured here, as the datasets of the training were.
        """
        known = self.trained.normalisation.get(volume["dataset"])
        kind = self.trained.contents["settings"]["normalisation"]
        lo, hi = known or intensity_range(survey.histogram, kind)
        if known or not is_measured(kind):
            return [float(lo), float(hi)], "training"
        logger.info("%s: not trained on; its intensities %g and %g become 0 and 1 (%s)", volume["name"], lo, hi, kind)
        return [lo, hi], "this volume"

    def _check_grid(self, volume: Volume, lattice: Lattice) -> None:
        """Raise ContractError if the volume's lattice is not of the voxels that the network was trained on."""
        expected = grid_lattice(Lattice.from_dict(volume["target"]), _voxel(self.trained)).voxel_nm
        if any(abs(a - b) > 1e-3 for a, b in zip(expected, lattice.voxel_nm, strict=True)):
            raise ContractError(
                f"{volume['name']} has voxels of {lattice.voxel_nm} nm, but the network was trained on grid "
                f"{self.trained.grid}, {expected} nm; train it anew (`-R train`) or name its grid in the model file"
            )
