"""Which engines are loaded when: planned over a whole run, because a run's future is known.

The order in which engines run is fixed before the first step, so Belady's rule (1966) applies: where room is
needed, what is used again latest goes. It is optimal for engines of one size and cost. Theirs differ a
hundredfold, so others compete: one drops the smallest engine that makes enough room, two drop what frees
most bytes for the longest time for each second that loading it again will take. The plan whose loads take the
least time wins. Then every load moves forward to the first moment at which its room is free, and engines that
run in the meantime hide it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from qlip_export.compiled import EngineMemory
from qlip_export.errors import QlipError

Victim = Callable[[Mapping[str, int], Callable[[str], int], int], str]
"""Chooses among engines (with their bytes) by how long they will be idle, where so many bytes are missing."""


@dataclass(frozen=True)
class Action:
    """Engines to drop, and then one to load.

    Attributes:
        start: It may begin when so many engines of the run have finished.
        due: It must be over before the engine with this number starts.
        drop: Engines that go, none of which runs in between.
        load: The engine that comes, if any.
    """

    start: int
    due: int
    drop: tuple[str, ...]
    load: str | None


@dataclass(frozen=True)
class ResidencyPlan:
    """Loads and drops of one run, in their order; one follows the other.

    Attributes:
        accesses: Engines in the order in which they run.
        actions: What happens to them.
        frugal: Whether engines give back their scratch memory after every run.
        peak: Most bytes at any moment, by prediction.
        loaded: Bytes that are loaded, engines loaded again included.
        cost: Seconds that this takes where each engine's are known, otherwise its bytes.
    """

    accesses: tuple[str, ...]
    actions: tuple[Action, ...]
    frugal: bool
    peak: int
    loaded: int
    cost: float


def smallest_budget(accesses: Collection[str], memory: Mapping[str, EngineMemory], fixed: int) -> int:
    """Return the bytes below which some engine of ``accesses`` cannot run, even alone."""
    return fixed + max(memory[k].resident + max(memory[k].scratch, memory[k].loading) for k in accesses)


def too_small(budget: int, least: int, every: int | None = None) -> QlipError:
    """Return the error that refuses a budget and names the least that works for this run.

    Args:
        budget: What was allowed, bytes.
        least: What this run needs.
        every: What is enough for every prompt; none: this run's bits are no prompt's.
    """
    return QlipError(
        "the memory budget is too small for this run",
        expected=f"{as_megabytes(least)} or more"
        + (f" ({as_megabytes(every)} for every prompt)" if every is not None else ""),
        found=as_megabytes(budget),
        fix=f"--memory-budget {as_option(least)}",
    )


def too_small_to_tell(budget: int, text: int, least: int, every: int) -> QlipError:
    """Return the error that refuses a budget in which not even the bits of the prompt can be found out.

    Args:
        budget: What was allowed, bytes.
        text: What finding them out needs.
        least: What every prompt needs at least.
        every: What is enough for every prompt.
    """
    return QlipError(
        "the memory budget is too small for this run",
        expected=f"at least {as_megabytes(least)}, by the bits of the prompt; "
        f"{as_megabytes(every)} for every prompt",
        found=as_megabytes(budget),
        fix=f"--memory-budget {as_option(every)}; "
        f"from {as_option(text)} on this error tells what the prompt needs",
    )


def as_megabytes(size: int) -> str:
    """Return bytes in MB of 10**6 bytes, rounded up to 0.1."""
    return f"{-(-size // 100_000) / 10:.1f} MB"


def as_option(size: int) -> str:
    """Return bytes as `--memory-budget` takes them."""
    return as_megabytes(size).replace(" ", "")


def all_resident(accesses: Collection[str], memory: Mapping[str, EngineMemory], fixed: int) -> int:
    """Return the bytes of a run that keeps all engines and their scratch memory."""
    return fixed + sum(memory[key].resident + memory[key].scratch for key in set(accesses))


def plan_residency(
    accesses: Sequence[str],
    memory: Mapping[str, EngineMemory],
    budget: int,
    *,
    resident: Collection[str] = (),
    fixed: int = 0,
    then: Sequence[str] = (),
) -> ResidencyPlan:
    """Plan one run.

    Args:
        accesses: Engines in the order in which they run.
        memory: What they take, and what those in ``resident`` take.
        budget: Bytes.
        resident: Engines that are loaded already.
        fixed: Bytes that are taken throughout, e.g. buffers.
        then: Engines likely to be wanted after the run, soonest first.

    Returns:
        The plan. At every moment, however late its loads are, no more than ``budget`` bytes are taken.

    Raises:
        QlipError: Less than `smallest_budget`.
    """
    if (least := smallest_budget(accesses, memory, fixed)) > budget:
        raise too_small(budget, least)
    needed = all_resident(accesses, memory, fixed)
    largest_load = max((memory[key].loading for key in accesses if key not in resident), default=0)
    # Engines that came from elsewhere may have kept their scratch memory; they count in full or go.
    frugal = needed + largest_load > budget
    sizes = {
        key: found.resident + (0 if frugal else found.scratch)
        for key, found in memory.items()
        if key in resident or key in set(accesses)
    }
    timed = all(memory[key].seconds > 0 for key in sizes)
    costs = {key: memory[key].seconds if timed else float(memory[key].resident) for key in sizes}
    rules: list[Victim] = [
        _used_latest,
        _just_enough,
        *(partial(_cheapest, costs, power) for power in (1, 2)),
    ]
    planner = _Planner(accesses, memory, sizes, costs, budget - fixed, frugal, then)
    plans = [planner.plan(resident, rule) for rule in rules]
    best = min(plans, key=lambda plan: (plan.cost, sum(costs[k] for a in plan.actions for k in a.drop)))
    return replace(best, peak=fixed + best.peak)


def _used_latest(candidates: Mapping[str, int], idle: Callable[[str], int], missing: int) -> str:
    return max(candidates, key=lambda key: (idle(key), candidates[key]))


def _just_enough(candidates: Mapping[str, int], idle: Callable[[str], int], missing: int) -> str:
    enough = [key for key, size in candidates.items() if size >= missing]
    if not enough:
        return max(candidates, key=lambda key: (candidates[key], idle(key)))
    return min(enough, key=lambda key: (candidates[key], -idle(key)))


def _cheapest(
    costs: Mapping[str, float],
    power: int,
    candidates: Mapping[str, int],
    idle: Callable[[str], int],
    missing: int,
) -> str:
    return max(candidates, key=lambda key: idle(key) ** power * candidates[key] / max(costs[key], 1e-9))


class _Planner:
    """Sizes and order of a run; `plan` applies one rule to them."""

    def __init__(
        self,
        accesses: Sequence[str],
        memory: Mapping[str, EngineMemory],
        sizes: Mapping[str, int],
        costs: Mapping[str, float],
        capacity: int,
        frugal: bool,
        then: Sequence[str],
    ) -> None:
        self._accesses = tuple(accesses)
        self._sizes = sizes
        self._costs = costs
        self._loading = {key: memory[key].loading for key in sizes}
        self._scratch = {key: memory[key].scratch if frugal else 0 for key in sizes}
        self._capacity = capacity
        self._frugal = frugal
        self._never = len(accesses) + len(then)
        self._uses: dict[str, list[int]] = {}
        for i, key in enumerate((*accesses, *then)):
            self._uses.setdefault(key, []).append(i)

    def plan(self, resident: Collection[str], victim: Victim) -> ResidencyPlan:
        actions, taken, peak = self._on_demand(resident, victim)
        actions, peak = self._earlier(actions, taken, peak)
        loads = [action.load for action in actions if action.load is not None]
        loaded, cost = sum(self._sizes[key] for key in loads), sum(self._costs[key] for key in loads)
        return ResidencyPlan(self._accesses, tuple(actions), self._frugal, peak, loaded, cost)

    def _idle(self, after: int, key: str) -> int:
        uses = self._uses.get(key, [])
        index = bisect_left(uses, after)
        return (uses[index] if index < len(uses) else self._never) - after

    def _last_use(self, key: str, before: int) -> int:
        uses = self._uses.get(key, [])
        index = bisect_left(uses, before)
        return uses[index - 1] if index else -1

    def _on_demand(self, resident: Collection[str], victim: Victim) -> tuple[list[Action], list[int], int]:
        """Load every engine when it is wanted; return also the bytes that are loaded at each access."""
        loaded = {key: self._sizes[key] for key in resident}
        total = sum(loaded.values())
        actions: list[Action] = []
        taken: list[int] = []
        peak = 0
        for i, key in enumerate(self._accesses):
            absent = key not in loaded
            beside = self._scratch[key]
            if absent:
                beside = self._sizes[key] + max(beside, self._loading[key])
            drop = []
            while (missing := total + beside - self._capacity) > 0:
                candidates = {k: size for k, size in loaded.items() if k != key}
                gone = victim(candidates, partial(self._idle, i), missing)
                total -= loaded.pop(gone)
                drop.append(gone)
            if absent or drop:
                actions.append(Action(i, i, tuple(drop), key if absent else None))
            peak = max(peak, total + beside)
            if absent:
                loaded[key] = self._sizes[key]
                total += self._sizes[key]
            taken.append(total)
        return actions, taken, peak

    def _earlier(self, actions: list[Action], taken: list[int], peak: int) -> tuple[list[Action], int]:
        """Let every action begin as early as the room for it is free, after the one before it.

        An action that is late changes nothing but its own bytes: those after it wait for it. So it is enough
        that each one fits where it begins, given the ones before it.
        """
        moved: list[Action] = []
        loading = [0] * len(taken)
        floor = 0
        for action in actions:
            start = action.due
            freed = sum(self._sizes[key] for key in action.drop)
            free_from = 1 + max((self._last_use(key, action.due) for key in action.drop), default=-1)
            if action.load is not None:
                # It cannot come before it went.
                free_from = max(free_from, 1 + self._last_use(action.load, action.due))
            size = self._sizes[action.load] if action.load is not None else 0
            transient = self._loading[action.load] if action.load is not None else 0
            while start > max(floor, free_from):
                at = start - 1
                bytes_there = taken[at] - freed + size
                moment = bytes_there + self._scratch[self._accesses[at]] + max(loading[at], transient)
                if moment > self._capacity:
                    break
                taken[at], loading[at] = bytes_there, max(loading[at], transient)
                peak = max(peak, moment)
                start = at
            floor = start
            moved.append(replace(action, start=start))
        return moved, peak
