"""The training loop that the three stages share: AdamW, EMA, a schedule that fits the time given, resuming.

Every random number of a step comes from a generator seeded by (seed, step, rank): a run that is stopped and
resumed draws what an uninterrupted one draws.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tools.emoji import checkpoint
from tools.emoji.ranks import Ranks, say

Draw = Callable[[torch.Generator], tuple[Tensor, ...]]
HandOn = Callable[[dict[str, Tensor], dict[str, float]], None]


@dataclass(frozen=True)
class Plan:
    """How one stage trains; exactly one of `steps` and `minutes` says how long."""

    stage: str
    learning_rate: float
    warmup_steps: int
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    ema_decay: float = 0.999
    clip_norm: float = 1.0
    steps: int | None = None
    minutes: float | None = None
    stop_after: int | None = None
    save_seconds: float = 60.0
    log_steps: int = 100
    seed: int = 20261122
    compiled: bool = False

    def __post_init__(self) -> None:
        """Refuse a plan without exactly one measure of length."""
        if (self.steps is None) == (self.minutes is None):
            raise ValueError(
                f"expected either steps or minutes, found steps={self.steps} minutes={self.minutes}"
            )

    def progress(self, step: int, seconds: float) -> float:
        """Return how much of the stage is over, from 0 to 1."""
        if self.steps is not None:
            return min(1.0, step / self.steps)
        assert self.minutes is not None
        return min(1.0, seconds / (60 * self.minutes))

    def rate(self, step: int, progress: float) -> float:
        """Return the learning rate: a linear warm-up in steps, then half a cosine to zero."""
        warm = min(1.0, (step + 1) / max(1, self.warmup_steps))
        return self.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * progress))


class Trainer:
    """One stage in progress: the objective's weights, their moving average, the optimizer, step and time."""

    def __init__(self, plan: Plan, objective: nn.Module, folder: Path, ranks: Ranks) -> None:
        """Set up AdamW over the trainable weights of `objective` and resume from `folder` where it can."""
        self.plan, self.objective, self.folder, self.ranks = plan, objective, folder, ranks
        self.named = {name: p for name, p in objective.named_parameters() if p.requires_grad}
        matrices = [p for p in self.named.values() if p.ndim > 1]
        vectors = [p for p in self.named.values() if p.ndim <= 1]
        groups = [
            {"params": matrices, "weight_decay": plan.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        fused = ranks.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(groups, lr=plan.learning_rate, betas=plan.betas, fused=fused)
        self.average = {name: p.detach().clone() for name, p in self.named.items()}
        self.step = 0
        self.seconds = 0.0
        # The step at which the AdamW moments were empty: the warm-up counts from there.
        self.fresh = 0
        self.resume()

    def resume(self) -> None:
        """Load the newest checkpoint: weights, average, both AdamW moments, step and elapsed seconds."""
        found = checkpoint.read_latest(self.folder)
        if found is None:
            return
        tensors, state = found
        self.step, self.seconds = state["step"], state["seconds"]
        with torch.no_grad():
            for name, parameter in self.named.items():
                parameter.copy_(tensors[f"model/{name}"])
                self.average[name].copy_(tensors[f"ema/{name}"])
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(
                        float(self.step), device=parameter.device if self.fused() else "cpu"
                    ),
                    "exp_avg": tensors[f"first/{name}"]
                    .to(parameter)
                    .contiguous(memory_format=layout(parameter)),
                    "exp_avg_sq": tensors[f"second/{name}"]
                    .to(parameter)
                    .contiguous(memory_format=layout(parameter)),
                }

    def fused(self) -> bool:
        """Whether AdamW runs as one kernel, which keeps its step count on the GPU."""
        return bool(self.optimizer.defaults["fused"])

    def save(self, hand_on: HandOn) -> None:
        """Write a checkpoint of everything `resume` reads, and hand the average on; only rank 0 writes."""
        if not self.ranks.first:
            return
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.named.items():
            tensors[f"model/{name}"] = parameter
            tensors[f"ema/{name}"] = self.average[name]
            moments = self.optimizer.state[parameter]
            tensors[f"first/{name}"] = moments["exp_avg"]
            tensors[f"second/{name}"] = moments["exp_avg_sq"]
        checkpoint.write_step(self.folder, self.step, tensors, {"seconds": self.seconds})
        hand_on(self.average, {"step": self.step, "seconds": self.seconds})

    def start_from(self, weights: dict[str, Tensor], step: int, seconds: float) -> None:
        """Start from averaged `weights` of another run, at their step, with fresh AdamW moments."""
        self.step, self.seconds, self.fresh = step, seconds, step
        with torch.no_grad():
            for name, parameter in self.named.items():
                parameter.copy_(weights[name])
                self.average[name].copy_(weights[name])

    def generator(self) -> torch.Generator:
        """Return the generator of this step and rank."""
        seed = (self.plan.seed * 1_000_003 + self.step) * 64 + self.ranks.rank
        return torch.Generator(self.ranks.device).manual_seed(seed)

    def update(self, loss: Tensor, rate: float) -> None:
        """Take one AdamW step of `rate` down the gradient of `loss` and move the average along."""
        loss.backward()
        nn.utils.clip_grad_norm_(list(self.named.values()), self.plan.clip_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        decay = min(self.plan.ema_decay, (1 + self.step) / (10 + self.step))
        current = [p.detach() for p in self.named.values()]
        torch._foreach_lerp_(list(self.average.values()), current, 1 - decay)
        self.step += 1


def layout(parameter: Tensor) -> torch.memory_format:
    """Return the memory format of `parameter`, which its moments must share for the fused kernel."""
    if parameter.ndim == 4 and parameter.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def train(trainer: Trainer, draw: Draw, hand_on: HandOn) -> None:
    """Train until the plan is over; with every checkpoint, `hand_on` writes the averaged weights.

    `trainer.objective(*draw(generator))` must return a scalar loss. A plan already over returns at once.
    `stop_after` interrupts after that many steps without ending the plan, as a killed run would, but with a
    checkpoint.
    """
    plan, objective, ranks = trainer.plan, trainer.objective, trainer.ranks
    wrapped: nn.Module = torch.compile(objective) if plan.compiled else objective
    if ranks.world > 1:
        ids = [ranks.device.index] if ranks.device.type == "cuda" else None
        wrapped = DistributedDataParallel(wrapped, device_ids=ids, gradient_as_bucket_view=True)
    begun, saved = trainer.seconds - time.monotonic(), time.monotonic()
    progress, first_step = plan.progress(trainer.step, trainer.seconds), trainer.step
    first_second: float | None = None
    while progress < 1.0 and (plan.stop_after is None or trainer.step < plan.stop_after):
        with torch.autocast(ranks.device.type, torch.bfloat16, enabled=ranks.device.type == "cuda"):
            loss = wrapped(*draw(trainer.generator()))
        trainer.update(loss, plan.rate(trainer.step - trainer.fresh, progress))
        if first_second is None:
            # The first step compiles: that time is reported apart and not a part of the schedule.
            if ranks.device.type == "cuda":
                torch.cuda.synchronize()
            say(ranks, f"{plan.stage}: first step after {time.monotonic() + begun - trainer.seconds:.1f} s")
            begun, first_second = trainer.seconds - time.monotonic(), time.monotonic()
        if plan.steps is not None or trainer.step % 10 == 0:
            trainer.seconds = time.monotonic() + begun
            progress = ranks.agree(plan.progress(trainer.step, trainer.seconds))
        if trainer.step % plan.log_steps == 0:
            value = float(loss.detach())
            speed = (trainer.step - first_step - 1) / max(1e-9, time.monotonic() - first_second)
            say(ranks, f"{plan.stage}: step {trainer.step} at {trainer.seconds:.0f} s ({progress:.1%}) "
                       f"loss {value:.4f}, {speed:.2f} steps/s")  # fmt: skip
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"{plan.stage}: loss is {value} at step {trainer.step}; lower the rate"
                )
        if time.monotonic() - saved > plan.save_seconds:
            trainer.save(hand_on)
            saved = time.monotonic()
    if first_second is not None:
        trainer.seconds = time.monotonic() + begun
        trainer.save(hand_on)
