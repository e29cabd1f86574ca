"""The policy's part of a build: chosen from a calibration folder, held against the build, written as ONNX."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import JsonValue

from qlip_export.errors import QlipError
from qlip_export.files import content_key, sha256_of
from qlip_export.manifest import BlockEntry, PolicyEntry
from qlip_export.policy.graph import OPSET, policy_graph
from qlip_export.policy.store import POLICIES, Policy, Quality, names, policy_name
from qlip_export.policy.t2q import TextToQuality
from qlip_export.policy.table import DecisionTable
from qlip_export.spec import Granularity, Unit
from qlip_export.workspace import Workspace

POLICY = "onnx/policy.onnx"


@dataclass(frozen=True)
class SelectedPolicy:
    """A policy and the T2Q network that it was trained with.

    Attributes:
        name: In the calibration folder.
        path: Of the policy's parameters.
        denoiser: Fingerprint of the denoiser of the build.
        bits: Bit options of the build.
    """

    name: str
    path: Path
    policy: Policy
    quality: Quality
    denoiser: str
    bits: tuple[int, ...]

    def check(self, units: Sequence[str]) -> None:
        """Refuse a policy that was made for something else.

        Raises:
            QlipError: Naming the difference.
        """
        self.policy.check(self.denoiser, units, self.bits, self.quality.sha256, self.path)

    def export(
        self,
        blocks: Sequence[BlockEntry],
        steps: int,
        batch_size: int,
        workspace: Workspace,
        tag: str = "",
    ) -> PolicyEntry:
        """Write `policy.onnx` for a sampler of ``steps`` steps and return its entry, without an engine.

        ``tag`` stands in the file's name, where a bundle has several batch sizes.

        Raises:
            QlipError: The policy was trained for other blocks or layers than ``blocks``.
        """
        recipe, network = self.policy.recipe, self.quality.network
        self.check(units_of(blocks)[recipe.unit])
        table = self.policy.table(steps)

        def make(path: Path) -> JsonValue:
            _save(network, table, batch_size, path)
            return None

        code = [sha256_of(Path(__file__).with_name(name)) for name in ("graph.py", "t2q.py")]
        key = content_key("policy", code, OPSET, self.quality.sha256, table.model_dump(), batch_size)
        path = POLICY.replace(".onnx", f"{tag}.onnx")
        workspace.product(path, key, make)
        rows, columns = network.projection.shape
        return PolicyEntry(
            onnx=path,
            name=self.name,
            unit=recipe.unit,
            criterion=recipe.criterion,
            parts=recipe.parts,
            cost=recipe.cost,
            projection=(rows, columns),
            fab=recipe.fab,
            srocc=self.quality.recipe.srocc,
            plcc=self.quality.recipe.plcc,
            table=table,
        )


def select_policy(
    folder: Path | None,
    wanted: str,
    *,
    bits: tuple[int, ...],
    granularity: Granularity,
    precision: Unit,
    denoiser: str,
    text_encoder: str,
) -> SelectedPolicy | None:
    """Choose the policy of a build; all that can be checked before the export is checked here.

    Args:
        folder: Calibration results.
        wanted: Name of a policy; ``none``; or ``auto``: of the policies that decide by ``precision``, quality
            and bits, with all parts, the one with most options among ``bits`` (ties: the higher bits), and
            none where the folder holds no policy or ``bits`` leave no choice.
        bits: Bit options of the build.
        granularity: Where its blocks are cut.
        precision: What has bits of its own in an engine; for layers, the policy must decide by layer.
        denoiser: Fingerprint.
        text_encoder: Fingerprint.

    Raises:
        QlipError: No such policy, none that fits, or one that is truncated or was made for something else.
    """
    found = names(folder) if folder is not None else []
    if precision == "layer" and (wanted == "none" or not found or len(bits) < 2):
        raise QlipError(
            "engines by layer are made for what a policy asks for, and there is none",
            expected="a policy trained with --unit layer",
            found="--policy none" if wanted == "none" else f"{len(found)} policies, {len(bits)} bit options",
            fix="name a calibrated folder with --calibration, or --granularity block",
        )
    if wanted == "none" or (wanted == "auto" and (len(bits) < 2 or not found)):
        return None
    if folder is None:
        raise QlipError(
            f"there is no policy {wanted!r}: this model brings no calibration",
            fix="name a calibrated folder with --calibration, or --policy none for uniform bits",
        )
    name = _default(found, bits, folder, precision) if wanted == "auto" else wanted
    policy = Policy.load(folder, name)
    path = folder / POLICIES / f"{name}.safetensors"
    recipe = policy.recipe
    if recipe.unit == "block" and recipe.granularity != granularity:
        raise QlipError(
            f"{path} was trained for other blocks",
            expected=f"{granularity} blocks",
            found=recipe.granularity,
            fix=f"build with --blocks {recipe.granularity}, or --policy none for uniform bits",
        )
    if precision == "layer" and recipe.unit != "layer":
        raise QlipError(
            f"{path} decides over {recipe.unit}s, and engines by layer need a decision over layers",
            expected="a policy trained with --unit layer",
            found=f"units {', '.join(recipe.units[:3])}...",
            fix="name another --policy, or --granularity block",
        )
    if recipe.criterion == "length":
        raise QlipError(
            f"{path} chooses by the number of tokens, which no engine counts",
            expected="a policy by quality or complexity",
            found="a policy for comparison",
            fix="name another policy, or --policy none for uniform bits",
        )
    quality = Quality.load(folder, recipe.criterion)
    quality.check(text_encoder, Quality.path(folder, recipe.criterion))
    selected = SelectedPolicy(name, path, policy, quality, denoiser, bits)
    selected.check(recipe.units)
    return selected


def units_of(blocks: Sequence[BlockEntry]) -> dict[str, list[str]]:
    """Return the names of what a policy decides over, by kind of unit: ``block`` and ``layer``."""
    return {
        "block": [name for b in blocks if b.quantized for name in (b.parts or (b.name,))],
        "layer": [layer.name for block in blocks for layer in block.quantized],
    }


def _default(found: list[str], bits: tuple[int, ...], folder: Path, unit: Unit) -> str:
    """Return the name of the policy that ``auto`` takes, which says no more than options and unit."""
    suffix = "-layer" if unit == "layer" else ""
    regular = [match for n in found if (match := re.fullmatch(rf"(\d+(?:-\d+)+){suffix}", n))]
    options = [tuple(map(int, match[1].split("-"))) for match in regular]
    fitting = [o for o in options if set(o) <= set(bits)]
    if not fitting:
        raise QlipError(
            f"no policy in {folder} chooses among these bit options",
            expected=" or ".join(",".join(map(str, o)) for o in options) or f"policy {' or '.join(found)}",
            found=",".join(map(str, bits)),
            fix="build with --bits that a policy was trained for, name one with --policy, "
            "or --policy none for uniform bits",
        )
    return policy_name(max(fitting, key=lambda o: (len(o), o)), unit, "quality", ("q", "m", "h"), "bits")


def _save(network: TextToQuality, table: DecisionTable, batch_size: int, path: Path) -> None:
    import onnx_ir as ir

    weights = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
    graph = policy_graph(
        weights["projection"],
        (weights["hidden.weight"], weights["hidden.bias"]),
        (weights["output.weight"], weights["output.bias"]),
        table,
        batch_size,
    )
    ir.save(graph, path)
