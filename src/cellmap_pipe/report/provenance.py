"""From each number of the report back to what it was made of, as JSON and as a page; see `evidence`."""

import os
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path as FilePath
from typing import Any

from cellmap_pipe.fetched import fetch_digest
from cellmap_pipe.files import digest, write_json, write_text
from cellmap_pipe.report.evidence import SHOWN, Evidence, anchor_of, collect, describe_code
from cellmap_pipe.report.pages import Cell, Column, Content, folded, heading, page, paragraph, table

Path = str | os.PathLike[str]

FORMAT = 1

_AGREES, _DIFFERS = "#009E73", "#D55E00"

_STYLE = """
.verdict { border-left: 6px solid; padding: .4rem .8rem; max-width: 62rem; }
.verdict.good { border-color: #009E73; background: #eefaf5; }
.verdict.bad { border-color: #C00000; background: #fdecea; color: #8b0000; font-weight: 600; }
.chain { display: flex; flex-wrap: wrap; gap: .2rem 1rem; padding: 0; margin: .3rem 0; list-style: none; }
a { color: #005a8c; }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem; scroll-margin-top: .5rem; }
h3:target { background: #fff3bf; }
td:nth-child(n + 3) { font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: .92em; }
"""


def write_provenance(
    inputs: Mapping[str, Any],
    out_json: Path,
    out_html: Path,
    *,
    settings: Mapping[str, Any],
    repository: Path,
    data_root: Path,
    runs: Path = "runs",
) -> None:
    """Write what every number of the report was made of as JSON and as a page, and whether it is still there.

    inputs: files by kind, one or several: crops, folds, table (scores.csv), crop_scores (crop_scores.csv), ranking
    (ranking.csv), comparison (comparison.csv), quality, converted, ceilings, stores (index.json of the training
    stores), datalists, metrics, weights, history, predictions, ensembles, tuned, segmentations, scores and, where there
    is a submission, submission (report.json), archive (the zip), forecast and truth_scores (scores.json). What each is
    about is read from it. settings: the resolved settings by stage. repository: a folder of the code, for its commit.
    runs: folder of the run directories, whose fingerprints and usage.csv are read where they are there.

    Compared are: scores with their records, with scores.csv and ranking.csv; crops that were scored or trained on with
    the folds; segmentations with those that were scored or packed, and their processing with what tuning found; the
    archive with the one that was checked, and scored against the truth; the fingerprint of each segmentation and each
    ensemble with what it is computed from; recorded weights with the SHA-256 of model.pt; the fingerprint of each
    training with its settings, crops and code version; each array's own fingerprint, and files of data by size
    (`snakemake verify` reads them through). A difference is no error: the page says it in red.
    Raises ContractError for a JSON file that cannot be read.
    """
    files = {
        kind: [str(path) for path in ([value] if isinstance(value, str) else value)] for kind, value in inputs.items()
    }
    content = {
        "format": FORMAT,
        "code": describe_code(FilePath(repository)),
        "settings": _digested(settings),
        **collect(files, settings, FilePath(runs)),
        "fetched": fetch_digest(FilePath(data_root)),
    }
    write_json(out_json, content)
    write_text(out_html, _page(content))


def _digested(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "sha256": digest(settings),
        "stages": {stage: digest(values) for stage, values in settings.items()},
        "values": dict(settings),
    }


def _page(content: Mapping[str, Any]) -> str:
    """Return the page of what `write_provenance` collected."""
    evidence = Evidence(files=dict(content["files"]), checks=list(content["checks"]))
    scored = (
        "Every score of the report is made of the records behind scores.csv, which has a row for each source and fold. "
        "Its chain stands below under the same names (address: provenance.html#SOURCE-foldFOLD): the scores, the "
        "segmentations that were scored, the predictions, the weights, the training, the data. "
    )
    by_source: dict[str, list[str]] = {}
    for name, entry in content["sources"].items():
        by_source.setdefault(name.rsplit("/fold", 1)[0], []).append(entry["anchor"])
    parts = [
        *_verdict(evidence),
        paragraph(
            (scored if by_source else "Nothing was scored: no fold that was trained has validation crops. ")
            + f"Digests are SHA-256, of which the first {SHOWN} digits are shown; provenance.json has all of them, and "
            "all settings."
        ),
        paragraph(
            "A fingerprint is a hash of everything that determines a result, the fingerprint of what it was made from "
            "among it: those of trainings, ensembles and segmentations were computed again for this page, and all "
            "scores from their records. Not read were the voxels: converted files and training stores were compared by "
            "size, which `snakemake verify` reads through; arrays of predictions and segmentations by the fingerprint "
            "that they carry. Listed by their digests and not computed again are a training's own numbers "
            "(metrics.json, history.csv, usage.csv), ceilings, scores of crops, comparisons of pairs, the submission's "
            "forecast and its scores against the truth."
        ),
        _links(by_source, content["submission"]),
        heading("Code"),
        *_code(content["code"]),
        heading("Settings"),
        paragraph(f"SHA-256 of all resolved settings: {content['settings']['sha256']}"),
        table(
            [
                Column("stage"),
                Column("result version", hint="raised when the stage's code gives other results"),
                Column("sha256"),
            ],
            [
                [stage, str(content["settings"]["values"].get("versions", {}).get(stage, "")), sha[:SHOWN]]
                for stage, sha in content["settings"]["stages"].items()
            ],
            name="settings",
        ),
    ]
    parts += [heading("Scores"), _file_table("tables", content["tables"], evidence)] if by_source else []
    for source, anchors in by_source.items():
        if len(anchors) > 1:
            parts += [
                _title(f"{source}, mean of folds", anchor_of(source, "mean")),
                paragraph("Mean of the folds below."),
            ]
        for name, entry in content["sources"].items():
            if entry["anchor"] in anchors:
                parts += _chain(name, entry, evidence, content["trainings"])
    parts.append(heading("Trainings"))
    for name, training in content["trainings"].items():
        parts += _training(name, training, evidence)
    if content["submission"]:
        parts += [heading("Submission"), *_chain("submission", content["submission"], evidence, content["trainings"])]
    parts += [_title("Data", "data"), *_data(content, evidence)]
    return page("Provenance", parts, style=_STYLE)


def _verdict(evidence: Evidence) -> list[str]:
    bad = [check for check in evidence.checks if not check["agrees"]]
    total = len(evidence.checks)
    if not bad:
        return [f'<p class="verdict good">All {total} comparisons agree.</p>']
    lines = "".join(
        f'<li><a href="#{escape(check["of"], quote=True)}">{escape(check["of"])}</a>: {escape(check["what"])}: DIFFERS '
        f"({escape(check['detail'])})</li>"
        for check in bad
    )
    return [
        f'<div class="verdict bad">{len(bad)} of {total} comparisons DIFFER: what is recorded is not what lies there, '
        f"and numbers made of it cannot be trusted.<ul>{lines}</ul></div>"
    ]


def _title(text: str, anchor: str) -> str:
    return f'<h3 id="{escape(anchor, quote=True)}">{escape(text)}</h3>'


def _links(by_source: Mapping[str, Sequence[str]], submission: Mapping[str, Any] | None) -> str:
    items = [
        f"<li>{escape(source)}: "
        + ", ".join(f'<a href="#{escape(a, quote=True)}">{escape(a.rsplit("-", 1)[1])}</a>' for a in anchors)
        + "</li>"
        for source, anchors in by_source.items()
    ]
    items += ['<li><a href="#submission">submission</a></li>'] if submission else []
    items += ['<li><a href="#data">data</a></li>']
    return f'<ul class="chain" aria-label="chains">{"".join(items)}</ul>'


def _code(code: Mapping[str, Any]) -> list[str]:
    git = code["git"]
    commit = f"commit {git['commit']}" if git else "no commit known: the code is not in a git repository"
    state = ", with changes that are NOT committed" if git and git["dirty"] else ""
    libraries = [[name, version] for name, version in code["libraries"].items()]
    return [
        paragraph(
            f"This page was made with cellmap_pipe {code['cellmap_pipe']}, {commit}{state}; Python {code['python']}. "
            "Each result is bound to the code that made it by the result version of its stage, which its fingerprint "
            "contains."
        ),
        folded(
            f"{len(libraries)} libraries", [table([Column("library"), Column("version")], libraries, name="libraries")]
        ),
    ]


_CHAIN_COLUMNS = (
    Column("stage"),
    Column("file"),
    Column("sha256", hint=f"first {SHOWN} digits"),
)
_CHECK_COLUMNS = (Column("comparison"), Column("result"), Column("detail"))


def _file_rows(stage: str, paths: Iterable[str | None], evidence: Evidence) -> list[list[Content]]:
    known = (path for path in paths if path)
    return [[stage, path, str(evidence.files[os.path.normpath(path)]["sha256"])[:SHOWN]] for path in known]


def _file_table(name: str, files: Mapping[str, Sequence[str]], evidence: Evidence) -> str:
    rows = [row for stage, paths in files.items() for row in _file_rows(stage, paths, evidence)]
    return table(_CHAIN_COLUMNS, rows, name=name)


def _check_table(anchor: str, evidence: Evidence) -> str:
    rows: list[list[Content]] = [
        [
            check["what"],
            Cell("agrees", _AGREES) if check["agrees"] else Cell("DIFFERS", _DIFFERS),
            check["detail"],
        ]
        for check in evidence.of(anchor)
    ]
    return table(_CHECK_COLUMNS, rows, name=f"checks_{anchor}")


def _chain(
    name: str, entry: Mapping[str, Any], evidence: Evidence, trainings: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """Return the section of one source and fold, or of the submission."""
    used = entry.get("trainings") or [member for member in entry["members"] if member in trainings]
    rows = _file_rows("scores", [entry.get("scores")], evidence)
    rows += _file_rows("archive", [entry.get("archive")], evidence)
    rows += _file_rows("flight check", [entry.get("checks")], evidence)
    rows += _file_rows("forecast", [entry.get("forecast")], evidence)
    rows += _file_rows("scores against the truth", [entry.get("truth_scores")], evidence)
    rows += _file_rows("segmentation", entry["segmentation"], evidence)
    rows += _file_rows("post-processing", [entry["tuned"]], evidence)
    rows += _file_rows("ensemble" if entry["members"] else "prediction", entry["predictions"], evidence)
    rows += _file_rows("prediction", entry.get("member_predictions", ()), evidence)
    rows += _file_rows("weights", [trainings[training]["weights"] for training in used], evidence)
    links = ", ".join(
        f'<a href="#{escape(str(trainings[training]["anchor"]), quote=True)}">{escape(training)}</a>'
        for training in used
    )
    numbers = entry.get("numbers", {})
    shown = ", ".join(f"{key} {value:.6g}" for key, value in numbers.items() if value is not None)
    said = f"{shown}, by the rules {entry['rules']}. " if shown else f"Rules {entry['rules']}. "
    volumes = [
        [volume, (prints["prediction"] or "")[:SHOWN], (prints["segmentation"] or "")[:SHOWN]]
        for volume, prints in entry["volumes"].items()
    ]
    columns = [Column("volume"), Column("prediction", hint="fingerprint"), Column("segmentation", hint="fingerprint")]
    return [
        _title(name, entry["anchor"]),
        f'<p>{escape(said)}Trained as: {links or "not known"}. Data: <a href="#data">crops and digests</a>.</p>',
        table(_CHAIN_COLUMNS, rows, name=f"chain_{entry['anchor']}"),
        _check_table(entry["anchor"], evidence),
        folded(f"{len(volumes)} volumes", [table(columns, volumes, name=f"volumes_{entry['anchor']}")]),
    ]


def _training(name: str, training: Mapping[str, Any], evidence: Evidence) -> list[str]:
    rows: list[list[Content]] = [
        *_file_rows("weights", [training["weights"]], evidence),
        *_file_rows("metrics", [training["metrics"]], evidence),
        *_file_rows("history", [training["history"]], evidence),
        *_file_rows("usage", [training["usage"]], evidence),
        *_file_rows("datalist", [training["datalist"]], evidence),
        *_file_rows("training store", [training["store"]], evidence),
        ["settings", f"train, {training['model']} (provenance.json)", training["settings_sha256"][:SHOWN]],
        ["fingerprint", "settings, crops and code version", training["fingerprint"][:SHOWN]],
    ]
    return [
        _title(name, training["anchor"]),
        paragraph(
            f"Grid {training['grid']}; {training['steps']} steps, weights of step {training['best_step']}; "
            f"{len(training['training'])} training and {len(training['validation'])} validation crops."
        ),
        table(_CHAIN_COLUMNS, rows, name=f"chain_{training['anchor']}"),
        _check_table(training["anchor"], evidence),
    ]


def _data(content: Mapping[str, Any], evidence: Evidence) -> list[str]:
    columns = [
        Column("crop"),
        Column("fold"),
        Column("grid"),
        Column("verdict"),
        Column("conversion", hint="the shard that lists what was converted"),
        Column("input", hint="digest of the arrays and settings that it was converted from"),
        Column("image", hint="sha256 of the NIfTI"),
        Column("label", hint="sha256 of the NIfTI"),
        Column("store", hint="digest of the voxels that networks are trained on"),
    ]
    rows: list[list[Content]] = [
        [
            crop,
            str(entry["fold"]),
            grid,
            found["verdict"],
            found.get("conversion", ""),
            *(str(found.get(key, ""))[:SHOWN] for key in ("input_digest", "image", "label", "store")),
        ]
        for crop, entry in content["crops"].items()
        for grid, found in entry["grids"].items()
    ]
    fetched = [paragraph(f"Digest of what was fetched: {content['fetched']}")] if content["fetched"] else []
    return [
        *fetched,
        _check_table("data", evidence),
        _file_table("files", content["data"], evidence),
        table(columns, rows, name="crops"),
    ]
