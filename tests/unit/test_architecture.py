"""Architectures of DiNTS: what is a network is accepted, what is none is refused; MONAI's files load as data only."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.networks.nets.dints import TopologyConstruction

from cellmap_pipe.cli import main
from cellmap_pipe.errors import ConfigError
from cellmap_pipe.training.architecture import (
    OPERATIONS,
    check_architecture,
    import_architecture,
    load_architecture,
    path_ends,
    write_architecture,
)

ROOT = Path(__file__).parents[2]

TINY: dict[str, Any] = {
    "spatial_dims": 3,
    "num_blocks": 2,
    "num_depths": 2,
    "node_a": [[1, 0], [1, 1], [1, 0]],
    "arch_code_a": [[1, 0, 1, 0], [1, 1, 0, 0]],
    "arch_code_c": [[1, 0, 2, 0], [0, 3, 0, 4]],
}


@st.composite
def architectures(draw: st.DrawFn) -> dict[str, Any]:
    """Draw an architecture block by block, from paths that begin where a feature map is in use."""
    dims, depths, blocks = (draw(st.integers(*bounds)) for bounds in ((2, 3), (2, 4), (1, 4)))
    ends = path_ends(depths)
    nodes = [draw(st.lists(st.booleans(), min_size=depths, max_size=depths).filter(any))]
    paths = []
    for _ in range(blocks):
        usable = [number for number, (start, _) in enumerate(ends) if nodes[-1][start]]
        active = draw(st.sets(st.sampled_from(usable), min_size=1))
        paths.append([int(number in active) for number in range(len(ends))])
        nodes.append([depth in {ends[number][1] for number in active} for depth in range(depths)])
    operation = st.integers(0, OPERATIONS[dims] - 1)
    row = st.lists(operation, min_size=len(ends), max_size=len(ends))
    return {
        "spatial_dims": dims,
        "num_blocks": blocks,
        "num_depths": depths,
        "node_a": [[int(on) for on in row] for row in nodes],
        "arch_code_a": paths,
        "arch_code_c": draw(st.lists(row, min_size=blocks, max_size=blocks)),
    }


@pytest.mark.parametrize("num_depths", [2, 3, 4])
def test_paths_lead_where_the_library_says(num_depths: int) -> None:
    library = TopologyConstruction(num_blocks=1, num_depths=num_depths, channel_mul=0.125)
    assert path_ends(num_depths) == list(zip(library.arch_code2in, library.arch_code2out, strict=True))


@given(architectures())
@settings(max_examples=60, deadline=None)
def test_connected_paths_are_accepted_and_survive_a_file(tmp_path_factory: Any, codes: dict[str, Any]) -> None:
    check_architecture(codes, "here")
    path = tmp_path_factory.mktemp("architecture") / "found.json"
    write_architecture(path, codes, "a test", {"max_steps": 3})
    assert load_architecture(path) == codes


@given(architectures(), st.data())
@settings(max_examples=60, deadline=None)
def test_a_feature_map_that_no_path_leads_to_or_one_not_in_use_that_a_path_needs_is_refused(
    codes: dict[str, Any], data: st.DataObject
) -> None:
    block = data.draw(st.integers(1, codes["num_blocks"]))
    depth = data.draw(st.integers(0, codes["num_depths"] - 1))
    codes["node_a"][block][depth] = 1 - codes["node_a"][block][depth]
    with pytest.raises(ConfigError, match=r"^here: .*(not in use|just those depths)"):
        check_architecture(codes, "here")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_blocks": 3}, r"node_a must be 4 lists of 2 numbers"),
        ({"num_depths": "2"}, r"num_depths is '2'; give an integer from 2 on"),
        ({"spatial_dims": 4}, r"spatial_dims is 4; allowed: 2, 3"),
        ({"arch_code_c": [[1, 0, 2, 0], [0, 3, 0, 5]]}, r"arch_code_c\[1\] holds 5; allowed: 0 .. 4"),
        ({"spatial_dims": 2}, r"arch_code_c\[0\] holds 2; allowed: 0 .. 1"),
        ({"arch_code_a": [[1, 0, 1, 0], [True, 1, 0, 0]]}, r"arch_code_a\[1\] holds True"),
        ({"arch_code_a": [[0, 0, 0, 0], [1, 1, 0, 0]]}, r"lead to depths \[\]"),
        ({"node_a": [[0, 0], [1, 1], [1, 0]]}, r"a path from depth 0, which node_a\[0\] says is not in use"),
        ({"num_block": 2}, r"'num_block' is unknown; did you mean num_blocks"),
    ],
)
def test_what_is_no_network_is_refused(change: dict[str, Any], message: str) -> None:
    check_architecture(TINY, "here")
    with pytest.raises(ConfigError, match=f"^here: .*{message}"):
        check_architecture({**TINY, **change}, "here")


def test_a_missing_code_is_named() -> None:
    with pytest.raises(ConfigError, match="here: node_a is missing"):
        check_architecture({key: value for key, value in TINY.items() if key != "node_a"}, "here")
    with pytest.raises(ConfigError, match=r"here is 'config/a\.json'; it must hold spatial_dims"):
        check_architecture("config/a.json", "here")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not readable as JSON"),
        ("[]", "is no architecture of format 1"),
        (json.dumps({"format": 2, "source": "?", **TINY}), "is no architecture of format 1"),
        (json.dumps({"format": 1, **TINY}), "with its `source`"),
        (json.dumps({"format": 1, "source": "?", **TINY, "node_a": 3}), "node_a must be 3 lists of 2 numbers"),
    ],
)
def test_a_file_that_is_no_architecture_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=f"a.json: .*{message}"):
        load_architecture(path)


def test_where_an_architecture_comes_from_changes_no_training(tmp_path: Path) -> None:
    for source in ("one", "another"):
        write_architecture(tmp_path / source, TINY, source, {"max_steps": len(source)})
    assert load_architecture(tmp_path / "one") == load_architecture(tmp_path / "another") == TINY


def test_shipped_architectures_can_be_used_and_say_where_they_come_from() -> None:
    shipped = sorted((ROOT / "config" / "architectures").glob("*.json"))
    assert shipped
    for path in shipped:
        load_architecture(path)
        assert json.loads(path.read_text())["search"]
        assert "synthetic data" in json.loads(path.read_text())["source"]


def save_as_monai(path: Path, names: tuple[str, str] = ("arch_code_a", "arch_code_c"), **changes: Any) -> Path:
    """Save TINY as MONAI's search does: arrays as TopologySearch.decode returns them, with how the search went."""
    paths = np.array(TINY["arch_code_a"], np.float64)
    content = {
        "node_a": np.array(TINY["node_a"]),
        names[0]: paths,
        f"{names[0]}_max": paths,
        names[1]: np.array(TINY["arch_code_c"]),
        "iter_num": 12,
        "epochs": 3,
        "best_dsc": np.float64(0.5),
        "best_path": -1,
    }
    torch.save(content | changes, path)
    return path


@pytest.mark.parametrize("names", [("arch_code_a", "arch_code_c"), ("code_a", "code_c")])
def test_files_of_monais_search_are_imported(
    tmp_path: Path, names: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    published, out = save_as_monai(tmp_path / "arch_code.pth", names), tmp_path / "found.json"
    assert main(["import-architecture", str(published), str(out)]) == 0
    assert load_architecture(out) == TINY
    assert json.loads(out.read_text())["source"] == "imported from arch_code.pth"
    assert "4 paths in 2 blocks of 2 depths" in capsys.readouterr().out


def test_files_of_older_versions_of_numpy_and_torch_are_imported(tmp_path: Path) -> None:
    published = save_as_monai(tmp_path / "old.pth")
    torch.save(torch.load(published, weights_only=False), published, _use_new_zipfile_serialization=False)
    old = published.read_bytes().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert b"numpy.core.multiarray" in old
    published.write_bytes(old)
    assert import_architecture(published, tmp_path / "old.json") == TINY


class Malicious:
    """What runs a function of the attacker's choice when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


@pytest.mark.parametrize("new", [True, False])
def test_a_file_that_would_run_code_is_refused(tmp_path: Path, new: bool) -> None:
    published, touched = tmp_path / "arch_code.pth", tmp_path / "touched"
    torch.save({"node_a": Malicious(touched)}, published, _use_new_zipfile_serialization=new)
    with pytest.raises(ConfigError, match=r"arch_code\.pth: holds more than arrays .*\(Unsupported .*getattr") as error:
        import_architecture(published, tmp_path / "found.json")
    assert "torch.load" not in str(error.value), "torch's advice, to load it all the same"
    assert not touched.exists()
    torch.load(published, weights_only=False)
    assert touched.exists(), "the file would have run code"
    assert not (tmp_path / "found.json").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arch_code_c": np.full((2, 4), 0.5)}, "arch_code_c is no matrix of whole numbers"),
        ({"arch_code_c": np.full((2, 4), np.nan)}, "arch_code_c is no matrix of whole numbers"),
        ({"node_a": np.array([[[1]]])}, "node_a is no matrix"),
        ({"node_a": np.array([["1"]])}, "holds more than arrays|node_a is no matrix"),
        ({"node_a": np.ones((2, 2))}, "node_a must be 3 lists"),
        ({"node_a": np.array([[1, Path()]], dtype=object)}, "holds more than arrays of numbers"),
    ],
)
def test_arrays_that_are_no_architecture_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    published = save_as_monai(tmp_path / "arch_code.pth", **change)
    with pytest.raises(ConfigError, match=message):
        import_architecture(published, tmp_path / "found.json")


def test_a_missing_damaged_or_foreign_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = tmp_path / "arch_code.pth", tmp_path / "found.json"
    with pytest.raises(ConfigError, match=r"arch_code\.pth: does not exist"):
        import_architecture(path, out)
    path.write_bytes(b"PK\x03\x04 torn")
    with pytest.raises(ConfigError, match=r"arch_code\.pth: .*is damaged"):
        import_architecture(path, out)
    torch.save([1, 2], path)
    with pytest.raises(ConfigError, match="holds a list"):
        import_architecture(path, out)
    torch.save({"state_dict": {}}, path)
    assert main(["import-architecture", str(path), str(out)]) == 2
    assert "lacks node_a" in capsys.readouterr().err
