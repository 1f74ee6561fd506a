"""Which volumes are predicted, on which voxels, and the EM under and around them.

A volume is a dict, as it stands in the JSON records: name ("jrc_x/crop12"), dataset, em (path under data.root), lattice
(voxels to predict), target (voxels that are asked for in the end), classes (list, or None for all) and, for a volume
of a table, asked: by class, the voxels that this one is asked for on, a part of the target or coarser.
"""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cellmap_pipe.classes import get_class
from cellmap_pipe.errors import ConfigError, ContractError, DataError, GeometryError
from cellmap_pipe.files import canonical_json, digest, read_json, write_json
from cellmap_pipe.geometry import Lattice, Shape3, shape3, vec3
from cellmap_pipe.prepare.em import choose_level, context_on_disk, read_em
from cellmap_pipe.prepare.ngff import chunk_files, read_image
from cellmap_pipe.prepare.resample import lattice_weights

logger = logging.getLogger(__name__)

Volume = dict[str, Any]
VoxelSize = Sequence[float] | str  # (z, y, x) in nm, or "native": the target's own

NATIVE = "native"
COLUMNS = ("crop_name", "dataset", "class_label", "voxel_size", "translation", "shape")

# Planes of the volume that are read and resampled at a time, always the same ones: any cut sees the same voxels.
READ_PLANES = 64

# Their lines and columns that are resampled at a time: a huge cross-section takes no more memory than its result.
READ_TILE = 512


def grid_lattice(target: Lattice, voxel_nm: VoxelSize) -> Lattice:
    """Return the lattice of `voxel_nm` over the box of `target`."""
    if isinstance(voxel_nm, str):
        return target
    return Lattice.covering(target.lower_nm, target.upper_nm, voxel_nm)


def validation_volumes(
    quality_csv: str | Path, folds_csv: str | Path, convert_jsons: Sequence[str | Path], fold: int | str
) -> list[Volume]:
    """Return the crops of validation fold `fold` that the quality check keeps, on the grid they were converted to.

    Their target is the lattice of their labels as annotated. Raises ContractError if a kept crop has no record.
    """
    verdicts = pd.read_csv(quality_csv, keep_default_na=False)
    folds = pd.read_csv(folds_csv, keep_default_na=False)
    held_out = set(folds.loc[folds["fold"].astype(str) == str(fold), "crop"])
    wanted = [crop for crop in verdicts.loc[verdicts["verdict"] == "keep", "crop"] if crop in held_out]
    records = {
        record["crop"]: record
        for path in convert_jsons
        for record in read_json(path, "run again with `-R convert`")["records"]
    }
    missing = [crop for crop in wanted if crop not in records]
    if missing:
        raise ContractError(
            f"{missing[0]}: in {quality_csv}, but no conversion has a record of it; run with `-R quality`"
        )
    return [
        {
            "name": crop,
            "dataset": records[crop]["dataset"],
            "em": records[crop]["em"],
            "lattice": records[crop]["lattice"],
            "target": records[crop]["label_lattice"],
            "classes": None,
        }
        for crop in sorted(wanted)
    ]


def _triple(text: str, where: str) -> list[float]:
    """Return the three numbers of "[z;y;x]". Raises ConfigError."""
    try:
        values = [float(part) for part in str(text).strip().strip("[]").replace(",", ";").split(";")]
    except ValueError:
        values = []
    if len(values) != 3:
        raise ConfigError(f"{where} is '{text}'; expected three numbers as in [8;8;8] (z, y, x)")
    return values


def test_volumes(volumes_csv: str | Path, data_root: str | Path, em_path: str, voxel_nm: VoxelSize) -> list[Volume]:
    """Return the volumes that a table lists, with the lattice of `voxel_nm` (z, y, x; nm) over each.

    The table has the columns of the challenge's test_crop_manifest.csv, one row per crop and class; an empty
    class_label stands for every class. A crop's box is the union of its rows': least voxel size and translation,
    largest shape.
    Where voxel_size, translation and shape are empty the volume is the whole EM at its finest level.
    Raises ConfigError naming the file, line and column.
    """
    table = pd.read_csv(volumes_csv, dtype=str, keep_default_na=False)
    lacking = [column for column in COLUMNS if column not in table.columns]
    if lacking:
        raise ConfigError(f"{volumes_csv}: column '{lacking[0]}' is missing; expected {', '.join(COLUMNS)}")
    for line, label in zip(table.index.tolist(), table["class_label"], strict=True):
        try:
            if label:
                get_class(label)
        except ConfigError as error:
            raise ConfigError(f"{volumes_csv}: class_label in line {line + 2}: {error}") from None
    volumes = []
    for (dataset, crop), rows in table.groupby(["dataset", "crop_name"], sort=True):
        name = f"{dataset}/crop{crop}" if str(crop).isdigit() else f"{dataset}/{crop}"
        em = f"{dataset}/{dataset}.zarr/{em_path}"
        target = _target(rows, volumes_csv, Path(data_root) / em)
        classes = list(dict.fromkeys(rows["class_label"]))
        asked = {
            str(label): _target(of_class, volumes_csv, Path(data_root) / em)
            for label, of_class in rows.groupby("class_label", sort=False)
            if label
        }
        for asked_for, lattice in asked.items():
            ends = zip(lattice.upper_nm, target.upper_nm, lattice.voxel_nm, strict=True)
            if any(end > whole + voxel for end, whole, voxel in ends):
                raise ConfigError(
                    f"{volumes_csv}: {name}: the box of {asked_for} reaches beyond that of its finest rows; give "
                    "classes of another box a crop_name of their own"
                )
        volumes.append(
            {
                "name": name,
                "dataset": str(dataset),
                "em": em,
                "lattice": grid_lattice(target, voxel_nm).to_dict(),
                "target": target.to_dict(),
                "classes": None if "" in classes else classes,
                "asked": {label: lattice.to_dict() for label, lattice in asked.items()},
            }
        )
    if not volumes:
        raise ConfigError(f"{volumes_csv}: lists no volume; add rows, or set data.volumes to another table")
    return volumes


def _target(rows: pd.DataFrame, table: str | Path, em: Path) -> Lattice:
    """Return the box that rows of one crop ask for."""
    if (rows[["voxel_size", "translation", "shape"]] == "").all(axis=None):
        try:
            return read_image(em).levels[0].lattice
        except DataError as error:
            raise ConfigError(
                f"{table}: a volume without voxel_size, translation and shape is the whole EM, but {error}"
            ) from None
    values = {
        column: np.array(
            [
                _triple(text, f"{table}: {column} in line {line + 2}")
                for line, text in zip(rows.index.tolist(), rows[column], strict=True)
            ]
        )
        for column in ("voxel_size", "translation", "shape")
    }
    try:
        return Lattice(
            vec3(values["voxel_size"].min(axis=0).tolist()),
            vec3(values["translation"].min(axis=0).tolist()),
            shape3(values["shape"].max(axis=0).tolist()),
        )
    except GeometryError as error:
        raise ConfigError(f"{table}: line {rows.index.tolist()[0] + 2}: {error}") from None


@dataclass(frozen=True)
class Survey:
    """What one look at all the EM of a volume tells.

    digest: of all voxels that a prediction may read. histogram: 256 counts of the volume's valid voxels. damaged: why
    parts of it could not be read.
    """

    digest: str
    histogram: np.ndarray
    damaged: tuple[str, ...] = ()


def reach_of(patch: Sequence[int], planes: str) -> Shape3:
    """Return how many voxels of context on each side (z, y, x) windows of `patch` can use.

    planes: "all" or "z", axes across which a network of slices (a patch of one plane) is run.
    """
    if patch[0] == 1 and planes == "all":
        return shape3([max(patch)] * 3)
    return shape3(patch)


class EMVolume:
    """The EM of one volume on its lattice, with the real EM around it as far as that is on disk.

    Raises DataError for what cannot be read and GeometryError for EM that is too coarse.
    """

    def __init__(self, path: Path, lattice: Lattice, *, max_upsample: float, reach: Shape3) -> None:
        """path: the EM's group. reach: how many voxels of context are of use on each side (z, y, x)."""
        image = read_image(path)
        self.level = choose_level(image, lattice, max_upsample)  # once for all windows: they must not differ in it
        self.lattice = lattice
        self.path = path
        self._image = replace(image, levels=(self.level,))
        self._max_upsample = max_upsample
        z, y, x = (context_on_disk(self.level, lattice, axis, n, n) for axis, n in enumerate(reach))
        self.context = (z, y, x)
        self._piece: tuple[Any, np.ndarray, np.ndarray | None] | None = None

    def read(self, lower: Shape3, upper: Shape3) -> tuple[np.ndarray, np.ndarray | None]:
        """Return image (uint8) and validity (bool or None) of a box of the lattice or its context, (z, y, x)."""
        first, last = -self.context[0][0], self.lattice.shape[0] + self.context[0][1]
        image = np.empty([b - a for a, b in zip(lower, upper, strict=True)], np.uint8)
        valid = None
        for number in range(lower[0] // READ_PLANES, -(-upper[0] // READ_PLANES)):
            begin, end = max(first, number * READ_PLANES), min(last, (number + 1) * READ_PLANES)
            piece, counted = self._read_piece((begin, *lower[1:]), (end, *upper[1:]))
            a, b = max(lower[0], begin), min(upper[0], end)
            image[a - lower[0] : b - lower[0]] = piece[a - begin : b - begin]
            if counted is not None:
                valid = np.ones(image.shape, bool) if valid is None else valid
                valid[a - lower[0] : b - lower[0]] = counted[a - begin : b - begin]
            del piece, counted  # or this piece would be held beside the next
        return image, valid

    def _read_piece(self, lower: Shape3, upper: Shape3) -> tuple[np.ndarray, np.ndarray | None]:
        """Return image and validity of a piece, which is kept until another one is read."""
        if self._piece is None or self._piece[0] != (lower, upper):
            self._piece = None  # before the next one takes its own memory
            image = np.empty([b - a for a, b in zip(lower, upper, strict=True)], np.uint8)
            valid = None
            for low, high in _tiles(lower, upper):
                place = tuple(slice(a - c, b - c) for a, b, c in zip(low, high, lower, strict=True))
                image[place], counted = self._resample(low, high)
                if counted is not None:
                    valid = np.ones(image.shape, bool) if valid is None else valid
                    valid[place] = counted
            self._piece = ((lower, upper), image, valid)
        return self._piece[1], self._piece[2]

    def _resample(self, lower: Shape3, upper: Shape3) -> tuple[np.ndarray, np.ndarray | None]:
        shape = [b - a for a, b in zip(lower, upper, strict=True)]
        block = read_em(self._image, self.lattice.window(lower, shape), max_upsample=self._max_upsample)
        return block.image, block.valid

    def survey(self, kept: Path | None = None) -> Survey:
        """Return the digest of all that a prediction may read, and the histogram of the volume's valid voxels.

        It is read tile by tile, so memory does not grow with the cross-section. kept: a JSON file that holds the result
        for the next time, as long as the EM's files are the same by name, size and time.
        """
        if kept is None:
            return self._read_all()
        listing = self._listing()
        survey = _read_survey(kept, listing)
        if survey is None:
            survey = self._read_all()
            if survey.damaged or self._listing() != listing:  # it is looked at anew each time until it is sound
                return survey
            with suppress(FileNotFoundError):  # another job has finished the same, and tidied up
                write_json(kept, {"listing": listing, "digest": survey.digest, "histogram": survey.histogram.tolist()})
        for abandoned in kept.parent.glob(f".partial-*-{kept.name}"):
            abandoned.unlink(missing_ok=True)
        return survey

    def _listing(self) -> str:
        """Return a digest of the lattice and of name, size and time of all files that `survey` reads."""
        before, after = zip(*self.context, strict=True)
        weights = lattice_weights(self.level.lattice, self.lattice.padded(before, after))
        files = chunk_files(self.level, [w.start for w in weights], [w.stop for w in weights])
        states = [(str(path), path.stat()) for path in files]
        return digest(
            [
                self.lattice.to_dict(),
                self.context,
                self.level.path,
                self.level.lattice.to_dict(),
                [(name, state.st_size, state.st_mtime_ns) for name, state in states],
            ]
        )

    def _read_all(self) -> Survey:
        sha = hashlib.sha256(canonical_json([self.lattice.to_dict(), self.context]).encode())
        histogram = np.zeros(256, np.int64)
        damaged = []
        before, after = zip(*self.context, strict=True)
        end = [n + a for n, a in zip(self.lattice.shape, after, strict=True)]
        for lower, upper in _tiles(shape3([-b for b in before]), shape3(end)):
            try:
                image, valid = self._resample(lower, upper)
            except DataError as error:  # the blocks that need this tile will fail, the others need not
                damaged.append(str(error))
                sha.update(b"damaged")
                continue
            sha.update(image.tobytes())
            if valid is not None:
                sha.update(np.packbits(valid).tobytes())
            inner = tuple(
                slice(max(0, -a), max(0, min(b, n) - a))
                for a, b, n in zip(lower, upper, self.lattice.shape, strict=True)
            )
            inside = image[inner]
            histogram += np.bincount(inside.ravel() if valid is None else inside[valid[inner]], minlength=256)
        return Survey(sha.hexdigest(), histogram, tuple(damaged))


def _read_survey(kept: Path, listing: str) -> Survey | None:
    """Return the survey that a file holds of EM with this listing, None if there is none."""
    if not kept.is_file():
        return None
    try:
        found = read_json(kept)
        return Survey(found["digest"], np.array(found["histogram"], np.int64)) if found["listing"] == listing else None
    except (ContractError, KeyError, TypeError):
        logger.info("%s: cannot be used, the EM is read again", kept)
        return None


def _tiles(lower: Shape3, upper: Shape3) -> Iterator[tuple[Shape3, Shape3]]:
    """Yield the tiles of a box, (lower, upper) corners: their inner edges lie at fixed multiples, whatever the box."""
    ranges = []
    for a, b, size in zip(lower, upper, (READ_PLANES, READ_TILE, READ_TILE), strict=True):
        ranges.append(list(pairwise([a, *range((a // size + 1) * size, b, size), b])))
    for z, y, x in product(*ranges):
        yield (z[0], y[0], x[0]), (z[1], y[1], x[1])


def check_survey(survey: Survey, path: Path) -> None:
    """Raise DataError for EM that cannot be segmented: not on disk at all, or one grey value everywhere."""
    counted = np.flatnonzero(survey.histogram)
    if survey.damaged and len(counted) < 2:
        raise DataError(survey.damaged[0])
    if not len(counted):
        raise DataError(f"{path}: no EM is on disk under this volume; fetch it, or take the volume off the list")
    if len(counted) == 1:
        raise DataError(
            f"{path}: the EM is blank under this volume (every voxel is {counted[0]}); check its box, "
            "or take the volume off the list"
        )
