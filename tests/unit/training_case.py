"""A tiny training: a store of three crops on disk, a datalist, and the request that trains on them."""

import faulthandler
import multiprocessing
import os
import re
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np

from cellmap_pipe.files import canonical_json, describe_file, write_json, write_text
from cellmap_pipe.prepare.chunks import sample_positions, store_stem
from cellmap_pipe.prepare.labels import UNKNOWN
from cellmap_pipe.prepare.layout import MAPPED, write_array, write_volume
from cellmap_pipe.prepare.state_table import count_states, encode_table
from cellmap_pipe.prepare.store import FORMAT_VERSION, pack_index

CLASSES = ["ecs", "mito_mem", "nuc"]

SETTINGS: dict[str, Any] = {
    "network": "SegResNetDS",
    "arguments": {"init_filters": 8, "blocks_down": [1, 1, 1]},
    "spatial_dims": 3,
    "grid": "8nm",
    "classes": CLASSES,
    "revision": 0,
    "patch": [16, 16, 16],
    "batch": 2,
    "accumulate": 1,
    "optimizer": "adamw",
    "lr": 3e-3,
    "weight_decay": 1e-5,
    "momentum": 0.9,
    "schedule": "cosine",
    "warmup": 0.1,
    "max_steps": 12,
    "steps_per_epoch": 4,
    "validate_every": 1,
    "patience": None,
    "smoothing": 0.0,
    "clip": 1.0,
    "loss": "dice_bce",
    "loss_options": {},
    "groups": [],
    "class_weights": "none",
    "deep_supervision": [1, 0.5, 0.25],
    "ema": True,
    "mixup": {"probability": 0.3, "alpha": 0.4},
    "normalisation": "percentile",
    "augment": {
        **dict.fromkeys(
            ("flips", "rotations", "affine", "brightness", "contrast", "gamma", "blur", "low_resolution"), True
        ),
        "noise": 0.05,
    },
    "planes": "all",
    "class_power": -0.5,
    "centred_fraction": 0.5,
    "seed": 0,
    "amp": "bf16",
    "compile": False,
    "channels_last": False,
    "checkpoint_minutes": 0.0001,
    "keep_every": None,
    "stop_minutes": 5,
    "on_damage": "stop",
    "init_from": None,
    "mlflow": None,
}


def table(unknown: tuple[int, ...] = ()) -> np.ndarray:
    """Return a state table, uint8 (256, 3): row 0 nothing, row k class k; the classes `unknown` are not annotated."""
    states = np.full((256, len(CLASSES)), UNKNOWN, np.uint8)
    states[: len(CLASSES) + 1] = 0
    states[np.arange(1, len(CLASSES) + 1), np.arange(len(CLASSES))] = 1
    for column in unknown:
        states[: len(CLASSES) + 1, column] = UNKNOWN
    return states


def crop_volume(shape: tuple[int, int, int], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return EM and label map of a ball (nuc) in a shell (mito_mem) in a slab, with ecs on one side."""
    z, y, x = np.indices(shape)
    radius = np.sqrt((z - shape[0] / 2) ** 2 + (y - shape[1] / 2) ** 2 + (x - shape[2] / 2) ** 2)
    label = np.zeros(shape, np.uint8)
    label[x < shape[2] // 5] = 1
    label[(radius < 9) & (radius >= 6)] = 2
    label[radius < 6] = 3
    noise = np.random.default_rng(seed).normal(0, 12, shape)
    image = np.clip(np.array([110, 200, 60, 150])[label] + noise, 0, 255).astype(np.uint8)
    return image, label


def write_store(root: Path, *, crops: int = 3, layout: str = MAPPED) -> Path:
    """Write a store of `crops` crops of two datasets under `root` and return its index."""
    folder = root / "store"
    folder.mkdir(parents=True)
    records = []
    for number in range(crops):
        shape, margin = (30 + 2 * number, 32, 28), 4
        image, label = crop_volume(shape, number)
        states = table(unknown=(2,) if number == 1 else ())
        label[:margin] = 255  # EM context
        crop = f"set-{number % 2}/crop{number}"
        paths = {kind: folder / f"{store_stem(crop)}_{kind}.npy" for kind in ("image", "label", "positions")}
        content = {
            kind: write_volume(layout, paths[kind], volume.dtype, shape, [volume], block=16)
            for kind, volume in (("image", image), ("label", label))
        }
        write_array(paths["positions"], sample_positions(label, states, seed=number, per_class=200, known=400))
        files = {kind: describe_file(path, folder) for kind, path in paths.items()}
        records.append(
            {
                "crop": crop,
                "dataset": f"set-{number % 2}",
                "lattice": {"voxel_nm": [8, 8, 8], "translation_nm": [0, 0, 0], "shape": list(shape)},
                "label_offset": [margin, 0, 0],
                "label_shape": [shape[0] - margin, *shape[1:]],
                "table": encode_table(states, range(len(CLASSES) + 1)),
                "classes": CLASSES,
                "counts": count_states(label[margin:], states, CLASSES),
                "annotated": [name for name in CLASSES if not (number == 1 and name == "nuc")],
                "layout": layout,
                "files": files,
                "content": {**content, "positions": files["positions"]["sha256"]},
                "input_digest": str(number),
            }
        )
    index = {
        "format_version": FORMAT_VERSION,
        "grid": "8nm",
        "voxel_nm": [8, 8, 8],
        "classes": CLASSES,
        "store_dir": "store",
        "ranges": {
            "set-0": {"percentile": [40, 220], "range": [0, 255]},
            "set-1": {"percentile": [30, 230], "range": [0, 255]},
        },
    }
    write_text(root / "index.json", canonical_json(pack_index(index, records)))
    return root / "index.json"


def write_request(root: Path, name: str = "run", **settings: Any) -> dict[str, Any]:
    """Return a request that trains on the first two crops of the store at `root` and validates on the third."""
    index = root / "index.json"
    if not index.exists():
        write_store(root)
    datalist = root / "fold0.json"
    write_json(
        datalist,
        {
            "training": [{"crop": "set-0/crop0"}, {"crop": "set-1/crop1"}],
            "validation": [{"crop": "set-0/crop2"}],
        },
    )
    outputs = {"weights": "model.pt", "metrics": "metrics.json", "history": "history.csv"}
    return {
        "rule": "train",
        "model": "tiny",
        "fold": "0",
        "settings": {**SETTINGS, **settings},
        "datalist": str(datalist),
        "index": str(index),
        "run_dir": str(root / "runs" / name),
        "outputs": {kind: str(root / "results" / name / file) for kind, file in outputs.items()},
        "device": "cpu",
        "log": str(root / f"{name}.log"),
        "threads": 1,
    }


# Longer than any of these processes takes, on a loaded machine too.
PATIENCE = 240


def in_process(function: Callable[..., None], *arguments: Any) -> BaseProcess:
    """Call `function` in a process of its own that has torch and MONAI imported already."""
    context = multiprocessing.get_context("forkserver")
    # the optimisers import dynamo at their first step, which takes seconds
    context.set_forkserver_preload(["cellmap_pipe.training.main", "torch._dynamo"])
    process = context.Process(target=_and_leave, args=(function, *arguments))
    process.start()
    return process


def _and_leave(function: Callable[..., None], *arguments: Any) -> None:
    """Call the function and leave the process, as a training does: its own tear-down can wait for ever."""
    faulthandler.dump_traceback_later(PATIENCE, exit=True)
    status = 0
    try:
        function(*arguments)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def in_ranks(world: int, function: Callable[..., None], *arguments: Any) -> list[BaseProcess]:
    """Call function(environment, *arguments) in the processes that torchrun would start."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        in_process(function, {"RANK": str(rank), "LOCAL_RANK": str(rank), **shared}, *arguments)
        for rank in range(world)
    ]


def start(request: dict[str, Any], hold: int | None = None) -> BaseProcess:
    """Start a training as the workflow does.

    hold: it makes no further step after this one until it is asked to stop: it cannot end before a test's signal.
    """
    return in_process(_train, {}, write_request_file(request), hold)


def start_ranks(request: dict[str, Any], world: int, hold: int | None = None) -> list[BaseProcess]:
    """Start a training of several processes. hold: see `start`, of the last of them; the others wait for it."""
    return in_ranks(world, _train, write_request_file(request), hold)


def start_dying(request: dict[str, Any], world: int, step: int, size: int) -> list[BaseProcess]:
    """Start a training whose first rank dies by SIGKILL in the checkpoint of `step` or later, `size` bytes into it."""
    arguments = (write_request_file(request), step, size)
    return [in_process(_train_and_die, {}, *arguments)] if world == 1 else in_ranks(world, _train_and_die, *arguments)


def finish(*processes: BaseProcess) -> list[int | None]:
    """Wait for the processes and return their exit codes."""
    for process in processes:
        process.join(PATIENCE + 20)  # it ends by itself before, with its stack as last words
    return [process.exitcode for process in processes]


def flattened(value: Any) -> Iterator[Any]:
    """Yield all that a checkpoint holds, tensors as bytes."""
    if isinstance(value, dict):
        for key in value:
            yield key
            yield from flattened(value[key])
    elif isinstance(value, list):
        for item in value:
            yield from flattened(item)
    else:
        yield value.numpy().tobytes() if hasattr(value, "numpy") else value


def write_request_file(request: dict[str, Any]) -> str:
    path = Path(request["run_dir"] + ".request.json")
    write_json(path, request)
    return str(path)


def wait_for_step(request: dict[str, Any], step: int, process: BaseProcess) -> None:
    """Return as soon as the run directory holds a checkpoint of `step` or later."""
    run_dir = Path(request["run_dir"])
    while process.is_alive():
        if any(int(path.name[4:13]) >= step for path in run_dir.glob("step*.pt")):
            return
        time.sleep(0.002)
    raise AssertionError(Path(request["log"]).read_text())


def _train(environment: dict[str, str], request_path: str, hold: int | None = None) -> None:
    from cellmap_pipe.training import loop
    from cellmap_pipe.training.main import main

    os.environ.update(environment)
    make_step = loop.Training._step

    def make_step_or_wait(self: Any, *arguments: Any) -> None:
        while self.progress.step == hold and self.process.stop_requested.signal is None:
            time.sleep(0.002)
        make_step(self, *arguments)

    if hold is not None and int(environment.get("RANK", 0)) == int(environment.get("WORLD_SIZE", 1)) - 1:
        loop.Training._step = make_step_or_wait  # type: ignore[method-assign]
    main(request_path)


def _train_and_die(environment: dict[str, str], request_path: str, step: int, size: int) -> None:
    from cellmap_pipe.training import checkpoint

    write = checkpoint._Digested.write

    def write_or_die(self: Any, data: Any) -> int:
        found = re.search(r"-step(\d+)\.pt$", str(self.stream.name))
        if found and int(found[1]) >= step and self.stream.tell() >= size:
            self.stream.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return write(self, data)

    checkpoint._Digested.write = write_or_die  # type: ignore[method-assign]
    _train(environment, request_path)
