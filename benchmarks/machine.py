"""Where numbers come from: processor, memory, versions, date."""

from __future__ import annotations

import datetime
import os
import platform
from importlib import metadata
from pathlib import Path

PACKAGES = ("openvino", "onnxruntime", "onnxruntime-gpu", "torch", "diffusers", "transformers", "numpy")


def machine() -> dict[str, object]:
    """Return a description of this machine, JSON-serialisable."""
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    facts = dict((part.strip() for part in line.split(":", 1)) for line in info.splitlines() if ":" in line)
    flags = set(facts.get("flags", "").split())
    return {
        "cpu": facts.get("model name", platform.processor()),
        "family_model": f"family {facts.get('cpu family', '?')} model {facts.get('model', '?')}",
        "features": sorted(flags & {"avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8"}),
        "cores": len(os.sched_getaffinity(0)),
        "ram_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": {d.name: d.version for d in metadata.distributions() if d.name in PACKAGES},
        "date": datetime.date.today().isoformat(),
        "load_before": os.getloadavg()[0],
    }
