"""What holds for all tests: the caller's Snakemake profile, which would send their jobs to a cluster, is left out."""

import os

for name in [name for name in os.environ if name.startswith("SNAKEMAKE")]:
    del os.environ[name]
