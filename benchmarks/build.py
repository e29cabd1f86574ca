"""Seconds and memory of a build from nothing: three bit options, coarse blocks."""

from __future__ import annotations

import shutil
from typing import Any

from benchmarks.bundles import OUT, Subject, build_bundle, prepare

SECONDS_TARGET = 480
BYTES_TARGET = 6e9


def run(of: Subject, *, quick: bool) -> dict[str, Any]:
    """Return the report of the build, with its wall seconds and the peak of its resident memory."""
    prepare(of, ())
    fresh = OUT / "bundles" / f"{of.shape}-fresh"
    for folder in (fresh, fresh.with_name(fresh.name + ".building")):
        shutil.rmtree(folder, ignore_errors=True)
    report = build_bundle(of, "coarse", fresh)
    del report["bundle"]
    shutil.rmtree(fresh)
    return {**report, "seconds_target": SECONDS_TARGET, "peak_rss_target": BYTES_TARGET}
