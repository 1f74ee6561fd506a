"""What holds for all tests.

The caller's Snakemake profile, which would send their jobs to a cluster, is left out, and so is the number of threads,
on which last bits of results depend. Hypothesis tries the same examples everywhere, however slow the machine.
"""

import os

from hypothesis import settings

for name in [name for name in os.environ if name.startswith("SNAKEMAKE")]:
    del os.environ[name]
os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
settings.load_profile("repeatable")
