"""The table of benchmarks: what programs print becomes records, records become docs/benchmarks.md."""

import importlib.util
import json
import os
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def table():
    spec = importlib.util.spec_from_file_location("benchmarks_table", ROOT / "benchmarks" / "table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MACHINE = {"cpu": "Some CPU", "cores": 2, "memory_gb": 24, "gpu": None}


def record(name="memory", **changes):
    values = {"pss 8": 0.9}
    return {
        "name": name,
        "command": f"python benchmarks/{name}.py",
        "quick": False,
        "date": "2026-11-22",
        "commit": "abc1234",
        "machine": MACHINE,
        "others_cores": 0.0,
        "values": values,
        "targets": dict.fromkeys(values, 1.0),
        "ok": True,
        **changes,
    }


@pytest.fixture
def bench(table, tmp_path, monkeypatch):
    """A folder of benchmarks with one program, `fake`, whose text the test writes."""
    monkeypatch.setattr(table, "FOLDER", tmp_path)
    monkeypatch.setattr(table, "RESULTS", tmp_path / "results.json")
    return lambda text: (tmp_path / "fake.py").write_text('"""How fake it is."""\n' + text)


def test_every_program_has_a_record_and_the_page_is_what_the_records_say(table):
    records = table.read_results()
    assert {one["name"] for one in records} == set(table.programs())
    assert (ROOT / "docs" / "benchmarks.md").read_text() == table.render(records), "run benchmarks/table.py --render"
    assert len(table.programs()) >= 12


def test_every_record_says_machine_date_and_command(table):
    for one in table.read_results():
        assert {"cpu", "cores", "memory_gb", "gpu"} == one["machine"].keys()
        assert len(one["date"].split("-")) == 3 and one["values"]
        assert one["command"].startswith(f"python benchmarks/{one['name']}.py")
        assert "/" not in one["command"].removeprefix("python benchmarks/"), "a path of one machine"


def test_every_value_is_a_row_with_its_target_and_whether_it_is_met(table):
    shown = table.rows(record("convert", values={"synthetic_bytes": 0.95, "synthetic_throughput": 4.5, "other": 1},
                              targets={"synthetic_bytes": 1.02, "synthetic_throughput": 3.0}))  # fmt: skip
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in shown]
    assert [cell[1:5] for cell in cells] == [
        ["synthetic_bytes", "0.95", "≤ 1.02", "met"],
        ["synthetic_throughput", "4.5", "≥ 3", "met"],
        ["other", "1", "", ""],
    ]
    assert all(cell[5:] == ["Some CPU, 2 cores, 24 GB, no GPU", "2026-11-22, abc1234",
                            "`python benchmarks/convert.py`"] for cell in cells)  # fmt: skip


def test_a_program_and_the_table_mean_the_same_by_better(table):
    with pytest.raises(table.BenchmarkError, match="memory: says ok True"):
        table.verdicts(record(values={"pss 8": 1.1}))
    with pytest.raises(table.BenchmarkError, match="loader: says ok False"):
        table.verdicts(record("loader", values={"blosc2": 30}, targets={"blosc2": 20}, ok=False))
    with pytest.raises(table.BenchmarkError, match="no value for unet"):
        table.verdicts(record(targets={"unet": 1.0}))


def test_a_target_that_is_missed_by_less_than_it_is_rounded_is_missed(table):
    assert table.verdicts(record(values={"pss 8": 1.0}, ok=False)) == {"pss 8": "missed"}


def test_the_directions_are_those_of_the_programs(table):
    better = {
        "augment": {"monai": True},
        "blocks": {"wall": True, "mb_per_patch": False},
        "convert": {"real_bytes": False, "real_throughput": True},
        "instance_search": {"seconds": False},
        "loader": {"numpy copy": True, "first batch s": False},
        "loss": {"dense": True, "label map": True, "memory": False, "gradient": False},
        "partial_labels": {"difference": True},
        "predict": {"stitch 400": False},
        "registration": {"real_missed": False},
        "scoring": {"blobs_128_200_clean": False},
        "train_step": {"plain": True, "loss_share": False},
    }
    assert {name: {key: table.more_is_better(name, key) for key in keys} for name, keys in better.items()} == better


def test_lines_of_every_kind_are_read(table):
    assert table.values_of({"ratios": {"a": 1.0}, "targets": {"a": 2.0}}) == ({"a": 1.0}, {"a": 2.0})
    labels = {"dice": {"masked": 0.77}, "ratios": {"difference": 0.07}, "targets": {"difference": 0.05}}
    assert table.values_of(labels) == ({"difference": 0.07, "dice, masked": 0.77}, {"difference": 0.05})
    step = {"ratios": {"plain": 2.1}, "loss_share": {"segresnet_ds": 0.04, "unet_2d": 0.1}, "targets": {"plain": 2.0}}
    assert table.values_of(step) == ({"plain": 2.1, "loss_share": 0.04}, {"plain": 2.0})


def test_a_quick_run_never_replaces_a_full_one_and_a_full_one_replaces_a_note(table):
    full, quick, noted = record(), record(quick=True), record(note="closing note")
    other = record(machine={**MACHINE, "gpu": "NVIDIA L40S"})
    records = [full]
    assert not table.add(records, quick) and records == [full]
    records = [quick]
    assert table.add(records, full) and records == [full]
    records = [noted]
    assert table.add(records, other) and records == [other]
    assert table.add(records, full) and records == [full, other]


def test_a_program_is_run_and_recorded(table, bench):
    bench('print(\'a table\')\nprint(\'{"name": "fake", "ratios": {"x": 0.5}, "targets": {"x": 1.0}, "ok": true}\')')
    found = table.measure("fake", quick=True, more=["--plot", "/somewhere/else/figure.png"])
    assert found["command"] == "python benchmarks/fake.py --quick --plot figure.png"
    assert (found["values"], found["targets"], found["ok"], found["quick"]) == ({"x": 0.5}, {"x": 1.0}, True, True)
    assert found["machine"] == table.machine() and found["machine"]["cores"] >= 1 and found["others_cores"] >= 0
    page = table.render([found])
    assert "- `fake`: How fake it is." in page and "| fake | x | 0.5 | ≤ 1 | met |" in page and ", quick" in page
    assert "1 of 1 targets are met." in page


def test_a_program_that_fails_is_named_and_the_others_go_on(table, bench, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(table, "PAGE", tmp_path / "benchmarks.md")
    bench("raise SystemExit('no such package')")
    (tmp_path / "good.py").write_text(
        '"""Good."""\nprint(\'{"name": "good", "ratios": {}, "targets": {}, "ok": true}\')'
    )
    assert table.main([]) == 1
    assert [one["name"] for one in table.read_results(table.RESULTS)] == ["good"]
    assert "Not run yet: fake." in table.PAGE.read_text()
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["ok"] is False
    with pytest.raises(table.BenchmarkError, match="fake: exit status 1"):
        table.measure("fake", quick=False)


def test_a_program_that_takes_too_long_ends_with_its_children(table, bench, tmp_path):
    bench(
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(300)'])\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid))\n"
        "child.wait()"
    )
    with pytest.raises(table.BenchmarkError, match="took longer"):
        table.measure("fake", quick=False, hours=6 / 3600)
    pid = int((tmp_path / "pid").read_text())
    for _ in range(100):
        stat = Path(f"/proc/{pid}/stat")
        if not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            break
        time.sleep(0.1)
    else:
        os.kill(pid, 9)
        pytest.fail("a child of the program went on")


def test_an_unknown_name_is_refused_with_those_that_are_known(table, capsys):
    with pytest.raises(SystemExit) as stopped:
        table.main(["lader"])
    assert stopped.value.code == 2 and "no benchmark lader; known: augment" in capsys.readouterr().err


def test_options_for_files_that_are_not_there_are_left_out(table, tmp_path, monkeypatch):
    manifest = tmp_path / "test_crop_manifest.csv"
    monkeypatch.setattr(table, "FULL", {"scoring": ("--big", "--manifest", str(manifest))})
    assert table.arguments_of("scoring", quick=False) == ["--big"]
    manifest.touch()
    assert table.arguments_of("scoring", quick=False, more=["--x"]) == ["--big", "--manifest", str(manifest), "--x"]
    assert table.arguments_of("scoring", quick=True) == ["--quick"]
