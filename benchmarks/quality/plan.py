"""Everything that docs/results.md reports: which policies are trained, and which rows are measured.

`run` works through it. Several processes may run it at once, one a GPU: each task is done by whoever takes it
first, and what is there already is not done again.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from benchmarks.quality.measure import Measurement, file_name
from benchmarks.quality.rows import Subject
from qlip_export.calibrate.bits import TRAINER
from qlip_export.calibrate.options import CalibrateOptions
from qlip_export.calibrate.stages import Calibration
from qlip_export.calibrate.trajectories import Trajectories
from qlip_export.policy.store import Policy, policy_name
from qlip_export.progress import Plain
from qlip_export.prompts import read_prompts
from qlip_export.simulate import Simulator
from qlip_export.zoo import find_model

POLICIES: dict[str, dict[str, object]] = {
    "8-16-32": {"bit_options": (8, 16, 32), "target_fab": 10.0},
    "6-8-10": {"bit_options": (6, 8, 10), "target_fab": 7.0},
    "6-8-10-layer": {"bit_options": (6, 8, 10), "target_fab": 7.0, "unit": "layer"},
    "8-16-32-layer": {"bit_options": (8, 16, 32), "target_fab": 10.0, "unit": "layer"},
    "8-16-32-latency": {"bit_options": (8, 16, 32), "target_fab": 10.0, "cost": "latency"},
    "8-16": {"bit_options": (8, 16), "target_fab": 10.0},
    "6-8-16-32": {"bit_options": (6, 8, 16, 32), "target_fab": 9.0},
    "6-8-10-complexity": {"bit_options": (6, 8, 10), "target_fab": 7.0, "criterion": "complexity"},
    "6-8-10-length": {"bit_options": (6, 8, 10), "target_fab": 7.0, "criterion": "length"},
    "6-8": {"bit_options": (6, 8), "target_fab": 7.0},
    "6-8-10-qh": {"bit_options": (6, 8, 10), "target_fab": 7.0, "parts": ("q", "h")},
    "6-8-10-qm": {"bit_options": (6, 8, 10), "target_fab": 7.0, "parts": ("q", "m")},
    "6-8-16": {"bit_options": (6, 8, 16), "target_fab": 7.0},
}
"""What each policy asks of `qlip-export calibrate` beyond its defaults."""

BY_LAYER = "8-16-32-layer"
VARIANT_ROWS = tuple(
    f"{kind}:{BY_LAYER}" for kind in ("uniform", *(f"variants-{n}" for n in (1, 2, 3, 5, 9)))
)
"""One policy by layer on engines of one option, and on at most N mixed variants of each block."""

UNIFORM_ROWS = ("fp32", "w4a32-nearest", "w4a32", "w4a16", "w4a8", "w4a6", "w4a5")
UPPER_BOUNDS = (
    r"w4a6+.*time_emb_proj",
    r"w4a6+up_blocks.*resnets.*conv1",
    r"w4a32!up_blocks.*conv(1|_shortcut)",
)
"""What two refinements of the grids could gain at most: these layers' inputs, or weights, stay exact."""
BASELINES = tuple(
    f"{kind}:{name}" for name in ("6-8-10", "8-16-32") for kind in ("random", "timestep", "static")
)


@dataclass(frozen=True)
class Task:
    """A piece of work: what it writes, what must be there before, and how it is done."""

    name: str
    result: Path
    needs: tuple[Path, ...]
    do: Callable[[], None]
    is_current: Callable[[], bool] = lambda: True

    def is_done(self) -> bool:
        """Say whether the result is there, and still what would be made."""
        return self.result.exists() and self.is_current()


class Worker:
    """Does the plan's tasks on one device."""

    def __init__(
        self, model: str, calibration: Path, out: Path, *, device: str, samples: int, batch_size: int
    ) -> None:
        """Load what all tasks share when it is first needed."""
        _, checkpoint = find_model(model)
        self._calibration, self._out, self._device = calibration, out, device
        self._batch_size = batch_size
        self.prompts = read_prompts(calibration / "prompts.txt")
        self.subject = Subject(checkpoint, calibration, device)
        self._measurement = Measurement(self.subject, out, samples=samples, batch_size=batch_size)

    def tasks(self) -> Iterator[Task]:
        """Yield all tasks, the most important first."""
        weights = self._calibration / "weights.json"
        yield Task("weights", weights, (), lambda: self._calibrate(stages=("weights",)))
        for row in ("fp32", "w4a32-nearest"):
            yield self._row(row, ())
        main = [*POLICIES][:2]
        for name in main:
            yield self._policy(name, weights)
        for row in UNIFORM_ROWS[2:]:
            yield self._row(row, (weights,))
        for name in main:
            yield self._row(f"qlip:{name}", (self._recipe(name),))
        for row in BASELINES:
            yield self._row(row, (self._recipe(row.split(":")[1]),))
        for criterion in ("complexity", "length"):
            yield self._labels(criterion)
        for name in [*POLICIES][2:]:
            yield self._policy(name, weights)
            yield self._row(f"qlip:{name}", (self._recipe(name),))
        for row in VARIANT_ROWS:
            yield self._row(row, (self._recipe(BY_LAYER),))
        for row in UPPER_BOUNDS:
            yield self._row(row, (weights,))

    def run(self, seconds: float) -> None:
        """Do tasks until none is left, or until ``seconds`` have passed."""
        started = time.monotonic()
        self._out.mkdir(parents=True, exist_ok=True)
        while time.monotonic() - started < seconds:
            left = [task for task in self.tasks() if not task.is_done()]
            if not left:
                break
            for task in left:
                if not all(path.exists() for path in task.needs):
                    continue
                with _claimed(self._out / f".{file_name(task.name)}.lock") as mine:
                    if mine and not task.is_done():
                        before = time.monotonic()
                        task.do()
                        print(f"{task.name}: {time.monotonic() - before:.1f} s", file=sys.stderr, flush=True)
                        break
            else:
                time.sleep(1)

    def _recipe(self, name: str) -> Path:
        return Policy.path(self._calibration, name).with_suffix(".json")

    def _row(self, row: str, needs: tuple[Path, ...]) -> Task:
        path = self._measurement.path(row)

        def is_current() -> bool:
            found = json.loads(path.read_text(encoding="utf-8")).get("policy_sha256")
            return bool(found == self.subject.policy_sha256(row))

        return Task(row, path, needs, lambda: self._measurement.row(row), is_current)

    def _policy(self, name: str, weights: Path) -> Task:
        def train() -> None:
            options = self._calibrate(stages=("q2b",), **POLICIES[name])
            made = policy_name(
                options.bit_options, options.unit, options.criterion, options.learned_parts, options.cost
            )
            assert made == name, (made, name)

        criterion = POLICIES[name].get("criterion", "quality")
        needs = (weights, self._calibration / f"t2q.{criterion}.json")
        return Task(
            f"policy {name}",
            self._recipe(name),
            needs,
            train,
            lambda: Policy.load(self._calibration, name).recipe.trainer == TRAINER,
        )

    def _labels(self, criterion: str) -> Task:
        return Task(
            f"t2q {criterion}",
            self._calibration / f"t2q.{criterion}.json",
            (),
            lambda: self._train_t2q(criterion),
        )

    def _train_t2q(self, criterion: str) -> None:
        self._calibrate(stages=("t2q",), criterion=criterion)

    def _calibrate(self, **options: object) -> CalibrateOptions:
        chosen = CalibrateOptions.model_validate(
            {"device": self._device, "batch_size": self._batch_size, **options}
        )
        _Shared(self, chosen).run(Plain())
        return chosen


class _Shared(Calibration):
    """A calibration that shares simulators and trajectories with all others of its worker."""

    def __init__(self, worker: Worker, options: CalibrateOptions) -> None:
        super().__init__(worker.subject.checkpoint, worker.prompts, options, worker.subject.calibration)
        self._subject = worker.subject

    def simulator(self, *, quantized: bool = False) -> Simulator:
        return self._subject.simulator("w4a32" if quantized else "fp32")

    def record(self, simulator: Simulator, prompts: list[str]) -> Trajectories:
        return self._subject.trajectories(prompts)


@contextmanager
def _claimed(path: Path) -> Iterator[bool]:
    """Hold a lock if nobody has it; say whether we do."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()
