"""Fetching: plan, copy, verify.

A crop is copied as its class arrays (the finest level, and the mask beside it), then as the boxes of EM levels that the
grids read; the metadata of all EM levels come along. The metadata of a class array come last: one that can be opened is
whole. What is here with its size is not copied again.

Beside the data, `{root}/.fetched/{dataset}/{crop}.json` records the size of every chunk at the source, for
`verify_fetch`; it changes when what was fetched does.
"""

import csv
import hashlib
import logging
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from shutil import rmtree
from tempfile import TemporaryDirectory
from typing import Any

from cellmap_pipe.classes import CLASSES
from cellmap_pipe.errors import CellmapError, ConfigError, DataError
from cellmap_pipe.fetch.arrays import ABSENT, Chunks, Region, check_packing, chunks_at_source, region_of
from cellmap_pipe.fetch.needs import VoxelSize, Wanted, disagreements, em_boxes, read_wanted
from cellmap_pipe.fetch.source import RemoteFile, Source, TransferError
from cellmap_pipe.files import canonical_json, digest, file_digest, read_json, replacing, write_json, write_text
from cellmap_pipe.geometry import Lattice
from cellmap_pipe.prepare.ngff import Image, array_attributes, is_array, read_image

logger = logging.getLogger(__name__)

RECORDS = ".fetched"
METADATA = (".zgroup", ".zattrs", ".zarray", "zarr.json")
PLAN_COLUMNS = "dataset crop kind arrays files bytes bytes_here problem".split()

Listing = Mapping[str, RemoteFile]


def fetch(out_json: str | Path, *, recheck: bool = False, **settings: Any) -> dict[str, Any]:
    """Copy what a run needs, verify it, write the record to `out_json` and return it.

    settings: as `plan_fetch`. recheck: also compare the MD5 of the files that are here, where the source tells it, and
    copy the others again. The record: source, and per crop and volume {classes, arrays, files, bytes, absent_chunks
    (chunks that the source does not have: they read as the fill value), problems, warnings}.
    An array that fails does not stop the others. Raises DataError at the end, when the record is written, naming what
    is incomplete; fetching again copies only what is missing.
    """
    with _run(copy=True, recheck=recheck, **settings) as run:
        items = run.items()
    record: dict[str, Any] = {"source": run.source.url, "crops": {}, "volumes": {}}
    problems: list[str] = []
    for item in items:
        item.problems += _missing(run.root, item.chunks, item.metadata, item.problems)
        _write_record(run.root, run.source.url, item)
        section = record["volumes" if item.wanted.is_volume else "crops"]
        section[item.wanted.name] = item.summary()
        problems += [f"{item.wanted.name}: {problem}" for problem in item.problems]
    write_json(out_json, record)
    for problem in problems:
        logger.error("%s", problem)
    if problems:
        incomplete = sum(bool(item.problems) for item in items)
        raise DataError(
            f"{incomplete} of {len(items)} crops and volumes are incomplete: {'; '.join(problems[:5])}"
            f"{f'; and {len(problems) - 5} more, see the log' if len(problems) > 5 else ''}; "
            "fetch again: only what is missing is copied"
        )
    return record


def plan_fetch(**settings: Any) -> list[dict[str, Any]]:
    """Return what `fetch` would copy, without writing anything: rows of PLAN_COLUMNS, bytes as stored at the source.

    settings: source (folder or URL of {dataset}/{dataset}.zarr) and options of its file system; root (folder to copy
    to); crops, volumes (tables, or None); classes (None = all that are listed); em_path, labels_path; grids (voxel size
    in nm (z, y, x), or "native", by name), max_upsample, context_nm, max_train_gb; workers, retries.
    Two rows per crop, `kind` labels and em; a chunk that several crops share is counted once. bytes_here: what of them
    need not be copied. Raises ConfigError for tables or a source that cannot be used.
    """
    with _run(copy=False, recheck=False, **settings) as run:
        items = run.items()
    rows = []
    for item in items:
        others = [problem for problem in item.problems if problem not in item.em.problems]
        kinds = [("labels", item.labels, others), ("em", [item.em], item.em.problems)]
        for kind, parts, problems in kinds[1:] if item.wanted.is_volume else kinds:
            row = {
                "dataset": item.wanted.dataset,
                "crop": item.wanted.crop,
                "kind": kind,
                "arrays": sum(len(part.chunks) for part in parts),
                **{name: sum(getattr(part, name) for part in parts) for name in ("files", "bytes", "bytes_here")},
                "problem": "; ".join(problems),
            }
            rows.append(row)
    return rows


def write_plan(out_csv: str | Path, **settings: Any) -> str:
    """Write the rows of `plan_fetch` to `out_csv` and return them as `plan_table` does."""
    rows = plan_fetch(**settings)
    with replacing(out_csv) as partial, open(partial, "w", newline="") as stream:
        writer = csv.DictWriter(stream, PLAN_COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return plan_table(rows)


def plan_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows of `plan_fetch` as text: one line per dataset, the total, and what could not be planned."""
    width = max([len("dataset"), *(len(row["dataset"]) for row in rows)])
    lines = [f"{'dataset':{width}} {'crops':>6} {'files':>9} {'size':>10} {'here':>10} {'to copy':>10}"]
    for dataset in [*dict.fromkeys(row["dataset"] for row in rows), None]:
        chosen = [row for row in rows if dataset in (None, row["dataset"])]
        crops = len({(row["dataset"], row["crop"]) for row in chosen})
        files, total, here = (sum(row[key] for row in chosen) for key in ("files", "bytes", "bytes_here"))
        sizes = " ".join(f"{_bytes(size):>10}" for size in (total, here, total - here))
        lines.append(f"{dataset or 'total':{width}} {crops:>6} {files:>9} {sizes}")
    lines += [f"problem: {row['dataset']}/{row['crop']}: {row['problem']}" for row in rows if row["problem"]]
    return "\n".join(lines)


def verify_fetch(root: str | Path) -> list[str]:
    """Return what is missing of everything that was fetched into `root`, in words, array by array; [] if nothing is.

    The source is not asked: its sizes are in the records. What could not be fetched is named as well.
    """
    lines = []
    for path in sorted((Path(root) / RECORDS).glob("*/*.json")):
        record = read_json(path, "fetch again")
        arrays = []
        for name, value in record["arrays"].items():
            arrays.append(Chunks(Region.from_dict(name, value), array("q", value["sizes"])))
        problems = record["problems"]
        problems += _missing(Path(root), arrays, record["metadata"], problems)
        lines += [f"{record['name']}: {problem}" for problem in problems]
    return lines


def fetch_digest(root: str | Path) -> str:
    """Return a short digest of what was fetched into `root`, "" if nothing was: it changes with the files' sizes."""
    records = sorted((Path(root) / RECORDS).glob("*/*.json"))
    return digest([[path.name, file_digest(path)] for path in records])[:16] if records else ""


@dataclass
class _Part:
    """What became of a class of a crop, or of its EM.

    files, bytes, bytes_here: with the metadata, without the chunks that another crop has counted.
    """

    lattice: Lattice | None = None
    chunks: list[Chunks] = field(default_factory=list)
    metadata: dict[str, int] = field(default_factory=dict)
    files: int = 0
    bytes: int = 0
    bytes_here: int = 0
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @contextmanager
    def faults(self) -> Iterator[None]:
        """Keep a fault of the data or of the transfer as a problem of this part; others go on."""
        try:
            yield
        except CellmapError as error:
            self.problems.append(str(error))


@dataclass
class _Item:
    """What became of a crop or volume."""

    wanted: Wanted
    labels: list[_Part]
    em: _Part
    problems: list[str]
    warnings: list[str]

    @property
    def parts(self) -> list[_Part]:
        return [*self.labels, self.em]

    @property
    def chunks(self) -> list[Chunks]:
        return [chunks for part in self.parts for chunks in part.chunks]

    @property
    def metadata(self) -> dict[str, int]:
        """Bytes of the metadata files, by name."""
        return {name: size for part in self.parts for name, size in part.metadata.items()}

    def summary(self) -> dict[str, Any]:
        """Return the crop's entry in the record of a fetch."""
        metadata = self.metadata
        return {
            "classes": sum(part.lattice is not None for part in self.labels),
            "arrays": len(self.chunks),
            "files": sum(chunks.files for chunks in self.chunks) + len(metadata),
            "bytes": sum(chunks.bytes for chunks in self.chunks) + sum(metadata.values()),
            "absent_chunks": sum(chunks.absent for chunks in self.chunks),
            "problems": self.problems,
            "warnings": self.warnings,
        }


@contextmanager
def _run(
    *,
    copy: bool,
    recheck: bool,
    source: str,
    options: Mapping[str, Any],
    root: str | Path,
    crops: str | Path | None,
    volumes: str | Path | None,
    classes: Sequence[str] | None,
    em_path: str,
    labels_path: str,
    grids: Mapping[str, VoxelSize],
    max_upsample: float,
    context_nm: float,
    max_train_gb: float | None,
    workers: int,
    retries: int,
) -> Iterator["_Run"]:
    """Yield a run with its threads and its staging folder; they end with the block."""
    wanted = read_wanted(crops, is_volume=False, classes=classes, key="data.crops") if crops else []
    wanted += read_wanted(volumes, is_volume=True, key="data.volumes") if volumes else []
    if not wanted:
        raise ConfigError(
            "data.crops and data.volumes name nothing to fetch; set them to the challenge's train_crop_manifest.csv "
            "and test_crop_manifest.csv, or to tables like these"
        )
    opened = Source(source, options, workers=2 * workers, retries=retries)
    with TemporaryDirectory(prefix="cellmap-fetch-") as stage:
        # as many arrays are looked at as files are copied: mostly both wait for answers
        arrays, files = ThreadPoolExecutor(workers), ThreadPoolExecutor(workers)
        try:
            yield _Run(
                source=opened,
                root=Path(root),
                stage=Path(stage),
                wanted=wanted,
                classes=list(CLASSES) if classes is None else list(classes),
                em_path=em_path,
                labels_path=labels_path,
                needs={
                    "grids": grids,
                    "max_upsample": max_upsample,
                    "context_nm": context_nm,
                    "max_train_gb": max_train_gb,
                },
                copy=copy,
                recheck=recheck,
                arrays=arrays,
                files=files,
            )
        finally:
            for pool in (arrays, files):  # the first waits for the second: what was not begun must not begin
                pool.shutdown(wait=False, cancel_futures=True)
            for pool in (files, arrays):
                pool.shutdown(wait=True)


@dataclass
class _Run:
    source: Source
    root: Path
    stage: Path
    wanted: list[Wanted]
    classes: list[str]
    em_path: str
    labels_path: str
    needs: dict[str, Any]
    copy: bool
    recheck: bool
    arrays: ThreadPoolExecutor
    files: ThreadPoolExecutor

    def items(self) -> list[_Item]:
        """Return what became of every crop and volume; labels first, for the EM lies where they do."""
        self._check_contact()
        crops = [wanted for wanted in self.wanted if not wanted.is_volume]
        folders = list(self.arrays.map(self._folders, crops))
        tasks = [
            [self.arrays.submit(self._label, wanted, name, names) for name in self._class_names(wanted, names)]
            for wanted, names in zip(crops, folders, strict=True)
        ]
        items = [_Item(wanted, [], _Part(), [], []) for wanted in self.wanted]
        for item, names, futures in zip(items, folders, tasks, strict=False):
            item.labels = [future.result() for future in futures]
            self._judge_labels(item, names)
        by_dataset: dict[str, list[_Item]] = {}
        for item in items:
            by_dataset.setdefault(item.wanted.dataset, []).append(item)
        # a dataset's crops share chunks: one after the other, so that none is copied twice
        for _ in self.arrays.map(self._em_of_dataset, by_dataset.values()):
            pass
        for item in items:
            item.problems += [problem for part in item.parts for problem in part.problems]
            item.warnings += [warning for part in item.parts for warning in part.warnings]
        return items

    def _check_contact(self) -> None:
        """Raise ConfigError if the source does not answer at all: else every array would try in vain for long."""
        dataset = self.wanted[0].dataset
        try:
            self.source.read(f"{dataset}/{dataset}.zarr/.zgroup")
        except TransferError as error:
            raise ConfigError(f"fetch.source: {error}; check the address, fetch.options and the network") from error

    def _folders(self, wanted: Wanted) -> set[str] | None:
        """Return the folders in the crop's folder at the source, None where the source cannot list them."""
        if not self.source.lists:
            return None
        try:
            return self.source.folders(self._crop_path(wanted))
        except TransferError:
            return None  # every class says so of itself

    def _class_names(self, wanted: Wanted, folders: set[str] | None) -> list[str]:
        if wanted.listed:
            return list(wanted.listed)
        return [name for name in self.classes if name in (folders or ())]

    def _judge_labels(self, item: _Item, folders: set[str] | None) -> None:
        """Note which of a crop's classes the source lacks, and log what it has."""
        names = self._class_names(item.wanted, folders)
        lacking = [
            name for name, part in zip(names, item.labels, strict=True) if not part.lattice and not part.problems
        ]
        if len(lacking) == len(names):
            item.problems.append(
                f"{self.source.url}/{self._crop_path(item.wanted)}: no class array is there; "
                "check dataset and crop_name in the table, and data.labels_path"
            )
        elif lacking:
            item.warnings.append(f"in the table, but without an array at the source: {', '.join(lacking)}")
        total = sum(part.bytes for part in item.labels)
        due = total - sum(part.bytes_here for part in item.labels)
        logger.info("%s: %d classes, %s, %s of it new", item.wanted.name, len(names), _bytes(total), _bytes(due))

    def _label(self, wanted: Wanted, name: str, folders: set[str] | None) -> _Part:
        """Bring one class of a crop. Its mask comes first: without it unknown voxels would pass for known ones."""
        part, path = _Part(), f"{self._crop_path(wanted)}/{name}"
        with part.faults():
            try:
                if folders is None or f"{name}_mask" in folders:
                    self._label_array(f"{path}_mask", part, is_mask=True)
                if folders is None or name in folders:
                    part.lattice = self._label_array(path, part, is_mask=False)
            finally:
                for staged in (path, f"{path}_mask"):
                    rmtree(self.stage / staged, ignore_errors=True)
        if part.lattice:
            differing = disagreements(part.lattice, wanted.listed.get(name))
            part.problems += [f"{path}: {text}; correct the table" for text in differing]
        return part

    def _label_array(self, path: str, part: _Part, *, is_mask: bool) -> Lattice | None:
        """Bring the finest level of a class and return its lattice; of a mask, which may be a plain array, None."""
        listing = self.source.files(path) if self.source.lists else None
        names = self._stage(path, listing)
        if not names:
            return None
        lattice, array = None, path
        if not (is_mask and is_array(self.stage / path)):
            image, staged = self._stage_image(path, listing)
            lattice, array = image.levels[0].lattice, self._relative(image.levels[0].path)
            names += [name for name in staged if name.rpartition("/")[0] == array]
        self._check_packing(names)
        inner = f"{array.removeprefix(path)}/".removeprefix("/")
        chunks = None if listing is None else {key.removeprefix(inner): entry for key, entry in listing.items()}
        self._bring(region_of(self.stage / array, array), part, chunks)
        self._place(names, part)
        return lattice

    def _em_of_dataset(self, items: Sequence[_Item]) -> None:
        """Bring the EM of all crops and volumes of a dataset."""
        dataset = items[0].wanted.dataset
        path = f"{dataset}/{dataset}.zarr/{self.em_path}"
        counted: set[str] = set()
        try:
            self._place_parents(items, path)
            names = self._stage(path, None)
            if not names:
                raise DataError(f"{self.source.url}/{path}: there is no EM; check data.em_path")
            image, staged = self._stage_image(path, None)
            names += staged
            self._check_packing(names)
        except CellmapError as error:
            for item in items:
                item.em.problems.append(str(error))
            return
        self._place(names, items[0].em)
        for item in items:
            with item.em.faults():
                self._em(item, image, counted)
            new = item.em.bytes - item.em.bytes_here
            logger.info("%s: EM, %s, %s of it new", item.wanted.name, _bytes(item.em.bytes), _bytes(new))

    def _em(self, item: _Item, image: Image, counted: set[str]) -> None:
        wanted = item.wanted
        target = next((part.lattice for part in item.labels if part.lattice), None) or wanted.box
        if target is None:
            if not wanted.is_volume:
                raise DataError("neither a class array nor the table says where it lies, so its EM is not known")
            target = image.levels[0].lattice
        boxes, reasons = em_boxes(image, target, is_volume=wanted.is_volume, **self.needs)
        item.warnings += reasons
        for level, (lower, upper) in boxes.items():
            path = self._relative(level)
            with item.em.faults():
                self._bring(region_of(self.stage / path, path, lower, upper), item.em, counted=counted)

    def _bring(
        self, region: Region, part: _Part, listing: Listing | None = None, counted: set[str] | None = None
    ) -> None:
        """Copy the chunks of a region that are not here, and count them. Raises TransferError if some cannot be had.

        listing: the files below the array's folder, if known. counted: the chunks that other crops counted already.
        """
        chunks, md5 = chunks_at_source(self.source, region, self.files, listing)
        part.chunks.append(chunks)
        missing, unexpected = chunks.compare(self.root)
        if unexpected:
            part.problems.append(
                f"{region.path}: {len(unexpected)} chunks are here that the source does not have, first "
                f"{unexpected[0]}; delete the array's folder and fetch again"
            )
        sizes = {key: size for key, size in zip(region.keys(), chunks.sizes, strict=True) if size != ABSENT}
        if self.recheck:
            missing += self._changed(region, set(sizes).difference(missing), md5)
        due = set(missing)
        for key, size in sizes.items():
            if counted is not None:
                name = f"{region.path}/{key}"
                if name in counted:
                    continue
                counted.add(name)
            self._count(part, size, here=key not in due)
        if self.copy:
            self._copy(region, missing, sizes)

    def _copy(self, region: Region, keys: Sequence[str], sizes: Mapping[str, int]) -> None:
        names = [f"{region.path}/{key}" for key in keys]
        tasks = [
            self.files.submit(self.source.copy, name, self.root / name, sizes[key])
            for name, key in zip(names, keys, strict=True)
        ]
        failures = []
        for key, task in zip(keys, tasks, strict=True):
            try:
                task.result()
            except TransferError as error:
                failures.append(f"{key} ({error})")
        if failures:
            raise TransferError(
                f"{region.path}: {len(failures)} of {len(sizes)} chunks were not copied, first {failures[0]}"
            )

    def _changed(self, region: Region, keys: set[str], md5: Mapping[str, str]) -> list[str]:
        """Return those chunks that are here with other bytes than at the source, or of which it tells no MD5."""
        ordered = sorted(keys)
        digests = self.files.map(lambda key: _md5(self.root / region.path / key), ordered)
        return [key for key, digest in zip(ordered, digests, strict=True) if md5.get(key) != digest]

    def _stage(self, folder: str, listing: Listing | None, inner: str = "") -> list[str]:
        """Read the metadata files in `folder` into the staging folder and return their names.

        listing: the files of the image by name, if known. inner: `folder` within the image, "" or ending with a slash.
        """
        staged = []
        for leaf in METADATA:
            entry = None if listing is None else listing.get(inner + leaf)
            if listing is not None and entry is None:
                continue
            name = f"{folder}/{leaf}"
            content = self.source.read(name, entry.size if entry else None)
            if content is not None:
                (self.stage / folder).mkdir(parents=True, exist_ok=True)
                (self.stage / name).write_bytes(content)
                staged.append(name)
        return staged

    def _stage_image(self, path: str, listing: Listing | None) -> tuple[Image, list[str]]:
        """Return the image at `path`, whose group is staged, with all its levels, and the names of their metadata."""
        staged: list[str] = []
        try:
            for level in _level_paths(self.stage / path):
                staged += self._stage(f"{path}/{level}", listing, f"{level}/")
            return read_image(self.stage / path), staged
        except DataError as fault:
            raise DataError(str(fault).replace(str(self.stage), self.source.url)) from fault

    def _check_packing(self, names: Sequence[str]) -> None:
        for name in names:
            if name.endswith((".zarray", "zarr.json")):
                check_packing(self.root / name, (self.stage / name).read_bytes(), name)

    def _place_parents(self, items: Sequence[_Item], em_path: str) -> None:
        """Bring the metadata of the groups above a dataset's EM and class arrays, each once."""
        placed: set[str] = set()
        for item in items:
            below = [em_path] if item.wanted.is_volume else [em_path, f"{self._crop_path(item.wanted)}/class"]
            folders = [str(parent) for path in below for parent in PurePosixPath(path).parents]
            for folder in dict.fromkeys(folders):
                if folder not in placed and folder.startswith(f"{item.wanted.dataset}/"):
                    self._place(self._stage(folder, None), item.em)
                    placed.add(folder)

    def _place(self, names: Sequence[str], part: _Part) -> None:
        """Bring staged metadata to their places, those of arrays last."""
        for name in sorted(names, key=lambda name: name.endswith((".zarray", "zarr.json"))):
            content, target = (self.stage / name).read_bytes(), self.root / name
            here = target.is_file() and target.read_bytes() == content
            part.metadata[name] = len(content)
            self._count(part, len(content), here=here)
            if self.copy and not here:
                with replacing(target) as partial:
                    partial.write_bytes(content)

    def _count(self, part: _Part, size: int, *, here: bool) -> None:
        part.files += 1
        part.bytes += size
        part.bytes_here += size if here else 0

    def _crop_path(self, wanted: Wanted) -> str:
        return f"{wanted.dataset}/{wanted.dataset}.zarr/{self.labels_path}/{wanted.crop}"

    def _relative(self, staged: str) -> str:
        return Path(staged).relative_to(self.stage).as_posix()


def _level_paths(group: Path) -> list[str]:
    """Return the folders of an image's levels as its metadata name them; [] if they are not understood.

    Raises DataError for one that would lead out of the image.
    """
    attributes = array_attributes(group)
    try:
        multiscale = attributes.get("ome", attributes)["multiscales"][0]
        paths = [str(entry["path"]) for entry in multiscale["datasets"]]
    except (KeyError, IndexError, TypeError, AttributeError):
        return []  # `read_image` says what is wrong
    for path in paths:
        if not PurePosixPath(path).parts or {"..", "/"}.intersection(PurePosixPath(path).parts):
            raise DataError(f"{group}: level '{path}' does not lie in the image")
    return paths


def _record_path(root: Path, wanted: Wanted) -> Path:
    return root / RECORDS / wanted.dataset / f"{wanted.crop}{'.volume' if wanted.is_volume else ''}.json"


def _write_record(root: Path, url: str, item: _Item) -> None:
    record = {
        "name": item.wanted.name,
        "source": url,
        "arrays": {
            chunks.region.path: {**chunks.region.to_dict(), "sizes": chunks.sizes.tolist()} for chunks in item.chunks
        },
        "metadata": sorted(item.metadata),
        "problems": item.problems,
    }
    write_text(_record_path(root, item.wanted), canonical_json(record) + "\n")


def _missing(root: Path, arrays: Sequence[Chunks], metadata: Iterable[str], problems: Sequence[str]) -> list[str]:
    """Return what is missing here of arrays and metadata, in words, without the arrays that `problems` name already."""
    lines = []
    for chunks in arrays:
        path = chunks.region.path
        missing, _ = chunks.compare(root)
        if missing and not any(problem.startswith(f"{path}:") for problem in problems):
            lines.append(
                f"{path}: {len(missing)} of {chunks.files} chunks are missing here, first {missing[0]}; fetch again"
            )
    lines += [f"{name}: is missing here; fetch again" for name in metadata if not (root / name).is_file()]
    return lines


def _md5(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _bytes(size: float) -> str:
    """Return a size in words, 1 kB = 1000 bytes."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.4g} TB"
