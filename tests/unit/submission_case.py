"""Submissions, predictions and manifests for tests: two crops with mitochondria, their membrane, a nucleus and er."""

import csv
import json
import shutil
import zipfile

import numpy as np
import zarr

VOXEL = [4.0, 8.0, 8.0]
TRANSLATION = [10.0, 100.5, 200.0]
SHAPE = [24, 20, 22]
LABELS = ["mito", "mito_mem", "nuc", "er"]


def write(root, name, values, zarr_format=2, **attributes):
    values = np.asarray(values)
    array = zarr.create_array(
        root / name,
        shape=values.shape,
        chunks=(12,) * values.ndim,
        dtype=values.dtype,
        zarr_format=zarr_format,
        fill_value=0,
    )
    array[:] = values
    array.attrs.update({"voxel_size": VOXEL, "translation": TRANSLATION, **attributes})


def volumes_of(seed):
    """Return what is segmented: two mitochondria with membrane, a nucleus, some er."""
    rng = np.random.default_rng(seed)
    mito = np.zeros(SHAPE, np.uint16)
    mito[2:9, 2:9, 2:9] = 1
    mito[12:20, 10:18, 3:12] = 2
    membrane = (mito > 0).astype(np.uint8)
    membrane[3:8, 3:8, 3:8] = 0
    nucleus = np.zeros(SHAPE, np.uint16)
    nucleus[15:, 12:, 15:] = 1
    return {"mito": mito, "mito_mem": membrane, "nuc": nucleus, "er": (rng.random(SHAPE) > 0.8).astype(np.uint8)}


def write_manifest(path, crops=("1", "2"), labels=LABELS, geometry=(VOXEL, TRANSLATION, SHAPE)):
    with open(path, "w", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(["crop_name", "dataset", "class_label", "voxel_size", "translation", "shape"])
        texts = ["[" + ";".join(map(str, vector)) + "]" if vector else "" for vector in geometry]
        table.writerows([crop, "jrc_x", label, *texts] for crop in crops for label in labels)
    return path


def segmentation(root, crops=(1, 2), labels=LABELS, lattice=(VOXEL, TRANSLATION, SHAPE), status="ok"):
    """Write segmentations as the workflow does and return their JSON."""
    records = []
    for crop in crops:
        record = {
            "name": f"jrc_x/crop{crop}",
            "dataset": "jrc_x",
            "status": status,
            "cause": "" if status == "ok" else "EM",
        }
        record["target"] = dict(zip(("voxel_nm", "translation_nm", "shape"), lattice, strict=True))
        if status == "ok":
            record |= {"path": f"volumes/jrc_x_crop{crop}.zarr", "classes": list(labels)}
            for label in labels:
                write(root / "volumes", f"jrc_x_crop{crop}.zarr/{label}/s0", volumes_of(crop)[label])
        records.append(record)
    path = root / "test.json"
    path.write_text(json.dumps({"model": "ensemble", "fold": "all", "subset": "test", "records": records}))
    return path


def rewrite(root, name, values, **attributes):
    shutil.rmtree(root / name)
    write(root, name, values, **attributes)


def set_attributes(root, name, **changes):
    path = root / name / ".zattrs"
    attributes = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in attributes.items() if value is not None}))


def set_meta(root, name, **changes):
    path = root / name / ".zarray"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def zipped(folder):
    """Return the zip file of a folder's files, beside it."""
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                archive.write(file, file.relative_to(folder))
    return path
