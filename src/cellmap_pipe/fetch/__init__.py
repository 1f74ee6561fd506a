"""Copying of crops and of the EM round them from wherever they are published, chunk by chunk, and proof of it."""

from cellmap_pipe.fetch.records import verify_fetch
from cellmap_pipe.fetch.run import fetch, plan_fetch, plan_table, write_plan

__all__ = ["fetch", "plan_fetch", "plan_table", "verify_fetch", "write_plan"]
