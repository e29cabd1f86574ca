"""The engines of a target that are loaded; where a plan says so, they come and go in the background."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from qlip_export.backends.base import Engine
from qlip_export.backends.heap import return_free_memory
from qlip_export.backends.numa import unbind_memory
from qlip_export.bundle import Bundle
from qlip_export.compiled import EngineEntry, EngineMemory
from qlip_export.runtime.residency import Action, ResidencyPlan, plan_residency
from qlip_export.runtime.targets import Target

UNBIND_EVERY = 32
"""Drops after which mappings are merged again: each leaves dozens behind, and merging takes milliseconds."""

Bind = Callable[[Engine, EngineEntry], None]
"""Binds a new engine to its buffers."""


class Engines:
    """Engines by the ONNX file that they were compiled from.

    One thread at a time may load and drop: the caller's, or inside `following` the background thread.

    Attributes:
        reserve: Bytes that a budget sets aside; see `Backend`.
        drops: How many engines were dropped so far.
        recent: What the denoiser ran last under a budget, in that order.
    """

    def __init__(self, bundle: Bundle, target: Target) -> None:
        """Load nothing yet."""
        self._bundle = bundle
        self._target = target.entry
        self._backend = target.backend
        self.reserve = target.backend.reserve
        self.drops = 0
        self.recent: tuple[str, ...] = ()
        self._loaded: dict[str, Engine] = {}
        self._binds: dict[str, weakref.WeakMethod[Bind]] = {}
        self._generous: set[str] = set()
        self._whole: dict[str, tuple[int, int, int] | None] = {}

    def __getitem__(self, onnx: str) -> Engine:
        return self._loaded[onnx]

    def __contains__(self, onnx: str) -> bool:
        return onnx in self._loaded

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._loaded))

    def entry(self, onnx: str) -> EngineEntry:
        """Return the manifest's entry of an engine.

        Raises:
            QlipError: The target has none.
        """
        return self._bundle.engine(self._target, onnx)

    def expect(self, onnx: str, bind: Bind) -> None:
        """Say which method binds an engine to its buffers whenever it is loaded.

        Its object owns buffers and refers to these engines, so they do not refer to it: what nobody uses any
        more goes at once, engines and all, and does not wait for Python's collector.
        """
        self._binds[onnx] = weakref.WeakMethod(bind)

    def memory(self, onnx: str) -> EngineMemory:
        """Return what an engine takes: as measured where it was compiled, otherwise a rough estimate."""
        entry = self.entry(onnx)
        if entry.memory is not None:
            return entry.memory
        size = self._bundle.manifest.files[entry.path].size
        ports = sum(port.nbytes for port in (*entry.inputs, *entry.outputs))
        return EngineMemory(resident=2 * size, scratch=4 * ports, loading=size)

    def measured(self, keys: Iterable[str]) -> bool:
        """Return whether what these engines take was measured."""
        return all(self.entry(key).memory is not None for key in keys)

    def ensure(self, keys: Iterable[str]) -> None:
        """Load what is missing, for runs without a budget: engines keep their scratch memory.

        Raises:
            QlipError: An engine file is missing or damaged.
        """
        wanted = list(dict.fromkeys(keys))
        missing = [key for key in wanted if key not in self._loaded]
        # Hashing and loading are single-threaded and leave the interpreter free: two at a time.
        with ThreadPoolExecutor(max_workers=2) as pool:
            for key, engine in zip(missing, pool.map(self._load, missing), strict=True):
                self._bound(key, engine)
        self._set_generous(wanted)

    def drop(self, keys: Iterable[str]) -> None:
        """Drop engines and give their memory back to the system."""
        for key in list(keys):
            del self._loaded[key]
            self._generous.discard(key)
            self.drops += 1
            if self.drops % UNBIND_EVERY == 0:
                unbind_memory()
        return_free_memory()

    def plan(
        self, accesses: Sequence[str], budget: int, *, fixed: int, then: Sequence[str] = ()
    ) -> ResidencyPlan:
        """Plan a run of engines in this order, from what is loaded now; see `plan_residency`.

        Raises:
            QlipError: The budget is too small for one of them alone.
        """

        def planned() -> ResidencyPlan:
            memory = {key: self.memory(key) for key in {*accesses, *self._loaded}}
            return plan_residency(accesses, memory, budget, resident=list(self), fixed=fixed, then=then)

        found = planned()
        if found.frugal and (stuck := self._set_frugal()):
            self.drop(stuck)
            found = planned()
        elif not found.frugal:
            self._set_generous(key for key in accesses if key in self._loaded)
        return found

    @contextmanager
    def following(self, plan: ResidencyPlan) -> Iterator[Callable[[], None]]:
        """Load and drop in the background as ``plan`` says, until the block ends.

        Yields:
            What to call before each engine of the plan is run, in their order: it returns when the engine is
            loaded, and raises what the background thread ran into.
        """
        follower = _Follower(plan, self._act)
        follower.start()

        def before() -> None:
            self._backend.synchronize()  # only now have the engines before this one finished
            follower.next()

        try:
            yield before
        finally:
            follower.stop()

    def _act(self, action: Action, frugal: bool) -> None:
        if action.drop:
            self.drop(action.drop)
        if action.load is not None:
            self._bound(action.load, self._load(action.load))
            self._loaded[action.load].frugal = frugal
            return_free_memory()  # what loading took beside the engine
            if not frugal:
                self._generous.add(action.load)

    def _set_generous(self, keys: Iterable[str]) -> None:
        for key in keys:
            self._loaded[key].frugal = False
            self._generous.add(key)

    def _set_frugal(self) -> list[str]:
        """Make all engines give back their scratch memory; return those that cannot without being dropped."""
        for engine in self._loaded.values():
            engine.frugal = True
        stuck = [key for key in self._generous if not self._loaded[key].release()]
        self._generous.clear()
        return_free_memory()
        return stuck

    def _bound(self, key: str, engine: Engine) -> None:
        bind = self._binds[key]()
        assert bind is not None, "who expects an engine is alive while it runs"
        bind(engine, self.entry(key))
        self._loaded[key] = engine

    def _load(self, key: str) -> Engine:
        entry = self.entry(key)
        return self._backend.load(self._checked(entry.path), entry)

    def _checked(self, path: str) -> Path:
        """Return an engine file; one that did not change since its hash was checked is not hashed again."""
        full = self._bundle.root / path
        found = _identity(full)
        if found is None or self._whole.get(path) != found:
            full = self._bundle.file(path)
            self._whole[path] = _identity(full)
        return full


class _Follower(threading.Thread):
    """Carries out the actions of a plan, each no earlier than it may begin."""

    def __init__(self, plan: ResidencyPlan, act: Callable[[Action, bool], None]) -> None:
        super().__init__(name="qlip-residency")
        self._plan = plan
        self._act = act
        self._changed = threading.Condition()
        self._finished = -1
        self._acted = 0
        self._error: BaseException | None = None
        self._stopped = False

    def run(self) -> None:
        for action in self._plan.actions:
            with self._changed:
                while self._finished < action.start and not self._stopped:
                    self._changed.wait()
                if self._stopped:
                    return
            try:
                self._act(action, self._plan.frugal)
            except BaseException as error:
                with self._changed:
                    self._error = error
                    self._changed.notify_all()
                return
            with self._changed:
                self._acted += 1
                self._changed.notify_all()

    def next(self) -> None:
        actions = self._plan.actions
        with self._changed:
            self._finished += 1
            self._changed.notify_all()
            while self._acted < len(actions) and actions[self._acted].due <= self._finished:
                if self._error is not None:
                    raise self._error
                self._changed.wait()

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self.join()


def _identity(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns
