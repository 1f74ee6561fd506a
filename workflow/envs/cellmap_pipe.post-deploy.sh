#!/usr/bin/env bash
# Run by Snakemake in the environment that `--sdm conda` has just made: better here than in each job.
python -c 'import cellmap_pipe' && exit 0
echo "ERROR --sdm conda: the environment has the libraries but not this package; export PYTHONPATH=/path/to/this/repository/src and give the command again, or use the one environment of 'make install' without --sdm" >&2
exit 1
