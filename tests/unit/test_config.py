import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cellmap_pipe.classes import TESTED
from cellmap_pipe.config import RESULT_VERSIONS, Config, load_config, merged
from cellmap_pipe.errors import ConfigError
from cellmap_pipe.evaluation.rules import RULES

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "config" / "config.yaml"
FOURTEEN = (
    "ecs pm mito_mem mito_lum mito_ribo golgi_mem golgi_lum ves_mem ves_lum endo_mem endo_lum er_mem er_lum nuc".split()
)


def resolve(extra: str = "", *, models: Path = ROOT / "config" / "models", folder: Path | None = None) -> Config:
    """Return the configuration that config.yaml gives with the YAML text `extra` as a --configfile."""
    files = [CONFIG]
    if folder is not None:
        (folder / "extra.yaml").write_text(extra)
        files.append(folder / "extra.yaml")
    values = merged(yaml.safe_load(CONFIG.read_text()), yaml.safe_load(extra) or {})
    return load_config(values, schemas=ROOT / "workflow" / "schemas", models=models, files=files)


def refusal(extra: str, folder: Path) -> str:
    with pytest.raises(ConfigError) as error:
        resolve(extra, folder=folder)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_the_default_is_the_full_run():
    config = resolve()
    assert list(config.classes) == FOURTEEN
    assert config.grids == {"8nm": (8, 8, 8), "32nm": (32, 32, 32)}
    assert config.models == ("segresnet_ds", "flexunet_resnet34", "swinunetr", "segresnet_32nm")
    assert config.folds.run == ("0",)
    assert config.grids_in_use == ("8nm", "32nm")


def test_every_model_file_can_be_used_with_the_default():
    config = resolve()
    assert {name: str(model) for name, model in config.resolved.items() if isinstance(model, ConfigError)} == {}


@pytest.mark.parametrize("name", ["demo", "comparison", "challenge"])
def test_shipped_configurations_are_valid(name):
    config = resolve((ROOT / "config" / f"{name}.yaml").read_text())
    assert config.models


def test_the_challenge_configuration_has_every_tested_class():
    config = resolve((ROOT / "config" / "challenge.yaml").read_text())
    assert sorted(config.classes) == sorted(TESTED)


def test_the_comparison_has_every_model_and_of_those_with_a_preset_of_the_grid_the_preset():
    config = resolve((ROOT / "config" / "comparison.yaml").read_text())
    assert sorted(config.models) == sorted(name for name in config.resolved if f"{name}_8nm" not in config.resolved)


def test_reading_the_configuration_imports_nothing_slow():
    slow = {"torch", "monai", "numpy", "pandas", "scipy", "zarr", "dynamic_network_architectures"}
    code = (
        "import sys, yaml, pathlib; from cellmap_pipe.config import load_config; root = pathlib.Path(sys.argv[1]);"
        "values = yaml.safe_load((root / 'config/config.yaml').read_text());"
        "config = load_config(values, schemas=root / 'workflow/schemas', models=root / 'config/models');"
        f"[config.model(name) for name in config.resolved]; assert not {slow} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(ROOT)], check=True)


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ("folds: {sed: 1}", "extra.yaml: folds.sed is not a known key; did you mean 'seed'?"),
        ("grid_s: {}", "extra.yaml: grid_s is not a known key; did you mean 'grids'?"),
        ("train: {pach: [1, 2, 3]}", "extra.yaml: train.pach is not a known key; did you mean 'patch'?"),
        (
            "overrides: {swinunetr: {train: {lrr: 1}}}",
            "extra.yaml: overrides.swinunetr.train.lrr is not a known key; did you mean 'lr'?",
        ),
        ("overrides: {swin_unetr: {}}", "names an unknown model 'swin_unetr'; did you mean 'swinunetr'?"),
        (
            "classes: [ecs, mitto]",
            "extra.yaml: classes lists an unknown class 'mitto'; did you mean 'mito'",
        ),
        ("models: [segresnet_dss]", "extra.yaml: models names an unknown model 'segresnet_dss'; did you mean"),
        ("folds: {n: 0}", "extra.yaml: folds.n is 0; allowed: a whole number >= 1 <= 100"),
        ("folds: {n: three}", "extra.yaml: folds.n is 'three'; allowed: a whole number"),
        ("folds: {group: crops}", "extra.yaml: folds.group is 'crops'; allowed: one of crop, dataset"),
        ("folds: {run: [7]}", "extra.yaml: folds.run names fold 7; allowed: 0 .. 4 (folds.n), all"),
        ("folds: {seed: null}", "folds.seed is missing"),
        ("grids: {8nm: {voxel_nm: [8, 8]}}", "extra.yaml: grids.8nm.voxel_nm is [8, 8]; allowed: native or a list"),
        ("grids: {8nm: {voxel_nm: [8, 8, -8]}}", "grids.8nm.voxel_nm is [8, 8, -8]; allowed: native or a list"),
        ("grid: 4nm", "extra.yaml: grid is '4nm'; allowed: 8nm, 32nm"),
        ("classes: [ecs, ecs]", "extra.yaml: classes lists 'ecs' twice"),
        ("data: {volumes: nowhere.csv}", "extra.yaml: data.volumes 'nowhere.csv' does not exist"),
        ("data: {crops: nowhere.csv}", "extra.yaml: data.crops 'nowhere.csv' does not exist"),
        ("folds: {datasplit: nowhere.csv}", "extra.yaml: folds.datasplit 'nowhere.csv' does not exist"),
        ("folds: {keep: nowhere.csv}", "extra.yaml: folds.keep 'nowhere.csv' does not exist"),
        (
            "folds: {keep: ./results/folds.csv}",
            "folds.keep './results/folds.csv' is the table that this run makes; give",
        ),
        (
            "overrides: {swinunetr: {network: SwinUNET}}",
            "extra.yaml: network 'SwinUNET' is unknown; did you mean SwinUNETR?",
        ),
        (
            "overrides: {swinunetr: {train: {patch: [96, 96, 90]}}}",
            "extra.yaml: train.patch [96, 96, 90] must be divisible by 32 for SwinUNETR; try [96, 96, 96]",
        ),
        ("overrides: {swinunetr: {grid: 4nm}}", "extra.yaml: grid of model swinunetr is '4nm'; allowed: 8nm, 32nm"),
        (
            "overrides: {swinunetr: {classes: [mito]}}",
            "extra.yaml: classes of model swinunetr hold 'mito', which `classes`",
        ),
        ("overrides: {swinunetr: {train: {class_weights: [1, 2]}}}", "has 2 entries for 14 classes"),
        (
            "overrides: {swinunetr: {classes: [pm, nuc], train: {class_weights: [0, 0]}}}",
            "extra.yaml: train.class_weights of model swinunetr is all zero; at least one class must have a weight",
        ),
        (
            "overrides: {swinunetr: {train: {deep_supervision: [0, 1]}}}",
            "extra.yaml: train.deep_supervision of model swinunetr gives the first output, the one that predictions",
        ),
        (
            "overrides: {swinunetr: {train: {loss_options: {alpha: 0, beta: 0}}}}",
            "extra.yaml: model swinunetr: train.loss_options: alpha and beta are both 0",
        ),
        (
            "overrides: {swinunetr: {arguments: {feature_sise: 24}}}",
            "extra.yaml: arguments.feature_sise: SwinUNETR has no such argument; did you mean feature_size?",
        ),
        (
            "overrides: {swinunetr: {arguments: {patch_size: [2, 2, 2]}}}",
            "extra.yaml: arguments.patch_size is [2, 2, 2]; give a positive integer",
        ),
        (
            "overrides: {swinunetr: {network: UNet, arguments: {feature_size: null, use_v2: null}}}",
            "extra.yaml: arguments.channels is missing; UNet needs channels, strides",
        ),
        (
            "{models: [dints], overrides: {dints: {arguments: {architecture: null}}}}",
            "extra.yaml: arguments.architecture is missing; DiNTS needs architecture",
        ),
        (
            "{models: [dints], overrides: {dints: {arguments: {use_downsample: maybe}}}}",
            "extra.yaml: arguments.use_downsample is 'maybe'; give true or false",
        ),
        (
            "{models: [dints], overrides: {dints: {spatial_dims: 2, train: {patch: [1, 96, 96]}}}}",
            "dints.yaml: arguments.architecture is one of spatial_dims 3; it does not fit a network of spatial_dims 2",
        ),
        ("resources: {predict: {gpu_gb: 40}}", "extra.yaml: resources.predict.gpu_gb is not a known key"),
        ("search: {warmup: 1}", "extra.yaml: search.warmup is 1; allowed: a number >= 0 < 1"),
        ("train: {lr: fast}", "extra.yaml: train.lr is 'fast'; allowed: a number > 0 (highest learning rate)"),
        (
            "train: {normalisation: percentiles}",
            "extra.yaml: train.normalisation is 'percentiles'; allowed: one of percentile, range, uint8/255 or a list "
            "(of a number >= 0 <= 255, 2 of them)",
        ),
        ("train: {normalisation: [10]}", "extra.yaml: train.normalisation is [10]; allowed: one of percentile, range"),
        ("train: {normalisation: [10, 300]}", "extra.yaml: train.normalisation is [10, 300]; allowed: one of"),
        ("train: {normalisation: [10, high]}", "extra.yaml: train.normalisation is [10, 'high']; allowed: one of"),
        ("train: {normalisation: null}", "train.normalisation is missing"),
        (
            "overrides: {swinunetr: {train: {normalisation: [210, 90]}}}",
            "extra.yaml: train.normalisation of model swinunetr is [210, 90]; the second intensity, which becomes 1, "
            "must be the higher one",
        ),
        (
            "{models: [swinunetr], overrides: {'*': {train: {normalisation: [90, 90]}}}}",
            "extra.yaml: train.normalisation of model swinunetr is [90, 90]; the second intensity",
        ),
        ("train: {augment: {intensity: true}}", "extra.yaml: train.augment.intensity is not a known key; "),
        ("train: {augment: {gama: false}}", "train.augment.gama is not a known key; did you mean 'gamma'?"),
        ("train: {augment: {blur: 0.5}}", "extra.yaml: train.augment.blur is 0.5; allowed: true or false"),
        ("train: {class_power: 3}", "extra.yaml: train.class_power is 3; allowed: a number >= -2 <= 1"),
        ("train: {on_damage: ignore}", "extra.yaml: train.on_damage is 'ignore'; allowed: one of stop, skip"),
        ("chunks: {memory_gb: 0}", "extra.yaml: chunks.memory_gb is 0; allowed: a number or null > 0"),
        ("retrain: perhaps", "extra.yaml: retrain is 'perhaps'; allowed: true or false"),
    ],
)
def test_a_fault_is_one_line_with_file_key_and_remedy(extra, expected, tmp_path):
    assert expected in refusal(extra, tmp_path)


def test_a_fault_of_a_model_file_names_the_file(tmp_path):
    models = tmp_path / "models"
    models.mkdir()
    (models / "small.yaml").write_text("network: SegResNetDS\nspatial_dims: 3\ntrain: {patch: [100, 128, 128]}\n")
    with pytest.raises(ConfigError, match=r"models/small.yaml: train.patch \[100, 128, 128\] must be divisible by 8"):
        resolve("models: [small]", models=models)
    (models / "small.yaml").write_text("network: SegResNetDS\nspatial_dims: 3\ntrian: {}\n")
    with pytest.raises(ConfigError, match=r"models/small.yaml: trian is not a known key; did you mean 'train'\?"):
        resolve("models: [small]", models=models)
    (models / "small.yaml").write_text("spatial_dims: 3\n")
    with pytest.raises(ConfigError, match=r"models/small.yaml: network is missing"):
        resolve("models: [small]", models=models)


def test_a_fault_of_a_model_that_is_not_used_is_raised_when_it_is_asked_for(tmp_path):
    config = resolve("overrides: {vit_3d: {network: VIT}}", folder=tmp_path)
    assert config.model("swinunetr").network == "SwinUNETR"
    with pytest.raises(ConfigError, match="network 'VIT' is unknown"):
        config.model("vit_3d")


def test_a_grid_divides_the_validation_crops_with_those_in_use():
    config = resolve("grids: {4nm: {voxel_nm: [4, 4, 4]}}\n")
    in_use = {"8nm": (8, 8, 8), "32nm": (32, 32, 32)}
    assert config.datalist_settings("32nm") == {"grid": "32nm", "grids": in_use}
    # of a model that is trained by itself
    assert config.datalist_settings("4nm")["grids"] == {**in_use, "4nm": (4, 4, 4)}


def test_entries_that_are_not_in_use_are_inert():
    config = resolve("grids: {1nm: {voxel_nm: [1, 1, 1]}}\nclasses: [pm, mito]\nmodels: [swinunetr]\n")
    assert config.grids_in_use == ("8nm",)
    assert config.segmentation_settings()["derive"] == []


def test_groups_are_derived_only_where_some_class_lies_inside():
    assert resolve().segmentation_settings()["derive"] == ["mito", "golgi", "ves", "endo", "er", "er_mem_all"]


def test_every_source_is_scored_on_the_configured_classes_and_their_groups():
    config = resolve("overrides: {segresnet_ds: {classes: [pm]}}")
    assert config.evaluation_settings()["derive"] == resolve().segmentation_settings()["derive"]
    assert config.evaluation_settings()["classes"] == list(config.classes)
    assert set(config.tuning_settings()) == {"settings", "rules", "classes", "labels", "revision"}


def test_a_group_that_a_model_learns_by_its_parts_is_derived():
    extra = """
classes: [mito, mito_mem, mito_lum, mito_ribo]
models: [segresnet_ds]
overrides: {segresnet_ds: {classes: [mito_mem, mito_lum, mito_ribo], train: {groups: [mito]}}}
"""
    config = resolve(extra)
    assert config.model("segresnet_ds").classes == ("mito_mem", "mito_lum", "mito_ribo")
    assert config.segmentation_settings()["derive"] == ["mito"]


def test_overrides_win_over_the_model_file_which_wins_over_the_configuration():
    def lr(extra: str) -> float:
        return resolve(extra).model("swinunetr").train["lr"]

    assert lr("") == 1e-4
    assert lr("train: {lr: 0.5}") == 1e-4
    assert resolve("train: {lr: 0.5}\noverrides: {}").model("segresnet_ds").train["momentum"] == 0.9
    assert lr("overrides: {'*': {train: {lr: 0.2}}}") == 0.2
    assert lr("overrides: {'*': {train: {lr: 0.2}}, swinunetr: {train: {lr: 0.3}}}") == 0.3


def test_mappings_merge_lists_are_replaced_and_null_removes():
    config = resolve("grids: {32nm: null, 4nm: {voxel_nm: [4, 4, 4]}}\nmodels: [swinunetr]\nclasses: [pm, nuc]\n")
    assert config.grids == {"8nm": (8, 8, 8), "4nm": (4, 4, 4)}
    assert config.classes == ("pm", "nuc")
    model = resolve("overrides: {swinunetr: {arguments: {use_v2: null}}}").model("swinunetr")
    assert model.arguments == {"feature_size": 48}


def test_null_stays_where_it_is_a_value():
    assert resolve("train: {clip: null}").model("swinunetr").train["clip"] is None


@pytest.mark.parametrize("value", ["percentile", "range", "uint8/255", [90, 210], [0.5, 1.5]])
def test_every_normalisation_is_accepted(value):
    assert resolve(f"train: {{normalisation: {value}}}").model("swinunetr").train["normalisation"] == value


def test_numbers_in_exponent_notation_are_numbers():
    config = resolve("overrides: {swinunetr: {train: {lr: 1e-5, max_steps: 2e3}, arguments: {drop_rate: 1e-1}}}")
    model = config.model("swinunetr")
    assert model.train["lr"] == 1e-5
    assert model.train["max_steps"] == 2000
    assert isinstance(model.train["max_steps"], int)
    assert model.arguments["drop_rate"] == 0.1


def test_every_result_depends_on_its_revision_and_nothing_else_of_that_section():
    config, revised = resolve(), resolve("revisions: {convert: 1}")
    assert config.version("convert") != revised.version("convert")
    assert {stage for stage in RESULT_VERSIONS if config.version(stage) != revised.version(stage)} == {"convert"}


def test_resources_do_not_enter_the_settings():
    extra = "overrides: {'*': {resources: {train: {gpus: 0}, predict: {gpus: 0}}}}"
    assert resolve().model("swinunetr").training_settings() == resolve(extra).model("swinunetr").training_settings()


def test_the_resolved_configuration_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        resolve().models = ()  # type: ignore[misc]


def test_the_schema_knows_every_version_of_the_rules():
    schema = yaml.safe_load((ROOT / "workflow" / "schemas" / "config.yaml").read_text())
    assert sorted(schema["properties"]["evaluate"]["properties"]["rules"]["enum"]) == sorted(RULES)


def test_fetch_copies_for_the_grids_of_the_models_in_use():
    settings = resolve(
        "{models: [segresnet_ds], chunks: {context_nm: 300}, fetch: {classes: configured}}"
    ).fetch_settings()
    assert settings["grids"] == {"8nm": (8, 8, 8)} and settings["context_nm"] == {"8nm": 300}
    assert settings["classes"] == FOURTEEN
    assert resolve().fetch_settings()["classes"] is None


def test_the_budget_of_fetched_crops_is_that_of_the_conversion():
    settings = resolve("{chunks: {context_nm: 300}, fetch: {context_nm: 2000}}").fetch_settings()
    assert settings["context_nm"] == dict.fromkeys(["8nm", "32nm"], 2000)
    assert settings["train_context_nm"] == dict.fromkeys(["8nm", "32nm"], 300)


def test_the_context_is_that_of_the_grid_whichever_models_there_are():
    """It is part of what networks were trained on: a model more must not train the others anew."""
    for models in ("segresnet_ds, segresnet_32nm", "segresnet_ds, swin_3d, segresnet_32nm"):
        config = resolve(f"models: [{models}]")
        assert config.fetch_settings()["context_nm"] == {"8nm": 512, "32nm": 2048}
        assert config.chunk_settings("32nm")["context_nm"] == 2048
    assert resolve("{models: [segresnet_ds], grid: own, grids: {own: {voxel_nm: native}}}").context_nm("own") == 512


def test_groups_that_teach_their_parts_must_be_formed_by_the_outputs():
    outputs = [name for name in FOURTEEN if name != "ecs"]
    model = f"{{classes: {outputs}, train: {{groups: [X]}}}}"
    base = f"classes: {[*FOURTEEN, 'mito', 'er']}\noverrides: {{segresnet_ds: {model}}}"
    assert resolve(base.replace("X", "mito")).model("segresnet_ds").train["groups"] == ["mito"]
    for group, fault in {
        "lyso": "hold 'lyso', which `classes` lacks",
        "pm": "hold 'pm', an output of the model",
        "er": "hold 'er', whose parts are not all outputs",
    }.items():
        with pytest.raises(ConfigError, match=rf"train\.groups of model segresnet_ds {fault}"):
            resolve(base.replace("X", group))


def test_a_search_takes_patches_and_classes_of_its_model_and_nothing_of_its_network():
    config = resolve("search: {lr: 1e-3, max_steps: 2e3}")
    assert (config.search["lr"], config.search["max_steps"]) == (1e-3, 2000)
    other = "overrides: {dints: {network: SegResNetDS, arguments: {architecture: null}, train: {lr: 1}}}"
    assert resolve(other).search_settings() == config.search_settings()
    assert resolve("search: {model: segresnet_32nm}").search_settings()["grid"] == "32nm"


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("search: {model: dint}", "search.model names an unknown model 'dint'; did you mean 'dints'?"),
        (
            "{search: {model: unet_3d}, overrides: {unet_3d: {train: {patch: [40, 96, 96]}}}}",
            r"search.model unet_3d with search.num_depths 4: train.patch .* divisible by 16 .*; try \[32, 96, 96\]",
        ),
        ("overrides: {dints: {network: DINTS}}", "network 'DINTS' is unknown"),
    ],
)
def test_a_search_that_could_not_run_is_refused_when_it_is_asked_for(extra, message):
    config = resolve(extra)
    with pytest.raises(ConfigError, match=message):
        config.search_settings()


def test_nnunet_datasets_have_three_digits():
    with pytest.raises(ConfigError, match=r"nnunet\.dataset_id is 999, .* of 2 grids up to 1000; .* at most 998"):
        resolve("nnunet: {dataset_id: 999}")


def test_each_grid_is_an_nnunet_dataset_of_its_own():
    config = resolve("nnunet: {dataset_id: 7}")
    assert [config.nnunet_settings(grid)["name"] for grid in config.grids] == ["Dataset007_8nm", "Dataset008_32nm"]


def test_a_model_holds_its_architecture_and_not_the_name_of_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a file that comes with the project is found from anywhere
    shipped = resolve().model("dints").arguments["architecture"]
    assert shipped["num_blocks"] == 12
    with pytest.raises(ConfigError, match=r"architecture 'mine\.json' does not exist"):
        resolve("overrides: {dints: {arguments: {architecture: mine.json}}}").model("dints")
    own = {**shipped, "arch_code_c": [[1] * 10] * 12}
    (tmp_path / "mine.json").write_text(json.dumps({"format": 1, "source": "a test", **own}))
    config = resolve("overrides: {dints: {arguments: {architecture: mine.json}}}")
    assert config.model("dints").training_settings()["arguments"]["architecture"] == own
