"""`verify` notices what is damaged or missing, and says which rule makes it again."""

import json
import re

import numpy as np
import pytest

from cellmap_pipe.cli import main
from cellmap_pipe.errors import ContractError
from cellmap_pipe.files import describe_file, write_json
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
    (folder / "volumes/ds_crop1.zarr/s0").mkdir(parents=True)
    (folder / "volumes/ds_crop1.zarr/.zattrs").write_text("{}")
    (folder / "volumes/ds_crop1.zarr/s0/.zarray").write_text("{}")
    record = {"name": "ds/crop1", "status": "ok", "path": "volumes/ds_crop1.zarr", "classes": ["pm"]}
    write_json(folder / "shard0.json", {"records": [record]})
    return tmp_path


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
    (results / "predict/net/fold0/validation/volumes/ds_crop1.zarr").rename(results / "gone.zarr")
    with pytest.raises(ContractError, match=r"^3 of "):
        verify_results(results)
    for fault in (r"8nm\.json: .*-R nnunet", r"index\.json: store format 1.*-R chunk", r"ds_crop1\.zarr.*-R predict"):
        assert re.search(fault, caplog.text)


def test_a_missing_prediction_is_named_with_its_remedy(results):
    volume = results / "predict/net/fold0/validation/volumes/ds_crop1.zarr"
    volume.rename(volume.with_name("gone.zarr"))
    with pytest.raises(ContractError, match=r"ds_crop1.zarr.*-R predict"):
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
