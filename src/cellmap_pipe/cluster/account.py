"""Whether the account that jobs are to be charged to is one of this user's. Imports nothing slow."""

import getpass
import logging
import re
from collections.abc import Collection

from cellmap_pipe.cluster.site import associations
from cellmap_pipe.errors import ConfigError

logger = logging.getLogger(__name__)


# What the profile holds is evaluated as Python where it is no plain name: that is left to sbatch.
NAMES = re.compile(r"[\w.,\s-]+")


def check_accounts(accounts: Collection[str | int | None]) -> None:
    """Return if Slurm knows each of `accounts` as one of this user's, or cannot be asked.

    Without this each job of a workflow is refused by itself, with a traceback, as often as the profile has retries.
    accounts: `slurm_account` of the jobs; several names in one of them are parted by commas or blanks. Raises
    ConfigError naming the first that is unknown and those there are.
    """
    texts = [str(account) for account in accounts if account is not None]
    asked = {name for text in texts if NAMES.fullmatch(text) for name in re.split(r"[,\s]+", text) if name}
    if not asked:
        return
    user = getpass.getuser()
    known = sorted({found.account for found in associations(user) or ()})
    if not known:  # some sites let only administrators ask, or keep none; sbatch decides then
        logger.warning("slurm_account is not checked: sacctmgr tells of no account of user %s", user)
        return
    unknown = sorted(asked - set(known) - {name for name in asked if name.lower() in known})
    if unknown:
        raise ConfigError(
            f"slurm_account: '{unknown[0]}' is no Slurm account of user {user}, who has {', '.join(known)}; set "
            "slurm_account under default-resources in the profile (profiles/longleaf/config.v9+.yaml on Longleaf)"
        )
