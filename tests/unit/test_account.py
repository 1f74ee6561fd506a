"""An account that Slurm does not know stops the workflow before its first job."""

import stat
from pathlib import Path

import pytest

from cellmap_pipe.cluster.account import check_accounts
from cellmap_pipe.errors import ConfigError


@pytest.fixture
def sacctmgr(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `sacctmgr` that is the only program there is, and lists two accounts."""
    program = tmp_path / "sacctmgr"
    program.write_text("#!/bin/sh\necho 'root||normal|||'\necho 'lab_a||normal,gpu_access|normal|100|'\n")
    program.chmod(program.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", str(tmp_path))
    return program


@pytest.mark.parametrize("account", ["lab_a", "LAB_A", "root,lab_a", "lab_a root"])
def test_accounts_of_the_user_pass_in_any_spelling_that_the_executor_takes(sacctmgr: Path, account: str) -> None:
    check_accounts([account, None])


def test_unknown_account_is_named_with_those_there_are_and_the_key_to_edit(sacctmgr: Path) -> None:
    with pytest.raises(ConfigError, match=r"'lab_b' is no Slurm account of user .*, who has lab_a, root; set slurm"):
        check_accounts(["lab_a", "lab_b"])


def test_an_expression_is_left_to_sbatch(sacctmgr: Path) -> None:
    check_accounts(['os.environ["ACCOUNT"]'])


@pytest.mark.parametrize("script", ["exit 1", "true"])
def test_a_site_that_tells_no_accounts_is_no_reason_to_stop(sacctmgr: Path, script: str) -> None:
    sacctmgr.write_text(f"#!/bin/sh\n{script}\n")
    check_accounts(["lab_b"])
    sacctmgr.unlink()
    check_accounts(["lab_b"])
