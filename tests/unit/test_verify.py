"""`verify` notices what is damaged or missing, and says which rule makes it again."""

import json
import re

import numpy as np
import pytest

from cellmap_pipe.cli import main
from cellmap_pipe.errors import ContractError
from cellmap_pipe.files import describe_file, write_json
from cellmap_pipe.geometry import Lattice
from cellmap_pipe.prediction.store import BlockStore
from cellmap_pipe.verify import verify_results


@pytest.fixture
def results(tmp_path):
    """A converted crop and a prediction, as the stages leave them."""
    image = tmp_path / "nifti/8nm/images/ds_crop1_0000.nii.gz"
    image.parent.mkdir(parents=True)
    image.write_bytes(b"not looked into")
    contract = describe_file(image, tmp_path / "nifti/8nm")
    write_json(tmp_path / "convert/8nm/shard0.json", {"records": [{"crop": "ds/crop1", "files": {"image": contract}}]})
    folder = tmp_path / "predict/net/fold0/validation"
    store = BlockStore(folder / "volumes", "ds/crop1", Lattice((8,) * 3, (4,) * 3, (100, 8, 200)), ["pm"], "f" * 64, {})
    store.array[:] = 7
    store.array[:, :, :, 128:] = 0  # of which zarr keeps no chunk
    for first, last in ((0, 64), (64, 100)):
        store.finish(((first, 0, 0), (last, 8, 200)))
    record = {"status": "ok", "path": f"volumes/{store.path.name}", "fingerprint": "f" * 64}
    write_json(folder / "shard0.json", {"shard": 0, "shards": 1, "records": [record]})
    return tmp_path


def prediction_of(results):
    """Return the store of the fixture's prediction."""
    return results / "predict/net/fold0/validation/volumes" / f"ds_crop1-{'f' * 12}.zarr"


def test_intact_results_agree(results):
    assert verify_results(results) == 2


def test_a_flipped_byte_is_named_with_its_remedy(results):
    image = results / "nifti/8nm/images/ds_crop1_0000.nii.gz"
    image.write_bytes(b"NOT looked into")
    with pytest.raises(ContractError, match=r"ds_crop1_0000.nii.gz: damaged .*-R convert"):
        verify_results(results)


def test_a_damaged_export_is_named_with_its_remedy(results):
    label = results / "nnunet/raw/Dataset801_8nm/labelsTr/ds_crop1.nii.gz"
    label.parent.mkdir(parents=True)
    label.write_bytes(b"not looked into")
    case = {"files": {"label": describe_file(label, results / "nnunet/raw/Dataset801_8nm")}}
    write_json(results / "nnunet/8nm.json", {"folder": "raw/Dataset801_8nm", "cases": {"ds_crop1": case}})
    assert verify_results(results) == 3
    label.write_bytes(b"cut")
    with pytest.raises(ContractError, match=r"ds_crop1.nii.gz: 3 bytes .*-R nnunet"):
        verify_results(results)


def test_a_file_that_cannot_be_read_is_named_with_its_remedy(results):
    image = results / "nifti/8nm/images/ds_crop1_0000.nii.gz"
    image.unlink()
    image.symlink_to(image)
    with pytest.raises(ContractError, match=r"ds_crop1_0000.nii.gz: cannot be read .*-R convert"):
        verify_results(results)


def test_contracts_that_cannot_be_used_do_not_hide_other_faults(results, caplog):
    write_json(results / "chunks/8nm/index.json", {"format_version": 1})
    (results / "nnunet").mkdir()
    (results / "nnunet/8nm.json").write_text("")
    prediction_of(results).rename(results / "gone.zarr")
    with pytest.raises(ContractError, match=r"^3 of "):
        verify_results(results)
    for fault in (
        r"8nm\.json: .*-R nnunet",
        r"index\.json: store format 1.*-R chunk",
        r"ds_crop1-f+\.zarr.*-R predict",
    ):
        assert re.search(fault, caplog.text)


@pytest.mark.parametrize(
    "lost, cause",
    [
        (".", "missing or damaged"),
        (".zattrs", "missing or damaged"),
        ("s0/.zarray", "missing or damaged"),
        ("s0/0/1", "chunks.* in 2 of 4 places"),
        ("../{stem}.blocks/0_0_0.json", "chunks.* in 2 of 4 places"),
    ],
)
def test_a_prediction_that_is_not_all_there_is_named_with_its_remedy(results, lost, cause):
    store = prediction_of(results)
    (store / lost.format(stem=store.stem)).resolve().rename(results / "gone")
    with pytest.raises(ContractError, match=rf"ds_crop1-f+.zarr: {cause}.*-R predict"):
        verify_results(results)


def test_a_prediction_that_was_cut_short_is_named(results):
    (prediction_of(results) / "s0/0/1/0/0").write_bytes(b"")
    with pytest.raises(ContractError, match=r"chunks.* in 2 of 4 places"):
        verify_results(results)


def test_what_a_run_with_more_shards_left_is_not_missed(results):
    record = {"status": "ok", "path": "volumes/gone.zarr", "fingerprint": "a" * 64}
    folder = results / "predict/net/fold0/validation"
    write_json(folder / "shard1.json", {"shard": 1, "shards": 2, "records": [record]})
    verify_results(results)
    write_json(folder / "shard0.json", {"shard": 0, "shards": 2, "records": []})
    with pytest.raises(ContractError, match=r"gone\.zarr"):
        verify_results(results)


def test_what_a_conversion_with_more_shards_left_is_not_missed(results):
    gone = {"records": [{"crop": "ds/crop2", "files": {"image": {"path": "gone.nii.gz", "size": 1, "sha256": "0"}}}]}
    shards = [results / f"convert/8nm/shard{number}.json" for number in (0, 1)]
    write_json(shards[1], {"shard": 1, "shards": 2, **gone})
    with pytest.raises(ContractError, match=r"gone\.nii\.gz"):
        verify_results(results)  # of an earlier version, which does not tell of its shards
    write_json(shards[0], {"shard": 0, "shards": 1, **json.loads(shards[0].read_text())})
    verify_results(results)


def test_segmentations_and_ensembles_that_lost_an_array_are_named(results):
    stores = {"ensemble/test/fold0": ["s0"], "segment/net/fold0/test": ["pm/s0", "nuc/s0"]}
    for contract, arrays in stores.items():
        for array in arrays:
            (results / f"{contract}.zarr" / array).mkdir(parents=True)
            (results / f"{contract}.zarr" / array / ".zarray").write_text("{}")
        record = {"status": "ok", "path": f"{contract.split('/')[-1]}.zarr", "classes": ["pm", "nuc"]}
        write_json(results / f"{contract}.json", {"records": [record]})
    assert verify_results(results) == 4
    (results / "segment/net/fold0/test.zarr/nuc/s0/.zarray").unlink()
    with pytest.raises(ContractError, match=r"test.zarr: missing, or without its nuc/s0; .*-R segment"):
        verify_results(results)


def test_a_chunk_that_was_fetched_and_is_gone_is_named_with_its_remedy(tmp_path, ngff):
    source, root = tmp_path / "source", tmp_path / "data"
    for path in ("recon-1/em/fibsem-uint8", "recon-1/labels/groundtruth/crop1/nuc"):
        ngff(source / "ds/ds.zarr" / path, np.ones((8, 8, 8), np.uint8), [8] * 3, [4] * 3)
    (tmp_path / "crops.csv").write_text("crop\nds/crop1\n")
    arguments = ["fetch", "--crops", tmp_path / "crops.csv", "--source", source, "--root", root, "--grid", "native"]
    assert main([str(argument) for argument in arguments]) == 0
    assert verify_results(tmp_path / "results", root) == 1
    (root / "ds/ds.zarr/recon-1/em/fibsem-uint8/s0/0/0/0").unlink()
    with pytest.raises(
        ContractError, match=r"fibsem-uint8/s0: 1 of 1 chunks are missing here, first 0/0/0; run .*-R fetch"
    ):
        verify_results(tmp_path / "results", root)


def test_results_that_are_not_there_yet_are_not_missed(tmp_path):
    (tmp_path / "crops.json").write_text(json.dumps({}))
    assert verify_results(tmp_path) == 0
