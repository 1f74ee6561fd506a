"""What became of the crops of a fetch, and the record of it beside the data.

`{root}/.fetched/{dataset}/{crop}.json` holds the size of every chunk at the source, for `verify_fetch`. It changes when
anything was copied, so that `fetch_digest` tells whether results are of the files that are here.
"""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cellmap_pipe.errors import CellmapError
from cellmap_pipe.fetch.arrays import Chunks, Region
from cellmap_pipe.fetch.needs import Wanted
from cellmap_pipe.fetched import RECORDS
from cellmap_pipe.files import canonical_json, read_json, write_text
from cellmap_pipe.geometry import Lattice

_REMEDY = "delete it and fetch again"


def verify_fetch(root: str | Path) -> list[str]:
    """Return what is missing of everything that was fetched into `root`, in words, array by array; [] if nothing is.

    The source is not asked: its sizes are in the records. What could not be fetched is named as well.
    """
    lines = []
    for path in sorted((Path(root) / RECORDS).glob("*/*.json")):
        record = read_json(path, _REMEDY)
        arrays = []
        for name, value in record["arrays"].items():
            arrays.append(Chunks(Region.from_dict(name, value), array("q", value["sizes"])))
        problems = record["problems"]
        problems += missing_here(Path(root), arrays, record["metadata"], problems)
        lines += [f"{record['name']}: {problem}" for problem in problems]
    return lines


@dataclass
class Part:
    """What became of a class of a crop, or of its EM.

    files, bytes, bytes_here: with the metadata, without the chunks that another crop has counted. copied: files that
    were written here.
    """

    lattice: Lattice | None = None
    chunks: list[Chunks] = field(default_factory=list)
    metadata: dict[str, int] = field(default_factory=dict)
    files: int = 0
    bytes: int = 0
    bytes_here: int = 0
    copied: int = 0
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
class Item:
    """What became of a crop or volume."""

    wanted: Wanted
    labels: list[Part]
    em: Part
    problems: list[str]
    warnings: list[str]

    @property
    def parts(self) -> list[Part]:
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


def _record_path(root: Path, wanted: Wanted) -> Path:
    return root / RECORDS / wanted.dataset / f"{wanted.crop}{'.volume' if wanted.is_volume else ''}.json"


def write_record(root: Path, url: str, item: Item) -> None:
    path = _record_path(root, item.wanted)
    earlier = read_json(path, _REMEDY).get("copied", 0) if path.is_file() else 0
    record = {
        "name": item.wanted.name,
        "copied": earlier + sum(part.copied for part in item.parts),
        "source": url,
        "arrays": {
            chunks.region.path: {**chunks.region.to_dict(), "sizes": chunks.sizes.tolist()} for chunks in item.chunks
        },
        "metadata": sorted(item.metadata),
        "problems": item.problems,
    }
    write_text(path, canonical_json(record) + "\n")


def missing_here(root: Path, arrays: Sequence[Chunks], metadata: Iterable[str], problems: Sequence[str]) -> list[str]:
    """Return what is missing here of arrays and metadata, in words, without the arrays that `problems` name already."""
    lines = []
    for chunks in arrays:
        path = chunks.region.path
        missing, _ = chunks.compare(root)
        if missing and not any(problem.startswith(f"{path}:") for problem in problems):
            lines.append(f"{path}: {len(missing)} of {chunks.files} chunks are missing here, first {missing[0]}")
    lines += [f"{name}: is missing here" for name in metadata if not (root / name).is_file()]
    return lines
