"""What a failing job leaves behind: a traceback, and one line that says what, where and what to do."""

import logging
from types import SimpleNamespace

import pytest

from cellmap_pipe.errors import DataError
from cellmap_pipe.log import also_in, job


@pytest.fixture
def snakemake(tmp_path):
    return SimpleNamespace(rule="convert", wildcards={"grid": "8nm", "shard": "3"}, log=[str(tmp_path / "logs/a.log")])


def test_the_last_line_names_rule_wildcards_and_remedy_below_the_traceback(snakemake, capsys):
    with pytest.raises(SystemExit) as stopped, job(snakemake):
        raise DataError("s0/0/1/2: damaged chunk;\n fetch it again")
    line = "ERROR convert grid=8nm,shard=3: s0/0/1/2: damaged chunk; fetch it again"
    with open(snakemake.log[0]) as stream:
        text = stream.read()
    assert stopped.value.code == 1
    assert text.splitlines()[-1] == line
    assert "Traceback" in text
    assert capsys.readouterr().err.strip() == line


def test_a_job_that_succeeds_ends_without_a_word(snakemake, capsys):
    with job(snakemake):
        pass
    assert capsys.readouterr().err == ""


def test_records_also_go_to_a_second_file_which_keeps_what_it_holds(snakemake, tmp_path):
    kept = tmp_path / "train.log"
    for number in (1, 2):
        with job(snakemake):
            with also_in(kept):
                logging.getLogger("cellmap_pipe").info("attempt %d", number)
            logging.getLogger("cellmap_pipe").info("after it")
    with open(snakemake.log[0]) as stream:
        assert [line.split(": ")[1] for line in stream.read().splitlines()] == ["attempt 2", "after it"]
    assert [line.split(": ")[1] for line in kept.read_text().splitlines()] == ["attempt 1", "attempt 2"]
