"""Variants are timed where they run; one that is slower than a more precise one does not run by itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qlip_export.backends import get_backend
from qlip_export.bundle import Bundle
from qlip_export.compile import compile_bundle
from qlip_export.compiled import TimingEntry
from qlip_export.manifest import BlockEntry, VariantEntry
from qlip_export.progress import Silent
from qlip_export.runtime import TextToImage
from qlip_export.runtime.dispatch import dispatch
from qlip_export.spec import Container, container_of
from qlip_export.timing import dominated, time_target
from tests import tamper
from tests.conftest import Cli


def block(name: str, *options: int) -> BlockEntry:
    variants = {
        f"a{bits}": VariantEntry(bits=bits, container=container_of(bits), onnx=f"onnx/{name}.a{bits}.onnx")
        for bits in options
    }
    return BlockEntry(
        name=name, inputs=(), outputs=(), layers=(), reference="onnx/x.a32.onnx", variants=variants
    )


def times(name: str, **milliseconds: float) -> dict[str, float]:
    return {f"onnx/{name}.{variant}.onnx": value for variant, value in milliseconds.items()}


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({"a8": 1.0, "a16": 2.0, "a32": 4.0}, {}),
        ({"a8": 3.0, "a16": 2.0, "a32": 4.0}, {"a8": "a16"}),
        ({"a8": 6.0, "a16": 5.0, "a32": 4.0}, {"a8": "a32", "a16": "a32"}),
        ({"a8": 2.0, "a16": 1.9, "a32": 4.0}, {}),  # within the noise
        ({"a8": 6.0, "a16": 1.0, "a32": 0.95}, {"a8": "a32"}),
        ({"a8": 6.0, "a32": 4.0}, {"a8": "a32"}),  # 16 bits were not timed
    ],
)
def test_variant_is_dominated_by_a_faster_one_of_at_least_its_bits(
    found: dict[str, float], expected: dict[str, str]
) -> None:
    blocks = (block("up", 8, 16, 32), block("other", 8, 16, 32))
    milliseconds = times("up", **found) | times("other", a8=1, a16=2, a32=3)
    assert dominated(blocks, milliseconds) == ({"up": expected} if expected else {})


def test_fewer_bits_never_stand_in_for_more() -> None:
    assert dominated((block("up", 8, 16, 32),), times("up", a8=1, a16=9, a32=9)) == {}


def test_one_engine_for_all_options_is_not_dominated_by_itself() -> None:
    only = VariantEntry(bits=32, container=Container.FLOAT, onnx="onnx/time.a32.onnx")
    same = {f"a{bits}": only.model_copy(update={"bits": bits}) for bits in (8, 16, 32)}
    time = BlockEntry(
        name="time", inputs=(), outputs=(), layers=(), reference="onnx/x.a32.onnx", variants=same
    )
    assert dominated((time,), {"onnx/time.a32.onnx": 1.0}) == {}


def test_dispatch_replaces_what_is_dominated_and_nothing_else() -> None:
    blocks = (block("down", 8, 16, 32), block("up", 8, 16, 32))
    instead = {"up": {"a8": "a32", "a16": "a32"}}
    assert dispatch(instead, blocks, [("a8", "a8"), ("a16", "a16"), ("a32", "a32")]) == [
        ("a8", "a32"),
        ("a16", "a32"),
        ("a32", "a32"),
    ]
    assert dispatch({}, blocks, [("a8", "a16")]) == [("a8", "a16")]


@pytest.fixture
def mine(adaptive_bundle: Path, tmp_path: Path) -> Path:
    return tamper.copy_of(adaptive_bundle, tmp_path)


def timing_of(path: Path) -> TimingEntry:
    found = Bundle.open(path).manifest.targets["openvino"].timing
    assert found is not None
    return found


def test_every_engine_of_a_block_is_timed_once(mine: Path, cli: Cli) -> None:
    report = json.loads(cli("compile", mine, "--backend", "openvino", "--json").out)
    manifest, timing = Bundle.open(mine).manifest, timing_of(mine)
    assert report["timing"] == json.loads(timing.model_dump_json())
    assert set(timing.milliseconds) == {v.onnx for b in manifest.blocks for v in b.variants.values()}
    assert all(value > 0 for value in timing.milliseconds.values())
    before = (mine / "manifest.json").read_bytes()
    shown = cli("compile", mine, "--backend", "openvino").out
    assert (mine / "manifest.json").read_bytes() == before, "known times are kept"
    assert "a step at 8 / 16 / 32 bits: " in shown
    assert "a step at 8 / 16 / 32 bits: " in cli("inspect", mine).out


def test_no_timing_and_times_of_other_engines(mine: Path, cli: Cli) -> None:
    cli("compile", mine, "--backend", "openvino", "--no-timing")
    assert Bundle.open(mine).manifest.targets["openvino"].timing is None
    set_timing(mine, {"up_blocks.0": {"a8": "a32"}})
    compile_bundle(mine, "openvino", Silent())
    assert timing_of(mine).instead == {"up_blocks.0": {"a8": "a32"}}
    tamper.edit_manifest(mine, lambda m: m["files"]["onnx/stem.a8.onnx"].update(key="another"))
    assert compile_bundle(mine, "openvino", Silent()).built == 1
    assert Bundle.open(mine).manifest.targets["openvino"].timing is None, (
        "one engine is new: all are timed anew"
    )


def set_timing(path: Path, instead: dict[str, dict[str, str]]) -> None:
    """Write times in which the variants named are slower than others."""

    def edit(manifest: dict[str, Any]) -> None:
        slow = {(name, variant) for name, of in instead.items() for variant in of}
        milliseconds = {
            variant["onnx"]: 9.0 if (entry["name"], name) in slow else 1.0
            for entry in manifest["blocks"]
            for name, variant in entry["variants"].items()
        }
        timing = {"milliseconds": milliseconds, "repeats": 5, "instead": instead}
        manifest["targets"]["openvino"]["timing"] = timing

    tamper.edit_manifest(path, edit)


def test_chosen_bits_run_as_the_faster_variant_and_forced_bits_as_they_are(mine: Path) -> None:
    blocks = [b.name for b in Bundle.open(mine).manifest.blocks]
    every = {name: {"a8": "a32", "a16": "a32"} for name in blocks if name != "time"}
    exact = TextToImage.load(mine)("a dog", seed=3, bits=32).images[0]
    forced = TextToImage.load(mine)("a dog", seed=3, bits=8).images[0]
    chosen = TextToImage.load(mine)("a dog", seed=3)
    assert {bits for step in chosen.records[0]["bits"] for bits in step} - {32}, (
        "the policy must choose something"
    )
    assert chosen.images[0].tobytes() != exact.tobytes()
    set_timing(mine, every)
    made = TextToImage.load(mine)("a dog", seed=3)
    assert made.images[0].tobytes() == exact.tobytes()
    record, before = made.records[0], chosen.records[0]
    assert (record["instead"], record["engine_switches"]) == (every, 0)
    assert (record["bits"], record["fab"]) == (before["bits"], before["fab"])
    again = TextToImage.load(mine)("a dog", seed=3, bits=8)
    assert again.images[0].tobytes() == forced.tobytes()
    assert again.records[0]["instead"] == {}


def test_dominated_variants_are_reported_and_can_be_kept(mine: Path, cli: Cli) -> None:
    set_timing(mine, {"stem": {"a8": "a32"}})
    line = "stem: a32 (1.00 ms) runs where a8 (9.00 ms) would"
    assert line in cli("inspect", mine).out
    assert line not in cli("compile", mine, "--backend", "openvino", "--keep-dominated").out
    assert timing_of(mine).instead == {}
    assert "a8" in timing_of(mine).model_dump_json(), "times are kept"
    assert cli("compile", mine, "--backend", "openvino").out.count(" runs where ") == 1
    assert set(timing_of(mine).instead["stem"]) == {"a8"}


def test_engines_that_do_not_run_here_are_not_timed(bundle: Path, tmp_path: Path) -> None:
    out = tamper.copy_of(bundle, tmp_path)
    notes: list[str] = []

    class Noting(Silent):
        def note(self, text: str) -> None:
            notes.append(text)

    def rename(manifest: dict[str, Any]) -> None:
        target = manifest["targets"].pop("openvino")
        manifest["targets"]["tensorrt-rtx"] = target | {"backend": "tensorrt-rtx"}

    tamper.edit_manifest(out, rename)
    before = (out / "manifest.json").read_bytes()
    assert time_target(out, "tensorrt-rtx", Noting()) is None
    assert len(notes) == 1 and notes[0].startswith("not timed: ")
    assert (out / "manifest.json").read_bytes() == before


def test_a_build_plans_by_the_times_of_the_bundle_that_it_replaces(mine: Path, tmp_path: Path) -> None:
    from qlip_export.build_variants import hardware

    def known(previous: Path, *, batch_size: int = 1, wider: int = 0) -> dict[str, Any]:
        manifest = Bundle.open(mine).manifest
        backend, bits = get_backend("openvino"), manifest.quantization.weight_bits
        _, channels, height, width = manifest.shapes.latents
        latents = (batch_size, channels, height, width + wider)
        found = hardware(backend, bits, None, manifest.model.fingerprint, latents, sizes=1, previous=previous)
        assert {n: {b[0]: t for b, t in of.items()} for n, of in found.measured.items()} == found.milliseconds
        return {**found.milliseconds}

    assert known(mine) == {}, "nobody timed it yet"
    set_timing(mine, {"up_blocks.0": {"a8": "a32"}})
    found = known(mine)
    # What runs at 8 bits there is the engine at 32, which takes as long as the others.
    assert found["up_blocks.0"] == found["up_blocks.1"] == {8: 1.0, 16: 1.0, 32: 1.0}
    assert known(mine, batch_size=2) == known(mine, wider=8) == {}
    assert known(tmp_path / "nothing") == {}
    tamper.edit_manifest(mine, lambda m: m["targets"]["openvino"].update(device="another"))
    assert known(mine) == {}
