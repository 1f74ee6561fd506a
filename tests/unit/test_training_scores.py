"""Training validates by the functions that score submissions."""

import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from training_case import CLASSES, crop_volume, write_store

from cellmap_pipe.evaluation import aggregate, score_semantic
from cellmap_pipe.prepare.store import Store
from cellmap_pipe.training.expand import Expander
from cellmap_pipe.training.sampling import Patches
from cellmap_pipe.training.validation import Validation


def test_a_fold_is_validated_by_the_counts_of_the_challenge(tmp_path: Path) -> None:
    """What `Validation` pools over the tiles of a crop is what its whole answer counts by `score_semantic`."""
    crops = ["set-0/crop0", "set-0/crop2"]
    patches = Patches(Store(write_store(tmp_path)), crops, CLASSES, (16, 16, 16))
    cpu = torch.device("cpu")
    expander = Expander(patches.tables, [(0, 255)] * len(crops), cpu)
    torch.manual_seed(0)
    network = torch.nn.Conv3d(1, len(CLASSES), 1)  # a voxel's answer depends on no tile
    with torch.no_grad():
        network.weight[:] = torch.tensor([8.0, -8.0, 4.0]).reshape(network.weight.shape)
        network.bias[:] = torch.tensor([-3.0, 4.0, -2.0])
    validation = Validation(patches, expander, batch=2, device=cpu, rank=0, world=1)
    scores = validation.evaluate(network)
    assert scores is not None
    records: list[dict[str, Any]] = []
    for number, crop in enumerate(crops):
        index, margin = int(crop[-1]), 4
        image, label = (volume[margin:] for volume in crop_volume((30 + 2 * index, 32, 28), index))
        with torch.no_grad():
            answer = (network(expander.image(torch.from_numpy(image)[None], [number])) > 0)[0].numpy()
        for column, name in enumerate(CLASSES):
            counts = score_semantic(answer[column], label == column + 1)
            records.append({"crop": crop, "label": name, **counts})
    for name in CLASSES:
        tp, fp, fn = (sum(r[key] for r in records if r["label"] == name) for key in ("tp", "fp", "fn"))
        assert tp and fp
        assert scores.dice[name] == 2 * tp / (2 * tp + fp + fn)
    semantic = [record for record in records if record["label"] != "nuc"]  # that is scored by instance
    assert scores.challenge == aggregate(semantic)["overall_semantic_score"]
