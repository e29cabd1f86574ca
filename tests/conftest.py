"""Process-wide settings of the test suite."""

from __future__ import annotations

import os

from hypothesis import settings

# One CPU for each xdist worker. Not every engine library reads OMP_NUM_THREADS (OpenVINO goes by TBB), but
# all of them respect the affinity of the process. Without it every worker starts a thread for every CPU.
_worker = os.environ.get("PYTEST_XDIST_WORKER", "")
if _worker.startswith("gw") and hasattr(os, "sched_setaffinity"):
    _cpus = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {_cpus[int(_worker.removeprefix("gw")) % len(_cpus)]})

# A deadline for each example measures how busy the machine is; the timeout of the whole test is enough.
settings.register_profile("qlip", deadline=None)
settings.load_profile("qlip")
