"""A memory budget over the parts of a run: what is loaded, what it is refused for, what it came to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from qlip_export.runtime.chain import Chain, Pattern
from qlip_export.runtime.component import Component
from qlip_export.runtime.engines import Engines
from qlip_export.runtime.residency import (
    ResidencyPlan,
    all_resident,
    smallest_budget,
    too_small,
    too_small_to_tell,
)
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
        self,
        budget: int | None,
        engines: Engines,
        chain: Chain,
        first: Sequence[Component],
        last: Sequence[Component],
        uniform: Pattern | None,
    ) -> None:
        """Nothing is loaded or dropped yet.

        Args:
            budget: Bytes.
            engines: All that may be loaded.
            chain: The denoiser.
            first: What runs before it: text encoders, and the policy where it decides.
            last: What runs after it.
            uniform: What the denoiser runs at every step; ``None``: what the policy asks for.
        """
        self._budget = budget
        self._engines = engines
        self._chain = chain
        self._first, self._last = first, last
        self._components = [*first, *last]
        self._uniform = uniform
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

    def require(self) -> None:
        """Refuse a budget that is too small before anything is loaded, as far as that can be told.

        Raises:
            QlipError: It is too small for bits that are known, or for finding them out.
        """
        if self._budget is None:
            return
        if self._uniform is not None:
            if (least := self._least_with(self._chain.engines_of([self._uniform]))) > self._budget:
                raise too_small(self._budget, least)
        elif (text := self._least_before()) > self._budget:
            every = self._least_with(self._chain.every_engine())
            raise too_small_to_tell(self._budget, text, self._least_of_all(), every)

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
        if (least := self._least(accesses, fixed)) > self._budget:
            every = self._least_with(self._chain.every_engine())
            raise too_small(self._budget, least, every if self._uniform is None else None)
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

    def _least_before(self) -> int:
        """Return the budget that is enough until the bits are known."""
        return self._least(self._keys(self._first), self._parts_bytes())

    def _least_with(self, blocks: Sequence[str], buffers: int | None = None) -> int:
        """Return the budget of runs of these engines, whose own buffers take ``buffers`` bytes."""
        taken = self._chain.buffer_bytes(blocks, alone=True) if buffers is None else buffers
        after = self._least([*blocks, *self._keys(self._last)], self._parts_bytes() + taken)
        return max(self._least_before(), after)

    def _least_of_all(self) -> int:
        """Return the budget below which no prompt runs, whatever its bits."""
        choices = ([v.onnx for v in block.variants.values()] for block in self._chain.blocks)
        smallest = [min(choice, key=lambda onnx: self._least([onnx], 0)) for choice in choices]
        return self._least_with(smallest, self._chain.least_buffer_bytes())

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
