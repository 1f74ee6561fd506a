"""The real crops, converted once for all tests that look at them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cellmap_pipe.files import read_json
from cellmap_pipe.prepare.convert import convert_shard
from cellmap_pipe.prepare.crops import write_crops

DATA = Path(__file__).parents[2] / ".." / "shared" / "data" / "real-em"
CLASSES = ["pm", "mito", "cyto", "nuc"]


@dataclass(frozen=True)
class Conversion:
    """All crops of real-em on a grid of 10 nm: records by crop, `crops.csv` and `shard0.json` in `folder`."""

    folder: Path
    records: dict[str, dict[str, Any]]

    @property
    def nifti(self) -> Path:
        return self.folder / "nifti"


@pytest.fixture(scope="session")
def real_em(tmp_path_factory) -> Conversion:
    if not DATA.is_dir():
        pytest.skip(f"{DATA} is not there")
    folder = tmp_path_factory.mktemp("real")
    data = {
        "root": str(DATA),
        "labels_path": "recon-1/labels/groundtruth",
        "em_path": "recon-1/em/fibsem-uint8",
        "crops": None,
    }
    write_crops(data, folder / "crops.csv")
    convert_shard(
        folder / "crops.csv",
        folder / "shard0.json",
        data_root=DATA,
        shard=0,
        shards=1,
        grid_name="10nm",
        voxel_nm=[10, 10, 10],
        classes=CLASSES,
        labels={"empty": "absent"},
        max_upsample=5,
        nifti_dir=folder / "nifti",
        workers=2,
    )
    records = read_json(folder / "shard0.json")["records"]
    return Conversion(folder, {record["crop"]: record for record in records})
