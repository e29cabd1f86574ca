"""The plan of a run: it fits at every moment, however late its loads are, and wastes little."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlip_export.compiled import EngineMemory
from qlip_export.errors import QlipError
from qlip_export.runtime.residency import (
    Action,
    ResidencyPlan,
    all_resident,
    plan_residency,
    smallest_budget,
)


def engine(resident: int, scratch: int = 0, loading: int = 0, seconds: float = 0.0) -> EngineMemory:
    return EngineMemory(resident=resident, scratch=scratch, loading=loading, seconds=seconds)


UNIT = {key: engine(1) for key in "abcdefgh"}


def peak_of(
    plan: ResidencyPlan,
    memory: Mapping[str, EngineMemory],
    resident: Sequence[str],
    fixed: int,
    lateness: Sequence[int],
) -> int:
    """Carry a plan out, action i beginning ``lateness[i]`` engines late, and return the most bytes taken.

    Also checks that an engine is there when it runs and that nothing is loaded twice or dropped while in use.
    """
    loaded = set(resident)
    kept = set() if plan.frugal else {*resident, *plan.accesses}
    peak, done = 0, 0

    def taken() -> int:
        return fixed + sum(memory[k].resident + (memory[k].scratch if k in kept else 0) for k in loaded)

    def act(action: Action, running: str | None) -> None:
        nonlocal peak
        assert loaded.issuperset(action.drop) and running not in action.drop
        loaded.difference_update(action.drop)
        if action.load is not None:
            assert action.load not in loaded
            loaded.add(action.load)
            # Its scratch memory comes with its first run; where it is kept, it counts from the start.
            busy = memory[running].scratch if running is not None and plan.frugal else 0
            peak = max(peak, taken() + busy + memory[action.load].loading)

    for i, key in enumerate(plan.accesses):
        while done < len(plan.actions) and plan.actions[done].due <= i:
            act(plan.actions[done], None)
            done += 1
        assert key in loaded
        peak = max(peak, taken() + (memory[key].scratch if plan.frugal else 0))
        # While it runs, the background thread goes on.
        while done < len(plan.actions) and plan.actions[done].start + lateness[done % len(lateness)] <= i:
            act(plan.actions[done], key)
            done += 1
            peak = max(peak, taken() + (memory[key].scratch if plan.frugal else 0))
    assert done == len(plan.actions)
    return peak


engines = st.dictionaries(
    st.sampled_from("abcdefghij"),
    st.builds(
        EngineMemory, resident=st.integers(0, 50), scratch=st.integers(0, 30), loading=st.integers(0, 9)
    ),
    min_size=1,
)


@given(st.data())
def test_no_plan_exceeds_its_budget(data: st.DataObject) -> None:
    memory = data.draw(engines)
    keys = sorted(memory)
    accesses = data.draw(st.lists(st.sampled_from(keys), min_size=1, max_size=40))
    resident = data.draw(st.lists(st.sampled_from(keys), unique=True))
    fixed = data.draw(st.integers(0, 20))
    least = smallest_budget(accesses, memory, fixed)
    budget = least + data.draw(st.integers(0, 300))
    plan = plan_residency(accesses, memory, budget, resident=resident, fixed=fixed)
    lateness = data.draw(st.lists(st.integers(0, 50), min_size=1, max_size=8))
    # What other runs left is dropped first; that moment belongs to them.
    left = fixed + sum(memory[k].resident + memory[k].scratch for k in resident)
    if left <= budget:
        assert peak_of(plan, memory, resident, fixed, lateness) <= plan.peak <= budget
    with pytest.raises(QlipError) as caught:
        plan_residency(accesses, memory, least - 1, resident=resident, fixed=fixed)
    assert caught.value.problem == "the memory budget is too small for this run"


@given(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=30), st.integers(1, 6))
def test_engines_of_one_size_are_loaded_as_seldom_as_can_be(accesses: list[str], capacity: int) -> None:
    plan = plan_residency(accesses, UNIT, capacity)
    assert plan.loaded == fewest_loads(accesses, capacity)


def fewest_loads(accesses: Sequence[str], capacity: int) -> int:
    """Try every choice of what goes."""
    states = {frozenset[str](): 0}
    for key in accesses:
        after: dict[frozenset[str], int] = {}
        for state, loads in states.items():
            outcomes = [state]
            if key not in state:
                loads += 1
                full = len(state) == capacity
                outcomes = [(state - {gone}) | {key} for gone in state] if full else [state | {key}]
            for outcome in outcomes:
                after[outcome] = min(loads, after.get(outcome, loads))
        states = after
    return min(states.values())


def test_everything_stays_where_it_fits() -> None:
    memory = {"a": engine(5, 3), "b": engine(7, 2)}
    plan = plan_residency("abab", memory, 17)
    assert (plan.frugal, plan.peak, plan.loaded) == (False, 17, 17)
    assert [(a.start, a.load) for a in plan.actions] == [(0, "a"), (0, "b")]


def test_scratch_memory_goes_first() -> None:
    memory = {"a": engine(5, 3), "b": engine(7, 2)}
    plan = plan_residency("abab", memory, 16)
    assert (plan.frugal, plan.peak, plan.loaded) == (True, 15, 12)


def test_the_next_engine_loads_while_another_runs() -> None:
    """Two fit: as soon as `a` has run, `c` may take its place while `b` runs."""
    plan = plan_residency("abc", UNIT, 2)
    assert plan.actions == (
        Action(0, 0, (), "a"),
        Action(0, 1, (), "b"),
        Action(1, 2, ("a",), "c"),
    )


def test_a_cycle_keeps_what_it_can() -> None:
    """Of four engines three fit: least recently used would load all four in each of ten rounds."""
    plan = plan_residency("abcd" * 10, UNIT, 3)
    assert plan.loaded == 4 + 12  # one missing each round, and every third round it is in place


def test_a_large_engine_does_not_go_for_a_small_one() -> None:
    memory = {"large": engine(100), "b": engine(4), "c": engine(4), "d": engine(4)}
    plan = plan_residency(["large", "b", "c", "d"] * 10, memory, 108)
    assert sum(action.load == "large" for action in plan.actions) == 1


def test_what_is_loaded_already_is_not_loaded_again() -> None:
    plan = plan_residency("abc", UNIT, 3, resident="bc")
    assert plan.loaded == 1


def test_engines_of_other_runs_go_first() -> None:
    plan = plan_residency("ab", UNIT, 2, resident="gh")
    assert sorted(key for action in plan.actions for key in action.drop) == ["g", "h"]


def test_what_comes_after_the_run_stays() -> None:
    drops = [
        key
        for action in plan_residency("ab", UNIT, 3, resident="gh", then="h").actions
        for key in action.drop
    ]
    assert drops == ["g"]


def test_refusal_names_the_least_budget() -> None:
    memory = {"a": engine(5_000_000, 1_000_000, 2_000_000), "b": engine(6_000_000)}
    with pytest.raises(QlipError) as caught:
        plan_residency("ab", memory, 1_000_000, fixed=500_000)
    assert caught.value.expected == "7.5 MB or more"
    assert caught.value.found == "1.0 MB"
    assert caught.value.fix == "--memory-budget 7.5MB"
    assert all_resident("abab", memory, 500_000) == 12_500_000


def test_what_takes_long_to_load_stays() -> None:
    memory = {"a": engine(10, seconds=1.0), "b": engine(10, seconds=0.01), "c": engine(10, seconds=0.01)}
    plan = plan_residency("abc" * 10, memory, 20)
    assert [action.load for action in plan.actions].count("a") == 1
    assert plan.cost == pytest.approx(1.0 + 20 * 0.01)
    unknown = plan_residency("abc" * 10, memory | {"b": engine(10)}, 20)
    assert unknown.cost == unknown.loaded, "bytes, where not all seconds are known"
