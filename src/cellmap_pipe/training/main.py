"""One training process: `python -m cellmap_pipe.training.main REQUEST.json`, alone or as one of several under torchrun.

The request says what to train, from what and whereto; see `training.launch`. Log records, warnings and whatever
libraries print go to the request's log file, whose last line after a failure is
`ERROR train model=..,fold=..: what, where, remedy`. The run directory keeps the records of all attempts.
"""

import contextlib
import datetime
import logging
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from cellmap_pipe.cluster import slurm
from cellmap_pipe.errors import ConfigError, ContractError, TrainingError
from cellmap_pipe.files import read_json, write_json
from cellmap_pipe.log import ALL_ATTEMPTS, ATTEMPT, FORMAT, also_in
from cellmap_pipe.machine import memory_limit
from cellmap_pipe.prepare.store import Store
from cellmap_pipe.training import checkpoint, results, siblings
from cellmap_pipe.training.fingerprint import FINGERPRINT, fingerprint
from cellmap_pipe.training.lease import die_with_parent
from cellmap_pipe.training.loop import Process, StopRequest, Training
from cellmap_pipe.training.owner import Owner, start_ticks
from cellmap_pipe.training.usage import CPU, UsageLog

logger = logging.getLogger("cellmap_pipe.training.main")  # it runs as __main__

# Threads of a rank that copy patches: two keep up with any network, reading ahead of a slow disk takes more.
MOST_WORKERS = 4

# Damaged crops that the line of an error names; all of them are in the log.
NAMED_FAULTS = 3


def run_training(request_path: str | Path) -> None:
    """Train what the request describes, or publish again what a finished run directory holds.

    Raises ConfigError, ContractError or TrainingError; TrainingError too when it was asked to stop before the end.
    """
    began = time.monotonic()
    die_with_parent()
    request = read_json(request_path)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    threads = int(request.get("threads", 1))
    torch.set_num_threads(threads)
    device = choose_device(request["device"], int(os.environ.get("LOCAL_RANK", "0")), world)
    if device.type == "cpu":
        _add_in_order()
    stop = StopRequest()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else CPU
    usage = UsageLog(Path(request["run_dir"]), world, name) if not rank else None
    if world > 1:
        # No farewell (destroy_process_group): after an exception it waits for ranks that still compute, and where the
        # group is freed while its threads wait for the interpreter, both wait for ever. The process just leaves.
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            # validation and the first rank's writing are waited for
            timeout=datetime.timedelta(hours=2),
        )
    over = threading.Event()
    siblings.leave_with(_processes(world), over)
    with _stop_signals(stop):
        workers, deadline = min(threads, MOST_WORKERS), _deadline(request, began)
        if deadline is not None and not rank:
            at = datetime.datetime.now() + datetime.timedelta(seconds=deadline - time.monotonic())
            logger.info("saves and stops at %s, before the walltime ends", at.isoformat(" ", timespec="seconds"))
        _train(request, Process(rank, world, device, stop, deadline, workers, usage), over)


def _processes(world: int) -> dict[int, int | None]:
    """Return the processes of this machine's ranks with their starts, see `siblings`."""
    if world == 1:
        return {}
    own = (socket.gethostname(), os.getpid(), start_ticks(os.getpid()))
    parts = [own] * world
    dist.all_gather_object(parts, own)
    return {pid: started for host, pid, started in parts if host == own[0]}


def _train(request: Mapping[str, Any], process: Process, over: threading.Event) -> None:
    """Train or publish. over: set once no rank waits for another one any more."""
    settings, run_dir = request["settings"], Path(request["run_dir"])
    if process.device.type == "cuda":
        # imported here: a CPU needs none of what it measures with
        from cellmap_pipe.training.estimate import memory_line

        logger.info("%s", memory_line(settings, process.device, process.world))
    training, validation = fold_crops(request["datalist"], request["fold"])
    damaged: dict[str, str] = {}
    store = Store(request["index"], grid=settings["grid"], damaged=damaged)
    if missing := [crop for crop in training + validation if crop not in store.crops]:
        raise ContractError(f"{request['index']}: crop {missing[0]} is not in the store; run `snakemake -R chunk`")
    expected = fingerprint(settings, store, training, validation)
    with contextlib.ExitStack() as held:
        if not process.rank:

            def stopped() -> bool:
                return process.stop_requested.signal is not None

            with Owner(run_dir, stopped=stopped):
                if reason := _outdated(run_dir, expected, retrain=request.get("retrain", False)):
                    logger.warning("%s: its training is kept as %s", reason, results.set_aside(run_dir))
            held.enter_context(Owner(run_dir, partial(_leave, request), stopped))
            held.enter_context(also_in(run_dir / ALL_ATTEMPTS))
            logger.info("%s %d on %s begins%s", ATTEMPT, os.getpid(), socket.gethostname(), _slurm_job())
            write_json(run_dir / "request.json", request)
            write_json(run_dir / FINGERPRINT, {"fingerprint": expected})
        _wait(process)
        state = checkpoint.latest(run_dir, clean=not process.rank)
        if state is None or not state["progress"]["finished"]:
            damaged = _read_through(store, training + validation, damaged, process)
            training, validation, skipped = _undamaged(training, validation, damaged, settings["on_damage"], process)
            trainer = Training(settings, store, training, validation, run_dir, expected, process, state, skipped)
            del state  # its tensors are copied by now
            trainer.run()
            state = checkpoint.latest(run_dir) if not process.rank else None
        _wait(process)
        over.set()
        if not process.rank:
            if state is None:
                raise TrainingError(f"{run_dir}: the checkpoint just written cannot be read; check the disk")
            results.publish(run_dir, state, request["outputs"], request["model"], request["fold"])
            logger.info("finished after %d steps", state["progress"]["step"])


def _add_in_order() -> None:
    """Have threads of a CPU add in a fixed order: else gradients of an indexed table are added as threads arrive.

    SwinUNETR's position biases are one, so that no run would be the bits of another.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    options: Any = torch.utils.deterministic
    options.fill_uninitialized_memory = False  # which costs time and is not needed


def _slurm_job() -> str:
    job = os.environ.get("SLURM_JOB_ID")
    return f", Slurm job {job}" if job else ""


def _leave(request: Mapping[str, Any], why: str) -> NoReturn:
    """End this process, saving nothing: what it would write is another one's by now."""
    os.write(2, f"{_error_name(request)}{why}\n".encode())
    os._exit(1)


def fold_crops(datalist: str | Path, fold: str) -> tuple[list[str], list[str]]:
    """Return the names of the training and the validation crops of a fold's datalist.

    Raises TrainingError if there are none to train on, or none to validate on in a fold other than `all`.
    """
    lists = read_json(datalist, "make it again with `snakemake -R datalist`")
    training, validation = ([entry["crop"] for entry in lists[side]] for side in ("training", "validation"))
    if not training:
        raise TrainingError(f"{datalist}: no training crop in fold {fold}; see the verdicts in results/quality")
    if not validation and str(fold) != "all":
        raise TrainingError(f"{datalist}: no validation crop in fold {fold}; choose another folds.run, or fold all")
    both = sorted(set(training) & set(validation))
    if both:
        raise TrainingError(f"{datalist}: crop {both[0]} is on both sides of fold {fold}; run `snakemake -R folds`")
    return training, validation


def _read_through(store: Store, crops: list[str], damaged: Mapping[str, str], process: Process) -> dict[str, str]:
    """Read every byte of the crops once, each rank its share, and return the damaged ones, the same on all ranks.

    The page cache then holds what fits into memory, and a damaged file is found before it is trained on. damaged: what
    this rank knows already; such crops are not read.
    """
    needed, limit = store.mapped_bytes(crops) / 1e9, memory_limit() / 1e9
    if needed > limit and not process.rank:
        logger.warning(
            "the fold's crops take %.1f GB and this job may use %.1f GB, so patches come from the disk: ask for more "
            "memory (resources.train.mem_mb), or set chunks.memory_gb to %.3g, which cuts the store into blocks",
            *(needed, limit, 0.6 * limit),
        )
    # shares by the place in the list: another rank may know other crops as damaged, where a network's disk falters
    share = [crop for crop in crops[process.rank :: process.world] if crop not in damaged]
    found = {**damaged, **store.read_through(share, process.workers)}
    if process.world > 1:
        parts: list[dict[str, str]] = [{} for _ in range(process.world)]
        dist.all_gather_object(parts, found)
        found = {crop: fault for part in parts for crop, fault in part.items()}
    return found


def _undamaged(
    training: list[str], validation: list[str], damaged: Mapping[str, str], on_damage: str, process: Process
) -> tuple[list[str], list[str], list[str]]:
    """Return the training and the validation crops without the damaged ones, and those that are left out.

    Raises ContractError naming the first faults if `on_damage` is "stop", TrainingError if nothing is left to train on,
    or nothing to validate on in a fold that has a validation: other weights would be kept than those asked for.
    """
    faults = {crop: damaged[crop] for crop in training + validation if crop in damaged}
    if not faults:
        return training, validation, []
    if not process.rank:
        what = "is damaged" if on_damage == "stop" else "is left out, train.on_damage is skip"
        for crop, fault in faults.items():
            logger.warning("crop %s %s: %s", crop, what, fault)
    if on_damage == "stop":
        more = f"; {len(faults) - NAMED_FAULTS} more are in the log" if len(faults) > NAMED_FAULTS else ""
        raise ContractError(
            f"{len(faults)} of the fold's crops are damaged in the training store: "
            f"{'; '.join([*faults.values()][:NAMED_FAULTS])}{more}. train.on_damage: skip trains without them"
        )
    whole = {"training": training, "validation": validation}
    left = {side: [crop for crop in crops if crop not in faults] for side, crops in whole.items()}
    for side, crops in whole.items():
        if crops and not left[side]:
            raise TrainingError(f"every {side} crop of the fold is damaged in the store; the first: {faults[crops[0]]}")
    return left["training"], left["validation"], sorted(faults)


def choose_device(asked: str, local_rank: int, processes: int) -> torch.device:
    """Return the device of this process: its GPU if there are any (or `cuda` is asked for), else the CPU.

    Raises TrainingError if fewer GPUs are visible than there are processes.
    """
    if asked not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device '{asked}' is unknown; allowed: auto, cpu, cuda")
    visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if asked == "cpu" or (asked == "auto" and not visible):
        return torch.device("cpu")
    if visible < processes:
        raise TrainingError(
            f"{processes} processes were asked for and {visible} GPUs are visible "
            f"(CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', 'unset')}, torch {torch.__version__}); "
            "lower resources.train.gpus, or see why torch cannot use them: a broken driver, or a torch built for CPUs"
        )
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def _outdated(run_dir: Path, expected: str, *, retrain: bool) -> str | None:
    """Return why the run directory is not to be used, or None."""
    if results.is_stale(run_dir, expected):
        return "settings, crops or code changed since it began"
    if retrain:
        state = checkpoint.latest(run_dir)
        if state is not None and state["progress"]["finished"]:
            return "retrain is set"
    return None


def _deadline(request: Mapping[str, Any], began: float) -> float | None:
    """Return when to stop, in seconds of time.monotonic(), by Slurm's end of the job or, from `began`, `runtime_min`.

    The setting `stop_minutes` before that, but no more than a tenth of the walltime before it.
    """
    end = slurm_end()
    runtime = request.get("runtime_min")
    if end is not None and end > time.time():  # it tells not of a job that was given more time
        start, left = time.monotonic(), end - time.time()
    elif runtime:
        start, left = began, 60.0 * float(runtime)
    else:
        return None
    return start + left - min(60 * request["settings"]["stop_minutes"], left / 10)


def slurm_end() -> float | None:
    """Return when Slurm ends this job, in seconds of time.time(); None if it sets no end, or is not there.

    Slurm before 23.02 has to be asked: the walltime began before this process did, and is not all left.
    """
    end, job = os.environ.get("SLURM_JOB_END_TIME", ""), os.environ.get("SLURM_JOB_ID")
    if end.isdigit():
        return float(end)
    if not job or not slurm.installed("squeue"):
        return None
    try:
        # by the local clock of this very machine, without a zone
        return datetime.datetime.fromisoformat(slurm.ask("squeue", "-h", "-j", job, "-o", "%e").strip()).timestamp()
    except (slurm.SlurmError, ValueError) as error:
        logger.warning("when Slurm will end job %s is not known (%s): the walltime is counted from now", job, error)
        return None


def _wait(process: Process) -> None:
    if process.world > 1:
        dist.barrier()


@contextlib.contextmanager
def _stop_signals(stop: StopRequest) -> Iterator[None]:
    def remember(number: int, _: FrameType | None) -> None:
        stop.signal = signal.Signals(number).name

    previous = {number: signal.signal(number, remember) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _log_to(path: str, rank: int) -> int:
    """Append everything that this process says to the file, its libraries' output too; return the file's size."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    size = os.fstat(descriptor).st_size
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING if rank else logging.INFO, format=FORMAT, force=True)
    logging.captureWarnings(True)
    return size


def _report(error: Exception, request: Mapping[str, Any], rank: int, terminal: int, since: int) -> None:
    """Append the traceback and the one `ERROR` line to the logs; the line goes to the terminal, too.

    What stops one rank stops the others, by the same error or a lost connection: the ranks that find a line in the log,
    beyond its first `since` bytes, add none. All but the first wait for its line; a failed rank keeps its connections
    meanwhile, so that a lost one is told of by nobody before what lost it.
    """
    path = Path(request["log"])
    if rank:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        time.sleep(3)
    name = _error_name(request)
    if b"\n" + name.encode() in path.read_bytes()[since:]:
        return
    if isinstance(error, torch.OutOfMemoryError):
        error = TrainingError(
            f"the GPU's memory is too small ({str(error).splitlines()[0]}); lower train.batch (and raise "
            "train.accumulate), or lower train.patch"
        )
    message = " ".join(str(error).split()) or type(error).__name__
    line = name + message
    os.write(terminal, (line + "\n").encode())
    for log in (path, Path(request["run_dir"]) / ALL_ATTEMPTS):
        with log.open("a") as stream:
            stream.write(traceback.format_exc() + line + "\n")


def _error_name(request: Mapping[str, Any]) -> str:
    return f"ERROR {request['rule']} model={request['model']},fold={request['fold']}: "


def main(request_path: str) -> NoReturn:
    """Run the request in the file and leave the process: 0 if it was fulfilled, else 1."""
    request = read_json(request_path)
    rank = int(os.environ.get("RANK", "0"))
    terminal = os.dup(2)
    since = _log_to(request["log"], rank)
    status = 0
    try:
        run_training(request_path)
    except Exception as error:
        status = 1
        with contextlib.suppress(OSError):  # the disk may be what failed
            _report(error, request, rank, terminal, since)
    logging.shutdown()
    # not sys.exit: tearing down may wait for a rank that failed
    os._exit(status)


if __name__ == "__main__":
    main(sys.argv[1])
