"""The resolved, typed configuration of a run.

Precedence: config/config.yaml < --configfile < config/models/<model>.yaml < overrides["*"] < overrides[<model>].
Mappings merge, lists and other values are replaced, `null` removes an entry. Defaults are in config/config.yaml alone;
what is allowed is in workflow/schemas. Errors are found before any job starts and name file and key.

This module is imported whenever Snakemake reads the workflow, so it imports nothing slow.
"""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from cellmap_pipe.classes import derivable, get_class, parts_of
from cellmap_pipe.errors import ConfigError
from cellmap_pipe.schema import Fault, Key, Schema, load_yaml, nearest
from cellmap_pipe.training.architecture import SEARCH_SETTINGS
from cellmap_pipe.training.loss_options import loss_options
from cellmap_pipe.training.zoo import check_network, check_patch, with_architecture

# Raise a stage's number whenever its code gives other results than before: library code triggers no rerun by itself.
RESULT_VERSIONS: dict[str, int] = {
    "phantom": 2,
    "crops": 3,
    "convert": 3,
    "quality": 3,
    "ceiling": 2,
    "folds": 3,
    "datalist": 2,
    "nnunet": 1,
    "chunk": 5,
    "network_check": 1,
    "search": 1,
    "train": 4,
    "prediction_plan": 1,
    "predict": 3,
    "ensemble": 2,
    "tune": 4,
    "segment": 4,
    "evaluate": 4,
    "submission": 4,
    "report": 8,
}

NATIVE = "native"
ENSEMBLE = "ensemble"

# The voxel size by which patches on crops' own grids, each of another size, are turned into nm.
ASSUMED_NATIVE_NM = 8.0
# EM round a label box that the training store keeps by default
CONTEXT_VOXELS = 64

MODEL_NAME = re.compile(r"[a-z][a-z0-9_]*")
Section = TypeVar("Section")


@dataclass(frozen=True)
class Data:
    """Where the data are; see `data` in config.yaml."""

    root: str
    em_path: str
    labels_path: str
    crops: str | None = None
    volumes: str | None = None
    truth: str | None = None
    phantom: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Folds:
    """How crops are divided; `run` holds fold numbers as text, or "all"."""

    n: int
    run: tuple[str, ...]
    seed: int
    group: str
    margin_nm: float
    specimens: Mapping[str, str]
    datasplit: str | None = None
    keep: str | None = None

    @property
    def validated(self) -> tuple[str, ...]:
        """The folds of `run` that have validation crops."""
        return tuple(fold for fold in self.run if fold != "all")


@dataclass(frozen=True)
class JobResources:
    """What a job asks of the machine: GPUs, CPU cores, memory of the first attempt in MB, walltime in minutes.

    device: `auto`, or `cpu` for a job that computes on its cores although it has GPUs. gpu_gb: memory of one of its
    GPUs, where it is known beforehand.
    """

    gpus: int
    threads: int
    mem_mb: int
    runtime_min: int
    device: str
    gpu_gb: float | None = None


@dataclass(frozen=True)
class Model:
    """One network with everything that determines its training and prediction, resolved."""

    name: str
    network: str
    spatial_dims: int
    arguments: Mapping[str, Any]
    grid: str
    classes: tuple[str, ...]
    revision: int
    train: Mapping[str, Any]
    predict: Mapping[str, Any]
    training_job: JobResources
    prediction_job: JobResources

    def training_settings(self) -> dict[str, Any]:
        """Return what determines the trained weights, apart from the data: `train` and the network."""
        return {
            **self.train,
            "network": self.network,
            "arguments": dict(self.arguments),
            "spatial_dims": self.spatial_dims,
            "grid": self.grid,
            "classes": list(self.classes),
            "revision": self.revision,
        }


@dataclass(frozen=True)
class Config:
    """The configuration of a run. `model` gives the models, those that the run does not use included."""

    data: Data
    fetch: Mapping[str, Any]
    classes: tuple[str, ...]
    grids: Mapping[str, tuple[float, ...] | str]
    max_upsample: float
    shards: int
    models: tuple[str, ...]
    labels: Mapping[str, Any]
    quality: Mapping[str, Any]
    folds: Folds
    nnunet: Mapping[str, Any]
    chosen_context_nm: float | None
    store_memory_gb: float | None
    search: Mapping[str, Any]
    ensemble: Mapping[str, Any]
    segment: Mapping[str, Any]
    rules: str
    revisions: Mapping[str, int]
    retrain: bool
    resolved: Mapping[str, Model | ConfigError]

    def model(self, name: str) -> Model:
        """Return the model called `name`. Raises the ConfigError that its file or its overrides contain."""
        model = self.resolved[name]
        if isinstance(model, ConfigError):
            raise model
        return model

    @property
    def grids_in_use(self) -> tuple[str, ...]:
        """The grids of the models that `all` trains, each once."""
        return tuple(dict.fromkeys(self.model(name).grid for name in self.models))

    def context_nm(self, grid: str) -> float:
        """Return how much EM the training store keeps round the label boxes of a grid.

        By default half a patch of 128 voxels, whichever models there are: what is stored is part of what they were
        trained on, and one more model with longer patches must not train all others of its grid anew.
        """
        if self.chosen_context_nm is not None:
            return self.chosen_context_nm
        return default_context_nm(self.grids[grid])

    def version(self, stage: str) -> str:
        """Return the version of a stage's results: that of the library's code and the run's own revision."""
        return f"{RESULT_VERSIONS[stage]}.{self.revisions.get(stage, 0)}"

    def crop_settings(self) -> dict[str, Any]:
        return {"em_path": self.data.em_path, "labels_path": self.data.labels_path}

    def conversion_settings(self, grid: str) -> dict[str, Any]:
        return {
            "grid_name": grid,
            "voxel_nm": self.grids[grid],
            "classes": list(self.classes),
            "labels": self.labels,
            "max_upsample": self.max_upsample,
            "max_train_gb": self.quality["max_train_gb"],
            "context_nm": self.context_nm(grid),
            "shards": self.shards,
            "revision": self.revisions["convert"],
        }

    def quality_settings(self, grid: str) -> dict[str, Any]:
        thresholds = {key: value for key, value in self.quality.items() if key not in ("keep", "drop")}
        needs = self.memory_settings(grid)
        if self.quality["max_predict_gb"] is None:
            needs["models"] = []  # they decide nothing then: how one predicts must not plan the training of all anew
        return {"settings": thresholds, "keep": self.quality["keep"], "drop": self.quality["drop"], **needs}

    def memory_settings(self, grid: str) -> dict[str, Any]:
        """Return what determines the host memory that a crop of the grid needs."""
        models = [self.model(name) for name in self.models]
        return {
            "context_nm": self.context_nm(grid),
            "models": [
                {
                    "name": model.name,
                    "patch": model.train["patch"],
                    "overlap": model.predict["overlap"],
                    "batch": model.predict["batch"],
                    "classes": len(model.classes),
                    "memory_gb": model.predict["memory_gb"],
                    **{key: model.predict[key] for key in ("planes", "output", "tta")},
                }
                for model in models
                if model.grid == grid
            ],
        }

    def fetch_settings(self) -> dict[str, Any]:
        """Return what `snakemake fetch` copies: from where, into where, and for which grids."""
        fetch = dict(self.fetch)
        context_nm = fetch.pop("context_nm")
        grids = {grid: self.grids[grid] for grid in self.grids_in_use}
        stored = {grid: self.context_nm(grid) for grid in grids}
        return {
            **fetch,
            "classes": list(self.classes) if fetch["classes"] == "configured" else None,
            "root": self.data.root,
            "em_path": self.data.em_path,
            "labels_path": self.data.labels_path,
            "grids": grids,
            "max_upsample": self.max_upsample,
            "max_train_gb": self.quality["max_train_gb"],
            "context_nm": stored if context_nm is None else dict.fromkeys(grids, float(context_nm)),
            "train_context_nm": stored,
        }

    @property
    def thresholds(self) -> dict[str, float]:
        """The configured probability by class above which a voxel belongs to it, "default" for the others."""
        return {"default": self.segment["threshold"], **self.segment["thresholds"]}

    def ceiling_settings(self) -> dict[str, Any]:
        segment = self.segmentation_settings()
        return {
            "thresholds": self.thresholds,
            "derive": segment["derive"],
            "labels": self.labels,
            "rules": self.rules,
        }

    def nnunet_settings(self, grid: str) -> dict[str, Any]:
        number = self.nnunet["dataset_id"] + list(self.grids).index(grid)
        return {"name": f"Dataset{number:03d}_{grid}", "classes": list(self.classes)}

    def fold_settings(self) -> dict[str, Any]:
        folds = self.folds
        return {
            "n": folds.n,
            "seed": folds.seed,
            "group": folds.group,
            "margin_nm": folds.margin_nm,
            "specimens": folds.specimens,
        }

    def datalist_settings(self, grid: str) -> dict[str, Any]:
        """Return the grids that divide the validation crops among them: those in use, and the one that is listed.

        The latter need not be in use: `search_dints` and a single `train_{model}` take models beyond `models`.
        """
        return {"grid": grid, "grids": {name: self.grids[name] for name in (*self.grids_in_use, grid)}}

    def chunk_settings(self, grid: str) -> dict[str, Any]:
        return {
            "context_nm": self.context_nm(grid),
            "max_upsample": self.max_upsample,
            "memory_gb": self.store_memory_gb,
            "revision": self.revisions["chunk"],
        }

    def search_settings(self) -> dict[str, Any]:
        """Return what a search for an architecture takes from its model: of the model's own network, nothing.

        Raises ConfigError for a model that does not exist, or whose patches the networks of the search do not take.
        """
        name = self.search["model"]
        if name not in self.resolved:
            raise ConfigError(f"search.model names an unknown model '{name}'; {nearest(name, list(self.resolved))}")
        settings = self.model(name).training_settings()
        try:
            check_patch("DiNTS", {"architecture": self.search}, settings["patch"], settings["spatial_dims"])
        except ConfigError as error:
            raise ConfigError(
                f"search.model {name} with search.num_depths {self.search['num_depths']}: {error}"
            ) from None
        return {key: settings[key] for key in SEARCH_SETTINGS}

    def segmentation_settings(self) -> dict[str, Any]:
        chosen = {key: value for key, value in self.segment.items() if key != "tune"}
        # also of `classes`: a model may learn a group by its parts alone
        derived = [name for name in chosen["derive"] if parts_of(name, self.classes)]
        return {**chosen, "derive": derived, "revision": self.revisions["segment"]}

    def tuning_settings(self) -> dict[str, Any]:
        """Return what determines what tuning finds, apart from probabilities and truth."""
        segment = {key: value for key, value in self.segmentation_settings().items() if key != "revision"}
        scoring = {**self.scoring_settings(), "labels": self.labels}
        return {"settings": segment, **scoring, "revision": self.revisions["tune"]}

    def ensemble_settings(self) -> dict[str, Any]:
        """Return how the models of an ensemble are weighted."""
        policy = self.ensemble["policy"]
        return {"policy": policy, "n": self.ensemble["n"]} if policy == "best_n" else {"policy": policy}

    def scoring_settings(self) -> dict[str, Any]:
        return {"rules": self.rules, "classes": list(self.classes)}

    def evaluation_settings(self) -> dict[str, Any]:
        derived = self.segmentation_settings()["derive"]
        return {**self.scoring_settings(), "derive": derived, "labels": self.labels}

    def prediction_settings(self, name: str, subset: str) -> dict[str, Any]:
        """Return what determines a prediction of model `name`, apart from its weights and the EM."""
        predict = dict(self.model(name).predict)
        shards = predict.pop("shards")[subset]
        settings = {**predict, "max_upsample": self.max_upsample, "revision": self.revisions["predict"]}
        if predict["output"] == "mask":  # else they decide nothing here
            settings["thresholds"] = self.thresholds
        classes = list(self.model(name).classes)
        return {"settings": settings, "shards": shards, "served": self.served(), "classes": classes}

    def served(self) -> dict[str, Any]:
        """Return voxel size and classes, in the order of `classes`, of the grids of the models in use."""
        predicted = {
            grid: {name for model in map(self.model, self.models) if model.grid == grid for name in model.classes}
            for grid in self.grids_in_use
        }
        return {
            grid: {"voxel_nm": self.grids[grid], "classes": [name for name in self.classes if name in names]}
            for grid, names in predicted.items()
        }

    def plan_settings(self) -> dict[str, Any]:
        """Return what determines which model predicts which volume, and what that takes."""
        models = {
            model.name: {
                **{key: value for key, value in model.predict.items() if key != "shards"},
                "grid": model.grid,
                "voxel_nm": self.grids[model.grid],
                "classes": list(model.classes),
                "patch": model.train["patch"],
                "spatial_dims": model.spatial_dims,
            }
            for model in map(self.model, self.models)
        }
        return {
            "em_path": self.data.em_path,
            "max_upsample": self.max_upsample,
            "classes": list(self.classes),
            "derive": self.segmentation_settings()["derive"],
            "models": models,
        }

    def volume_settings(self, name: str) -> dict[str, Any]:
        """Return where the EM of volumes is found, and the voxel size at which model `name` sees it."""
        return {"em_path": self.data.em_path, "voxel_nm": self.grids[self.model(name).grid]}


def default_context_nm(voxel_nm: Sequence[float] | str | None) -> float:
    """Return how much EM the training store keeps round label boxes. voxel_nm: of the grid; a word, None: native."""
    sizes = (ASSUMED_NATIVE_NM,) if voxel_nm is None or isinstance(voxel_nm, str) else voxel_nm
    return CONTEXT_VOXELS * max(sizes)


def load_config(
    values: Mapping[str, Any], *, schemas: Path, models: Path, files: Sequence[str | os.PathLike[str]] = ()
) -> Config:
    """Return the resolved configuration.

    values: the merged content of config.yaml, the --configfile files and --config. schemas: folder of config.yaml and
    model.yaml. models: folder of the model files. files: the files that `values` come from, later ones win; they are
    read again only to say in which of them a fault lies.
    Raises ConfigError, one line per fault, for whatever `all` would trip over. Faults of models that `all` does not
    use are raised by `Config.model`.
    """
    for path in models.glob("*.yaml"):
        if not MODEL_NAME.fullmatch(path.stem) or path.stem == ENSEMBLE:
            raise ConfigError(
                f"{_shown(path)}: a model is named by small letters, digits and _, begins with a letter and is not "
                f"'{ENSEMBLE}'; rename the file"
            )
    schema = Schema(schemas / "config.yaml")
    # nulls stay in the overrides until they have removed something
    overrides = values.get("overrides") or {}
    values = dict(schema.normalised(values))
    sources = _Sources([Path(file) for file in files])
    faults = list(schema.faults({key: value for key, value in values.items() if key != "overrides"}))
    faults += schema.faults({"overrides": values.get("overrides", {})}, partial=True)
    if faults:
        raise ConfigError("\n".join(_line(sources.of(fault.key), fault) for fault in faults))
    _check(values, sources, [path.stem for path in models.glob("*.yaml")], overrides)
    resolved = {
        path.stem: _resolve_model(path, values, overrides, Schema(schemas / "model.yaml"), sources)
        for path in sorted(models.glob("*.yaml"))
    }
    folds = {**values["folds"], "run": tuple(str(fold) for fold in values["folds"]["run"])}
    config = Config(
        data=_section(Data, values["data"]),
        fetch=values["fetch"],
        classes=tuple(values["classes"]),
        grids={name: _voxel(grid["voxel_nm"]) for name, grid in values["grids"].items()},
        max_upsample=float(values["max_upsample"]),
        shards=values["shards"],
        models=tuple(values["models"]),
        labels=values["labels"],
        quality=values["quality"],
        folds=_section(Folds, folds),
        nnunet=values["nnunet"],
        chosen_context_nm=values["chunks"]["context_nm"],
        store_memory_gb=values["chunks"]["memory_gb"],
        search=values["search"],
        ensemble=values["ensemble"],
        segment=values["segment"],
        rules=values["evaluate"]["rules"],
        revisions=values["revisions"],
        retrain=values["retrain"],
        resolved=resolved,
    )
    broken = [str(model) for name in config.models if isinstance(model := resolved[name], ConfigError)]
    if broken:
        raise ConfigError("\n".join(broken))
    return config


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with the entries of `over`: mappings merge, everything else is replaced."""
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        result[key] = merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return result


class _Sources:
    """Which of several configuration files sets a key."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = files
        self.contents = cache(load_yaml)

    def of(self, key: Key) -> str:
        """Return the last file that holds `key`, or the longest beginning of it that any file holds."""
        for length in range(len(key), 0, -1):
            for file in reversed(self.files):
                if _holds(self.contents(file), key[:length]):
                    return _shown(file)
        return _shown(self.files[0]) if self.files else "config"


def _holds(value: Any, key: Key) -> bool:
    for step in key:
        if isinstance(value, Mapping) and step in {str(name) for name in value}:
            value = next(entry for name, entry in value.items() if str(name) == step)
        elif isinstance(value, list) and step.isdigit() and int(step) < len(value):
            value = value[int(step)]
        else:
            return False
    return True


def _shown(path: Path) -> str:
    relative = os.path.relpath(path)
    return relative if not relative.startswith("..") else str(path)


def _line(file: str, fault: Fault) -> str:
    return f"{file}: {'.'.join(fault.key)} {fault.message}"


def _section(kind: type[Section], values: Mapping[str, Any]) -> Section:
    names = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: value for name, value in values.items() if name in names})


def _voxel(value: Any) -> tuple[float, ...] | str:
    return value if isinstance(value, str) else tuple(float(size) for size in value)


def _check(values: Mapping[str, Any], sources: _Sources, known: Sequence[str], overrides: Iterable[str]) -> None:
    """Raise ConfigError for what a schema cannot say: names that must exist, files that were named."""
    classes = values["classes"]
    named: list[tuple[str, Key]] = [(name, ("classes",)) for name in classes]
    named += [(name, ("segment", "derive")) for name in values["segment"]["derive"]]
    named += [(name, ("labels", "empty_by_class")) for name in values["labels"]["empty_by_class"]]
    for section in ("thresholds", "hole_nm3", "split_nm", "min_size_nm3"):
        named += [(name, ("segment", section)) for name in values["segment"][section]]
    faults = []
    for name, key in named:
        try:
            get_class(name)
        except ConfigError as error:
            faults.append(Fault(key, f"lists an {str(error).removeprefix('classes: ')}"))
    faults += [
        Fault(key, f"names an unknown model '{name}'; {nearest(name, sorted(known))}")
        for key, names in ((("models",), values["models"]), (("overrides",), overrides))
        for name in names
        if name not in known and name != "*"
    ]
    faults += [
        Fault(("folds", "run"), f"names fold {fold}; allowed: 0 .. {values['folds']['n'] - 1} (folds.n), all")
        for fold in values["folds"]["run"]
        if fold != "all" and fold >= values["folds"]["n"]
    ]
    if values["grid"] not in values["grids"]:
        faults.append(Fault(("grid",), f"is '{values['grid']}'; allowed: {', '.join(values['grids'])} (of `grids`)"))
    number, count = values["nnunet"]["dataset_id"], len(values["grids"])
    if number + count - 1 > 999:
        faults.append(
            Fault(
                ("nnunet", "dataset_id"),
                f"is {number}, which numbers the datasets of {count} grids up to {number + count - 1}; "
                f"nnU-Net's numbers have three digits, so at most {1000 - count} is allowed",
            )
        )
    made_later = values["data"].get("phantom") is not None
    given = [("folds", "datasplit"), *(() if made_later else (("data", "crops"), ("data", "volumes")))]
    if keep := values["folds"].get("keep"):
        if values["folds"].get("datasplit"):
            faults.append(Fault(("folds", "keep"), "is set beside folds.datasplit; set one of them to null"))
        if Path(keep).resolve() == Path("results/folds.csv").resolve():
            faults.append(Fault(("folds", "keep"), f"'{keep}' is the table that this run makes; give a copy of it"))
        else:
            given.append(("folds", "keep"))
    faults += [
        Fault(key, f"'{path}' does not exist (looked in {Path.cwd()}); correct the path or set it to null")
        for key in given
        if (path := values[key[0]].get(key[1])) and not Path(path).is_file()
    ]
    if truth := values["data"].get("truth"):
        if not values["data"].get("volumes"):
            faults.append(Fault(("data", "truth"), "is set without data.volumes, the volumes whose truth it is"))
        if not made_later and not Path(truth, ".zgroup").is_file():
            message = f"'{truth}' is no zarr v2 group (no .zgroup); give the one that holds crop{{N}}/{{label}}"
            faults.append(Fault(("data", "truth"), message))
    if faults:
        raise ConfigError("\n".join(_line(sources.of(fault.key), fault) for fault in faults))


def _resolve_model(
    path: Path, values: Mapping[str, Any], overrides: Mapping[str, Any], schema: Schema, sources: _Sources
) -> Model | ConfigError:
    """Return the model of one file, or the error that keeps it from being used."""
    try:
        own = load_yaml(path)
        faults = list(schema.faults(schema.normalised(own), partial=True))
        if faults:
            raise ConfigError("\n".join(_line(_shown(path), fault) for fault in faults))
        base = {key: values[key] for key in ("grid", "classes", "train", "predict", "resources")}
        entries = base | {"arguments": {}, "revision": 0}
        for layer in (own, overrides.get("*"), overrides.get(path.stem)):
            entries = merged(entries, layer or {})
        entries = schema.normalised(entries)

        def source(*key: str) -> str:
            """Return the file that decides the entry."""
            for name in (path.stem, "*"):
                if _holds(overrides.get(name, {}), key):
                    return sources.of(("overrides", name, *key))
            if key[0] in base and not _holds(own, key):
                return sources.of(key)
            return _shown(path) if key == ("network",) or _holds(own, key) else source("network")

        for fault in schema.faults(entries):
            raise ConfigError(_line(source(*fault.key), fault))
        try:
            # files that come with the project are named from its root
            folders = (Path(), path.parents[2])
            entries["arguments"] = with_architecture(entries["network"], entries["arguments"], folders)
        except ConfigError as error:
            raise ConfigError(f"{source('arguments', 'architecture')}: {error}") from None
        _check_model(path.stem, entries, values, source)
    except ConfigError as error:
        return error
    return Model(
        name=path.stem,
        network=entries["network"],
        spatial_dims=entries["spatial_dims"],
        arguments=entries["arguments"],
        grid=entries["grid"],
        classes=tuple(entries["classes"]),
        revision=entries["revision"],
        train=entries["train"],
        predict=entries["predict"],
        training_job=_section(JobResources, entries["resources"]["train"]),
        prediction_job=_section(JobResources, entries["resources"]["predict"]),
    )


def _group_fault(group: str, outputs: Sequence[str], classes: Sequence[str]) -> str | None:
    """Return what keeps the voxels of `group` from teaching a model of those outputs, or None."""
    if group not in classes:
        return f"hold '{group}', which `classes` lacks; {nearest(group, list(classes))}"
    if group in outputs:
        return f"hold '{group}', an output of the model; leave it out of train.groups, or of the model's classes"
    if not derivable(group, outputs):
        return f"hold '{group}', whose parts are not all outputs of the model; add them to its classes"
    return None


def _check_model(name: str, entries: Mapping[str, Any], values: Mapping[str, Any], source: Any) -> None:
    """Raise ConfigError for a model that cannot be built or trained in this run."""
    if entries["grid"] not in values["grids"]:
        raise ConfigError(
            f"{source('grid')}: grid of model {name} is '{entries['grid']}'; "
            f"allowed: {', '.join(values['grids'])} (of `grids`)"
        )
    outside = [entry for entry in entries["classes"] if entry not in values["classes"]]
    if outside:
        raise ConfigError(
            f"{source('classes')}: classes of model {name} hold '{outside[0]}', which `classes` lacks; "
            f"{nearest(outside[0], values['classes'])}"
        )
    weights = entries["train"]["class_weights"]
    if not isinstance(weights, str) and len(weights) != len(entries["classes"]):
        raise ConfigError(
            f"{source('train', 'class_weights')}: train.class_weights of model {name} has {len(weights)} entries for "
            f"{len(entries['classes'])} classes; give one per class, or none"
        )
    if not isinstance(weights, str) and not any(weights):
        raise ConfigError(
            f"{source('train', 'class_weights')}: train.class_weights of model {name} is all zero; "
            "at least one class must have a weight"
        )
    if not entries["train"]["deep_supervision"][0]:
        raise ConfigError(
            f"{source('train', 'deep_supervision')}: train.deep_supervision of model {name} gives the first output, "
            "the one that predictions come from, no weight; begin with a number above 0"
        )
    try:
        loss_options(entries["train"]["loss"], entries["train"]["loss_options"])
    except ConfigError as error:
        raise ConfigError(f"{source('train', 'loss_options')}: model {name}: {error}") from None
    for group in entries["train"]["groups"]:
        if fault := _group_fault(group, entries["classes"], values["classes"]):
            raise ConfigError(f"{source('train', 'groups')}: train.groups of model {name} {fault}")
    limits = entries["train"]["normalisation"]
    if not isinstance(limits, str) and limits[1] <= limits[0]:
        raise ConfigError(
            f"{source('train', 'normalisation')}: train.normalisation of model {name} is {limits}; "
            "the second intensity, which becomes 1, must be the higher one"
        )
    begin = entries["train"]["init_from"]
    if begin and not Path(begin).is_file():
        raise ConfigError(
            f"{source('train', 'init_from')}: train.init_from of model {name}: '{begin}' does not exist (looked in "
            f"{Path.cwd()}); give a model.pt, or null"
        )
    try:
        check_network(entries["network"], entries["arguments"], entries["spatial_dims"], entries["train"]["patch"])
    except ConfigError as error:
        named = re.match(r"arguments\.\w+|train\.patch", str(error))
        raise ConfigError(f"{source(*named[0].split('.') if named else ['network'])}: {error}") from None
