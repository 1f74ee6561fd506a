"""The mean of several models' class probabilities, volume by volume and piece by piece."""

import logging
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from cellmap_pipe.config import RESULT_VERSIONS
from cellmap_pipe.errors import ConfigError, ContractError
from cellmap_pipe.evaluation.challenge import aggregate
from cellmap_pipe.files import digest, read_json, remove_partials, replacing, write_json
from cellmap_pipe.geometry import Lattice, Shape3, nearest_grid, shape3
from cellmap_pipe.prediction.plan import Box
from cellmap_pipe.prediction.store import ARRAY, create_probabilities, file_stem, open_probabilities, remove_unlisted
from cellmap_pipe.prepare.resample import apply_weights, lattice_weights

logger = logging.getLogger(__name__)

Record = dict[str, Any]
REMEDY = "make it again with `-R predict`"

POLICIES = ("mean", "weighted", "best_n", "best")

# Voxels that are resampled at a time: a few arrays of 64 MB, however large the volume
PIECE_VOXELS = 1 << 24


def read_records(predict_jsons: Iterable[str | Path]) -> dict[str, list[Record]]:
    """Return the records of several predictions by volume, in the given order, with absolute paths.

    The shards of one prediction (same model and fold) may name a volume several times; it is returned once. Each record
    tells `model` and `fold` of its prediction, and `elsewhere`: nothing where the file, of an ensemble or an earlier
    version, does not say.
    Raises ContractError naming a file that cannot be read, a volume of which the shards say different things, or shards
    that do not make up a prediction.
    """
    records: dict[str, dict[tuple[str, str], Record]] = {}
    shards: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for path in predict_jsons:
        content = read_json(path, REMEDY)
        source = (str(content["model"]), str(content["fold"]))
        shards.setdefault(source, []).append((content.get("shard", 0), content.get("shards", 1)))
        for found in content["records"]:
            where = None if found["path"] is None else os.path.normpath(Path(path).parent / found["path"])
            record = {"elsewhere": [], **found, "path": where, "model": source[0], "fold": source[1]}
            earlier = records.setdefault(found["name"], {}).setdefault(source, record)
            if earlier != record:
                differing = [key for key in record if earlier.get(key) != record[key]]
                raise ContractError(
                    f"{path}: says another {' and '.join(differing)} of {found['name']} than another shard of model "
                    f"{source[0]}, fold {source[1]}: they were not predicted alike; {REMEDY}"
                )
    for (model, fold), found in shards.items():
        if sorted(found) != [(shard, len(found)) for shard in range(len(found))]:
            listed = ", ".join(f"{shard} of {count}" for shard, count in sorted(found))
            raise ContractError(f"model {model}, fold {fold}: its shards are {listed}: not one prediction; {REMEDY}")
    return {name: list(by_source.values()) for name, by_source in records.items()}


def source_of(record: Mapping[str, Any]) -> str:
    """Return the name of the prediction that a record of `read_records` belongs to."""
    return f"{record['model']}/fold{record['fold']}"


def pieces(shape: Shape3, chunk: Shape3, voxels: int) -> Iterator[Box]:
    """Yield the boxes (lower, upper) that make up `shape`, each one chunk thick and of at most `voxels` voxels.

    Inner edges lie at multiples of `chunk` (z, y, x), so a piece is never smaller than one chunk.
    """
    depth = min(chunk[0], shape[0])
    rows = max(1, voxels // (depth * shape[2] * chunk[1])) * chunk[1]
    columns = max(1, voxels // (depth * min(rows, shape[1]) * chunk[2])) * chunk[2]
    for z, y, x in product(*(range(0, n, step) for n, step in zip(shape, (chunk[0], rows, columns), strict=True))):
        upper = (min(z + chunk[0], shape[0]), min(y + rows, shape[1]), min(x + columns, shape[2]))
        yield (z, y, x), upper


class ClassVolumes(ABC):
    """Probabilities by class on one lattice, resampled to another and read piece by piece.

    Linear between voxel centres where the lattice is finer, area mean where it is coarser; beyond the own box the
    nearest voxel is repeated.
    """

    def __init__(self, own: Lattice, lattice: Lattice) -> None:
        self._weights = lattice_weights(own, lattice)
        self._shape = lattice.shape

    @abstractmethod
    def block(self, name: str, box: tuple[slice, slice, slice]) -> np.ndarray:
        """Return 255 p of class `name` in a box of the own lattice, (z, y, x)."""

    def slab(self, name: str, first: int, last: int) -> np.ndarray:
        """Return 255 p of class `name` on the planes [first, last) of the lattice, float32 (z, y, x)."""
        return self.piece(name, ((first, 0, 0), (last, *self._shape[1:])))

    def piece(self, name: str, box: Box) -> np.ndarray:
        """Return 255 p of class `name` in a box of the lattice, float32 (z, y, x); the same however it is cut."""
        weights = [
            whole if (lo, hi) == (0, n) else whole.rows(lo, hi)
            for whole, lo, hi, n in zip(self._weights, *box, self._shape, strict=True)
        ]
        z, y, x = (slice(part.start, part.stop) for part in weights)
        block = self.block(name, (z, y, x))
        if not block.any():  # rare classes are nowhere in most places
            return np.zeros([hi - lo for lo, hi in zip(*box, strict=True)], np.float32)
        return apply_weights(block, weights)


class Probabilities(ClassVolumes):
    """The probabilities of one record on disk."""

    def __init__(self, record: Record, lattice: Lattice) -> None:
        self._path = record["path"]
        self.classes: list[str] = list(record["classes"])
        self._array = open_probabilities(Path(record["path"]), REMEDY)
        self.dtype: np.dtype[Any] = self._array.dtype
        own = Lattice.from_dict(record["lattice"])
        if self._array.shape != (len(self.classes), *own.shape):
            raise ContractError(f"{record['path']}: shape {self._array.shape} is not that of its record; {REMEDY}")
        super().__init__(own, lattice)

    def block(self, name: str, box: tuple[slice, slice, slice]) -> np.ndarray:
        """Return 255 p of class `name` in a box of the own lattice, (z, y, x): uint8, float32 if stored as float16.

        Raises ContractError if a chunk is damaged.
        """
        try:
            stored = np.asarray(self._array[(self.classes.index(name), *box)])
        except MemoryError:
            raise
        except Exception as error:  # codecs raise many kinds; all mean that a chunk is damaged
            raise ContractError(f"{self._path}: damaged ({' '.join(str(error).split())}); {REMEDY}") from error
        return stored if stored.dtype == np.uint8 else stored.astype(np.float32) * np.float32(255)


class ValidationScores:
    """What models scored on validation crops, class by class, by the challenge's rules."""

    def __init__(self, paths: Iterable[str | Path]) -> None:
        """paths: `scores/{model}/fold{k}.json`; labels that could not be scored tell nothing."""
        self._crops: dict[tuple[str, str], dict[str, Record]] = {}
        for path in paths:
            content = read_json(path, "make it again with `-R evaluate`")
            for record in content["records"]:
                if record["status"] != "failed":
                    of_class = self._crops.setdefault((str(content["model"]), record["label"]), {})
                    of_class[record["crop"]] = record

    def of_class(self, name: str, models: Sequence[str], without: str) -> dict[str, float]:
        """Return each model's score of a class over the crops that all of them were scored on, crop `without` apart.

        Empty if there is no such crop.
        """
        found = {model: self._crops.get((model, name), {}) for model in models}
        crops = sorted(set.intersection(*(set(records) for records in found.values())) - {without})
        if not crops:
            return {}
        pools = {
            model: aggregate([records[crop] for crop in crops])["label_scores"][name]
            for model, records in found.items()
        }
        return {model: float(pool.get("iou", pool.get("combined_score"))) for model, pool in pools.items()}


@dataclass(frozen=True)
class Policy:
    """How the models of an ensemble count. kind: mean, weighted, best_n or best; n: of best_n."""

    kind: str
    n: int
    scores: ValidationScores

    def __post_init__(self) -> None:
        if self.kind not in POLICIES:
            raise ConfigError(f"ensemble.policy '{self.kind}' is unknown; use one of {', '.join(POLICIES)}")

    def weights(self, name: str, members: Sequence[Record], volume: str) -> tuple[dict[str, float], bool]:
        """Return the weights of the members that have class `name` by prediction, and whether scores decided them.

        The folds of a model count alike. Without scores that tell the models apart from nothing, all are 1.
        """
        having = [member for member in members if name in member["classes"]]
        models = list(dict.fromkeys(member["model"] for member in having))
        alike = {source_of(member): 1.0 for member in having}
        if self.kind == "mean" or len(models) < 2:
            return alike, True
        scores = self.scores.of_class(name, models, without=volume)
        if max(scores.values(), default=0) < 1e-6:
            return alike, False
        if self.kind == "weighted":
            return {source_of(m): round(scores[m["model"]], 6) for m in having if scores[m["model"]] >= 1e-6}, True
        best = sorted(models, key=lambda model: -scores[model])[: 1 if self.kind == "best" else self.n]
        return {source_of(member): 1.0 for member in having if member["model"] in best}, True


@dataclass(frozen=True)
class _Task:
    name: str
    members: list[Record]
    folder: Path
    policy: Policy

    @property
    def store(self) -> Path:
        return self.folder / f"{file_stem(self.name)}.zarr"

    @property
    def sidecar(self) -> Path:
        return self.folder / f"{file_stem(self.name)}.json"


def write_ensemble(
    predict_jsons: Sequence[str | Path],
    out_json: str | Path,
    *,
    store_dir: str | Path,
    workers: int,
    policy: str = "mean",
    n: int = 3,
    scores: Sequence[str | Path] = (),
) -> None:
    """Write the mean probabilities of every volume over the models that predicted it, then the JSON that lists them.

    policy: "mean", all models count alike; "weighted", each by its validation score of the class; "best_n" and "best",
    only the `n` models, or the one, that score best at the class. scores: the models' `scores/{model}/fold{k}.json`.
    Models are compared over the crops on which all of them were scored, all folds together; for a validation crop its
    own records are left out. A class without such crops, or that none of them finds, is the plain mean; it is listed
    under `unweighted` of the record and named in the log.
    Each class is the mean over the models that have it. Their lattices may differ: the result lies on the one nearest
    the target's voxel size. Probabilities are uint8, float16 if a model's are. Memory: a few pieces of PIECE_VOXELS for
    each of the `workers`, which take a volume each. A volume that no model predicted is listed with the first one's
    status and cause. What models leave to another grid (`elsewhere`) is not passed on: that one's models are in the
    mean. A volume that is done already is not done again.
    Raises ContractError naming a prediction that is not what its JSON says.
    """
    out_json, folder = Path(out_json), Path(store_dir)
    folder.mkdir(parents=True, exist_ok=True)
    chosen = Policy(policy, n, ValidationScores(scores))
    sources = [read_json(path, REMEDY) for path in predict_jsons]
    predictions = read_records(predict_jsons)
    remove_partials(folder)
    remove_unlisted(folder, predictions)
    tasks = [_Task(name, members, folder, chosen) for name, members in sorted(predictions.items())]
    with ThreadPoolExecutor(max(1, workers)) as pool:
        records = list(pool.map(_average, tasks))
    unweighted = Counter(name for record in records for name in record.get("unweighted", []))
    for name, volumes in sorted(unweighted.items()):
        logger.warning(
            "%s: the plain mean in %d of %d volumes: there is no validation crop on which all its models were scored, "
            "or none found it",
            name,
            volumes,
            len(records),
        )
    for record in records:
        if record["path"] is not None:
            record["path"] = os.path.relpath(folder / record["path"], out_json.parent)
    folds = {str(source["fold"]) for source in sources}
    write_json(
        out_json,
        {
            "model": "ensemble",
            "fold": folds.pop() if len(folds) == 1 else "all",
            "subset": sources[0]["subset"] if sources else None,
            "policy": policy,
            "records": records,
            "members": sorted({source_of(source) for source in sources}),
            "weights_sha256": digest(sorted({source["weights_sha256"] for source in sources})),
        },
    )


def _average(task: _Task) -> Record:
    """Write the mean of one volume unless it is there already; return its record, with the path in its folder."""
    available = [member for member in task.members if member["status"] == "ok"]
    if not available:
        return {key: value for key, value in task.members[0].items() if key not in ("model", "fold", "elsewhere")}
    classes = list(dict.fromkeys(name for member in available for name in member["classes"]))
    decided = {name: task.policy.weights(name, available, task.name) for name in classes}
    weights = {name: by_source for name, (by_source, _) in decided.items()}
    members = [member for member in available if any(source_of(member) in used for used in weights.values())]
    lattice = _lattice(members)
    readers = {source_of(member): Probabilities(member, lattice) for member in members}
    output = "float16" if any(reader.dtype == np.float16 for reader in readers.values()) else "uint8"
    fingerprint = digest(
        {
            "version": RESULT_VERSIONS["ensemble"],
            "members": {source_of(member): member["fingerprint"] for member in members},
            "lattice": lattice.to_dict(),
            "weights": weights,
        }
    )
    record = {
        **{key: available[0][key] for key in ("name", "dataset", "target", "status", "cause")},
        "path": task.store.name,
        "lattice": lattice.to_dict(),
        "classes": classes,
        "shape": [len(classes), *lattice.shape],
        "output": output,
        "fingerprint": fingerprint,
        "members": len(members),
        "weights": weights,
        "unweighted": [name for name, (_, by_scores) in decided.items() if not by_scores],
    }
    if (task.store / ARRAY / ".zarray").is_file() and task.sidecar.is_file() and read_json(task.sidecar) == record:
        return record
    with replacing(task.store) as partial:
        array = create_probabilities(partial, task.name, lattice, classes, {"fingerprint": fingerprint}, output=output)
        for box in pieces(lattice.shape, shape3(array.chunks[1:]), PIECE_VOXELS):
            z, y, x = (slice(lo, hi) for lo, hi in zip(*box, strict=True))
            for channel, name in enumerate(classes):
                mean = _mean((readers[source].piece(name, box), weight) for source, weight in weights[name].items())
                array[channel, z, y, x] = np.rint(mean) if output == "uint8" else mean / np.float32(255)
        task.sidecar.unlink(missing_ok=True)  # it tells of the store that is replaced now
    write_json(task.sidecar, record)
    logger.info("%s: mean of %d predictions", task.name, len(members))
    return record


def _lattice(members: Sequence[Record]) -> Lattice:
    """Return the members' lattice nearest the target's voxel size, the finest of those that are equally near."""
    lattices = {str(i): Lattice.from_dict(member["lattice"]) for i, member in enumerate(members)}
    target = Lattice.from_dict(members[0]["target"])
    return lattices[nearest_grid({i: lattice.voxel_nm for i, lattice in lattices.items()}, target.voxel_nm)]


def _mean(weighted: Iterable[tuple[np.ndarray, float]]) -> np.ndarray:
    """Return the weighted mean of arrays (float32, overwritten); one is held beside the sum at a time."""
    total: np.ndarray | None = None
    weights = 0.0
    for values, weight in weighted:
        values *= np.float32(weight)
        total = values if total is None else np.add(total, values, out=total)
        weights += weight
    assert total is not None  # a class is of at least one member
    total /= np.float32(weights)
    return total
