"""Fetching from a real S3 server on loopback, behind a proxy that fails in every way a network does."""

import errno
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import fsspec
import numpy as np
import pytest
import zarr
from fsspec.implementations.local import LocalFileSystem
from moto.server import ThreadedMotoServer

from cellmap_pipe.cli import main
from cellmap_pipe.errors import ConfigError, DataError
from cellmap_pipe.fetch import arrays as arrays_module
from cellmap_pipe.fetch import fetch, plan_fetch, plan_table, verify_fetch, write_plan
from cellmap_pipe.fetch import source as source_module
from cellmap_pipe.fetch.needs import read_wanted
from cellmap_pipe.fetched import fetch_digest
from cellmap_pipe.prepare.convert import bulk_paths, convert_shard, read_nifti
from cellmap_pipe.prepare.crops import write_crops

LABELS, EM = "recon-1/labels/groundtruth", "recon-1/em/fibsem-uint8"
BUCKET = "cells"

# Crops are cubes of 64 nm that begin here (z; y and x at 24 nm), in EM of 384 x 128 x 128 nm.
STARTS = {"crop1": 72, "crop2": 200}
CROPS = [("jrc_a", "crop1"), ("jrc_a", "crop2"), ("jrc_b", "crop2")]

# With 16 nm of context, in chunks of 64 nm: crop1 needs 0..2 along z, crop2 2..4, and all of them across.
EM_CHUNKS = {"jrc_a": range(5), "jrc_b": range(2, 5)}

MANIFESTS = Path(__file__).parents[2] / ".." / "shared" / "data" / "manifests"

# Chunk 0/0/1 of crop1/nuc holds only zeros: as in the challenge's data, the source has no file for it.
HOLE = f"jrc_a/jrc_a.zarr/{LABELS}/crop1/nuc/s0/0/0/1"
NUC = f"jrc_a/jrc_a.zarr/{LABELS}/crop1/nuc"


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch):
    monkeypatch.setattr(source_module, "FIRST_PAUSE_S", 0.002)


def write_group(path: Path) -> None:
    path.mkdir(parents=True, exist_ok=True)
    (path / ".zgroup").write_text('{"zarr_format": 2}')


@pytest.fixture(scope="session")
def tree(tmp_path_factory, ngff):
    """Two datasets: jrc_a in zarr v2, jrc_b in zarr v3 with "." between indices; EM in 3 levels, labels twice finer."""
    root = tmp_path_factory.mktemp("source")
    rng = np.random.default_rng(0)
    layouts = {"jrc_a": {}, "jrc_b": {"zarr_format": 3, "separator": "."}}
    for dataset, layout in layouts.items():
        volume = rng.integers(1, 255, (48, 16, 16), np.uint8)
        ngff(root / dataset / f"{dataset}.zarr" / EM, volume, [8] * 3, [4] * 3, levels=3, **layout)
    for folder in ("", "recon-1", "recon-1/labels", LABELS, f"{LABELS}/crop1", f"{LABELS}/crop2", "recon-1/em"):
        write_group(root / "jrc_a/jrc_a.zarr" / folder)
    for dataset, crop in CROPS:
        for name in ("nuc", "mito"):
            labels = rng.integers(0, 2, (16, 16, 16), np.uint8)
            path = root / dataset / f"{dataset}.zarr" / LABELS / crop / name
            ngff(path, labels, [4] * 3, [STARTS[crop] + 2, 26, 26], levels=2, **layouts[dataset])
    (root / HOLE).unlink()
    ngff(root / f"{NUC}_mask", np.ones((16, 16, 16), np.uint8), [4] * 3, [STARTS["crop1"] + 2, 26, 26])
    return root


@pytest.fixture(scope="session")
def table(tmp_path_factory):
    path = tmp_path_factory.mktemp("tables") / "crops.csv"
    rows = ["crop_name,dataset,class_label,voxel_size,translation,shape"]
    for dataset, crop in CROPS:
        place = f"[4.0;4.0;4.0],[{STARTS[crop] + 2};26;26],[16;16;16]"
        rows += [f"{crop[4:]},{dataset},{name},{place}" for name in ("nuc", "mito")]
    path.write_text("\r\n".join(rows) + "\r\n")
    return path


@pytest.fixture
def one(table, tmp_path):
    """The table of crop1 alone."""
    path = tmp_path / "one.csv"
    path.write_text("\n".join(table.read_text().splitlines()[:3]))
    return path


@pytest.fixture(scope="session")
def server(tree):
    """The address of an S3 server whose bucket holds the tree."""
    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    moto.start()
    host, port = moto.get_host_and_port()
    url = f"http://{host}:{port}"
    bucket = fsspec.filesystem("s3", key="k", secret="s", endpoint_url=url, skip_instance_cache=True)
    bucket.mkdir(BUCKET, acl="public-read")
    content = {f"{BUCKET}/{path.relative_to(tree)}": path.read_bytes() for path in files_of(tree)}
    bucket.pipe(content, ACL="public-read", batch_size=8)
    yield url
    moto.stop()


class Proxy(ThreadingHTTPServer):
    """Passes requests on; `fault(method, path, times asked)` says what goes wrong: a status, "cut", "hang up", None."""

    daemon_threads = True

    def __init__(self, behind: str, fault):
        super().__init__(("127.0.0.1", 0), Passing)
        self.behind, self.fault = urlsplit(behind), fault
        self.asked, self.lock = Counter(), threading.Lock()
        self.open = threading.Event()  # while it is not set, requests are held back
        self.open.set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def copied(self) -> list[str]:
        """The objects that were asked for, chunks of arrays alone."""
        return [path for (method, path) in self.asked if method == "GET" and path.rpartition("/")[2].isdigit()]


class Passing(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self):
        with self.server.lock:
            key = (self.command, self.path)
            self.server.asked[key] += 1
            fault = self.server.fault(self.command, self.path, self.server.asked[key])
        self.server.open.wait(30)
        if fault == "hang up":
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        if isinstance(fault, int):
            self.answer(fault, {"Content-Type": "application/xml"}, b"<Error><Code>InternalError</Code></Error>")
            return
        status, headers, body = self.ask()
        self.answer(status, headers, body, cut=fault == "cut")

    do_HEAD = do_GET  # noqa: N815

    def ask(self):
        import http.client

        connection = http.client.HTTPConnection(self.server.behind.hostname, self.server.behind.port)
        headers = {name: value for name, value in self.headers.items() if name.lower() != "connection"}
        connection.request(self.command, self.path, headers=headers)
        response = connection.getresponse()
        body = response.read()
        connection.close()
        return response.status, dict(response.getheaders()), body

    def answer(self, status, headers, body, cut=False):
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "transfer-encoding", "connection", "server", "date"):
                self.send_header(name, value)
        length = next((v for k, v in headers.items() if k.lower() == "content-length"), str(len(body)))
        self.send_header("Content-Length", length if self.command == "HEAD" else str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *args):
        pass


@contextmanager
def proxy(behind, fault=lambda method, path, times: None):
    server = Proxy(behind, fault)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def files_of(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file())


def s3(url: str) -> dict:
    return {"source": f"s3://{BUCKET}", "options": {"anon": True, "endpoint_url": url}}


def settings(table, root, **changes) -> dict:
    grids = changes.get("grids", {"8nm": [8, 8, 8]})
    return {
        "crops": str(table),
        "volumes": None,
        "root": str(root),
        "options": {},
        "classes": None,
        "em_path": EM,
        "labels_path": LABELS,
        "grids": grids,
        "max_upsample": 4,
        "context_nm": dict.fromkeys(grids, 16),
        "train_context_nm": dict.fromkeys(grids, 16),
        "max_train_gb": None,
        "workers": 8,
        "retries": 6,
        **changes,
    }


def assert_same_files(root: Path, tree: Path) -> None:
    """Every file that was fetched has the source's bytes."""
    fetched = [path for path in files_of(root) if ".fetched" not in path.parts]
    assert fetched
    for path in fetched:
        assert path.read_bytes() == (tree / path.relative_to(root)).read_bytes(), path


def wanted_files(tree: Path) -> set[str]:
    """What the table asks for at 8 nm: of labels s0, of EM all metadata and the chunks of s0 round the crops."""
    names = set()
    for path in files_of(tree):
        name = path.relative_to(tree).as_posix()
        if LABELS in name:
            keep = "/s1/" not in name
        elif path.name in (".zgroup", ".zattrs", ".zarray", "zarr.json"):
            keep = True
        else:
            level, _, key = name.partition(f"{EM}/")[2].partition("/")
            keep = level == "s0" and int(key.removeprefix("c.").replace(".", "/").split("/")[0]) in EM_CHUNKS[name[:5]]
        if keep:
            names.add(name)
    return names


def test_what_is_fetched_has_the_bytes_of_the_source_whatever_the_network_does(server, tree, table, tmp_path):
    kinds = [None, 500, "cut", 503, None, "hang up", None]

    def fault(method, path, times):
        return kinds[(len(path) + 3 * sum(map(ord, path))) % len(kinds)] if times <= 2 else None

    with proxy(server, fault) as between:
        record = fetch(tmp_path / "fetch.json", **settings(table, tmp_path / "data", **s3(between.url)))
        retried = [count for count in between.asked.values() if count > 1]
    assert len(retried) > 10
    assert_same_files(tmp_path / "data", tree)
    fetched = {path.relative_to(tmp_path / "data").as_posix() for path in files_of(tmp_path / "data")}
    assert {name for name in fetched if not name.startswith(".fetched")} == wanted_files(tree)
    assert record["crops"]["jrc_a/crop1"]["absent_chunks"] == 1
    assert record["crops"]["jrc_a/crop2"]["absent_chunks"] == 0
    assert all(entry["problems"] == entry["warnings"] == [] for entry in record["crops"].values())
    assert json.loads((tmp_path / "fetch.json").read_text()) == record
    assert verify_fetch(tmp_path / "data") == []


def test_a_second_fetch_copies_nothing_and_says_the_same(server, one, tmp_path):
    with proxy(server) as between:
        asked = settings(one, tmp_path / "data", **s3(between.url))
        first = fetch(tmp_path / "1.json", **asked)
        assert len(between.copied()) == 12 + 7 + 8 + 8  # EM, nuc, its mask, mito
        between.asked.clear()
        assert fetch(tmp_path / "2.json", **asked) == first
        assert between.copied() == []
    assert (tmp_path / "1.json").read_bytes() == (tmp_path / "2.json").read_bytes()


def test_large_files_are_streamed_and_a_cut_stream_is_begun_anew(server, tree, tmp_path, monkeypatch):
    monkeypatch.setattr(source_module, "STREAMED_BYTES", 10)
    with proxy(server, lambda method, path, times: "cut" if times == 1 else None) as between:
        source = source_module.Source(f"s3://{BUCKET}", s3(between.url)["options"], workers=2, retries=2)
        name = f"{NUC}/s0/0/0/0"
        source.copy(name, tmp_path / "chunk", (tree / name).stat().st_size)
        assert between.asked["GET", f"/{BUCKET}/{name}"] == 2
    assert (tmp_path / "chunk").read_bytes() == (tree / name).read_bytes()
    assert files_of(tmp_path) == [tmp_path / "chunk"]
    with pytest.raises(source_module.TransferError, match="bytes came, 1 were announced"):
        source_module.Source(str(tree), {}, workers=1, retries=1).copy(name, tmp_path / "other", 1)
    assert not (tmp_path / "other").exists()


def test_a_killed_fetch_goes_on_where_it_was(server, tree, table, tmp_path):
    asked = settings(table, tmp_path / "data", **s3("URL"), workers=2)

    def fault(method, path, times):
        if len(between.copied()) == 25:
            between.open.clear()

    with proxy(server, fault) as between:
        asked["options"]["endpoint_url"] = between.url
        code = "import json,sys; from cellmap_pipe.fetch import fetch; fetch(sys.argv[1], **json.loads(sys.argv[2]))"
        job = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "fetch.json"), json.dumps(asked)])
        deadline = time.monotonic() + 60
        while between.open.is_set() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        job.send_signal(signal.SIGKILL)
        job.wait()
        between.fault = lambda method, path, times: None
        between.open.set()
        before = {path: path.stat().st_mtime_ns for path in files_of(tmp_path / "data") if path.name.isdigit()}
        assert 10 < len(before) <= 25
        between.asked.clear()
        fetch(tmp_path / "fetch.json", **asked)
        again = between.copied()
    assert {path: path.stat().st_mtime_ns for path in before} == before
    here = {f"/{BUCKET}/{path.relative_to(tmp_path / 'data')}" for path in before}
    assert again
    assert not here.intersection(again)
    assert_same_files(tmp_path / "data", tree)


def test_what_a_killed_fetch_left_is_removed_but_not_what_another_one_writes(tree, one, tmp_path):
    folder = tmp_path / "data" / NUC / "s0/0/0"
    folder.mkdir(parents=True)
    old, young = folder / ".partial-1-0", folder / ".partial-2-1"
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    fetch(tmp_path / "fetch.json", **settings(one, tmp_path / "data", source=str(tree)))
    assert not old.exists()
    assert young.exists()


def test_two_fetches_into_one_root_do_not_disturb_each_other(server, tree, table, tmp_path):
    asked = settings(table, tmp_path / "data", **s3(server))
    code = "import json,sys; from cellmap_pipe.fetch import fetch; fetch(sys.argv[1], **json.loads(sys.argv[2]))"
    jobs = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path / f"{i}.json"), json.dumps(asked)]) for i in range(2)
    ]
    assert [job.wait(120) for job in jobs] == [0, 0]
    assert_same_files(tmp_path / "data", tree)
    assert verify_fetch(tmp_path / "data") == []


def test_a_label_array_that_can_be_opened_is_whole(server, one, tmp_path):
    with (
        proxy(server, lambda method, path, times: 500 if "crop1/nuc/s0/1/1/1" in path else None) as between,
        pytest.raises(DataError, match=r"jrc_a/crop1: .*nuc/s0: 1 of 7 chunks were not copied, first 1/1/1"),
    ):
        fetch(tmp_path / "fetch.json", **settings(one, tmp_path / "data", **s3(between.url), retries=1))
    assert (tmp_path / "data" / NUC / "s0/0/0/0").is_file()
    assert not (tmp_path / "data" / NUC / "s0/.zarray").exists()


def test_one_crop_that_fails_does_not_stop_the_others(server, tree, table, tmp_path):
    def fault(method, path, times):
        return 500 if f"jrc_a.zarr/{LABELS}/crop2/mito/s0" in path and method == "GET" else None

    with proxy(server, fault) as between:
        asked = settings(table, tmp_path / "data", **s3(between.url), retries=1)
        with pytest.raises(DataError, match=r"^1 of 3 crops and volumes are incomplete: jrc_a/crop2: .*fetch again"):
            fetch(tmp_path / "fetch.json", **asked)
        record = json.loads((tmp_path / "fetch.json").read_text())
        assert [name for name, entry in record["crops"].items() if entry["problems"]] == ["jrc_a/crop2"]
        assert any("crop2" in line for line in verify_fetch(tmp_path / "data"))
        between.fault = lambda method, path, times: None
        between.asked.clear()
        fetch(tmp_path / "fetch.json", **asked)
        assert between.copied()
        assert all("crop2/mito" in path for path in between.copied())
    assert_same_files(tmp_path / "data", tree)
    assert verify_fetch(tmp_path / "data") == []


def test_a_chunk_that_vanished_here_is_named_and_fetched_again(tree, table, tmp_path):
    asked = settings(table, tmp_path / "data", source=str(tree))
    fetch(tmp_path / "fetch.json", **asked)
    chunk = tmp_path / "data" / NUC / "s0/1/0/1"
    chunk.unlink()
    (tmp_path / "data" / NUC / "s0/1/1/1").write_bytes(b"cut")
    assert verify_fetch(tmp_path / "data") == [f"jrc_a/crop1: {NUC}/s0: 2 of 7 chunks are missing here, first 1/0/1"]
    fetch(tmp_path / "fetch.json", **asked)
    assert chunk.is_file()
    assert verify_fetch(tmp_path / "data") == []


def test_the_plan_counts_the_bytes_and_writes_nothing(server, tree, table, tmp_path):
    rows = plan_fetch(**settings(table, tmp_path / "data", **s3(server)))
    assert not (tmp_path / "data").exists()
    assert sum(row["files"] for row in rows) == len(wanted_files(tree))
    total = sum((tree / name).stat().st_size for name in wanted_files(tree))
    assert sum(row["bytes"] for row in rows) == total
    assert sum(row["bytes_here"] for row in rows) == 0
    asked = settings(table, tmp_path / "data", source=str(tree))
    fetch(tmp_path / "fetch.json", **asked)
    text = write_plan(tmp_path / "plan.csv", **asked)
    assert text == plan_table(plan_fetch(**asked))
    assert text.splitlines()[-1].split()[:3] == ["total", "3", str(len(wanted_files(tree)))]
    assert text.splitlines()[-1].endswith("0 B")
    assert (
        (tmp_path / "plan.csv")
        .read_text()
        .startswith("dataset,crop,kind,arrays,files,bytes,bytes_here,problem,warning\n")
    )


def test_a_manifest_that_says_something_else_is_named(tree, table, tmp_path):
    wrong = tmp_path / "wrong.csv"
    lines = table.read_text().splitlines()
    lines[1] = lines[1].replace("[4.0;4.0;4.0]", "[8.0;8.0;8.0]")
    lines[2] = lines[2].replace("[74;26;26]", "[70;26;26]").replace("[16;16;16]", "[16;16;15]")
    lines.append("1,jrc_a,pm,[4;4;4],[74;26;26],[16;16;16]")
    lines.append("9,jrc_a,nuc,[4;4;4],[74;26;26],[16;16;16]")
    wrong.write_text("\n".join(lines))
    with pytest.raises(DataError, match="2 of 4 crops"):
        fetch(tmp_path / "fetch.json", **settings(wrong, tmp_path / "data", source=str(tree)))
    crops = json.loads((tmp_path / "fetch.json").read_text())["crops"]
    problems = " ".join(crops["jrc_a/crop1"]["problems"])
    assert "nuc: voxel size [4.0, 4.0, 4.0] nm at the source, [8.0, 8.0, 8.0] in the table" in problems
    assert "mito: translation [74.0, 26.0, 26.0] nm at the source, [70.0, 26.0, 26.0] in the table" in problems
    assert "mito: shape [16, 16, 16] at the source, [16, 16, 15] in the table" in problems
    assert crops["jrc_a/crop1"]["warnings"] == ["in the table, but without an array at the source: pm"]
    assert "crop9: no class array is there" in crops["jrc_a/crop9"]["problems"][0]


def test_a_fetched_crop_converts_as_the_source_does(server, tree, table, tmp_path):
    fetch(tmp_path / "fetch.json", **settings(table, tmp_path / "data", **s3(server)))
    results = {}
    for name, root in (("source", tree), ("fetched", tmp_path / "data")):
        out = tmp_path / name
        data = {"root": str(root), "labels_path": LABELS, "em_path": EM, "crops": None}
        write_crops(data, out / "crops.csv")
        convert_shard(
            out / "crops.csv",
            out / "shard.json",
            data_root=root,
            shard=0,
            shards=1,
            grid_name="8nm",
            voxel_nm=[8, 8, 8],
            classes=["nuc", "mito"],
            labels={"empty": "absent"},
            max_upsample=4,
            nifti_dir=out / "nifti",
            workers=1,
        )
        records = json.loads((out / "shard.json").read_text())["records"]
        assert [record["cause"] for record in records] == [""] * 3
        results[name] = {record["crop"]: bulk_paths(out / "nifti", record["crop"]) for record in records}
    for crop, paths in results["source"].items():
        for kind in ("image", "label"):
            assert np.array_equal(read_nifti(paths[kind]), read_nifti(results["fetched"][crop][kind])), crop


def test_volumes_are_fetched_as_em_of_the_nearest_grid_alone(tree, tmp_path):
    volumes = tmp_path / "volumes.csv"
    place = "[16;16;16],[40;40;40],[4;4;4]"
    volumes.write_text(
        "crop_name,dataset,class_label,voxel_size,translation,shape\n"
        f"7,jrc_a,nuc,{place}\n7,jrc_a,mito,{place}\nwhole,jrc_b,,,,\n"
    )
    grids = {"8nm": [8, 8, 8], "16nm": [16, 16, 16]}
    asked = settings(None, tmp_path / "data", source=str(tree), crops=None, volumes=str(volumes), grids=grids)
    record = fetch(tmp_path / "fetch.json", **{**asked, "context_nm": dict.fromkeys(grids, 0)})
    assert record["crops"] == {}
    folder = tmp_path / "data" / "jrc_a/jrc_a.zarr" / EM
    assert [path.name for path in sorted(folder.iterdir())] == [".zattrs", ".zgroup", "s0", "s1", "s2"]
    assert [path.name for path in sorted((folder / "s0").iterdir())] == [".zarray", ".zattrs"]
    assert (folder / "s1/0/0/0").is_file()  # 32..96 nm of chunks of 128 nm
    assert not (folder / "s1/1").exists()
    whole = tmp_path / "data" / "jrc_b/jrc_b.zarr" / EM / "s0"
    assert len(files_of(whole)) == 6 * 2 * 2 + 1


def test_sharded_arrays_come_shard_by_shard(tmp_path, ngff):
    top = tmp_path / "source/jrc_c/jrc_c.zarr"
    ngff(top / LABELS / "crop1/nuc", np.ones((8, 8, 8), np.uint8), [8] * 3, [4] * 3, zarr_format=3)
    ngff(top / EM, np.ones((8, 8, 8), np.uint8), [8] * 3, [4] * 3, zarr_format=3)
    shutil.rmtree(top / EM / "s0")
    array = zarr.create_array(
        str(top / EM / "s0"), shape=(64, 64, 64), chunks=(8, 8, 8), shards=(32, 32, 32), dtype="uint8", fill_value=0
    )
    array[:32] = 7
    (tmp_path / "crops.csv").write_text("crop\njrc_c/crop1\n")
    asked = settings(tmp_path / "crops.csv", tmp_path / "data", source=f"file://{tmp_path / 'source'}")
    record = fetch(tmp_path / "fetch.json", **{**asked, "context_nm": {"8nm": 100}})
    folder = tmp_path / "data/jrc_c/jrc_c.zarr" / EM / "s0"
    assert len([path for path in files_of(folder) if path.name != "zarr.json"]) == 1
    assert record["crops"]["jrc_c/crop1"]["absent_chunks"] == 0
    assert (zarr.open_array(folder, mode="r")[:32, :32, :32] == 7).all()


def test_any_file_system_of_fsspec_serves(tree, table, tmp_path):
    memory = fsspec.filesystem("memory")
    memory.pipe({f"/cells/{path.relative_to(tree)}": path.read_bytes() for path in files_of(tree)})
    try:
        fetch(tmp_path / "fetch.json", **settings(table, tmp_path / "data", source="memory://cells"))
    finally:
        memory.rm("/cells", recursive=True)
    assert_same_files(tmp_path / "data", tree)
    assert verify_fetch(tmp_path / "data") == []


def test_a_web_server_that_lists_nothing_serves_and_its_failures_are_not_taken_for_holes(tree, one, tmp_path):
    class Plain(SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(tree))

        def list_directory(self, path):
            self.send_error(403)

        def log_message(self, *args):
            pass

    behind = ThreadingHTTPServer(("127.0.0.1", 0), Plain)
    threading.Thread(target=behind.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def fault(method, path, times):
        return 500 if times == 1 and "/s0/" in path else None

    with proxy(f"http://127.0.0.1:{behind.server_address[1]}", fault) as between:
        record = fetch(tmp_path / "fetch.json", **settings(one, tmp_path / "data", source=between.url))
        (tmp_path / "bare.csv").write_text("crop\njrc_a/crop1\n")
        asked = settings(tmp_path / "bare.csv", tmp_path / "bare", source=between.url, classes=["pm", "mito", "nuc"])
        bare = fetch(tmp_path / "fetch.json", **asked)["crops"]["jrc_a/crop1"]
    behind.shutdown()
    behind.server_close()
    assert record["crops"]["jrc_a/crop1"]["absent_chunks"] == 1
    assert_same_files(tmp_path / "data", tree)
    assert (tmp_path / "data" / f"{NUC}_mask/s0/.zarray").is_file()
    assert bare["classes"] == 2
    assert bare["warnings"] == []


def test_other_bytes_of_the_same_size_are_noticed_with_recheck(server, tree, one, tmp_path):
    asked = settings(one, tmp_path / "data", source=str(tree))
    fetch(tmp_path / "fetch.json", **asked)
    chunk = tmp_path / "data" / NUC / "s0/0/0/0"
    chunk.write_bytes(bytes(len(chunk.read_bytes())))
    fetch(tmp_path / "fetch.json", **asked)
    assert not any(chunk.read_bytes())
    with proxy(server) as between:
        fetch(tmp_path / "fetch.json", recheck=True, **settings(one, tmp_path / "data", **s3(between.url)))
        assert between.copied() == [f"/{BUCKET}/{NUC}/s0/0/0/0"]
    assert_same_files(tmp_path / "data", tree)


def test_another_version_of_an_array_is_not_mixed_with_the_one_here(tree, table, tmp_path, ngff):
    asked = settings(table, tmp_path / "data", source=str(tree))
    ngff(tmp_path / "data" / NUC, np.zeros((16, 16, 16), np.uint8), [4] * 3, [74, 26, 26], chunks=(16, 16, 16))
    with pytest.raises(DataError, match=r"nuc/s0/.zarray: chunks at the source differ .*delete its folder"):
        fetch(tmp_path / "fetch.json", **asked)


def test_a_chunk_that_only_this_side_has_is_named(tree, table, tmp_path):
    asked = settings(table, tmp_path / "data", source=str(tree))
    (tmp_path / "data" / HOLE).parent.mkdir(parents=True)
    (tmp_path / "data" / HOLE).write_bytes(b"old")
    with pytest.raises(DataError, match="1 chunks are here that the source does not have, first 0/0/1"):
        fetch(tmp_path / "fetch.json", **asked)


def test_a_level_outside_its_image_is_refused(tree, table, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(tree, source)
    attributes = source / NUC / ".zattrs"
    attributes.write_text(attributes.read_text().replace('"path": "s0"', '"path": "../../../evil"'))
    with pytest.raises(DataError, match="does not lie in the image"):
        fetch(tmp_path / "fetch.json", **settings(table, tmp_path / "data", source=str(source)))


def test_a_full_disk_stops_everything_at_once(tree, table, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(source_module.os, "replace", full)
    with pytest.raises(DataError, match=r"data: cannot be written \(No space left on device\); free space there"):
        fetch(tmp_path / "fetch.json", **settings(table, tmp_path / "data", source=str(tree)))
    assert not (tmp_path / "fetch.json").exists()


def test_a_source_that_does_not_answer_is_said_so_at_once(table, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(ConfigError, match=r"check the address, fetch\.options and the network"):
        plan_fetch(**settings(table, tmp_path / "data", **s3(url), retries=1))
    with pytest.raises(ConfigError, match=r"fetch.source nonsense://x"):
        plan_fetch(**settings(table, tmp_path / "data", source="nonsense://x"))


def test_a_source_without_any_of_the_datasets_is_said_so_at_once(server, table, tmp_path):
    for source in (str(tmp_path / "nowhere"), str(tmp_path)):
        with pytest.raises(ConfigError, match=r"has none of the datasets jrc_a, jrc_b \(looked for jrc_a/jrc_a.zarr\)"):
            plan_fetch(**settings(table, tmp_path / "data", source=source))
    wrong = {**s3(server), "source": "s3://no-such-bucket"}
    with pytest.raises(ConfigError, match=r"fetch\.source s3://no-such-bucket: has none of the datasets"):
        plan_fetch(**settings(table, tmp_path / "data", **wrong))


def test_a_root_that_cannot_be_written_is_said_so_before_the_source_is_asked(table, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"data\.root .*file: cannot be written"):
        fetch(tmp_path / "fetch.json", **settings(table, tmp_path / "file", source="s3://never-asked"))


def test_links_at_the_source_are_followed_and_a_broken_one_is_not_taken_for_a_hole(tree, one, tmp_path):
    source, slab = tmp_path / "source", f"jrc_a/jrc_a.zarr/{EM}/s0/1"
    shutil.copytree(tree, source)
    for name in (f"{NUC}/s0/1/0/0", NUC, slab):
        away = tmp_path / name.replace("/", "-")
        shutil.move(source / name, away)
        (source / name).symlink_to(away)
    asked = settings(one, tmp_path / "data", source=str(source))
    record = fetch(tmp_path / "fetch.json", **asked)
    assert record["crops"]["jrc_a/crop1"]["absent_chunks"] == 1
    for name in (f"{NUC}/s0/1/0/0", f"{slab}/0/0"):
        assert (tmp_path / "data" / name).read_bytes() == (tree / name).read_bytes()
    (tmp_path / f"{NUC}/s0/1/0/0".replace("/", "-")).unlink()
    with pytest.raises(DataError, match="1/0/0 is a link to nothing"):
        fetch(tmp_path / "fetch.json", **asked)


def test_a_folder_that_cannot_be_listed_is_not_taken_for_an_empty_one(tree, one, tmp_path, monkeypatch):
    ordinary = LocalFileSystem.ls

    def refusing(self, path, **options):
        if path.endswith(f"{NUC}/s0/1"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return ordinary(self, path, **options)

    monkeypatch.setattr(LocalFileSystem, "ls", refusing)
    with pytest.raises(DataError, match="Permission denied"):
        fetch(tmp_path / "fetch.json", **settings(one, tmp_path / "data", source=str(tree)))
    assert not (tmp_path / "data" / NUC / "s0/.zarray").exists()


@pytest.mark.parametrize("dataset", ["jrc_a", "jrc_b"])
def test_a_part_of_a_large_array_is_found_without_listing_the_whole(server, tree, tmp_path, monkeypatch, dataset):
    monkeypatch.setattr(arrays_module, "_SMALL", 0)
    path = f"{dataset}/{dataset}.zarr/{EM}/s0"
    region = arrays_module.region_of(tree / path, path, (16, 0, 0), (32, 16, 16))
    for url, options in ((str(tree), {}), (f"s3://{BUCKET}", s3(server)["options"])):
        source = source_module.Source(url, options, workers=4, retries=1)
        monkeypatch.setattr(source, "_walked", None)
        monkeypatch.setattr(source._fs, "find", None)
        with ThreadPoolExecutor(4) as pool:
            chunks, _ = arrays_module.chunks_at_source(source, region, pool)
        names = region.keys()
        assert chunks.sizes.tolist() == [(tree / path / name).stat().st_size for name in names]
        assert chunks.files == region.count < 24


def test_the_budget_of_a_crop_does_not_depend_on_the_context_that_is_fetched(tree, one, tmp_path):
    # 8 x 8 x 8 voxels, and 2 more on each side: 2 * 12 ** 3 bytes with the context of the training store
    asked = settings(one, tmp_path / "data", source=str(tree), max_train_gb=3.5e-6)
    rows = plan_fetch(**{**asked, "context_nm": {"8nm": 1000}})
    assert [row["arrays"] for row in rows] == [3, 1]
    rows = plan_fetch(**{**asked, "train_context_nm": {"8nm": 1000}, "context_nm": {"8nm": 0}})
    assert [row["arrays"] for row in rows] == [3, 0]
    assert "no EM for grid 8nm: image and labels of 8x8x8 voxels" in rows[1]["warning"]
    assert plan_table(rows).startswith("warning: jrc_a/crop1: no EM for grid 8nm")


def test_em_that_the_source_does_not_have_is_warned_of(tree, one, tmp_path, caplog):
    source = tmp_path / "source"
    shutil.copytree(tree, source)
    for key in "0123456":
        shutil.rmtree(source / "jrc_a/jrc_a.zarr" / EM / "s0" / key, ignore_errors=True)
    record = fetch(tmp_path / "fetch.json", **settings(one, tmp_path / "data", source=str(source)))
    warnings = record["crops"]["jrc_a/crop1"]["warnings"]
    assert f"jrc_a/crop1: {warnings[0]}" in caplog.messages
    assert len(warnings) == 1
    assert warnings[0].endswith(f"{EM}/s0: none of the 12 chunks there is at the source")


def test_a_level_that_only_the_metadata_have_is_warned_of(tree, one, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(tree, source)
    shutil.rmtree(source / "jrc_a/jrc_a.zarr" / EM / "s0")
    record = fetch(tmp_path / "fetch.json", **settings(one, tmp_path / "data", source=str(source)))
    warning = f"jrc_a/jrc_a.zarr/{EM}: names level s0, which is not at the source"
    assert record["crops"]["jrc_a/crop1"]["warnings"] == [warning]


def test_a_class_array_that_cannot_be_understood_is_one_problem(tree, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(tree, source)
    shutil.rmtree(source / NUC / "s0")
    shutil.rmtree(source / NUC / "s1")
    shutil.rmtree(source / NUC.replace("nuc", "mito"))
    (tmp_path / "crops.csv").write_text("crop\njrc_a/crop1\n")
    rows = plan_fetch(**settings(tmp_path / "crops.csv", tmp_path / "data", source=str(source)))
    assert [row["problem"] for row in rows] == [f"{source}/{NUC}: none of its levels (s0, s1) is at the source", ""]


def test_what_was_fetched_has_another_digest_whenever_a_file_was_copied(server, one, tmp_path):
    root = tmp_path / "data"
    asked = settings(one, root, **s3(server))
    assert fetch_digest(root) == ""
    fetch(tmp_path / "fetch.json", **asked)
    seen = [fetch_digest(root)]
    chunk = root / NUC / "s0/0/0/0"
    content = chunk.read_bytes()
    chunk.unlink()
    fetch(tmp_path / "fetch.json", **asked)
    seen.append(fetch_digest(root))
    chunk.write_bytes(bytes(len(content)))
    fetch(tmp_path / "fetch.json", recheck=True, **asked)
    seen.append(fetch_digest(root))
    fetch(tmp_path / "fetch.json", recheck=True, **asked)
    assert chunk.read_bytes() == content
    assert len(set(seen)) == 3
    assert fetch_digest(root) == seen[-1]


def test_an_interrupted_fetch_does_not_go_on_trying(server, one, tmp_path, monkeypatch):
    monkeypatch.setattr(source_module, "FIRST_PAUSE_S", 60.0)
    source = source_module.Source(
        f"s3://{BUCKET}", {"anon": True, "endpoint_url": "http://127.0.0.1:9"}, workers=1, retries=5
    )
    threading.Timer(0.3, source.stop).start()
    began = time.monotonic()
    with pytest.raises(source_module.TransferError):
        source.read("x")
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("crop_name,dataset\nnonsense/..,jrc_a\n", "line 2: .*names no crop"),
        ("crop_name,dataset,class_label\n1,jrc_a,nucc\n", "line 2: .*nucc"),
        ("crop_name,dataset,voxel_size,translation,shape\n1,jrc_a,[4;4],[0;0;0],[1;1;1]\n", "line 2: expected three"),
        ("crop_name,dataset,voxel_size,translation,shape\n1,jrc_a,[4;4;a],[0;0;0],[1;1;1]\n", "written \\[z;y;x\\]"),
        ("crop\n", "lists nothing"),
        ("crop_name;dataset\n1;jrc_a\n", "has columns crop_name;dataset; .* with commas between"),
    ],
)
def test_a_table_that_cannot_be_used_is_named_with_its_line(text, message, tree, tmp_path):
    (tmp_path / "crops.csv").write_text(text)
    with pytest.raises(ConfigError, match=message):
        plan_fetch(**settings(tmp_path / "crops.csv", tmp_path / "data", source=str(tree)))


@pytest.mark.skipif(not MANIFESTS.is_dir(), reason=f"{MANIFESTS} is not there")
def test_the_challenges_own_tables_are_understood():
    crops = read_wanted(MANIFESTS / "train_crop_manifest.csv", is_volume=False)
    assert len(crops) == 289
    assert sum(len(crop.listed) for crop in crops) == 11786
    volumes = {each.name: each.box for each in read_wanted(MANIFESTS / "test_crop_manifest.csv", is_volume=True)}
    assert len(volumes) == 16
    assert volumes["jrc_zf-cardiac-1/crop983"].voxel_nm == (32, 32, 32)
    assert volumes["jrc_zf-cardiac-1/crop983"].shape == (1000, 1000, 1000)
    some = read_wanted(MANIFESTS / "train_crop_manifest.csv", is_volume=False, classes=["nuc", "ld"])
    assert {name for crop in some for name in crop.listed} == {"nuc", "ld"}


def test_the_command_plans_and_fetches(tree, table, tmp_path, capsys):
    arguments = ["fetch", "--crops", str(table), "--root", str(tmp_path / "data"), "--source", str(tree)]
    arguments += ["--grid", "8", "8", "8", "--context-nm", "16"]
    assert main([*arguments, "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("total")
    assert not (tmp_path / "data").exists()
    assert main([*arguments, "--out", str(tmp_path / "fetch.json")]) == 0
    assert "3 crops and volumes" in capsys.readouterr().out
    assert_same_files(tmp_path / "data", tree)


def test_the_configuration_imports_no_file_system():
    code = (
        "import sys, cellmap_pipe.config, cellmap_pipe.cli; print([m for m in ('fsspec', 's3fs') if m in sys.modules])"
    )
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    assert subprocess.check_output([sys.executable, "-c", code], text=True, env=environment).strip() == "[]"
