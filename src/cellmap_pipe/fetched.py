"""Whether what was fetched is another than before: asked whenever the workflow is planned, so apart from the fetching.

It imports nothing slow.
"""

from pathlib import Path

from cellmap_pipe.files import digest, file_digest

# In `data.root`, the folder of the records of a fetch; see `fetch.records`.
RECORDS = ".fetched"


def fetch_digest(root: str | Path) -> str:
    """Return a short digest of what was fetched into `root`, "" if nothing was.

    It changes with what the source has, and whenever a fetch has written a file here, be it one that was repaired.
    """
    records = sorted((Path(root) / RECORDS).glob("*/*.json"))
    return digest([[path.name, file_digest(path)] for path in records])[:16] if records else ""
