"""One job of the rule `predict`: a model's class probabilities for its share of the volumes, block by block.

A volume's blocks are recorded as they are finished; a job that was killed goes on with the next one, and the result is
the same, bit for bit. A volume that fails is named, the others go on, and the job fails at its end.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from cellmap_pipe.classes import contains
from cellmap_pipe.config import RESULT_VERSIONS
from cellmap_pipe.errors import ConfigError, ContractError
from cellmap_pipe.files import digest, write_json
from cellmap_pipe.geometry import Lattice, shape3
from cellmap_pipe.intensity import intensity_range, is_measured, lookup_table
from cellmap_pipe.prediction.sliding_window import Network, PredictionError, columns, make_plan, stream
from cellmap_pipe.prediction.store import BlockStore, blocks_of, file_stem, remove_unlisted, runs_of
from cellmap_pipe.prediction.volumes import (
    READ_PLANES,
    EMVolume,
    Survey,
    Volume,
    VoxelSize,
    check_survey,
    grid_lattice,
    service,
)
from cellmap_pipe.prepare.convert import shard_of
from cellmap_pipe.training.inference import Trained, load_model

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PredictionSettings:
    """How volumes are predicted: `predict` of config.yaml, and `max_upsample`."""

    overlap: float
    blending: str
    batch: int
    memory_gb: float | None
    max_oversampling: float
    allow_oversampling: bool
    max_upsample: float

    # What decides only where and whether a result is made, not which
    NEUTRAL = ("memory_gb", "max_oversampling", "allow_oversampling", "shards")

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> "PredictionSettings":
        """Return the entries of `settings` that are known here. Raises ConfigError for one that is missing."""
        lacking = [field.name for field in fields(cls) if field.name not in settings]
        if lacking:
            raise ConfigError(f"predict.{lacking[0]} is missing from the settings of this prediction")
        return cls(**{field.name: settings[field.name] for field in fields(cls)})


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
    served: Mapping[str, VoxelSize],
    model: str,
    fold: int | str,
    subset: str,
    device: str = "auto",
) -> None:
    """Write the probabilities of those volumes that belong to this shard, then the JSON that lists them.

    volumes: dicts as `volumes.validation_volumes` gives them; a hash of the name assigns each to a shard.
    settings: see PredictionSettings; further entries, such as a revision, only enter the fingerprint.
    served: voxel size (z, y, x) in nm, or "native", of the grids of all models in use, by name; a volume that another
    grid serves is listed as "not served". device: auto, cpu or cuda.
    Raises PredictionError naming the volumes that failed, after all others are done; nothing is listed then.
    """
    used = PredictionSettings.of(settings)
    out_json, store_dir = Path(out_json), Path(store_dir)

    def owned(stem: str) -> bool:
        return shard_of(stem, shards) == shard

    mine = [volume for volume in volumes if owned(file_stem(volume["name"]))]
    store_dir.mkdir(parents=True, exist_ok=True)
    remove_unlisted(store_dir, (volume["name"] for volume in volumes), owned)
    place = choose_device(device)
    trained = load_model(weights_pt, device=str(place))
    job = _Job(trained, used, settings, Path(data_root), store_dir, place)
    records, failures = [], []
    for volume in sorted(mine, key=lambda volume: str(volume["name"])):
        record = {
            "name": volume["name"],
            "dataset": volume["dataset"],
            "path": None,
            "lattice": volume["lattice"],
            "target": volume["target"],
            "classes": job.classes_of(volume),
            "shape": None,
            "fingerprint": None,
            "status": "not served",
            "cause": "",
        }
        choice = service(
            volume,
            trained.grid,
            {**served, trained.grid: _voxel(trained)},
            used.max_oversampling,
            used.allow_oversampling,
        )
        records.append(record)
        if not record["classes"]:
            record["cause"] = "this model predicts none of its classes"
        elif not choice.served:
            record["cause"] = choice.cause
        else:
            try:
                store, notes = job.predict(volume, record["classes"])
            except Exception as error:  # whatever it is, the other volumes must not suffer from it
                logger.exception("%s failed", volume["name"])
                failures.append((volume["name"], error))
                continue
            record |= {
                "status": "ok",
                "path": os.path.relpath(store.path, out_json.parent),
                "shape": list(store.array.shape),
                **notes,
            }
        logger.info("%s: %s %s", record["name"], record["status"], record["cause"])
    if failures:
        causes = "; ".join(
            f"{name}: {' '.join(str(error).split()) or type(error).__name__}" for name, error in failures
        )
        raise PredictionError(
            f"{len(failures)} of {len(mine)} volumes failed: {causes}. Finished blocks are kept; mend the cause "
            "or take the volume off the list, and run again"
        ) from failures[0][1]
    write_json(
        out_json,
        {"model": model, "fold": str(fold), "subset": subset, "records": records, "weights_sha256": trained.digest},
    )


def choose_device(device: str) -> torch.device:
    """Return the device that "auto", "cpu" or "cuda" stands for. Raises ConfigError for cuda without a GPU."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError("device cuda was asked for, but no GPU is to be seen; use auto or cpu")
    return torch.device(device)


def _voxel(trained: Trained) -> VoxelSize:
    return trained.voxel_nm if isinstance(trained.voxel_nm, str) else tuple(trained.voxel_nm)


def arithmetic(trained: Trained, device: torch.device) -> str:
    """Return "bf16" where the network is run in bfloat16, on a GPU if it was trained so there, else "float32"."""
    return "bf16" if device.type == "cuda" and trained.contents["settings"]["amp"] == "bf16" else "float32"


def mixed_precision(trained: Trained, device: torch.device) -> Network:
    """Return the network as it is run on `device`, see `arithmetic`."""
    if arithmetic(trained, device) == "float32":
        return trained.network

    def network(images: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            return trained.network(images)

    return network


class _Job:
    """What the volumes of one job share: the network and how it is used."""

    def __init__(
        self,
        trained: Trained,
        used: PredictionSettings,
        settings: Mapping[str, Any],
        root: Path,
        store_dir: Path,
        device: torch.device,
    ) -> None:
        self.trained, self.used, self.root, self.store_dir, self.device = trained, used, root, store_dir, device
        self._network = mixed_precision(trained, device)
        self._determining = {key: value for key, value in settings.items() if key not in PredictionSettings.NEUTRAL}

    def classes_of(self, volume: Volume) -> list[str]:
        """Return the network's classes that the volume asks for, among them the parts of groups that it asks for."""
        wanted = volume["classes"]
        return [
            name
            for name in self.trained.classes
            if wanted is None or name in wanted or any(contains(group, name) for group in wanted)
        ]

    def predict(self, volume: Volume, classes: Sequence[str]) -> tuple[BlockStore, dict[str, Any]]:
        """Write the probabilities of `classes`; return the store and what its record says about how they were made."""
        lattice = Lattice.from_dict(volume["lattice"])
        self._check_grid(volume, lattice)
        patch = shape3(self.trained.patch)
        em = EMVolume(self.root / volume["em"], lattice, max_upsample=self.used.max_upsample, reach=patch)
        survey = em.survey()
        check_survey(survey, em.path)
        normalisation, source = self._intensity_range(volume, survey)
        fingerprint = digest(
            {
                "version": RESULT_VERSIONS["predict"],
                "weights": self.trained.digest,
                "em": survey.digest,
                "classes": list(classes),
                "normalisation": normalisation,
                "patch": list(patch),
                "arithmetic": arithmetic(self.trained, self.device),
                "settings": self._determining,
            }
        )
        notes = {
            "fingerprint": fingerprint,
            "normalisation": {"range": normalisation, "from": source},
            "em_level": em.level.path.rsplit("/", 1)[-1],
        }
        store = BlockStore(self.store_dir, volume["name"], lattice, classes, fingerprint, notes)
        plan = make_plan(lattice.shape, patch, self.used.overlap, self.used.blending, em.context)
        channels = [list(self.trained.classes).index(name) for name in classes]
        depth, *align = shape3(store.array.chunks[1:])
        boxes = columns(
            plan, len(classes), depth, self.used.batch, (align[0], align[1]), self.used.memory_gb, held=READ_PLANES
        )
        for column in boxes:
            for run in runs_of(block for block in blocks_of(column, depth) if not store.finished(block)):
                (_, y0, x0), (_, y1, x1) = run
                pieces = stream(
                    self._network,
                    em,
                    plan,
                    run,
                    channels=channels,
                    depth=depth,
                    normalise=lookup_table(*normalisation),
                    batch=self.used.batch,
                    device=self.device,
                    network_channels=len(self.trained.classes),
                )
                for first, last, probabilities in pieces:
                    store.array[:, first:last, y0:y1, x0:x1] = probabilities
                    for block in blocks_of(((first, y0, x0), (last, y1, x1)), depth):
                        store.finish(block)
        return store, notes

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
