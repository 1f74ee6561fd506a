"""Snakemake that looks after its Slurm jobs every second.

The plugin adds 10 s to that interval in each round in which no job has ended, which no option prevents. Jobs of tests
end after seconds, and the workflow would spend most of its time waiting.
"""

import sys

from snakemake.cli import main
from snakemake_executor_plugin_slurm import Executor

Executor.next_seconds_between_status_checks = property(lambda executor: 1.0, lambda executor, seconds: None)

if __name__ == "__main__":
    sys.exit(main())
