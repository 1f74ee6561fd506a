"""The synthetic challenge: three labelled datasets, two unlabelled test volumes with known truth, and usual trouble.

What each crop is for stands beside it in `DATASETS`. Crop numbers are unique over all datasets. The crops of a dataset
lie in different octants of its cell, at least 250 nm apart, so that any of them can be trained on or validated on.
"""

import csv
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cellmap_pipe.files import file_digest, replacing, write_json
from cellmap_pipe.geometry import Lattice, Shape3, Vec3, vec3
from cellmap_pipe.phantom import layout
from cellmap_pipe.phantom.cell import Cell, Contents, Octant, all_octants, build_cell, sample
from cellmap_pipe.phantom.render import Instrument, render

CLASSES = tuple(
    "ecs pm mito_mem mito_lum mito_ribo golgi_mem golgi_lum ves_mem ves_lum endo_mem endo_lum er_mem er_lum nuc".split()
)
GROUPS = ("mito", "ves", "endo", "golgi")
EVERYTHING = CLASSES + GROUPS
MANIFEST = "test_crop_manifest.csv"
TRUTH = "truth/test.zarr"
RESIN = 207  # grey value of embedding medium without a cell
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Crop:
    """A box with labels. `start`: its lower edge in EM voxels (z, y, x), fractions allowed. `why`: what it tests.

    unknown: semantic classes that are not known in the first quarter of the box (along z). masked: classes whose
    `{class}_mask` leaves out the last quarter. displaced, zoom: labels that are not where they say: they show the cell
    so many voxels further, and so many times more of it, seen from the box's lower corner.
    """

    number: int
    start: Vec3
    shape: Shape3
    voxel_nm: Vec3
    classes: tuple[str, ...]
    why: str = ""
    unknown: tuple[str, ...] = ()
    dense: bool = False
    masked: tuple[str, ...] = ()
    displaced: Vec3 = (0.0, 0.0, 0.0)
    zoom: float = 1.0

    @property
    def name(self) -> str:
        return f"crop{self.number}"

    def lattice(self, em: Lattice) -> Lattice:
        """Return the crop's label lattice in the dataset whose EM lies on `em`."""
        lower = [lo + s * v for lo, s, v in zip(em.lower_nm, self.start, em.voxel_nm, strict=True)]
        return Lattice(
            self.voxel_nm, vec3([lo + v / 2 for lo, v in zip(lower, self.voxel_nm, strict=True)]), self.shape
        )

    def shown(self, em: Lattice) -> Lattice:
        """Return the lattice on which the labels are taken from the cell: that of the crop, unless it is misplaced."""
        stated = self.lattice(em)
        voxel = vec3([v * self.zoom for v in stated.voxel_nm])
        start = [
            lo + d * v + w / 2
            for lo, d, v, w in zip(stated.lower_nm, self.displaced, stated.voxel_nm, voxel, strict=True)
        ]
        return Lattice(voxel, vec3(start), stated.shape)


@dataclass(frozen=True)
class Dataset:
    """One EM volume of one cell. `blank`, `missing`: boxes (start, shape in EM voxels) of bare resin, of absent chunks.

    cell_nm: size of the cell's box, whose lower corner is the EM's. octants: its contents where they are not the usual.
    """

    name: str
    em: Lattice
    cell_nm: Vec3
    instrument: Instrument
    crops: tuple[Crop, ...] = ()
    tests: tuple[Crop, ...] = ()
    octants: dict[Octant, Contents] = field(default_factory=lambda: all_octants(Contents()))
    blank: tuple[Vec3, Shape3] | None = None
    missing: tuple[Vec3, Shape3] | None = None

    def box(self, start: Vec3, shape: Shape3) -> Lattice:
        """Return the box of EM voxels that begins at `start`."""
        return self.em.window([int(s) for s in start], shape)


ISO = (16.0, 16.0, 16.0)
FLAT = (24.0, 16.0, 16.0)
FINE = (8.0, 8.0, 8.0)
_SOME = ("ecs", "pm", "mito", "er_mem", "nuc", "cyto")
_SPARSE = Contents(golgi=0, mito=3, endo=0, er=6, ves=34)

DATASETS = (
    Dataset(
        "phantom-1",
        Lattice(ISO, (0.0, 0.0, 0.0), (160, 160, 160)),
        (2560.0, 2560.0, 2560.0),
        Instrument(gain=0.9, offset=10, noise=8),
        crops=(
            Crop(101, (0, 0, 0), (72, 72, 72), ISO, EVERYTHING, "all classes", dense=True),
            Crop(102, (0, 88, 88), (72, 72, 72), ISO, EVERYTHING, "every class", dense=True),
            Crop(103, (88, 0, 88), (72, 72, 72), ISO, EVERYTHING, "ER unknown in part", unknown=("er_mem", "er_lum")),
            Crop(104, (88, 88, 0), (72, 72, 72), ISO, ("mito", "ves", "endo", "golgi", "nuc"), "groups only"),
            Crop(105, (0, 0, 104), (64, 64, 72), ISO, ("ecs", "pm", "er_mem", "er_lum", "nuc"), "beyond the EM"),
            Crop(106, (96, 96, 96), (56, 56, 56), ISO, ("ecs", "pm", "mito", "nuc"), "blank EM"),
        ),
        blank=((90, 90, 90), (70, 70, 70)),
    ),
    Dataset(
        "phantom-2",
        Lattice(FLAT, (4812.0, 2408.0, 3208.0), (108, 160, 160)),
        (2592.0, 2560.0, 2560.0),
        Instrument(gain=0.62, offset=70, psf_nm=10, noise=6),
        crops=(
            Crop(201, (0.25, 0.25, 0.75), (48, 72, 72), FLAT, EVERYTHING, "every class, off the EM's voxel grid"),
            Crop(202, (60, 88, 0), (48, 72, 72), FLAT, CLASSES, "every class of the list, no groups"),
            Crop(203, (60, 0, 88), (48, 72, 72), FLAT, ("ecs", "pm", "nuc", "cyto"), "few classes", masked=("cyto",)),
            Crop(204, (0, 88, 88), (36, 36, 36), (32.0, 32.0, 32.0), ("ecs", "mito", "nuc"), "coarse labels"),
            Crop(205, (0, 88, 0), (32, 48, 48), FLAT, (), "unannotated"),
            Crop(206, (0, 0, 88), (48, 72, 72), FLAT, _SOME, "labels displaced", displaced=(4.0, -9.0, 6.0)),
        ),
    ),
    Dataset(
        "phantom-3",
        Lattice(ISO, (-392.0, 808.0, 1608.0), (160, 160, 160)),
        (2560.0, 2560.0, 2560.0),
        Instrument(gain=0.75, offset=25, psf_nm=8, noise=8),
        crops=(
            Crop(301, (8, 8, 8), (128, 128, 128), FINE, EVERYTHING, "every class, labels twice finer than the EM"),
            Crop(302, (88.25, 87.75, 8.25), (128, 128, 128), FINE, CLASSES, "every class of the list, off the grid"),
            Crop(
                303,
                (8, 88, 88),
                (128, 128, 128),
                FINE,
                (*CLASSES[:7], "endo_mem", "endo_lum", "endo"),
                "golgi and endo annotated, but absent",
            ),
            Crop(304, (128, 128, 128), (64, 64, 64), FINE, ("ecs", "pm", "mito"), "EM not downloaded"),
            Crop(305, (88, 8, 8), (128, 128, 128), FINE, _SOME, "labels show twice the field of view", zoom=2.0),
        ),
        octants=all_octants(Contents(), [((0, 1, 1), _SPARSE)]),
        missing=((128, 128, 128), (32, 32, 32)),
    ),
    Dataset(
        "phantom-4",
        Lattice(ISO, (8.0, 8.0, 8.0), (88, 88, 88)),
        (2560.0, 2560.0, 2560.0),
        Instrument(gain=0.82, offset=18, noise=8),
        tests=(Crop(901, (4, 4, 4), (72, 72, 72), ISO, EVERYTHING, "test volume"),),
        octants={(0, 0, 0): Contents()},
    ),
    Dataset(
        "phantom-5",
        Lattice((16.0, 8.0, 8.0), (1208.0, 404.0, 804.0), (80, 136, 136)),
        (2560.0, 2560.0, 2560.0),
        Instrument(gain=0.7, offset=45, noise=10),
        tests=(
            Crop(902, (6, 12.25, 12.25), (64, 112, 112), (16.0, 8.0, 8.0), EVERYTHING, "test volume, off the grid"),
        ),
        octants={(0, 0, 0): Contents()},
    ),
)


def write_challenge(root: Path | str, *, seed: int, out_json: Path | str) -> None:
    """Write the challenge's datasets, test manifest and test truth under `root`, then `out_json`, which describes them.

    The same seed gives the same bytes. `out_json` holds `seed`, `crops` and `tests` (each with its geometry, annotated
    classes and `why`) and `contents`: number, size and digest of the files of each part. Each dataset appears under its
    name only when it is complete.
    """
    root = Path(root)
    parts = {}
    with replacing(root / TRUTH) as truth_path:
        truth = layout.open_root(truth_path)
        for index, dataset in enumerate(DATASETS):
            with replacing(root / dataset.name) as folder:
                cell = write_dataset(dataset, folder, np.random.default_rng([seed, index]))
            parts[dataset.name] = describe_tree(root / dataset.name)
            for crop in dataset.tests:
                lattice = crop.lattice(dataset.em)
                layout.write_truth(truth, crop.name, sample(cell, lattice), lattice, crop.classes)
    parts[TRUTH] = describe_tree(root / TRUTH)
    _write_manifest(root / MANIFEST)
    parts[MANIFEST] = describe_tree(root / MANIFEST)
    write_json(
        out_json,
        {
            "format_version": FORMAT_VERSION,
            "seed": seed,
            "contents": parts,
            "crops": [_describe(dataset, crop) for dataset in DATASETS for crop in dataset.crops],
            "tests": [_describe(dataset, crop) for dataset in DATASETS for crop in dataset.tests],
        },
    )


def write_dataset(dataset: Dataset, folder: Path, rng: np.random.Generator) -> Cell:
    """Write one dataset, `{name}.zarr` below `folder`, and return the cell that it shows."""
    lower = dataset.em.lower_nm
    upper = vec3([lo + size for lo, size in zip(lower, dataset.cell_nm, strict=True)])
    cell = build_cell(lower, upper, rng, dataset.octants)
    image = render(cell, dataset.em, dataset.instrument, rng)
    if dataset.blank is not None:
        start, shape = dataset.blank
        image[tuple(slice(int(s), int(s) + n) for s, n in zip(start, shape, strict=True))] = RESIN
    root = layout.open_root(folder / f"{dataset.name}.zarr")
    missing = None if dataset.missing is None else dataset.box(*dataset.missing)
    layout.write_em(root, image, dataset.em, levels=3, missing=missing)
    for crop in dataset.crops:
        lattice = crop.lattice(dataset.em)
        unknown, masked = np.zeros(lattice.shape, bool), np.zeros(lattice.shape, bool)
        unknown[: lattice.shape[0] // 4] = True
        masked[-(lattice.shape[0] // 4) :] = True
        layout.write_crop(
            root,
            crop.name,
            sample(cell, crop.shown(dataset.em)),
            lattice,
            crop.classes,
            unknown=dict.fromkeys(crop.unknown, unknown),
            masked=dict.fromkeys(crop.masked, masked),
            dense=crop.dense,
        )
    return cell


def _write_manifest(path: Path) -> None:
    """Write the rows that the submission must answer, in the format of the challenge's own manifest."""
    with replacing(path) as partial, open(partial, "w", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["crop_name", "dataset", "class_label", "voxel_size", "translation", "shape"])
        for dataset in DATASETS:
            for crop in dataset.tests:
                lattice = crop.lattice(dataset.em)
                place = [_bracketed(v) for v in (lattice.voxel_nm, lattice.translation_nm, lattice.shape)]
                writer.writerows([crop.number, dataset.name, name, *place] for name in crop.classes)


def _bracketed(values: Sequence[float]) -> str:
    return f"[{';'.join(str(v) for v in values)}]"


def _describe(dataset: Dataset, crop: Crop) -> dict[str, Any]:
    return {
        "crop": f"{dataset.name}/{crop.name}",
        "lattice": crop.lattice(dataset.em).to_dict(),
        "annotated": list(crop.classes),
        "why": crop.why,
    }


def describe_tree(path: Path) -> dict[str, Any]:
    """Return number, size in bytes and one digest (over relative names and contents) of the files below `path`."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    total = hashlib.sha256()
    for file in files:
        total.update(f"{file.relative_to(path.parent).as_posix()} {file_digest(file)}\n".encode())
    return {"files": len(files), "size": sum(file.stat().st_size for file in files), "sha256": total.hexdigest()}
