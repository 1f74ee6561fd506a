"""Runs the benchmarks, keeps what they found in benchmarks/results.json, and makes docs/benchmarks.md of it.

    python benchmarks/table.py [NAME ...] [--quick] [--hours H] [-- ARGUMENT ...]    run all programs, or those named
    python benchmarks/table.py --render                                              only write the page anew

Programs run one after another, each in a process of its own with OMP_NUM_THREADS=1; what stands behind `--` goes to
all of them (`table.py predict -- --giant`). A run replaces the record of the same program on the same machine, but a
quick one never a full one. A program that fails or takes longer than H hours is named, its old record stays, and the
others go on. The last line is one JSON object: name, ratios, targets (of all programs that ran, as program: value), ok.
"""

import argparse
import json
import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cellmap_pipe.files import read_json, write_text
from cellmap_pipe.machine import memory_limit

logger = logging.getLogger("table")

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent
RESULTS = FOLDER / "results.json"
PAGE = ROOT / "docs" / "benchmarks.md"
HELPERS = frozenset({"table", "volumes"})
MANIFEST = ROOT.parent / "shared" / "data" / "manifests" / "test_crop_manifest.csv"
# What a full run takes besides; a file that is not there is left out with its option
FULL: Mapping[str, tuple[str, ...]] = {"scoring": ("--big", "--manifest", str(MANIFEST))}
# The network that the plain loop of train_step trains, whose share of the loss is compared
PLAIN = "segresnet_ds"
# Share of the machine's cores that others may use during a quiet run
BUSY = 0.1

Record = dict[str, Any]


class BenchmarkError(Exception):
    """A program did not give what a benchmark has to give."""


def programs() -> list[str]:
    """Return the names of the benchmarks, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in HELPERS)


def more_is_better(program: str, name: str) -> bool:
    """Return whether a value has to reach its target; others have to stay below."""
    match program:
        case "augment" | "loader":
            return name != "first batch s"
        case "blocks":
            return name == "wall"
        case "convert":
            return name.endswith("_throughput")
        case "loss":
            return name in ("dense", "label map")
        case "partial_labels":
            return name == "difference"
        case "train_step":
            return name != "loss_share"
        case _:
            return False


def values_of(line: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, float]]:
    """Return values and targets by name of a program's last line."""
    values, targets = dict(line.get("ratios", {})), dict(line.get("targets", {}))
    values |= {f"dice, {way}": value for way, value in line.get("dice", {}).items()}
    if PLAIN in line.get("loss_share", {}):
        values["loss_share"] = line["loss_share"][PLAIN]
    return values, targets


def verdicts(record: Mapping[str, Any]) -> dict[str, str]:
    """Return "met", "missed" or "" (no target) by name of a value.

    A program decides before it rounds. If it says that a target is missed, and none is by the rounded values, that
    value is missed that equals its target. Raises BenchmarkError if program and table do not mean the same by better.
    """
    program, values, targets = record["name"], record["values"], record["targets"]
    if lacking := sorted(targets.keys() - values.keys()):
        raise BenchmarkError(f"{program}: has a target and no value for {', '.join(lacking)}")
    found = {}
    for name, value in values.items():
        if name not in targets:
            found[name] = ""
            continue
        target = targets[name]
        met = value >= target if more_is_better(program, name) else value <= target
        found[name] = "met" if met else "missed"
    if not record["ok"] and "missed" not in found.values():
        found |= {name: "missed" for name, target in targets.items() if values[name] == target}
    if record["ok"] != ("missed" not in found.values()):
        raise BenchmarkError(f"{program}: says ok {record['ok']}, its values {found}; see more_is_better in table.py")
    return found


def machine() -> Record:
    """Return what runs the benchmarks: CPU, cores and memory that this process may use, GPU."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    models = [line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name")]
    gpu = None
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        listed = subprocess.run(query, capture_output=True, text=True, timeout=60, check=False)
        names = listed.stdout.split("\n") if listed.returncode == 0 else []
        gpu = ", ".join(sorted({name.strip() for name in names if name.strip()})) or None
    cores = len(os.sched_getaffinity(0))
    return {
        "cpu": models[0] if models else "unknown CPU",
        "cores": cores,
        "memory_gb": round(memory_limit() / 1e9),
        "gpu": gpu,
    }


def busy_seconds() -> float:
    """Return the CPU seconds that the machine spent since it was started, without those of our ended children."""
    text = Path("/proc/stat").read_text() if Path("/proc/stat").is_file() else "cpu 0"
    user, nice, system, _, _, *interrupts = [int(word) for word in text.splitlines()[0].split()[1:8]] + [0] * 5
    own = os.times()
    ticks = user + nice + system + sum(interrupts[:2])
    return ticks / os.sysconf("SC_CLK_TCK") - own.children_user - own.children_system


def commit() -> str | None:
    """Return the short commit of the code, with + if a file of it differs, or None outside of a repository."""

    def git(*words: str) -> str | None:
        try:
            run = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
        except FileNotFoundError:
            return None
        return run.stdout.strip() if run.returncode == 0 else None

    name = git("rev-parse", "--short=7", "HEAD")
    return name and name + ("+" if git("status", "--porcelain", "--", "src", "benchmarks/*.py") else "")


def arguments_of(program: str, *, quick: bool, more: Sequence[str] = ()) -> list[str]:
    """Return the options that a program is given."""
    if quick:
        return ["--quick", *more]
    given = FULL.get(program, ())
    absent = {i for i, word in enumerate(given) if word.startswith("/") and not Path(word).exists()}
    return [*(word for i, word in enumerate(given) if i not in absent and i + 1 not in absent), *more]


def shown(program: str, arguments: Iterable[str]) -> str:
    """Return the command as anyone would give it: of files elsewhere, the name alone."""
    words = [Path(word).name if "/" in word and not word.startswith("--") else word for word in arguments]
    return shlex.join(["python", f"benchmarks/{program}.py", *words])


def measure(program: str, *, quick: bool, more: Sequence[str] = (), hours: float = 3.0) -> Record:
    """Run a program and return its record. Raises BenchmarkError if it gives none."""
    arguments = arguments_of(program, quick=quick, more=more)
    begin, before = time.monotonic(), busy_seconds()
    process = subprocess.Popen(
        [sys.executable, str(FOLDER / f"{program}.py"), *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # so that its children can be ended with it
    )
    try:
        printed, _ = process.communicate(timeout=hours * 3600)
    except BaseException as error:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            raise BenchmarkError(f"{program}: took longer than {hours:g} h; give it more by --hours") from None
        raise
    wall = time.monotonic() - begin
    others = max(0.0, busy_seconds() - before) / wall
    logger.info("%s", printed.rstrip())
    try:
        line = json.loads(printed.splitlines()[-1])
    except (IndexError, ValueError):
        line = None
    if not isinstance(line, dict) or line.get("name") != program or not isinstance(line.get("ok"), bool):
        raise BenchmarkError(f"{program}: exit status {process.returncode}, and its last line is no JSON of its result")
    values, targets = values_of(line)
    record = {
        "name": program,
        "command": shown(program, arguments),
        "quick": quick,
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit(),
        "machine": machine(),
        "others_cores": round(others, 2),
        "wall_s": round(wall),
        "values": values,
        "targets": targets,
        "ok": line["ok"],
    }
    verdicts(record)
    return record


def add(records: list[Record], record: Record) -> bool:
    """Put a record in the place of that of the same program and machine; return False if that one was a full run's.

    A record from a note (see `note` in results.json) gives way to any full run.
    """
    same = [
        other
        for other in records
        if other["name"] == record["name"] and (other["machine"] == record["machine"] or other.get("note"))
    ]
    if record["quick"] and any(not other["quick"] for other in same):
        return False
    records[:] = [*(other for other in records if not any(other is one for one in same)), record]
    records.sort(key=lambda one: (one["name"], one["machine"]["gpu"] or "", one["machine"]["cpu"]))
    return True


def described(found: Mapping[str, Any]) -> str:
    """Return a machine in a few words."""
    return f"{found['cpu']}, {found['cores']} cores, {found['memory_gb']} GB, {found['gpu'] or 'no GPU'}"


def rows(record: Mapping[str, Any]) -> list[str]:
    """Return the lines of the table for a record, those with a target first."""
    verdict = verdicts(record)
    when = record["date"]
    if record.get("commit"):
        when += f", {record['commit']}"
    if record.get("note"):
        when += ", noted"
    if record["quick"]:
        when += ", quick"
    if record.get("others_cores", 0.0) > BUSY * record["machine"]["cores"]:
        when += f", others {record['others_cores']:g} cores"
    lines = []
    for name in sorted(record["values"], key=lambda name: not verdict[name]):
        sign = "≥" if more_is_better(record["name"], name) else "≤"
        target = f"{sign} {record['targets'][name]:g}" if name in record["targets"] else ""
        value = f"{record['values'][name]:.4g}"
        label = name.replace("|", "/")
        cells = [record["name"], label, value, target, verdict[name], described(record["machine"]), when]
        lines.append("| " + " | ".join([*cells, f"`{record['command']}`"]) + " |")
    return lines


def summary(program: str) -> str:
    """Return the first line of a program's docstring."""
    return (FOLDER / f"{program}.py").read_text().split('"""')[1].strip().splitlines()[0]


HEAD = """\
# Benchmarks

Every program of `benchmarks/`, and what it found. `python benchmarks/table.py` runs them and writes this page; change
nothing here by hand. Speed and memory are ratios to a named alternative, or to a limit, measured in one run on one
machine with `OMP_NUM_THREADS=1`: they say more than seconds, which belong to a machine. The docstring of each program
says exactly what is compared.

"noted": the numbers are those that a full run printed and somebody wrote down, before this table existed. "quick": a
smaller run. "others": so many cores were busy with something else meanwhile. A commit with + had changes beside it.
"""


def render(records: Sequence[Record]) -> str:
    """Return the page: what each program measures, and one table of every value."""
    known = programs()
    if strangers := sorted({record["name"] for record in records} - set(known)):
        raise BenchmarkError(f"{RESULTS.name}: there is no program {', '.join(strangers)}; delete its records")
    parts = [HEAD]
    parts += [f"- `{name}`: {summary(name)}" for name in known]
    missed = [
        f"{record['name']}: {name}"
        for record in records
        for name, verdict in verdicts(record).items()
        if verdict == "missed"
    ]
    count = sum(len(record["targets"]) for record in records)
    parts += [
        "",
        f"{count - len(missed)} of {count} targets are met." + (f" Missed: {'; '.join(missed)}." if missed else ""),
    ]
    if absent := sorted(set(known) - {record["name"] for record in records}):
        parts += ["", f"Not run yet: {', '.join(absent)}."]
    parts += ["", "| benchmark | measured | ratio or value | target | | machine | date | command |", "|" + "---|" * 8]
    parts += [line for record in records for line in rows(record)]
    return "\n".join(parts) + "\n"


def read_results(path: Path = RESULTS) -> list[Record]:
    """Return the records, none if the file is not there yet."""
    return read_json(path)["records"] if path.is_file() else []


def write_results(records: Sequence[Record], path: Path, page: Path) -> None:
    """Write the records and their page; nothing is written if they cannot be shown."""
    text = render(records)
    write_text(path, json.dumps({"records": records}, indent=1, ensure_ascii=False) + "\n")
    write_text(page, text)


def main(words: Sequence[str] | None = None) -> int:
    """Run what is asked for, write results and page. Returns 0 if every program ran and met its targets."""
    words = list(sys.argv[1:] if words is None else words)
    cut = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: all, {', '.join(programs())}")
    parser.add_argument("--quick", action="store_true", help="smaller runs")
    parser.add_argument("--hours", type=float, default=3.0, help="for one program (default: %(default)s)")
    parser.add_argument("--render", action="store_true", help="only write docs/benchmarks.md from results.json")
    options = parser.parse_args(words[:cut])
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    if unknown := sorted(set(options.names) - set(programs())):
        parser.error(f"there is no benchmark {', '.join(unknown)}; known: {', '.join(programs())}")

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C does, it ends the program that runs
    records = read_results(RESULTS)
    fresh: list[Record] = []
    failed = False
    for name in [] if options.render else options.names or programs():
        logger.info("== %s", name)
        try:
            record = measure(name, quick=options.quick, more=words[cut + 1 :], hours=options.hours)
        except BenchmarkError as error:
            logger.error("ERROR %s", error)
            failed = True
            continue
        fresh.append(record)
        if not add(records, record):
            logger.info("%s: a full run is on record; the quick one is not kept", name)
        write_results(records, RESULTS, PAGE)
    if options.render:
        write_results(records, RESULTS, PAGE)
    found = {
        part: {f"{record['name']}: {key}": value for record in fresh for key, value in record[part].items()}
        for part in ("values", "targets")
    }
    ok = not failed and all(record["ok"] for record in fresh)
    sys.stdout.write(
        json.dumps({"name": "table", "ratios": found["values"], "targets": found["targets"], "ok": ok}) + "\n"
    )
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
