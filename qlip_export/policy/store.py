"""Trained policies on disk: ``t2q.CRITERION.safetensors``, and ``policies/NAME`` for each set of bit options.

Every file of tensors has a JSON file of the same name beside it: the recipe, and what was measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypeVar

import safetensors
import torch
from pydantic import Field, ValidationError
from safetensors.torch import load_file, save_file

from qlip_export.errors import QlipError
from qlip_export.files import sha256_of, written_aside
from qlip_export.policy.q2b import Part, QualityToBits, timestep_groups
from qlip_export.policy.t2q import TextToQuality
from qlip_export.policy.table import DecisionTable
from qlip_export.spec import Frozen, Granularity, Unit

Criterion = Literal["quality", "complexity", "length"]

POLICIES = "policies"


class QualityRecipe(Frozen):
    """How a T2Q network was trained, and how well it predicts."""

    text_encoder: str = Field(description="fingerprint")
    denoiser: str = Field(description="fingerprint of the model that drew the labelled images")
    criterion: Criterion
    prompts: int = Field(description="labelled prompts, one image each")
    prompts_sha256: str
    reference: int | None = Field(
        None, description="real images that GIQA's mixture was fitted to; else the labelled ones themselves"
    )
    reference_sha256: str | None = Field(None, description="of their features; older recipes do not say")
    steps: int
    scheduler: str
    guidance: float
    seed: int
    size: tuple[int, int] | None = Field(
        default=None, description="height and width of the images, pixels; none: the model's own"
    )
    random_weights: int | None = Field(
        default=None,
        description="seed of random weights that stood in for the model's: speed and memory, no quality",
    )
    low: float = Field(description="raw label that became 0")
    high: float = Field(description="raw label that became 1")
    mixture: int | None = Field(description="Gaussians of GIQA's mixture; none for other criteria")
    epochs: int
    held_out: int = Field(description="prompts that the network was not trained on")
    srocc: float = Field(description="Spearman's rank correlation of prediction and label, held-out prompts")
    plcc: float = Field(description="Pearson's correlation, held-out prompts")


class PolicyRecipe(Frozen):
    """What a policy decides over, and how it was trained."""

    denoiser: str = Field(description="fingerprint")
    options: tuple[int, ...]
    unit: Unit
    granularity: Granularity = Field(description="where the blocks were cut; for layers it says nothing")
    units: tuple[str, ...]
    parts: tuple[Part, ...]
    criterion: Criterion
    t2q_sha256: str = Field(description="of the T2Q network that predicted the qualities")
    cost: Literal["bits", "latency"]
    steps: int = Field(ge=1, description="sampling steps of the training runs")
    groups: int = Field(ge=1, description="timestep groups G")
    forced_steps: int = Field(ge=0, description="first steps with p_q = 1")
    scheduler: str
    guidance: float
    prompts: int
    prompts_sha256: str
    iterations: int
    batch: int
    learning_rate: float
    seed: int
    size: tuple[int, int] | None = Field(
        default=None, description="height and width of the images, pixels; none: the model's own"
    )
    random_weights: int | None = Field(
        default=None,
        description="seed of random weights that stood in for the model's: speed and memory, no quality",
    )
    lambda_bit: float = Field(description="as it was at the end")
    target_fab: float | None = Field(description="FAB that lambda_bit was steered to, if any")
    ranges_sha256: str | None = Field(None, description="of the ranges' file; trainer 1 did not say")
    weights: str | None = Field(
        None, description="SHA-256 of the learned rounding, or nearest; trainer 1 did not say"
    )
    latency_sha256: str | None = Field(None, description="of the measured times, where they are the cost")
    fab: float = Field(description="mean bits over units' layers and steps that training prompts get")
    error: float = Field(
        description="mean squared error of the guided prediction in the last tenth of training, "
        "before offsets were shifted to the target FAB"
    )
    trainer: int = Field(1, description="version of the training code; 1 paired some gradients wrongly")


class Quality:
    """A trained T2Q network and its recipe."""

    def __init__(self, network: TextToQuality, recipe: QualityRecipe, sha256: str = "") -> None:
        """Wrap what training made; ``sha256`` is that of the file."""
        self.network, self.recipe, self.sha256 = network.eval(), recipe, sha256

    @staticmethod
    def path(folder: Path, criterion: Criterion) -> Path:
        """Return where a calibration folder keeps the network for ``criterion``."""
        return folder / f"t2q.{criterion}.safetensors"

    def save(self, folder: Path) -> Path:
        """Write the network in FP16 and its recipe; return the network's path."""
        path = self.path(folder, self.recipe.criterion)
        tensors = {name: t.detach().half().cpu() for name, t in self.network.state_dict().items()}
        _save(path, tensors, self.recipe)
        return path

    @classmethod
    def load(cls, folder: Path, criterion: Criterion) -> Quality:
        """Read the network for ``criterion``.

        Raises:
            QlipError: Missing, truncated, or not a T2Q network.
        """
        path = cls.path(folder, criterion)
        tensors, recipe = _load(path, QualityRecipe)
        try:
            network = TextToQuality(tensors["projection"])
            network.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
        except (KeyError, RuntimeError) as error:
            raise _broken(path, error) from error
        return cls(network, recipe, sha256_of(path))

    def check(self, text_encoder: str, path: Path) -> None:
        """Refuse a network that was trained on another text encoder.

        Raises:
            QlipError: Naming the difference.
        """
        _same(path, "text encoder", text_encoder, self.recipe.text_encoder)


class Policy:
    """A trained Q2B and its recipe."""

    def __init__(self, q2b: QualityToBits, recipe: PolicyRecipe) -> None:
        """Wrap what training made."""
        self.q2b, self.recipe = q2b, recipe

    @staticmethod
    def path(folder: Path, name: str) -> Path:
        """Return where a calibration folder keeps policy ``name``."""
        return folder / POLICIES / f"{name}.safetensors"

    def save(self, folder: Path, name: str) -> Path:
        """Write the parameters and the recipe as policy ``name``; return the parameters' path."""
        path = self.path(folder, name)
        _save(path, {n: t.detach().float().cpu() for n, t in self.q2b.state_dict().items()}, self.recipe)
        return path

    @classmethod
    def load(cls, folder: Path, name: str) -> Policy:
        """Read policy ``name`` of a calibration folder.

        Raises:
            QlipError: Missing, truncated, or not a policy; the message lists those that are there.
        """
        path = cls.path(folder, name)
        if not path.is_file():
            raise QlipError(
                f"{folder} holds no policy {name!r}",
                expected=" or ".join(names(folder)) or "a calibrated policy",
                found=name,
                fix="name one of these, or train it: 'qlip-export calibrate --model MODEL --bit-options ...'",
            )
        tensors, recipe = _load(path, PolicyRecipe)
        q2b = QualityToBits(recipe.options, len(recipe.units), recipe.groups, frozenset(recipe.parts))
        try:
            q2b.load_state_dict(tensors)
        except RuntimeError as error:
            raise _broken(path, error) from error
        return cls(q2b, recipe)

    def check(
        self, denoiser: str, units: Sequence[str], options: Sequence[int], t2q_sha256: str, path: Path
    ) -> None:
        """Refuse a policy that was made for something else.

        Args:
            denoiser: Fingerprint of the denoiser.
            units: Blocks or layers of the build, those that follow the bit options.
            options: Bit options of the build; the policy's must be among them.
            t2q_sha256: Of the T2Q network at hand.
            path: For the message.

        Raises:
            QlipError: Naming the difference.
        """
        recipe = self.recipe
        _same(path, "denoiser", denoiser, recipe.denoiser)
        if set(units) != set(recipe.units):
            extra, missing = sorted(set(recipe.units) - set(units)), sorted(set(units) - set(recipe.units))
            raise QlipError(
                f"{path} was trained for other {recipe.unit}s",
                expected=f"{len(units)} {recipe.unit}s" + (f", among them {missing[0]}" if missing else ""),
                found=f"{len(recipe.units)}" + (f", among them {extra[0]}" if extra else ""),
                fix="build with the same --blocks, or calibrate again",
            )
        if missing_bits := sorted(set(recipe.options) - set(options)):
            raise QlipError(
                f"{path} chooses among other bit options",
                expected=",".join(map(str, options)),
                found=",".join(map(str, recipe.options)),
                fix=f"build with --bits that include {','.join(map(str, missing_bits))}, or --policy none",
            )
        if recipe.t2q_sha256 != t2q_sha256:
            raise QlipError(
                f"{path} was trained with another T2Q network",
                expected=f"SHA-256 {recipe.t2q_sha256[:16]}…",
                found=f"{t2q_sha256[:16]}…",
                fix="run 'qlip-export calibrate --stages q2b' again",
            )

    def table(self, steps: int) -> DecisionTable:
        """Compile the policy for a sampler of ``steps`` steps.

        Groups and forced steps keep their share of the run: a policy of 25 steps works at 20 or at 50.
        """
        recipe = self.recipe
        table: DecisionTable = self.q2b.table(
            recipe.units,
            timestep_groups(steps, recipe.groups),
            min(steps, round(recipe.forced_steps * steps / recipe.steps)),
        )
        return table


def names(folder: Path) -> list[str]:
    """Return the names of the policies in a calibration folder."""
    return sorted(path.stem for path in (folder / POLICIES).glob("*.safetensors"))


def policy_name(
    options: Sequence[int], unit: Unit, criterion: Criterion, parts: Sequence[Part], cost: str
) -> str:
    """Return the name of a policy, e.g. ``8-16-32``; what is not the default is spelt out."""
    words = ["-".join(map(str, options))]
    if unit != "block":
        words.append(unit)
    if criterion != "quality":
        words.append(criterion)
    if len(options) == 3 and len(parts) == 2:
        words.append("".join(sorted(parts, key="qmh".index)))
    if cost != "bits":
        words.append("latency")
    return "-".join(words)


_Recipe = TypeVar("_Recipe", bound=Frozen)


def _save(path: Path, tensors: dict[str, torch.Tensor], recipe: Frozen) -> None:
    with written_aside(path) as aside:
        save_file(tensors, aside)
    # The recipe comes last: where it is, the tensors are whole.
    with written_aside(path.with_suffix(".json")) as aside:
        aside.write_text(recipe.model_dump_json(indent=1) + "\n", encoding="utf-8")


def _load(path: Path, kind: type[_Recipe]) -> tuple[dict[str, torch.Tensor], _Recipe]:
    try:
        recipe = kind.model_validate_json(path.with_suffix(".json").read_text(encoding="utf-8"))
        return load_file(path), recipe
    except (OSError, UnicodeDecodeError, ValidationError, safetensors.SafetensorError) as error:
        raise _broken(path, error) from error


def _broken(path: Path, error: Exception) -> QlipError:
    return QlipError(
        f"cannot read {path}",
        expected="what 'qlip-export calibrate' wrote, with its .json beside it",
        found=str(error).splitlines()[0],
        fix="run 'qlip-export calibrate' again",
    )


def _same(path: Path, what: str, expected: str, found: str) -> None:
    if expected != found:
        raise QlipError(
            f"{path} was made for another {what}",
            expected=f"fingerprint {expected[:16]}…",
            found=f"{found[:16]}…",
            fix="run 'qlip-export calibrate' for this model",
        )
