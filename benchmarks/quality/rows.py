"""The configurations that are compared, by name.

``fp32``, ``w4a8``, ``w4a32-nearest``: uniform bits; 4-bit weights with learned rounding, or to nearest.
``qlip:NAME``: the policy NAME of the calibration folder. Baselines at its FAB: ``random:NAME`` draws the bits
of every prompt, step and layer from the policy's own mix; ``timestep:NAME`` and ``static:NAME`` are trained
as the policy is, but see no prompt and, in the second case, no timestep.
``variants-N:NAME`` runs a policy by layer on at most N variants of each block, ``uniform:NAME`` on variants
of one option for all layers of a block; ``qlip:NAME`` is what the policy asks for, exactly.
``w4a6+PATTERN`` keeps the inputs of layers that match the pattern exact, ``w4a6!PATTERN`` their weights.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qlip_export.calibrate.bits import Plan, bit_costs, train_q2b
from qlip_export.calibrate.quality import predicted
from qlip_export.calibrate.trajectories import Trajectories, record
from qlip_export.calibrate.weights import quantized_weights
from qlip_export.capture import denoiser_family
from qlip_export.checkpoint import Checkpoint
from qlip_export.files import sha256_of
from qlip_export.policy.q2b import QualityToBits, timestep_groups
from qlip_export.policy.store import Criterion, Policy
from qlip_export.prompts import read_prompts
from qlip_export.quant.ranges import Ranges
from qlip_export.quant.rounding import LearnedRounding
from qlip_export.quant.weights import round_to_nearest
from qlip_export.simulate import Simulator
from qlip_export.variants.plan import Planner, layer_bits

VARIANTS = re.compile(r"variants-(\d+)")
UNIFORM = re.compile(r"w4a(\d+)(?:-nearest)?(?:([+!])(.*))?")
STEPS = 25
GUIDANCE = 4.0


class Subject:
    """A model, its calibration folder, and simulators for each way to round the weights."""

    def __init__(self, checkpoint: Checkpoint, calibration: Path, device: str) -> None:
        """Nothing is loaded yet."""
        self.checkpoint, self.calibration, self.device = checkpoint, calibration, device
        self.ranges = Ranges.load(calibration / "ranges.json")
        self._simulators: dict[str, Simulator] = {}
        self._trajectories: dict[tuple[str, ...], Trajectories] = {}
        self._qualities: dict[tuple[str, ...], Tensor] = {}

    def simulator(self, row: str) -> Simulator:
        """Return the simulator with the weights of ``row``."""
        kind = "full" if row == "fp32" else "nearest" if row.endswith("-nearest") else "learned"
        exact = row.split("!")[1] if "!" in row else None
        key = f"{kind}!{exact}"
        if key not in self._simulators:
            simulator = Simulator(self.checkpoint, device=self.device, ranges=self.ranges, steps=STEPS)
            if kind != "full":
                path = self.calibration / "weights.safetensors"
                quantize = round_to_nearest if kind == "nearest" else LearnedRounding.load(path)
                layers = [n for n in simulator.all_layers if exact is None or not re.fullmatch(exact, n)]
                simulator.set_weights(quantized_weights(self.checkpoint, layers, quantize, 4))
            self._simulators[key] = simulator
        return self._simulators[key]

    def trajectories(self, prompts: Sequence[str]) -> Trajectories:
        """Return full-precision runs over ``prompts``, recorded once."""
        key = tuple(prompts)
        if key not in self._trajectories:
            self._trajectories[key] = record(
                self.simulator("fp32"), prompts, guidance=GUIDANCE, seed=0, batch_size=256
            )
        return self._trajectories[key]

    def qualities(self, criterion: Criterion, prompts: Sequence[str]) -> Tensor:
        """Return q of each prompt, (N,) float32, predicted once."""
        key = (criterion, *prompts)
        if key not in self._qualities:
            self._qualities[key] = predicted(self.calibration, criterion, self.simulator("fp32"), prompts)
        return self._qualities[key]

    def policy_sha256(self, row: str) -> str | None:
        """Return the SHA-256 of the policy that a row is about, if it is about one that is there."""
        path = Policy.path(self.calibration, row.split(":")[1]) if ":" in row else None
        return sha256_of(path) if path and path.is_file() else None

    def bits(self, row: str, prompts: Sequence[str]) -> Tensor | None:
        """Return the activation bits of ``row``, (N, steps, layers) int8, or nothing for full precision."""
        layers = self.simulator("fp32").layers
        if row == "fp32":
            return None
        if uniform := UNIFORM.fullmatch(row):
            exact = uniform[3] if uniform[2] == "+" else ""
            bits = [32 if re.fullmatch(exact, name) else int(uniform[1]) for name in layers]
            return torch.tensor(bits, dtype=torch.int8).expand(len(prompts), STEPS, len(layers))
        kind, name = row.split(":")
        policy = Policy.load(self.calibration, name)
        if kind in ("timestep", "static"):
            q2b, forced = self._blind(kind, policy)
            return self._of(policy, q2b, torch.full((len(prompts),), 0.5), forced)
        if kind == "uniform" or VARIANTS.fullmatch(kind):
            return self._merged(kind, policy, prompts)
        bits = self._of(
            policy,
            policy.q2b,
            self.qualities(policy.recipe.criterion, prompts),
            policy.recipe.forced_steps,
        )
        if kind == "random":
            mix = torch.bincount(bits.flatten().long(), minlength=33).float()
            drawn = torch.multinomial(
                mix, bits.numel(), replacement=True, generator=torch.Generator().manual_seed(0)
            )
            return drawn.view(bits.shape).to(torch.int8)
        return bits

    def _of(self, policy: Policy, q2b: QualityToBits, q: Tensor, forced: int) -> Tensor:
        options = torch.tensor(policy.recipe.options, dtype=torch.int8)
        chosen = q2b.run(q, timestep_groups(STEPS, len(q2b.lines())), forced)
        return options[chosen][..., self._unit_of_layer(policy)]

    def _merged(self, kind: str, policy: Policy, prompts: Sequence[str]) -> Tensor:
        """Return the bits of each layer where every block runs at one of a few variants."""
        recipe, simulator = policy.recipe, self.simulator("fp32")
        blocks: dict[str, list[str]] = {}
        family = denoiser_family(self.checkpoint)
        names, block_of = family.units_of(simulator.layers, "block", recipe.granularity)
        for layer, block in zip(simulator.layers, block_of, strict=True):
            blocks.setdefault(names[block], []).append(layer)
        table = policy.table(STEPS)
        if found := VARIANTS.fullmatch(kind):
            known = read_prompts(self.calibration / "prompts.txt")[: recipe.prompts]
            qualities = self.qualities(recipe.criterion, known).tolist()
            variants = Planner(table, blocks, qualities).plan(int(found[1])).variants
        else:
            options = np.array(recipe.options, dtype=np.uint8)[:, None]
            variants = {name: np.repeat(options, len(layers), axis=1) for name, layers in blocks.items()}
        q = self.qualities(recipe.criterion, prompts).tolist()
        bits = layer_bits(table, blocks, variants, q)
        return torch.from_numpy(np.stack([bits[layer] for layer in simulator.layers], axis=-1)).to(torch.int8)

    def _unit_of_layer(self, policy: Policy) -> list[int]:
        recipe = policy.recipe
        family = denoiser_family(self.checkpoint)
        units, found = family.units_of(self.simulator("fp32").layers, recipe.unit, recipe.granularity)
        assert units == recipe.units
        return list(found)

    def _blind(self, kind: str, policy: Policy) -> tuple[QualityToBits, int]:
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
            at_once=recipe.batch,
            seed=recipe.seed,
        )
        prompts = read_prompts(self.calibration / "prompts.txt")[: recipe.prompts]
        trajectories = self.trajectories(prompts)
        qualities = torch.full((len(trajectories.inputs),), 0.5)
        learned = train_q2b(self.simulator("learned"), trajectories, qualities, plan)
        return learned.q2b, plan.forced_steps
