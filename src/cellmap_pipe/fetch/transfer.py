"""The work of a fetch: every crop and volume in turn, its labels first, for the EM lies where they do.

A crop is copied as its class arrays (the finest level, and the mask beside it), then as the boxes of EM levels that the
grids read; the metadata of all EM levels come along. The metadata of a class array come last: one that can be opened is
whole. What is here with its size is not copied again.
"""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from shutil import rmtree
from typing import Any

from cellmap_pipe.errors import CellmapError, ConfigError, DataError
from cellmap_pipe.fetch.arrays import ABSENT, Chunks, Region, check_packing, chunks_at_source, region_of
from cellmap_pipe.fetch.needs import Wanted, disagreements, em_boxes
from cellmap_pipe.fetch.records import Item, Part
from cellmap_pipe.fetch.source import RemoteFile, Source, TransferError
from cellmap_pipe.files import replacing
from cellmap_pipe.geometry import Lattice
from cellmap_pipe.prepare.ngff import Image, array_attributes, is_array, read_image

logger = logging.getLogger(__name__)

METADATA = (".zgroup", ".zattrs", ".zarray", "zarr.json")

Listing = Mapping[str, RemoteFile]


@dataclass
class Transfer:
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

    def items(self) -> list[Item]:
        """Return what became of every crop and volume; labels first, for the EM lies where they do."""
        self._check_contact()
        items = [Item(wanted, [], Part(), [], []) for wanted in self.wanted]
        crops = [item for item in items if not item.wanted.is_volume]
        names = list(self.arrays.map(self._class_names, crops))
        tasks = [
            [self.arrays.submit(self._label, item.wanted, name, masked) for name, masked in classes.items()]
            for item, classes in zip(crops, names, strict=True)
        ]
        for item, classes, futures in zip(crops, names, tasks, strict=True):
            item.labels = [future.result() for future in futures]
            self._judge_labels(item, list(classes))
        by_dataset: dict[str, list[Item]] = {}
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
        """Raise ConfigError if the source does not answer, or has no dataset at all: else every array would say so."""
        datasets = list(dict.fromkeys(wanted.dataset for wanted in self.wanted))
        try:
            if not self.source.lists:
                self.source.read(f"{datasets[0]}/{datasets[0]}.zarr/.zgroup")
            elif not any(self.arrays.map(lambda name: self.source.folders(f"{name}/{name}.zarr"), datasets)):
                raise ConfigError(
                    f"fetch.source {self.source.url}: has none of the datasets {', '.join(datasets[:3])}"
                    f"{', ...' if len(datasets) > 3 else ''} (looked for {datasets[0]}/{datasets[0]}.zarr); check the "
                    "address, and dataset in the table"
                )
        except TransferError as error:
            raise ConfigError(f"fetch.source: {error}; check the address, fetch.options and the network") from error

    def _class_names(self, item: Item) -> dict[str, bool | None]:
        """Return the classes of a crop to look for, and whether each has a mask; None where the source cannot list."""
        wanted = item.wanted
        if not self.source.lists:
            return dict.fromkeys(wanted.listed or self.classes)
        try:
            folders = self.source.folders(self._crop_path(wanted))
        except TransferError as error:
            item.problems.append(str(error))
            return {}
        names = wanted.listed or [name for name in self.classes if name in folders]
        return {name: f"{name}_mask" in folders for name in names}

    def _judge_labels(self, item: Item, names: Sequence[str]) -> None:
        """Note which of a crop's classes the source lacks, and log what it has."""
        lacking = [
            name for name, part in zip(names, item.labels, strict=True) if not part.lattice and not part.problems
        ]
        if len(lacking) == len(names) and not item.problems:
            item.problems.append(
                f"{self.source.url}/{self._crop_path(item.wanted)}: no class array is there; "
                "check dataset and crop_name in the table, and data.labels_path"
            )
        elif lacking and item.wanted.listed:
            item.warnings.append(f"in the table, but without an array at the source: {', '.join(lacking)}")
        total = sum(part.bytes for part in item.labels)
        due = total - sum(part.bytes_here for part in item.labels)
        found = len(names) - len(lacking)
        logger.info("%s: %d classes, %s, %s of it new", item.wanted.name, found, in_bytes(total), in_bytes(due))

    def _label(self, wanted: Wanted, name: str, masked: bool | None) -> Part:
        """Bring one class of a crop. Its mask comes first: without it unknown voxels would pass for known ones.

        masked: whether the source has a mask, None if it has to be asked.
        """
        part, path = Part(), f"{self._crop_path(wanted)}/{name}"
        with part.faults():
            try:
                if masked is not False:
                    self._label_array(f"{path}_mask", part, is_mask=True)
                part.lattice = self._label_array(path, part, is_mask=False)
            finally:
                for staged in (path, f"{path}_mask"):
                    rmtree(self.stage / staged, ignore_errors=True)
        if part.lattice:
            differing = disagreements(part.lattice, wanted.listed.get(name))
            part.problems += [f"{path}: {text}; correct the table" for text in differing]
        return part

    def _label_array(self, path: str, part: Part, *, is_mask: bool) -> Lattice | None:
        """Bring the finest level of a class and return its lattice; of a mask, which may be a plain array, None."""
        listing = self.source.files(path) if self.source.lists else None
        names = self._stage(path, listing)
        if not names:
            return None
        lattice, array = None, path
        if not (is_mask and is_array(self.stage / path)):
            image, staged = self._stage_image(path, listing)
            part.warnings += self._lacking_levels(image)
            lattice, array = image.levels[0].lattice, self._relative(image.levels[0].path)
            names += [name for name in staged if name.rpartition("/")[0] == array]
        self._check_packing(names)
        inner = f"{array.removeprefix(path)}/".removeprefix("/")
        chunks = None if listing is None else {key.removeprefix(inner): entry for key, entry in listing.items()}
        self._bring(region_of(self.stage / array, array), part, chunks)
        self._place(names, part)
        return lattice

    def _em_of_dataset(self, items: Sequence[Item]) -> None:
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
            item.em.warnings += self._lacking_levels(image)
            with item.em.faults():
                self._em(item, image, counted)
            new = item.em.bytes - item.em.bytes_here
            logger.info("%s: EM, %s, %s of it new", item.wanted.name, in_bytes(item.em.bytes), in_bytes(new))

    def _em(self, item: Item, image: Image, counted: set[str]) -> None:
        wanted = item.wanted
        target = next((part.lattice for part in item.labels if part.lattice), None) or wanted.box
        if target is None and not wanted.is_volume:
            return  # what is wrong with its labels is said there
        target = target or image.levels[0].lattice
        boxes, reasons = em_boxes(image, target, is_volume=wanted.is_volume, **self.needs)
        item.em.warnings += reasons
        for level, (lower, upper) in boxes.items():
            path = self._relative(level)
            with item.em.faults():
                chunks = self._bring(region_of(self.stage / path, path, lower, upper), item.em, counted=counted)
                if not chunks.files:
                    item.em.warnings.append(f"{path}: none of the {chunks.absent} chunks there is at the source")

    def _bring(
        self, region: Region, part: Part, listing: Listing | None = None, counted: set[str] | None = None
    ) -> Chunks:
        """Return what the source has of a region, after copying and counting the chunks of it that are not here.

        Raises TransferError if some cannot be had.

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
            self._copy(region, missing, sizes, part)
        return chunks

    def _copy(self, region: Region, keys: Sequence[str], sizes: Mapping[str, int], part: Part) -> None:
        names = [f"{region.path}/{key}" for key in keys]
        tasks = [
            self.files.submit(self.source.copy, name, self.root / name, sizes[key])
            for name, key in zip(names, keys, strict=True)
        ]
        failures = []
        for key, task in zip(keys, tasks, strict=True):
            try:
                task.result()
                part.copied += 1
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
            text = str(fault).replace(str(self.stage), self.source.url).replace("on disk", "at the source")
            raise DataError(text) from fault

    def _lacking_levels(self, image: Image) -> list[str]:
        """Return, in words, which levels an image names but does not have: the next one is read in its place."""
        path, found = self._relative(image.path), {self._relative(level.path) for level in image.levels}
        lacking = [level for level in _level_paths(self.stage / path) if f"{path}/{level}" not in found]
        return [f"{path}: names level {level}, which is not at the source" for level in lacking]

    def _check_packing(self, names: Sequence[str]) -> None:
        for name in names:
            if name.endswith((".zarray", "zarr.json")):
                check_packing(self.root / name, (self.stage / name).read_bytes(), name)

    def _place_parents(self, items: Sequence[Item], em_path: str) -> None:
        """Bring the metadata of the groups above a dataset's EM and class arrays, each once."""
        placed: set[str] = set()
        for item in items:
            below = [em_path] if item.wanted.is_volume else [em_path, f"{self._crop_path(item.wanted)}/class"]
            folders = [str(parent) for path in below for parent in PurePosixPath(path).parents]
            for folder in dict.fromkeys(folders):
                if folder not in placed and folder.startswith(f"{item.wanted.dataset}/"):
                    self._place(self._stage(folder, None), item.em)
                    placed.add(folder)

    def _place(self, names: Sequence[str], part: Part) -> None:
        """Bring staged metadata to their places, those of arrays last."""
        for name in sorted(names, key=lambda name: name.endswith((".zarray", "zarr.json"))):
            content, target = (self.stage / name).read_bytes(), self.root / name
            here = target.is_file() and target.read_bytes() == content
            part.metadata[name] = len(content)
            self._count(part, len(content), here=here)
            if self.copy and not here:
                part.copied += 1
                with replacing(target) as partial:
                    partial.write_bytes(content)

    def _count(self, part: Part, size: int, *, here: bool) -> None:
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


def _md5(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def in_bytes(size: float) -> str:
    """Return a size in words, 1 kB = 1000 bytes."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.4g} TB"
