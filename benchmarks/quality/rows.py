"""The configurations that are compared, by name.

``fp32``, ``w4a8``, ``w4a32-nearest``: uniform bits; 4-bit weights with learned rounding, or to nearest.
``qlip:NAME``: the policy NAME of the calibration folder. Baselines at its FAB: ``random:NAME`` draws the bits
of every prompt, step and layer from the policy's own mix; ``timestep:NAME`` and ``static:NAME`` are trained
as the policy is, but see no prompt and, in the second case, no timestep.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from qlip_export.calibrate.bits import Plan, bit_costs, train_q2b
from qlip_export.calibrate.trajectories import Trajectories, record
from qlip_export.calibrate.weights import quantized_weights
from qlip_export.checkpoint import Checkpoint
from qlip_export.families.unet import UNET
from qlip_export.policy.q2b import QualityToBits
from qlip_export.policy.store import Policy, Quality
from qlip_export.quant.ranges import Ranges
from qlip_export.quant.rounding import LearnedRounding
from qlip_export.quant.weights import round_to_nearest
from qlip_export.simulate import Simulator

UNIFORM = re.compile(r"w4a(\d+)(-nearest)?")
BASELINES = ("random", "timestep", "static")
TRAINING_PROMPTS = 1500


class Subject:
    """A model, its calibration folder, and simulators for each way to round the weights."""

    def __init__(self, checkpoint: Checkpoint, calibration: Path, device: str, steps: int) -> None:
        """Nothing is loaded yet."""
        self.checkpoint, self.calibration, self.device, self.steps = checkpoint, calibration, device, steps
        self.ranges = Ranges.load(calibration / "ranges.json")
        self._simulators: dict[str, Simulator] = {}
        self._trajectories: Trajectories | None = None

    def simulator(self, row: str) -> Simulator:
        """Return the simulator with the weights of ``row``."""
        kind = "full" if row == "fp32" else "nearest" if row.endswith("-nearest") else "learned"
        if kind not in self._simulators:
            simulator = Simulator(self.checkpoint, device=self.device, ranges=self.ranges, steps=self.steps)
            if kind != "full":
                path = self.calibration / "weights.safetensors"
                quantize = round_to_nearest if kind == "nearest" else LearnedRounding.load(path)
                simulator.set_weights(quantized_weights(self.checkpoint, simulator.all_layers, quantize, 4))
            self._simulators[kind] = simulator
        return self._simulators[kind]

    def bits(self, row: str, prompts: Sequence[str], training_prompts: Sequence[str]) -> Tensor | None:
        """Return the activation bits of ``row``, (N, steps, layers) int8, or nothing for full precision."""
        layers = len(self.simulator("fp32").layers)
        if row == "fp32":
            return None
        if uniform := UNIFORM.fullmatch(row):
            return torch.full((1, 1, 1), int(uniform[1]), dtype=torch.int8).expand(
                len(prompts), self.steps, layers
            )
        kind, name = row.split(":")
        policy = Policy.load(self.calibration, name)
        if kind in ("timestep", "static"):
            q2b, forced = self._blind(kind, policy, training_prompts)
            return self._of(policy, q2b, torch.full((len(prompts),), 0.5), forced)
        bits = self._of(policy, policy.q2b, self.qualities(policy, prompts), policy.recipe.forced_steps)
        if kind == "random":
            mix = torch.bincount(bits.flatten().long(), minlength=33).float()
            drawn = torch.multinomial(
                mix, bits.numel(), replacement=True, generator=torch.Generator().manual_seed(0)
            )
            return drawn.view(bits.shape).to(torch.int8)
        return bits

    def qualities(self, policy: Policy, prompts: Sequence[str]) -> Tensor:
        """Return the policy's q of each prompt, (N,) float32."""
        quality = Quality.load(self.calibration, policy.recipe.criterion)
        with torch.no_grad():
            found: Tensor = quality.network(self.simulator("fp32").pooled(prompts).cpu())
        return found

    def _of(self, policy: Policy, q2b: QualityToBits, q: Tensor, forced: int) -> Tensor:
        groups = q2b.lines().shape[0]
        unit_of_layer = self._unit_of_layer(policy)
        options = torch.tensor(policy.recipe.options, dtype=torch.int8)
        steps = []
        with torch.no_grad():
            for step in range(self.steps):
                probabilities = q2b.probabilities(q, step * groups // self.steps, step < forced)
                steps.append(options[probabilities.argmax(-1)][:, unit_of_layer])
        return torch.stack(steps, 1)

    def _unit_of_layer(self, policy: Policy) -> list[int]:
        recipe = policy.recipe
        names = self.simulator("fp32").layers
        if recipe.unit == "layer":
            return [recipe.units.index(name) for name in names]
        return [recipe.units.index(str(UNET.block_of(name, recipe.granularity))) for name in names]

    def _blind(self, kind: str, policy: Policy, prompts: Sequence[str]) -> tuple[QualityToBits, int]:
        """Train a policy to the same FAB that sees no prompt and, if ``static``, no timestep."""
        recipe = policy.recipe
        static = kind == "static"
        unit_of_layer = self._unit_of_layer(policy)
        plan = Plan(
            options=recipe.options,
            parts=frozenset(recipe.parts),
            units=recipe.units,
            unit_of_layer=tuple(unit_of_layer),
            costs=bit_costs(recipe.options, unit_of_layer, len(recipe.units)),
            groups=1 if static else recipe.groups,
            forced_steps=0 if static else recipe.forced_steps,
            lambda_bit=None,
            target_fab=recipe.fab,
            iterations=recipe.iterations,
            batch=recipe.batch,
            seed=recipe.seed,
        )
        if self._trajectories is None:
            self._trajectories = record(
                self.simulator("fp32"),
                prompts[: recipe.prompts],
                guidance=recipe.guidance,
                seed=recipe.seed,
                batch_size=256,
            )
        trajectories = self._trajectories
        qualities = torch.full((len(trajectories.inputs),), 0.5)
        learned = train_q2b(self.simulator("learned"), trajectories, qualities, plan)
        return learned.q2b, plan.forced_steps
