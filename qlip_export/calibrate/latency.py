"""What a choice of bits costs in time: each unit at each option, measured on the engines of a bundle."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from pydantic import Field, ValidationError
from torch import Tensor

from qlip_export.errors import QlipError
from qlip_export.files import written_aside
from qlip_export.spec import Frozen, variant_name

REPEATS = 15


class Latencies(Frozen):
    """Milliseconds of every block at every bit option, and where they were measured."""

    backend: str
    version: str
    device: str
    fingerprint: str = Field(description="of the denoiser")
    latents: tuple[int, int, int, int]
    milliseconds: dict[str, dict[int, float]] = Field(description="block -> bits -> median of a call")


def measure_latencies(bundle: Path, path: Path) -> Latencies:
    """Time every block of a bundle at every bit option, interleaved, and write the medians to ``path``.

    Raises:
        QlipError: No bundle, or one without engines.
    """
    from qlip_export.runtime import TextToImage

    loaded = TextToImage.load(bundle)
    manifest = loaded.bundle.manifest
    target = loaded.target.entry
    found = Latencies(
        backend=target.backend,
        version=target.version,
        device=target.device,
        fingerprint=manifest.model.fingerprint,
        latents=manifest.shapes.latents,
        milliseconds={
            block: {bits: round(1000 * times[variant_name(bits)], 4) for bits in loaded.bundle.uniform}
            for block, times in loaded.chain.time_blocks(REPEATS).items()
        },
    )
    with written_aside(path) as aside:
        aside.write_text(found.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return found


def read_latencies(path: Path) -> Latencies:
    """Return the times that an earlier run measured.

    Raises:
        QlipError: There are none.
    """
    try:
        return Latencies.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValidationError) as error:
        raise QlipError(
            "the latency cost needs measured times",
            expected=f"a bundle to measure, or {path} from an earlier run",
            found=str(error).splitlines()[0],
            fix="--bundle with a bundle of this model, built at these bits",
        ) from error


def latency_costs(
    path: Path,
    options: Sequence[int],
    layers: Mapping[str, tuple[str, str, int]],
    units: Sequence[str],
    fingerprint: str,
) -> Tensor:
    """Return the milliseconds of each unit at each option, (K, options) float32, above the cheapest one.

    A layer gets the share of its block's time that it has of the block's multiply-accumulates.

    Args:
        path: Where the times are kept; their blocks must be those of the policy.
        options: Bit options.
        layers: By name: block, unit and multiply-accumulates.
        units: Names of the K units.
        fingerprint: Of the denoiser that the times must be of.

    Raises:
        QlipError: No times, those of another model, or none for a block or an option.
    """
    times = read_latencies(path)
    if times.fingerprint != fingerprint:
        raise QlipError(
            f"the times in {path} are those of another model",
            expected=f"fingerprint {fingerprint[:16]}…",
            found=f"{times.fingerprint[:16]}…",
            fix="--bundle with a bundle of this model",
        )
    macs_of_block: dict[str, int] = defaultdict(int)
    for block, _, macs in layers.values():
        macs_of_block[block] += macs
    costs = torch.zeros(len(units), len(options))
    for block, unit, macs in layers.values():
        measured = times.milliseconds.get(block, {})
        if missing := [b for b in options if b not in measured]:
            raise QlipError(
                f"no time of block {block} at {missing[0]} bits",
                expected=f"{', '.join(map(str, options))} bits of every block",
                found=f"{', '.join(map(str, measured)) or 'nothing'} for {block} in {path}",
                fix="--bundle with a bundle built at these bits and with the same --blocks",
            )
        share = macs / macs_of_block[block]
        cost = torch.tensor([measured[b] for b in options]) * share
        costs[units.index(unit)] += cost
    return costs - costs.min(dim=1, keepdim=True).values
