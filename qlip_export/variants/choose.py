"""What a build is to export: variants by layer within its limits, and which blocks become one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from qlip_export.errors import QlipError
from qlip_export.manifest import LayerEntry
from qlip_export.policy.table import DecisionTable
from qlip_export.spec import Container, Frozen, Unit, container_of
from qlip_export.variants.fuse import fused_name, runs_of_one_mind
from qlip_export.variants.merge import MOST_COUNTED, bits_of, cheapest
from qlip_export.variants.plan import EXACT, Planner, VariantPlan, units_of_blocks
from qlip_export.variants.reachable import Bits, demand, edges_of

SHOWN = (1, 2, 3, 5, 9)
"""Numbers of variants that a build tells of, beside its own choice and all of them."""


@dataclass(frozen=True)
class Limits:
    """What a build asks for; at most one of them picks the number of variants.

    Attributes:
        max_variants: Of each block.
        max_engine_bytes: Of all engines of the denoiser, in all sizes of images together, estimated.
        target_fab: Feature average bits to reach with the fewest engines.
        target_latency: Seconds of the denoiser for an image, to reach with the fewest engines.
    """

    max_variants: int | None = None
    max_engine_bytes: int | None = None
    target_fab: float | None = None
    target_latency: float | None = None


@dataclass(frozen=True)
class Hardware:
    """What is known of the engines before they are made.

    Attributes:
        engine_bytes: Says what an engine takes whose layers are carried by these containers; none where no
            backend is known.
        milliseconds: Measured times, block -> bits -> a call at uniform bits; none where nobody measured.
        measured: Times of variants, block -> bits of its quantized layers -> a call, where an earlier build
            has engines of them.
        sizes: Of images and batches; a variant becomes an engine in each. Times are those of the first.
    """

    engine_bytes: Callable[[Sequence[tuple[LayerEntry, Container]]], int] | None = None
    milliseconds: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    measured: Mapping[str, Mapping[tuple[int, ...], float]] = field(default_factory=dict)
    sizes: int = 1


class VariantRow(Frozen):
    """What a number of variants costs and gives."""

    variants: int | None = Field(description="of each block at most; none: one for all that can be asked for")
    engines: int = Field(description="of the denoiser, in all sizes of images together")
    bytes: int | None = Field(description="of these engines, estimated; none: of no known backend")
    fab: float = Field(description="feature average bits, expected over calibration prompts")
    seconds: float | None = Field(
        description="of the denoiser for an image, expected from the times of uniform blocks; none: no times"
    )


@dataclass(frozen=True)
class Choice:
    """What to export.

    Attributes:
        runs: The chain; blocks of one run become one.
        variants: By the name of the (fused) block, the bits of its quantized layers by name.
        rows: What other numbers of variants would cost and give.
        chosen: What this choice costs and gives; none, and no rows, for uniform variants.
    """

    runs: list[list[str]]
    variants: dict[str, list[dict[str, int]]]
    rows: tuple[VariantRow, ...]
    chosen: VariantRow | None


class Chooser:
    """Chooses variants for the blocks of a denoiser."""

    def __init__(
        self,
        table: DecisionTable,
        qualities: Sequence[float],
        limits: Limits,
        hardware: Hardware,
        *,
        precision: Unit,
        fuse: bool,
        batches: bool,
    ) -> None:
        """Remember what to choose by.

        Args:
            table: The policy.
            qualities: q of the calibration prompts.
            limits: Of the build.
            hardware: What is known of the engines.
            precision: ``layer`` for a variant for each pattern, ``block`` for one for each bit option.
            fuse: Make one block of neighbours that always change together.
            batches: Whether prompts share a run.
        """
        self._table, self._qualities = table, qualities
        self._limits, self._hardware = limits, hardware
        self._precision, self._fuse, self._batches = precision, fuse, batches

    def __call__(self, blocks: Mapping[str, Sequence[LayerEntry]], apart: Sequence[str]) -> Choice:
        """Choose.

        Args:
            blocks: Layers of every block, in the order of the chain.
            apart: Blocks that are never fused.

        Raises:
            QlipError: The policy decides over other units, or no choice is within the limits.
        """
        names = {name: [e.name for e in layers if e.quantized] for name, layers in blocks.items()}
        rows: tuple[VariantRow, ...]
        chosen: VariantRow | None
        decided = {name: layers for name, layers in names.items() if layers}
        if self._precision == "block":
            options = np.array(self._table.options, dtype=np.uint8)[:, None]
            plan = VariantPlan({n: np.repeat(options, len(k), axis=1) for n, k in decided.items()}, 0.0)
            rows, chosen = (), None
        else:
            planner = Planner(self._table, decided, self._qualities, batches=self._batches)
            costs = _Costs(planner, blocks, self._hardware, self._table)
            plan, chosen = self._pick(planner, costs)
            shown = [n for n in SHOWN if n < max(len(m.demand.patterns) for m in planner.mergers.values())]
            rows = tuple(costs.row(n, planner.plan(n)) for n in (*shown, EXACT))
        runs = [[name] for name in blocks]
        serving = self._serving(decided, plan)
        if self._fuse:
            states = len(next(iter(serving.values())))
            still = {n: serving.get(n, np.zeros(states, dtype=np.int64)) for n in blocks}
            runs = runs_of_one_mind([*blocks], still, apart, alike=self._precision == "block")
        return Choice(runs, _variants(runs, decided, plan, serving), rows, chosen)

    def _serving(
        self, decided: Mapping[str, Sequence[str]], plan: VariantPlan
    ) -> dict[str, NDArray[np.int64]]:
        """Return for each block the variant that runs in each state of the policy, (S,)."""
        edges, units = edges_of(self._table), units_of_blocks(self._table, decided)
        found = {}
        for name, variants in plan.variants.items():
            asked = demand(self._table, units[name], self._qualities, edges, batches=self._batches)
            found[name] = cheapest(variants, asked.patterns, bits_of(variants))[asked.states]
        return found

    def _pick(self, planner: Planner, costs: _Costs) -> tuple[VariantPlan, VariantRow]:
        limits = self._limits
        if limits.max_engine_bytes is not None:
            return costs.within(limits.max_engine_bytes)
        if limits.target_fab is None and limits.target_latency is None:
            count = limits.max_variants or EXACT
            plan = planner.plan(count)
            return plan, costs.row(count, plan)
        if limits.target_latency is not None and not costs.timed:
            raise QlipError(
                "--target-latency needs the times of this model's blocks on this device",
                expected="latency.json in the calibration folder, or at -o a bundle by block that was timed; "
                "of this backend, device and batch size",
                found="none that fits",
                fix="qlip-export calibrate --stages q2b --cost latency --bundle BUNDLE",
            )
        row = None
        for count in (*range(1, MOST_COUNTED + 1), EXACT):
            plan = planner.plan(count)
            row = costs.row(count, plan)
            fits = row.fab <= limits.target_fab if limits.target_fab is not None else None
            if fits is None:
                assert row.seconds is not None and limits.target_latency is not None
                fits = row.seconds <= limits.target_latency
            if fits:
                return plan, row
        assert row is not None
        what = "FAB" if limits.target_fab is not None else "seconds an image"
        least = row.fab if limits.target_fab is not None else row.seconds
        raise QlipError(
            f"no number of variants reaches this target: the policy asks for {least:.4g} {what}",
            expected=f"{least:.4g} or more",
            found=f"{limits.target_fab if limits.target_fab is not None else limits.target_latency:g}",
            fix="a higher target, or a policy that asks for less",
        )


class _Costs:
    """Bytes and seconds of plans."""

    def __init__(
        self,
        planner: Planner,
        blocks: Mapping[str, Sequence[LayerEntry]],
        hardware: Hardware,
        table: DecisionTable,
    ) -> None:
        self._planner, self._blocks, self._hardware = planner, blocks, hardware
        self._options, self._steps = table.options, len(table.group_of_step)
        known = hardware.milliseconds
        self.timed = all(set(table.options) <= set(known.get(name, ())) for name in blocks)

    def row(self, count: int, plan: VariantPlan) -> VariantRow:
        sizes = None
        if self._hardware.engine_bytes is not None:
            sizes = [self._bytes(name, v) for name, variants in plan.variants.items() for v in variants]
        return VariantRow(
            variants=None if count == EXACT else count,
            engines=plan.engines * self._hardware.sizes,
            bytes=None if sizes is None else sum(sizes),
            fab=round(plan.fab, 4),
            seconds=round(self._seconds(plan), 4) if self.timed else None,
        )

    def within(self, limit: int) -> tuple[VariantPlan, VariantRow]:
        """Give every block one variant, then one more to whichever saves most bits a byte, while it fits."""
        mergers = self._planner.mergers
        counts = dict.fromkeys(mergers, 1)
        sizes = {name: self._total(name, mergers[name].variants(1)) for name in mergers}
        if (least := sum(sizes.values())) > limit:
            raise QlipError(
                "--max-engine-bytes holds not even one engine for each block",
                expected=f"about {least} or more",
                found=str(limit),
                fix="a larger budget, or a backend with smaller engines",
            )
        open_to_more = dict.fromkeys(mergers, True)
        while any(open_to_more.values()):
            offers = []
            for name, is_open in open_to_more.items():
                step = self._step(name, counts[name]) if is_open else None
                if step is None or sum(sizes.values()) - sizes[name] + step[1] > limit:
                    open_to_more[name] = False
                    continue
                count, size, saved = step
                offers.append((saved / max(size - sizes[name], 1), name, count, size))
            if offers:
                _, name, count, size = max(offers)
                counts[name], sizes[name] = count, size
        plan = self._planner.plan(counts)
        most = max(len(variants) for variants in plan.variants.values())
        exact = all(len(v) == len(mergers[n].demand.patterns) for n, v in plan.variants.items())
        return plan, self.row(EXACT if exact else most, plan)

    def _step(self, name: str, count: int) -> tuple[int, int, float] | None:
        """Return the next number of variants of a block that saves bits, their bytes, and the bits saved."""
        merger = self._planner.mergers[name]
        now = merger.expected(merger.variants(count))
        for more in (*range(count + 1, MOST_COUNTED + 1), EXACT):
            variants = merger.variants(more)
            if (saved := now - merger.expected(variants)) > 0:
                return more, self._total(name, variants), saved
            if more >= len(merger.demand.patterns):
                return None
        return None

    def _total(self, name: str, variants: Bits) -> int:
        return sum(self._bytes(name, variant) for variant in variants)

    def _bytes(self, name: str, variant: Bits) -> int:
        """Return roughly what the engines of a variant take, one for each size."""
        assert self._hardware.engine_bytes is not None
        bits = iter(variant.tolist())
        layers = self._blocks[name]
        return self._hardware.sizes * self._hardware.engine_bytes(
            [(e, container_of(next(bits)) if e.quantized else Container.HALF) for e in layers]
        )

    def _seconds(self, plan: VariantPlan) -> float:
        """Return the seconds of a run.

        Variants that were timed take what they took. In others a layer has the share of its block's time at
        its bits that it has of its multiply-accumulates.
        """
        total = 0.0
        for name, layers in self._blocks.items():
            times = self._hardware.milliseconds[name]
            if name not in plan.variants:
                total += self._steps * min(times[b] for b in self._options)
                continue
            merger, variants = self._planner.mergers[name], plan.variants[name]
            macs = np.array([e.macs for e in layers if e.quantized], dtype=np.float64)
            grid = np.array(self._options)
            of_option = np.array([times[b] for b in self._options])
            estimates = of_option[np.searchsorted(grid, variants)] @ (macs / macs.sum())
            known = self._hardware.measured.get(name, {})
            milliseconds = np.array(
                [
                    known.get(tuple(bits), guess)
                    for bits, guess in zip(variants.tolist(), estimates, strict=True)
                ]
            )
            serving = cheapest(variants, merger.demand.patterns, bits_of(variants))
            total += float(merger.demand.steps @ milliseconds[serving])
        return total / 1000


def _variants(
    runs: Sequence[Sequence[str]],
    decided: Mapping[str, Sequence[str]],
    plan: VariantPlan,
    serving: Mapping[str, NDArray[np.int64]],
) -> dict[str, list[dict[str, int]]]:
    """Return the variants of every run: for each state what its blocks run together, each once."""
    found: dict[str, list[dict[str, int]]] = {}
    for run in runs:
        inside = [name for name in run if name in decided]
        if not inside:
            found[fused_name(run)] = [{}]
            continue
        if len(run) == 1:
            together = np.arange(len(plan.variants[run[0]]))[:, None]
        else:
            together = np.unique(np.stack([serving[name] for name in inside], axis=1), axis=0)
        found[fused_name(run)] = [
            {
                layer: int(bits)
                for name, index in zip(inside, row, strict=True)
                for layer, bits in zip(decided[name], plan.variants[name][index], strict=True)
            }
            for row in together
        ]
    return found
