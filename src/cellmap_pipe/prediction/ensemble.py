"""The mean of several models' class probabilities, volume by volume and slab by slab."""

import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cellmap_pipe.config import RESULT_VERSIONS
from cellmap_pipe.errors import ContractError
from cellmap_pipe.files import digest, read_json, remove_partials, replacing, write_json
from cellmap_pipe.geometry import Lattice
from cellmap_pipe.prediction.store import create_probabilities, file_stem, open_probabilities, remove_unlisted
from cellmap_pipe.prepare.resample import AxisWeights, apply_weights, lattice_weights

logger = logging.getLogger(__name__)

Record = dict[str, Any]
REMEDY = "make it again with `-R predict`"


def read_records(predict_jsons: Iterable[str | Path]) -> dict[str, list[Record]]:
    """Return the records of several predictions by volume, in the given order, with absolute paths.

    Raises ContractError naming a file that cannot be read.
    """
    records: dict[str, list[Record]] = {}
    for path in predict_jsons:
        for record in read_json(path, REMEDY)["records"]:
            where = None if record["path"] is None else str(Path(path).parent / record["path"])
            records.setdefault(record["name"], []).append({**record, "path": where})
    return records


class ClassVolumes(ABC):
    """Probabilities by class on one lattice, resampled to another and read slab by slab.

    Linear between voxel centres where the lattice is finer, area mean where it is coarser; beyond the own box the
    nearest voxel is repeated.
    """

    def __init__(self, own: Lattice, lattice: Lattice) -> None:
        self._weights = lattice_weights(own, lattice)

    @abstractmethod
    def block(self, name: str, box: tuple[slice, slice, slice]) -> np.ndarray:
        """Return 255 p of class `name` in a box of the own lattice, (z, y, x)."""

    def slab(self, name: str, first: int, last: int) -> np.ndarray:
        """Return 255 p of class `name` on the planes [first, last) of the lattice, float32 (z, y, x)."""
        z, y, x = self._weights
        part: AxisWeights = z.rows(first, last)
        block = self.block(name, (slice(part.start, part.stop), slice(y.start, y.stop), slice(x.start, x.stop)))
        if not block.any():  # rare classes are nowhere in most slabs
            return np.zeros((last - first, y.matrix.shape[0], x.matrix.shape[0]), np.float32)
        return apply_weights(block, (part, y, x))


class Probabilities(ClassVolumes):
    """The probabilities of one record on disk."""

    def __init__(self, record: Record, lattice: Lattice) -> None:
        self._path = record["path"]
        self.classes: list[str] = list(record["classes"])
        self._array = open_probabilities(Path(record["path"]), REMEDY)
        own = Lattice.from_dict(record["lattice"])
        if self._array.shape != (len(self.classes), *own.shape):
            raise ContractError(f"{record['path']}: shape {self._array.shape} is not that of its record; {REMEDY}")
        super().__init__(own, lattice)

    def block(self, name: str, box: tuple[slice, slice, slice]) -> np.ndarray:
        """Return 255 p of class `name` in a box of the own lattice, uint8 (z, y, x).

        Raises ContractError if a chunk is damaged.
        """
        try:
            return np.asarray(self._array[(self.classes.index(name), *box)])
        except MemoryError:
            raise
        except Exception as error:  # codecs raise many kinds; all mean that a chunk is damaged
            raise ContractError(f"{self._path}: damaged ({' '.join(str(error).split())}); {REMEDY}") from error


@dataclass(frozen=True)
class _Task:
    name: str
    members: list[Record]
    folder: Path

    @property
    def store(self) -> Path:
        return self.folder / f"{file_stem(self.name)}.zarr"

    @property
    def sidecar(self) -> Path:
        return self.folder / f"{file_stem(self.name)}.json"


def write_ensemble(
    predict_jsons: Sequence[str | Path], out_json: str | Path, *, store_dir: str | Path, workers: int
) -> None:
    """Write the mean probabilities of every volume over the models that predicted it, then the JSON that lists them.

    The mean is taken for each class over the models that have it, on the lattice of the first of them; a volume that no
    model predicted is listed with the first one's status and cause. A volume that is done already is not done again.
    Raises ContractError naming a prediction that is not what its JSON says.
    """
    out_json, folder = Path(out_json), Path(store_dir)
    folder.mkdir(parents=True, exist_ok=True)
    sources = [read_json(path, REMEDY) for path in predict_jsons]
    predictions = read_records(predict_jsons)
    remove_partials(folder)
    remove_unlisted(folder, predictions)
    tasks = [_Task(name, members, folder) for name, members in sorted(predictions.items())]
    with ThreadPoolExecutor(max(1, workers)) as pool:
        records = list(pool.map(_average, tasks))
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
            "records": records,
            "members": sorted({f"{source['model']}/fold{source['fold']}" for source in sources}),
            "weights_sha256": digest(sorted({source["weights_sha256"] for source in sources})),
        },
    )


def _average(task: _Task) -> Record:
    """Write the mean of one volume unless it is there already; return its record, with the path in its folder."""
    members = [member for member in task.members if member["status"] == "ok"]
    if not members:
        return dict(task.members[0])
    lattice = Lattice.from_dict(members[0]["lattice"])
    classes = list(dict.fromkeys(name for member in members for name in member["classes"]))
    fingerprint = digest(
        {"version": RESULT_VERSIONS["ensemble"], "members": [member["fingerprint"] for member in members]}
    )
    record = {
        **{key: members[0][key] for key in ("name", "dataset", "lattice", "target", "status", "cause")},
        "path": task.store.name,
        "classes": classes,
        "shape": [len(classes), *lattice.shape],
        "fingerprint": fingerprint,
        "members": len(members),
    }
    if task.store.is_dir() and task.sidecar.is_file() and read_json(task.sidecar) == record:
        return record
    readers = [Probabilities(member, lattice) for member in members]
    with replacing(task.store) as partial:
        array = create_probabilities(partial, task.name, lattice, classes, {"fingerprint": fingerprint})
        for first in range(0, lattice.shape[0], array.chunks[1]):
            last = min(first + array.chunks[1], lattice.shape[0])
            for channel, name in enumerate(classes):
                slabs = (reader.slab(name, first, last) for reader in readers if name in reader.classes)
                total = next(slabs).copy()
                count = 1
                for slab in slabs:
                    total += slab
                    count += 1
                array[channel, first:last] = np.rint(total / count).astype(np.uint8)
    write_json(task.sidecar, record)
    logger.info("%s: mean of %d predictions", task.name, len(members))
    return record
