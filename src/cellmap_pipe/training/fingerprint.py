"""What determines a training's result, as one hash. Imports no torch: the report computes it again."""

from collections.abc import Mapping, Sequence
from typing import Any

from cellmap_pipe.config import RESULT_VERSIONS
from cellmap_pipe.files import digest, file_digest
from cellmap_pipe.prepare.store import Store

# Settings that say when and where something is kept, or what becomes of a fault, not what comes out.
INERT_SETTINGS = ("checkpoint_minutes", "keep_every", "stop_minutes", "on_damage", "mlflow")

FINGERPRINT = "fingerprint.json"


def fingerprint(settings: Mapping[str, Any], store: Store, training: Sequence[str], validation: Sequence[str]) -> str:
    """Return the hash of what determines a training's result: settings, the fold's crops, the code's version.

    Crops count by the digests of their voxels, so that one added crop changes only the trainings that use it, and how
    the voxels lie on disk changes none.
    """
    crops = {
        side: {
            name: {
                "content": store.crops[name]["content"],
                "shape": list(store.shape(name)),
                "table": store.crops[name]["table"],
                "label_box": [list(store.crops[name][key]) for key in ("label_offset", "label_shape")],
                "range": list(store.intensity_range(store.crops[name]["dataset"], settings["normalisation"])),
            }
            for name in names
        }
        for side, names in (("training", training), ("validation", validation))
    }
    begin = settings["init_from"]
    return digest(
        {
            "settings": {key: value for key, value in settings.items() if key not in INERT_SETTINGS},
            "init_from": file_digest(begin) if begin else None,
            "crops": crops,
            "classes_of_store": store.classes,
            "voxel_nm": store.voxel_nm,
            "version": RESULT_VERSIONS["train"],
        }
    )
