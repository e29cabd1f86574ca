"""`compile --profile`: engines for a range of sizes.

TensorRT-RTX really compiles them; none is executed, which takes a GPU. How they are run is shown with the
stand-in for the library, whose engines are the dynamic ONNX graphs.
"""

from __future__ import annotations

import json
import shutil
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qlip_export.backends import tensorrt_builder as shared_code
from qlip_export.backends.base import Capabilities
from qlip_export.backends.options import CompileOptions
from qlip_export.bundle import Bundle
from qlip_export.compile import CompileReport, compile_bundle
from qlip_export.compiled import Compiled, TensorEntry
from qlip_export.errors import QlipError
from qlip_export.extents import EngineShapes, Extent, parse_profile
from qlip_export.graph.dynamic import make_dynamic
from qlip_export.graph.store import load
from qlip_export.noise import seeded_noise
from qlip_export.profiles import _Shapes, plan_profile
from qlip_export.progress import Progress, Silent
from qlip_export.reference import psnr
from qlip_export.runtime import TextToImage
from qlip_export.sizes import choose_size
from qlip_export.spec import Container
from qlip_export.timing import time_target
from qlip_export.validate import validate
from tests import tamper
from tests.backends.stand_in_cuda import StandInRuntime
from tests.backends.test_tensorrt_runtime import StandInTensorRt
from tests.conftest import Cli, Shared
from tests.test_cli import one_error

RANGES = ("batch:1x1x4", "height:16x32x64", "width:32x48x64")


def compile_ranging(bundle: Path, backend: str, *ranges: str) -> CompileReport:
    return compile_bundle(bundle, backend, Silent(), CompileOptions(profile=parse_profile(ranges)))


# --- TensorRT-RTX


@pytest.fixture(scope="session")
def ranging(shared: Shared, sized: Path) -> Path:
    """The INT8 engines of `sized`, and one FP16 engine, by TensorRT-RTX, for `RANGES`; its others as well."""
    pytest.importorskip("tensorrt_rtx", reason='needs pip install "qlip-export[tensorrt-rtx]"')

    def fewer(manifest: dict[str, Any]) -> None:
        for size in (manifest, *manifest["other_sizes"]):
            for block in size["blocks"]:
                kept = {"a8", "a16"} if block["name"] == "down_blocks.1" else {"a8"}
                block["variants"] = {n: v for n, v in block["variants"].items() if n in kept}

    def make(out: Path) -> None:
        shutil.copytree(sized, out)
        tamper.edit_manifest(out, fewer)
        compile_ranging(out, "tensorrt-rtx", *RANGES)

    return shared("ranging", make)


def places(plan: bytes, shape: tuple[int, ...]) -> list[int]:
    """Return where a shape stands in an engine file, as 64-bit numbers."""
    wanted, found, at = struct.pack(f"<{len(shape)}q", *shape), [], -1
    while (at := plan.find(wanted, at + 1)) >= 0:
        found.append(at)
    return found


def test_engines_are_one_set_and_hold_the_profile(ranging: Path) -> None:
    """Without a GPU the library does not load an engine; its file is what can be looked at."""
    manifest = Bundle.open(ranging).manifest
    target = manifest.targets["tensorrt-rtx"]
    assert target.engines.keys() == dict(manifest.sizes[0]._graphs()).keys()
    assert {axis: str(held) for axis, held in target.profile.items()} == {
        "batch": "1x1x4",
        "height": "16x32x64",
        "width": "32x48x64",
    }
    assert [held.step for held in target.profile.values()] == [1, 16, 16]
    entry = target.engines["onnx/down_blocks.1.a8.onnx"]
    port = next(port for port in entry.inputs if port.name == "down_blocks.0_out2")
    assert (port.shape, port.extents) == ((2, 16, 4, 4), ("2*batch", "16", "height/8", "width/8"))
    plan = (ranging / entry.path).read_bytes()
    (low,), (best,), (high,) = (places(plan, s) for s in ((2, 16, 2, 4), (2, 16, 4, 6), (8, 16, 8, 8)))
    assert low < best < high
    assert target.engines["onnx/time.a32.onnx"].outputs[0].extents is None  # one row for the whole batch


def test_what_was_asked_of_layers_and_weights_is_kept(ranging: Path) -> None:
    engines = Bundle.open(ranging).manifest.targets["tensorrt-rtx"].engines
    facts = {onnx: entry.facts for onnx, entry in engines.items()}
    assert all(fact is not None and fact.wrong == {} for fact in facts.values())
    half = facts["onnx/down_blocks.1.a16.onnx"]
    assert half is not None and half.int4_weights_widened == 0  # packed, as in a static engine


def test_other_range_rebuilds_only_what_it_changes(ranging: Path, tmp_path: Path) -> None:
    mine = Path(shutil.copytree(ranging, tmp_path / "mine"))
    assert compile_ranging(mine, "tensorrt-rtx", *RANGES).built == 0
    report = compile_ranging(mine, "tensorrt-rtx", *RANGES[:2], "width:32x32x64")
    # Neither the timestep's embedding nor text encoder and policy have a width.
    assert (report.built, report.reused) == (10, 3)


# --- which size runs


@pytest.mark.parametrize(
    ("asked", "label"),
    [
        ({}, "32x32"),
        ({"width": 48}, "48x32"),
        ({"width": 64, "height": 16}, "64x16"),
        ({"height": 48, "batch_size": 3}, "32x48:3"),
        ({"images": 3}, "32x32:3"),
        ({"images": 9}, "32x32:3"),
        ({"height": 64, "images": 7}, "32x64:4"),
    ],
)
def test_size_within_the_range_is_taken(ranging: Path, asked: dict[str, int], label: str) -> None:
    opened = Bundle.open(ranging)
    view = choose_size(opened, **asked, target="tensorrt-rtx").manifest  # type: ignore[arg-type]
    assert view.shapes.label == label
    assert view.inputs[0].shape == (2 * view.shapes.batch_size, *view.shapes.latents[1:])
    (height, width), batch = view.shapes.image, view.shapes.batch_size
    target = view.targets["tensorrt-rtx"]
    ends = {block.name: target.engines[block.variants["a8"].onnx].outputs[-1].shape for block in view.blocks}
    assert ends["down_blocks.1"] == (2 * batch, 32, height // 16, width // 16)
    assert ends["out"] == (2 * batch, 4, height // 4, width // 4)
    assert target.engines[view.vae_decoder.onnx].outputs[0].shape == (batch, 3, height, width)


@pytest.mark.parametrize("asked", [{"width": 80}, {"width": 40}, {"batch_size": 5}, {"height": 8}])
def test_size_outside_of_the_range_names_it(ranging: Path, asked: dict[str, int]) -> None:
    with pytest.raises(QlipError, match="holds no engines of that size") as caught:
        TextToImage.load(ranging, backend="tensorrt-rtx", **asked)  # type: ignore[arg-type]
    assert caught.value.expected == (
        "tensorrt-rtx: batch 1 to 4, height 16 to 64, multiples of 16, width 32 to 64, multiples of 16"
    )
    assert str(caught.value.fix).endswith("a wider --profile")


def test_sizes_of_other_targets_stay_theirs(ranging: Path) -> None:
    assert TextToImage.load(ranging, width=48).target.name == "openvino"
    with pytest.raises(QlipError, match="no engines of that size") as caught:
        TextToImage.load(ranging, backend="openvino", width=64)
    assert caught.value.expected == "32x32, 48x32, 32x32:2 (WIDTHxHEIGHT, :batch size)"


def test_size_that_only_engines_for_a_gpu_have_says_so(
    cli: Cli, ranging: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qlip_export.backends.cuda.gpu_count", lambda: 0)
    options = ("--width", 64, "--height", 16, "-o", tmp_path / "no.png", "--json")
    error = one_error(cli("generate", ranging, "a red apple", *options))
    assert error == {
        "problem": "only engines of tensorrt-rtx make images of that size, and they do not run here",
        "expected": "a GPU and its driver",
        "found": "engines of TensorRT-RTX run on NVIDIA GPUs; none is at hand",
        "fix": "take a size that openvino can make here: 32x32, 48x32, 32x32:2 (WIDTHxHEIGHT, :batch size); "
        f"or build it with one more --size, then qlip-export compile {ranging} --backend openvino",
    }


def test_evaluation_of_such_a_size_says_so_too(
    cli: Cli, ranging: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qlip_export.backends.cuda.gpu_count", lambda: 0)
    options = ("--metrics", "fab,bitops", "--compare", 8, "--samples", 2, "--width", 64, "--json")
    assert "only engines of tensorrt-rtx make" in one_error(cli("evaluate", ranging, *options))["problem"]


def test_nothing_else_that_runs_here_is_not_offered(ranging: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlip_export.backends.cuda.gpu_count", lambda: 0)
    monkeypatch.setitem(sys.modules, "openvino", None)
    monkeypatch.delitem(sys.modules, "qlip_export.backends.openvino", raising=False)
    with pytest.raises(QlipError, match="only engines of tensorrt-rtx") as caught:
        TextToImage.load(ranging, width=64)
    assert str(caught.value.fix).startswith("build it with one more --size")


# --- bad input


REFUSED = [
    (["batch:4x2x1"], "the numbers do not rise", "1 <= MIN <= OPT <= MAX", "4, 2, 1", "batch:1x2x4"),
    (["batch:0x1x2"], "the numbers do not rise", "1 <= MIN <= OPT <= MAX", "0, 1, 2", "batch:1x1x2"),
    (["depth:1x1x4"], "is no range", "batch, height or width", "depth:1x1x4", "batch:1x1x4"),
    (["height:16x64"], "is no range", "NAME:MINxOPTxMAX", "height:16x64", "height:512x768x1024"),
    (
        ["batch:1x1x2", "batch:1x1x4"],
        "batch has a range already",
        "one range for batch",
        "--profile batch:1x1x2 before",
        "--profile batch:1x1x4 alone",
    ),
    (["height:24x32x48"], "does not fit the model", "multiples of 16", "24", "--profile height:16x32x48"),
    (
        ["width:48x48x64"],
        "leaves out the bundle's own size",
        "a range with 32",
        "48 to 64",
        "--profile width:32x48x64",
    ),
    (["width:32x32x100000"], "MAX is too large", "8192 pixels", "100000", "--profile width:32x32x8192"),
    (["batch:1x1x65"], "MAX is too large", "64 images", "65", "--profile batch:1x1x64"),
    (
        ["batch:1x1x64", "height:32x32x8192", "width:32x32x8192"],
        "MAX is too large",
        "2,147,483,647 numbers, which 32 bits index",
        "128 x 4 x 2048 x 2048, 2,147,483,648 numbers",
        "lower MAX",
    ),
]


@pytest.mark.parametrize(("ranges", "problem", "expected", "found", "fix"), REFUSED)
def test_ranges_that_are_refused(
    cli: Cli, sized: Path, ranges: list[str], problem: str, expected: str, found: str, fix: str, rtx: Any
) -> None:
    options = [text for given in ranges for text in ("--profile", given)]
    error = one_error(cli("compile", sized, "--backend", "tensorrt-rtx", *options, "--json"))
    assert problem in error["problem"]
    assert f"--profile {ranges[-1]}" in error["problem"]  # as it was typed
    assert expected in error["expected"]
    assert found in error["found"]
    assert fix in error["fix"]


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_other_backends_take_no_ranges(cli: Cli, sized: Path, backend: str) -> None:
    options = ("--backend", backend, "--profile", "batch:1x1x4", "--json")
    error = one_error(cli("compile", sized, *options))
    assert error["problem"] == f"{backend} takes no --profile: its engines have static shapes"
    assert error["expected"] == "--backend tensorrt or tensorrt-rtx"
    assert error["found"] == f"--backend {backend} --profile batch:1x1x4"
    assert "--size" in error["fix"]


def test_numbers_of_the_image_size_in_an_older_export_are_refused(sized: Path, tmp_path: Path) -> None:
    out = tamper.copy_of(sized, tmp_path)

    def older(manifest: dict[str, Any]) -> None:
        manifest["conditioning"]["text"] = {"kind": "constant", "row": [32.0, 32.0, 0.0, 0.0]}

    tamper.edit_manifest(out, older)
    with pytest.raises(QlipError) as caught:
        compile_ranging(out, "tensorrt-rtx", "height:16x32x64")
    assert caught.value.problem == (
        "--profile height:16x32x64: text of this bundle holds the size of its images as numbers"
    )
    assert caught.value.expected == "'height' and 'width' in their place, as exports write now"
    assert caught.value.found == "(32.0, 32.0, 0.0, 0.0)"
    assert str(caught.value.fix).startswith("export the bundle again")


def test_graph_that_cannot_follow_names_the_ranges(sized: Path, tmp_path: Path) -> None:
    import onnx

    out = tamper.copy_of(sized, tmp_path)
    path = out / "onnx/stem.a8.onnx"
    model = onnx.load(path, load_external_data=False)
    next(node for node in model.graph.node if node.op_type == "Conv").op_type = "CumSum"
    onnx.save(model, path)
    asked = parse_profile(["height:16x32x64", "width:32x32x64"])
    with pytest.raises(QlipError, match=r"stem\.a8\.onnx: node .*CumSum") as caught:
        plan_profile(Bundle.open(out).manifest, asked, lambda onnx: out / onnx)
    assert caught.value.problem.startswith("--profile height:16x32x64 --profile width:32x32x64: ")
    assert None not in caught.value.as_dict().values()


def test_outputs_that_do_not_follow_name_the_ranges(sized: Path) -> None:
    asked = parse_profile(["batch:1x1x4"])
    shapes = _Shapes(Bundle.open(sized).manifest, asked, lambda onnx: sized / onnx)
    with pytest.raises(QlipError) as caught:
        shapes._expect({"noise": (Extent.of(2),)}, {"noise": (Extent.of("batch"),)})
    assert caught.value.as_dict() == {
        "problem": "--profile batch:1x1x4: the graphs of this bundle do not follow: noise",
        "expected": "(batch)",
        "found": "(2)",
        "fix": "several static sizes in one bundle: build --size",
    }


# --- running them, with the stand-in


class StandInCompiler(StandInTensorRt):
    """Writes the dynamic graph as the engine."""

    capabilities: Any = Capabilities(
        device="stand-in", version="0", half="float16", suffix=".plan", containers=()
    )

    def prepare(self, options: CompileOptions, progress: Progress) -> None:
        pass

    def compile_ranging(
        self, onnx: Path, engine: Path, container: Container, shapes: EngineShapes
    ) -> Compiled:
        model = load(onnx)
        make_dynamic(model, shapes.ports, shapes.own, name=onnx.name)
        varying = [str(v.name) for v in model.graph.inputs if shapes.varies(str(v.name))]
        profile = {name: (shapes.at("min", name), shapes.at("max", name)) for name in varying}
        model.metadata_props["profile"] = json.dumps(profile)
        engine.write_bytes(ir.to_proto(ir.external_data.load_to_model(model)).SerializeToString())

        def port(value: ir.Value) -> TensorEntry:
            assert value.dtype is not None
            tensor: Any = type("Tensor", (), {"name": value.name, "shape": [1], "dtype": value.dtype})
            entry = shared_code.port(_named(tensor), shapes)
            own = tuple(extent.at(shapes.own) for extent in shapes.ports[str(value.name)])
            return entry.model_copy(update={"shape": own})

        graph = model.graph
        return Compiled(inputs=tuple(map(port, graph.inputs)), outputs=tuple(map(port, graph.outputs)))


def _named(tensor: Any) -> Any:
    names = {"FLOAT16": "HALF"}
    tensor.dtype = type("DataType", (), {"name": names.get(tensor.dtype.name, tensor.dtype.name)})
    return tensor


@pytest.fixture
def stand_in(
    shared: Shared,
    sized: Path,
    gpu: StandInRuntime,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """`sized` with engines of the stand-in for `RANGES`, and the stand-in in TensorRT's place."""
    from qlip_export.backends import get_backend

    def get(name: str, *, threads: int | None = None) -> Any:
        return StandInCompiler() if name == "tensorrt" else get_backend(name, threads=threads)

    monkeypatch.setattr("qlip_export.compile.get_backend", get)
    monkeypatch.setattr("qlip_export.runtime.targets.get_backend", get)

    def make(out: Path) -> None:
        shutil.copytree(sized, out)
        compile_ranging(out, "tensorrt", *RANGES)

    return shared("ranging-stand-in", make)


@pytest.mark.parametrize("size", [{"width": 48}, {"batch_size": 2}])
def test_images_are_those_of_static_engines(stand_in: Path, size: dict[str, int]) -> None:
    prompts = ["a red apple", "a green boat"]
    run, static = (
        TextToImage.load(stand_in, backend=backend, **size)  # type: ignore[arg-type]
        for backend in ("tensorrt", "openvino")
    )
    assert run.target.entry.profile and not static.target.entry.profile
    noise = np.stack([seeded_noise(i, run.bundle.manifest.shapes.latents[1:]) for i in range(2)])
    images = [each(prompts, latents=noise, bits=32).images for each in (run, static)]
    for found, wanted in zip(*images, strict=True):
        assert found.size == wanted.size == (size.get("width", 32), 32)
        assert psnr(found, wanted) > 45


def test_size_that_nothing_was_built_for_becomes_an_image(cli: Cli, stand_in: Path, tmp_path: Path) -> None:
    options = ("--height", 64, "--width", 48, "--backend", "tensorrt", "--seed", 0, "--json")
    done = cli("generate", stand_in, *["a red apple"] * 3, *options, "-o", tmp_path / "images")
    assert done.code == 0, done.err
    records = json.loads(done.out)["images"]
    assert {record["target"] for record in records} == {"tensorrt"}
    # Three images in one batch: all have the bits of the most demanding.
    run = TextToImage.load(stand_in, backend="tensorrt", height=64, width=48, images=3)
    assert run.bundle.manifest.shapes.label == "48x64:3"
    from PIL import Image

    with Image.open(tmp_path / "images/0000.png") as image:
        assert image.size == (48, 64)


def test_inspect_tells_the_ranges(cli: Cli, stand_in: Path) -> None:
    said = cli("inspect", stand_in).out
    assert "one set of engines for batch 1 to 4 (tuned for 1); height 16 to 64, multiples of 16" in said


def test_shape_outside_of_the_profile_is_refused_by_the_engine(stand_in: Path) -> None:
    run = TextToImage.load(stand_in, backend="tensorrt")
    entry = run.target.entry.engines[run.bundle.manifest.blocks[1].variants["a32"].onnx]
    engine = run.backend.load(stand_in / entry.path, entry)
    with pytest.raises(QlipError, match=r"refuses latents: \(2, 4, 32, 8\)"):
        engine.bind("latents", run.backend.allocate((2, 4, 32, 8), "float32"))
    with pytest.raises(QlipError, match="the engine does not start"):
        engine.run()


def test_variants_are_timed_at_the_optimum(
    stand_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = Path(shutil.copytree(stand_in, tmp_path / "mine"))
    monkeypatch.setattr("qlip_export.timing.LEAST", 1)
    monkeypatch.setattr("qlip_export.timing.MOST", 1)
    seen = []
    monkeypatch.setattr(
        "qlip_export.timing.Chain.step", lambda self, latents, *rest: seen.append(latents.shape) or latents
    )
    timing = time_target(mine, "tensorrt", Silent())
    assert timing is not None and set(seen) == {(2, 4, 8, 12)}  # 48x32
    own = {v.onnx for block in Bundle.open(mine).manifest.blocks for v in block.variants.values()}
    assert timing.milliseconds.keys() == own and timing.other_sizes == {}


def test_validation_looks_at_the_sizes_that_the_range_holds(
    stand_in: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qlip_export.validate._compare_images", lambda *arguments: ([], []))
    report = validate(stand_in, prompt="a dog", seed=1, model=None, progress=Silent(), backend="tensorrt")
    assert [report.size, *(other.size for other in report.other_sizes)] == ["32x32", "48x32", "32x32:2"]
    assert report.passed
