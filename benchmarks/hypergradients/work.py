"""A process of the benchmark: one job (JSON) in, its rows out, one a line.

A process for each job: what one leaves in memory, in caches or in thread pools is nothing to the next.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import jax


def rows(job: dict[str, Any]) -> list[dict[str, Any]]:
    """What a job of `__main__.jobs` measures."""
    from benchmarks.hypergradients import estimators, side_by_side, transformer

    section, given = job["section"], {k: v for k, v in job.items() if k != "section"}
    if section == "estimators":
        return estimators.measure(**given)
    if section == "peers":
        return [side_by_side.measure(**given)]
    if section == "agreement":
        return side_by_side.agreement(**given)
    if section == "transformer":
        return transformer.measure(**given)
    if section == "depth":
        return transformer.depth(**given)
    return [transformer.pretrained(**given)]


if __name__ == "__main__":
    jax.config.update("jax_enable_compilation_cache", False)  # compile times are measured
    # A process may be bound to some of the machine's cores.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    for row in rows(json.loads(sys.argv[1])):
        print(json.dumps({**row, "cores": cores}))
