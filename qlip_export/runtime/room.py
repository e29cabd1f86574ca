"""A memory budget over the parts of a run: what is loaded, what it is refused for, what it came to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from qlip_export.runtime.chain import Chain, Pattern
from qlip_export.runtime.component import Component
from qlip_export.runtime.engines import Engines
from qlip_export.runtime.residency import ResidencyPlan, all_resident, smallest_budget, too_small
from qlip_export.spec import Frozen

Before = Callable[[], None]
"""To be called before each engine of a run."""


class MemoryUse(Frozen):
    """What one batch did with its memory budget, bytes, by prediction.

    Attributes:
        budget: What was allowed.
        peak: The most at any moment.
        smallest: The least budget that this batch can do with.
        all_resident: What it takes to load each engine once and keep everything.
        loaded: What was loaded, engines loaded again included.
        measured: Whether what engines take was measured where they were compiled.
    """

    budget: int
    peak: int
    smallest: int
    all_resident: int
    loaded: int
    measured: bool


class Room:
    """The budget of one batch; ``None`` lets everything stay that was ever loaded."""

    def __init__(
        self, budget: int | None, engines: Engines, chain: Chain, components: Sequence[Component]
    ) -> None:
        """Nothing is loaded or dropped yet; ``components`` are all that the pipeline has."""
        self._budget = budget
        self._engines = engines
        self._chain = chain
        self._components = components
        self._used: list[MemoryUse] = []

    @property
    def used(self) -> MemoryUse | None:
        """What the parts of the batch came to together, with a budget."""
        if not self._used:
            return None
        last = self._used[-1]
        return last.model_copy(
            update={
                "peak": max(part.peak for part in self._used),
                "smallest": max(part.smallest for part in self._used),
                "loaded": sum(part.loaded for part in self._used),
                "measured": all(part.measured for part in self._used),
            }
        )

    def require(self, patterns: Sequence[Pattern] | None) -> None:
        """Refuse a budget that not even the parts beside the denoiser fit into.

        Args:
            patterns: What the denoiser may be asked to run; ``None``: any variants.

        Raises:
            QlipError: It is too small; names one that is enough for every prompt.
        """
        if self._budget is None:
            return
        parts = self._keys(self._components)
        blocks = self._chain.every_engine() if patterns is None else self._chain.engines_of(patterns)
        if self._least(parts, self._parts_bytes()) > self._budget:
            fixed = self._parts_bytes() + self._chain.buffer_bytes(blocks, alone=True)
            raise too_small(self._budget, self._least([*parts, *blocks], fixed), "every prompt")

    @contextmanager
    def running(self, patterns: Sequence[Pattern], parts: Sequence[Component]) -> Iterator[Before | None]:
        """Have engines loaded in time for the steps ``patterns`` and then ``parts``, in this order.

        Yields:
            What to call before each engine of the steps, with a budget; ``parts`` call it themselves.

        Raises:
            QlipError: The budget is too small for them.
        """
        if self._budget is None:
            self._chain.load(dict.fromkeys(patterns))
            yield None
            return
        blocks = self._chain.engines_of(patterns)
        accesses = [*blocks, *self._keys(parts)]
        fixed = self._make_room(blocks, accesses, self._budget)
        self._chain.prepare(patterns)
        for part in parts:
            part.prepare()
        if blocks:
            self._engines.recent = tuple(blocks)
        # What comes next is most likely what the last batch ran.
        around = self._keys(self._components)
        then = [*around, *self._engines.recent] if blocks else [*self._engines.recent, *around]
        plan = self._engines.plan(accesses, self._budget, fixed=fixed, then=then)
        alone = self._parts_bytes() + self._chain.buffer_bytes(blocks, alone=True)
        self._used.append(self._use(plan, alone, self._budget))
        with self._engines.following(plan) as before:
            for part in parts:
                part.before = before
            try:
                yield before
            finally:
                for part in parts:
                    part.before = None

    def _make_room(self, blocks: Sequence[str], accesses: Sequence[str], budget: int) -> int:
        """Return the bytes of all buffers; drop those of other runs where not everything fits."""
        parts = self._parts_bytes()
        fixed = parts + self._chain.buffer_bytes(blocks)
        alone = parts + self._chain.buffer_bytes(blocks, alone=True)
        memory = {key: self._engines.memory(key) for key in {*accesses, *self._engines}}
        if blocks:
            crowded = all_resident([*memory], memory, fixed) > budget
        else:  # nobody knows yet which blocks come next: they stay if they can
            crowded = smallest_budget(accesses, memory, fixed) > budget
        if not crowded or fixed == alone:
            return fixed
        components = self._keys(self._components)
        self._engines.drop([key for key in self._engines if key not in {*accesses, *components}])
        self._chain.keep_buffers(blocks)
        return alone

    @staticmethod
    def _keys(components: Sequence[Component]) -> list[str]:
        return [key for component in components for key in component.keys]

    def _parts_bytes(self) -> int:
        """Return what is taken beside engines and the denoiser's buffers."""
        return self._engines.reserve + sum(component.buffer_bytes for component in self._components)

    def _least(self, keys: Sequence[str], fixed: int) -> int:
        return smallest_budget(keys, {key: self._engines.memory(key) for key in keys}, fixed)

    def _use(self, plan: ResidencyPlan, fixed: int, budget: int) -> MemoryUse:
        memory = {key: self._engines.memory(key) for key in plan.accesses}
        every = {key: self._engines.memory(key) for key in self._keys(self._components)}
        return MemoryUse(
            budget=budget,
            peak=plan.peak,
            smallest=smallest_budget(plan.accesses, memory, fixed),
            all_resident=all_resident([*memory, *every], memory | every, fixed),
            loaded=plan.loaded,
            measured=self._engines.measured(plan.accesses),
        )
