"""The record of a training in MLflow, if asked for. What fails in its store is warned of and costs no training."""

import importlib.util
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from cellmap_pipe.errors import ContractError, TrainingError
from cellmap_pipe.files import read_json, write_json

logger = logging.getLogger(__name__)

EXPERIMENT = "cellmap_pipe"
RUN_FILE = "mlflow.json"

# MLflow shortens or refuses what is longer, by its version.
MOST_CHARACTERS = 500

# By default a silent server would hold each record up for minutes.
PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}


def check_installed() -> None:
    """Raise TrainingError unless the package MLflow is there."""
    if importlib.util.find_spec("mlflow") is None:
        raise TrainingError(
            "train.mlflow is set and the package mlflow is missing: pip install 'cellmap_pipe[mlflow]', or set "
            "train.mlflow to null"
        )


class MlflowRun:
    """One training as one run of MLflow, for the length of a `with` block; a training that goes on continues its run.

    uri: of the store. run_dir: of the training, whose last two names are the run's; it keeps the run's id.
    parameters: logged once, as text.
    """

    def __init__(self, uri: str, run_dir: Path, parameters: Mapping[str, Any]) -> None:
        self.uri, self.run_dir, self.parameters = uri, run_dir, parameters
        self.active = False

    def __enter__(self) -> "MlflowRun":
        try:
            self._start()
        except Exception as error:
            self._warn("begun", error)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        if not self.active:
            return
        import mlflow

        try:
            mlflow.end_run("FINISHED" if kind is None else "KILLED")
        except Exception as error:
            self._warn("ended", error)

    def log(self, metrics: Mapping[str, float | None], step: int) -> None:
        """Record the metrics that have a value."""
        if not self.active:
            return
        import mlflow

        try:
            mlflow.log_metrics({name: value for name, value in metrics.items() if value is not None}, step=step)
        except Exception as error:
            self._warn(f"written to at step {step}", error)

    def _start(self) -> None:
        for name, value in PATIENCE.items():
            os.environ.setdefault(name, value)
        import mlflow

        mlflow.set_tracking_uri(self.uri)
        mlflow.set_experiment(EXPERIMENT)
        if (run_id := self._earlier_run()) is not None:
            try:
                mlflow.start_run(run_id=run_id)
            except mlflow.MlflowException as error:
                logger.warning("MLflow: run %s of %s is not continued (%s)", run_id, self.uri, error)
            else:
                self.active = True
                return
        run = mlflow.start_run(run_name=f"{self.run_dir.parent.name}/{self.run_dir.name}")
        self.active = True
        write_json(self.run_dir / RUN_FILE, {"uri": self.uri, "run_id": run.info.run_id})
        mlflow.log_params({name: str(value)[:MOST_CHARACTERS] for name, value in self.parameters.items()})

    def _earlier_run(self) -> str | None:
        """Return the id of the run of an earlier process of this training in the same store."""
        try:
            kept = read_json(self.run_dir / RUN_FILE)
        except ContractError:
            return None
        return str(kept["run_id"]) if kept.get("uri") == self.uri else None

    def _warn(self, what: str, error: Exception) -> None:
        logger.warning("MLflow: the run could not be %s in %s (%s)", what, self.uri, " ".join(str(error).split()))
