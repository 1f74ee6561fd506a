"""The page on tuned post-processing says what was chosen and what it is worth."""

import json

from cellmap_pipe.prediction.processing import FORMAT, Choice, Processing, choice_to_dict
from cellmap_pipe.report.tuning import write_tuning


def test_scores_before_and_after_stand_beside_the_choice(tmp_path):
    nuc = Processing(threshold=0.35, split_nm=40, min_size_nm3=1e7)
    choice = choice_to_dict(Choice({"nuc": nuc}, repair=True))
    report = {
        "nuc": {
            "kind": "instance",
            "n_crops": 4,
            "score_default": 0.5,
            "score_tuned": 0.625,
            "kept": True,
            "overall": nuc.to_dict(),
            "cause": "",
        },
        "pm": {
            "kind": "semantic",
            "n_crops": 1,
            "score_default": None,
            "score_tuned": None,
            "kept": False,
            "overall": Processing().to_dict(),
            "cause": "annotated in 1 crops",
        },
    }
    content = {
        "format": FORMAT,
        "rules": "csc-2026.07",
        "groups": {"jrc_x/crop1": 0, "jrc_x/crop2": 1},
        "by_group": [choice, choice],
        "overall": choice,
        "report": report,
        "repair": {"score_default": 0.25, "score_tuned": 0.375, "kept": True},
        "failed": ["jrc_x/crop3/pm: damaged"],
    }
    (tmp_path / "unet_3d.json").write_text(json.dumps(content))
    write_tuning([tmp_path / "unet_3d.json"], tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    nuc_row = next(line for line in text.splitlines() if "nuc</td>" in line)
    for shown in ("instance", ">0.500<", ">0.625<", ">+0.125<", ">yes<", ">0.350<", ">40<", ">1e+07<"):
        assert shown in nuc_row
    assert ">no<" in next(line for line in text.splitlines() if "pm</td>" in line)
    assert "annotated in 1 crops" in text and "jrc_x/crop3/pm: damaged" in text
    assert "2 crops; masks of different classes are made consistent (mean IoU of the masks 0.2500 as" in text
    assert "Scored by the rules csc-2026.07 (provisional)" in text
