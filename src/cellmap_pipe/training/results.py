"""What a training hands on: its run directory, and the published files."""

import csv
import io
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cellmap_pipe.errors import TrainingError
from cellmap_pipe.files import read_json, replacing, write_json, write_text
from cellmap_pipe.training import checkpoint
from cellmap_pipe.training.fingerprint import FINGERPRINT


def best_path(run_dir: Path, step: int) -> Path:
    """Return where a training keeps the weights that were the best after step `step`, a model file."""
    return run_dir / f"best{step:09d}.pt"


def is_stale(run_dir: Path, expected: str) -> bool:
    """Return whether `run_dir` holds a training of another fingerprint."""
    path = run_dir / FINGERPRINT
    return path.exists() and read_json(path, f"delete {run_dir} and train again")["fingerprint"] != expected


def set_aside(run_dir: Path) -> Path:
    """Rename the run directory to `{name}.stale-{time}` and return that path: nothing is used, nothing is lost."""
    aside = run_dir.with_name(f"{run_dir.name}.stale-{time.strftime('%Y%m%d-%H%M%S')}")
    number = 1
    while aside.exists():
        number += 1
        aside = run_dir.with_name(f"{run_dir.name}.stale-{time.strftime('%Y%m%d-%H%M%S')}-{number}")
    run_dir.rename(aside)
    (aside / "owner.json").unlink(missing_ok=True)
    return aside


def publish(run_dir: Path, state: Mapping[str, Any], outputs: Mapping[str, str], model: str, fold: str) -> None:
    """Write model.pt, history.csv and metrics.json, in this order, from a finished run directory.

    state: its last checkpoint. Raises TrainingError if it made no step, or if the best weights are missing or of
    another training.
    """
    if not state["progress"]["step"]:
        raise TrainingError(f"{run_dir}: the training finished without a step; rename {run_dir} and train again")
    best = best_path(run_dir, state["progress"]["best_step"])
    if not best.is_file():
        raise TrainingError(f"{best}: missing although the training finished; rename {run_dir} and train again")
    contents = checkpoint.read_model(best, f"rename {run_dir} and train again")
    found, expected = (
        (contents["step"], contents["fingerprint"]),
        (state["progress"]["best_step"], state["fingerprint"]),
    )
    if found != expected:
        raise TrainingError(
            f"{best}: step and fingerprint are {found}, but the last checkpoint's best are {expected}; "
            f"rename {run_dir} and train again"
        )
    with replacing(outputs["weights"]) as partial:
        shutil.copyfile(best, partial)
    write_text(outputs["history"], history_csv(state["progress"]["history"], contents["classes"]))
    validation = contents["validation"]
    write_json(
        outputs["metrics"],
        {
            "model": model,
            "fold": fold,
            "steps": state["progress"]["step"],
            "parameters": state["parameters"],
            "best_step": contents["step"],
            "best_mean_dice": validation["mean_dice"],
            "best_smoothed_dice": validation["smoothed_dice"],
            "best_challenge_score": validation["challenge_score"],
            "dice": validation["dice"],
            "untrained_mean_dice": state["progress"]["untrained"],
            "skipped_crops": state["progress"]["skipped"],
            "alarms": sorted(state["progress"]["alarms"].values()),
            "classes": contents["classes"],
            "grid": contents["grid"],
            "patch": contents["patch"],
            "fingerprint": contents["fingerprint"],
        },
    )


def history_csv(history: Sequence[Mapping[str, Any]], classes: Sequence[str]) -> str:
    """Return history.csv: step, loss (mean since the last row), lr, and the scores; empty: not validated.

    mean_dice, smoothed_dice (by which the best weights are chosen), challenge_score (its semantic part), dice_<class>.
    """
    scores = ("mean_dice", "smoothed_dice", "challenge_score")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["step", "loss", "lr", *scores, *[f"dice_{name}" for name in classes]])
    for row in history:
        values = [*[row[name] for name in scores], *[row["dice"].get(name) for name in classes]]
        writer.writerow(
            [row["step"], f"{row['loss']:.6g}", f"{row['lr']:.6g}", *["" if v is None else f"{v:.6f}" for v in values]]
        )
    return text.getvalue()
