"""Engines by layer: exactly what the policy can ask for, typed layer by layer, and run as it asks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlip_export.bundle import Bundle
from qlip_export.checkpoint import Checkpoint
from qlip_export.graph.store import load
from qlip_export.manifest import PolicyEntry
from qlip_export.runtime import TextToImage
from qlip_export.runtime.schedule import Scheduler, layer_bits
from qlip_export.spec import container_of
from tests.conftest import STEPS, Cli, Shared, build_tiny
from tests.tiny import BLOCKS
from tests.tiny_calibration import write_few_patterns

PROMPTS = ["a red apple", "the blue boat", "a dog"]
POLICY = "few"


@pytest.fixture(scope="module")
def few(shared: Shared, trained: Path, tiny_model: Path) -> Path:
    """The trained calibration with a policy by layer of few patterns."""

    def make(folder: Path) -> None:
        shutil.copytree(trained, folder)
        recipe = json.loads((folder / "policies" / "8-16-32.json").read_text())
        write_few_patterns(folder, Checkpoint(tiny_model), t2q_sha256=recipe["t2q_sha256"], name=POLICY)

    return shared("few", make)


@pytest.fixture(scope="module")
def layered(shared: Shared, tiny_model: Path, adaptive_bundle: Path, few: Path) -> Path:
    """Exactly the engines that the policy can ask for."""

    def make(out: Path) -> None:
        shutil.copytree(adaptive_bundle, out)
        build_tiny(tiny_model, out, calibration=few, policy=POLICY, precision="layer")

    return shared("layered", make)


@pytest.fixture(scope="module")
def pipeline(layered: Path) -> TextToImage:
    return TextToImage.load(layered)


def policy_of(bundle: Bundle) -> PolicyEntry:
    assert bundle.manifest.policy is not None
    return bundle.manifest.policy


def names_of(bundle: Bundle) -> list[str]:
    return [layer.name for block in bundle.manifest.blocks for layer in block.quantized]


def asked(bundle: Bundle, q: float) -> np.ndarray:
    """Return the policy's own bits, (steps, layers), in the order of the chain."""
    table = policy_of(bundle).table
    columns = [table.units.index(name) for name in names_of(bundle)]
    return np.array([table.bits(q, step) for step in range(STEPS)])[:, columns]


def test_the_bits_of_every_layer_are_the_policys(pipeline: TextToImage) -> None:
    records = pipeline(PROMPTS, seed=0).records
    for record in records:
        ran = layer_bits(pipeline.chain.blocks, [*map(tuple, record["variants"])])
        assert (ran == asked(pipeline.bundle, record["q"])).all()
        assert record["fab"] == pytest.approx(ran.mean(), abs=1e-3)
    assert len({json.dumps(record["variants"]) for record in records}) > 1
    assert {8, 16, 32} == set(np.unique(asked(pipeline.bundle, 0.9)))


@given(st.floats(0, 1))
def test_so_they_are_for_any_quality(pipeline: TextToImage, q: float) -> None:
    schedule = Scheduler(policy_of(pipeline.bundle).table, pipeline.chain.blocks)
    assert (layer_bits(pipeline.chain.blocks, schedule([q])) == asked(pipeline.bundle, q)).all()


def test_nothing_is_built_that_nothing_asks_for(pipeline: TextToImage) -> None:
    blocks, table = pipeline.chain.blocks, policy_of(pipeline.bundle).table
    thresholds = {t for row in table.choices for choice in row for t in choice.thresholds}
    schedule = Scheduler(table, blocks)
    found: dict[str, set[str]] = {block.name: set() for block in blocks}
    for q in (0.0, *thresholds):
        for pattern in schedule([q]):
            for block, variant in zip(blocks, pattern, strict=True):
                found[block.name].add(variant)
    assert found == {block.name: set(block.variants) for block in blocks}
    engines = pipeline.target.entry.engines
    assert set(engines) == set(pipeline.bundle.manifest.containers)
    assert len(engines) == sum(map(len, found.values())) + 3
    assert max(map(len, found.values())) > 3


def precisions(model: ir.Model) -> dict[str, tuple[bool, str]]:
    """Return for each layer of a bound graph whether its input is quantized, and its type."""
    found = {}
    for node in model.graph:
        weight = node.inputs[1] if node.op_type in ("Conv", "MatMul", "Gemm") else None
        producer = weight.producer() if weight is not None else None
        if producer is None or producer.op_type != "DequantizeLinear":
            continue
        name = str(producer.name).removesuffix("/weight.dq")
        source = node.inputs[0].producer() if node.inputs[0] is not None else None
        quantized = source is not None and source.op_type == "DequantizeLinear"
        found[name] = quantized, str(node.outputs[0].dtype)
    return found


def test_graphs_are_typed_layer_by_layer(pipeline: TextToImage) -> None:
    types = {8: (True, "FLOAT16"), 16: (False, "FLOAT16"), 32: (False, "FLOAT")}
    mixed = 0
    for block in pipeline.chain.blocks:
        for name, variant in block.variants.items():
            found = precisions(load(pipeline.bundle.file(variant.onnx)))
            expected = {
                e.name: types[b] for e, b in zip(block.quantized, block.layer_bits(name), strict=True)
            }
            assert {layer: found[layer] for layer in expected} == expected
            mixed += len(set(expected.values())) == 3
            narrowest = min(block.layer_bits(name), default=32)
            assert variant.container is container_of(narrowest)
    assert mixed, "no variant holds all three"


def test_all_variants_share_the_weights(layered: Path) -> None:
    weights = [path.name for path in (layered / "onnx").glob("*.bin")]
    assert sorted(weights) == ["denoiser.weights.bin", "text_encoder.weights.bin", "vae_decoder.weights.bin"]
    for path in (layered / "onnx").glob("*_blocks.*.onnx"):
        own = [
            value.const_value
            for value in ir.load(path).graph.initializers.values()
            if not isinstance(value.const_value, ir.ExternalTensor)
        ]
        assert sum(tensor.nbytes for tensor in own if tensor is not None) < 4096, path


def test_validate_compares_every_engine_and_the_policys_image(cli: Cli, layered: Path) -> None:
    done = cli("validate", layered, "--json")
    report = json.loads(done.out)
    assert done.code == 0, [row for row in report["rows"] if not row["passed"]]
    variants = {(row["block"], row["variant"]) for row in report["rows"]}
    blocks = Bundle.open(layered).manifest.blocks
    assert variants == {(block.name, name) for block in blocks for name in block.variants}
    (image,) = report["images"]
    assert image["bits"] is None
    assert image["psnr"] > 25


def test_uniform_bits_are_refused(cli: Cli, layered: Path, tmp_path: Path) -> None:
    done = cli("generate", layered, "a dog", "--bits", 8, "-o", tmp_path / "x.png")
    assert done.code == 2
    assert "run what its policy asks for, and no uniform bits" in done.err
    assert "--granularity block" in done.err


def test_inspect_and_explain(
    cli: Cli, layered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = cli("inspect", layered).out
    assert "mean bits" in text
    monkeypatch.setenv("COLUMNS", "100")
    done = cli("generate", layered, "a dog", "--seed", 1, "-o", tmp_path / "x.png", "--explain", "--json")
    (record,) = json.loads(done.out)["images"]
    (line,) = [line.split() for line in done.err.splitlines() if line.startswith("down_blocks.1")]
    column = record["blocks"].index("down_blocks.1")
    assert [int(n) for n in line[1:-1]] == [round(row[column]) for row in record["bits"]]
    assert any(row[column] not in (8, 16, 32) for row in record["bits"])


# --- limits and fusion


@pytest.fixture(scope="module")
def merged(shared: Shared, tiny_model: Path, layered: Path, few: Path) -> tuple[Path, Any]:
    """At most two variants of a block, neighbours fused."""

    def make(out: Path) -> None:
        shutil.copytree(layered, out / "bundle")
        report = build_tiny(
            tiny_model,
            out / "bundle",
            calibration=few,
            policy=POLICY,
            precision="layer",
            max_variants=2,
            fuse=True,
        )
        (out / "report.json").write_text(report.model_dump_json())

    out = shared("merged", make)
    return out / "bundle", json.loads((out / "report.json").read_text())


def test_fewer_variants_round_up(merged: tuple[Path, Any]) -> None:
    path, report = merged
    pipeline = TextToImage.load(path)
    assert max(len(block.variants) for block in pipeline.chain.blocks) == 2
    record = pipeline(PROMPTS[0], seed=0).records[0]
    ran = layer_bits(pipeline.chain.blocks, [*map(tuple, record["variants"])])
    assert (ran >= asked(pipeline.bundle, record["q"])).all()
    counts = [row["engines"] for row in report["variants"]]
    averages = [row["fab"] for row in report["variants"]]
    assert counts == sorted(counts)
    assert averages == sorted(averages, reverse=True)
    assert averages[0] > averages[-1]
    assert report["chosen"] == report["variants"][1] | {"variants": 2}
    assert record["fab"] < averages[0]


def test_neighbours_that_never_differ_become_one(merged: tuple[Path, Any], pipeline: TextToImage) -> None:
    path, report = merged
    # All but the two mixed blocks never change; the timestep embedding stays by itself.
    names = [block.name for block in Bundle.open(path).manifest.blocks]
    assert names == [
        "time",
        "stem..down_blocks.0",
        "down_blocks.1",
        "down_blocks.2..up_blocks.0",
        "up_blocks.1",
        "up_blocks.2..out",
    ]
    assert (report["unfused"], report["blocks"]) == (len(BLOCKS), len(names))
    fused = TextToImage.load(path)
    assert sorted(names_of(fused.bundle)) == sorted(names_of(pipeline.bundle))
    first, second = fused(PROMPTS[0], seed=3).images[0], pipeline(PROMPTS[0], seed=3).images[0]
    difference = np.asarray(first, dtype=float) - np.asarray(second, dtype=float)
    assert np.abs(difference).mean() < 24, "two variants are not so much better than the policy asks for"


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--max-variants", "0"], "--max-variants: Input should be greater than or equal to 1"),
        (["--target-fab", "-1"], "--target-fab: Input should be greater than 0"),
        (["--target-fab", "2"], "no number of variants reaches this target: the policy asks for"),
        (["--max-engine-bytes", "none"], "--max-engine-bytes is no size"),
        (["--max-engine-bytes", "-5MB"], "--max-engine-bytes is no size"),
        (["--max-engine-bytes", "1kB"], "--max-engine-bytes holds not even one engine for each block"),
        (["--target-latency", "1"], "--target-latency needs the times of this model's blocks"),
        (["--max-variants", "2", "--target-fab", "9"], "each of these picks the number of variants"),
        (["--policy", "8-16-32"], "decides over blocks, and engines by layer need a decision over layers"),
        (["--policy", "none"], "engines by layer are made for what a policy asks for, and there is none"),
        (["--granularity", "block", "--max-variants", "2"], "--max-variants limits variants by layer"),
        (["--granularity", "block", "--policy", "none", "--fuse"], "there is no policy"),
    ],
)
def test_what_cannot_be_is_one_clear_error(
    cli: Cli, layered: Path, tiny_model: Path, few: Path, tmp_path: Path, options: list[str], complaint: str
) -> None:
    out = tmp_path / "bundle"
    shutil.copytree(layered, out)
    command = [
        "build",
        "--model",
        tiny_model,
        "--calibration",
        few,
        "--granularity",
        "layer",
        "--steps",
        STEPS,
    ]
    done = cli(*command, "--policy", POLICY, "--backend", "openvino", "-o", out, *options)
    assert done.code == 2
    assert complaint in done.err
    assert done.err.count("error:") == 1
    assert "Traceback" not in done.err
