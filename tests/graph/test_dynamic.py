"""Graphs made dynamic: run by ONNX Runtime, they do what the static graphs of each size do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from qlip_export.bundle import Bundle
from qlip_export.errors import QlipError
from qlip_export.extents import AXES, Axis, Extent, Extents, parse_profile
from qlip_export.graph.dynamic import make_dynamic
from qlip_export.graph.propagate import Dim, NotDynamicError, regroup
from qlip_export.graph.store import load
from qlip_export.manifest import Manifest
from qlip_export.profiles import ProfilePlan, plan_profile
from tests.graph.conftest import Arrays, graph, relative, run

TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}


@pytest.fixture(scope="module")
def plan(sized: Path) -> ProfilePlan:
    asked = parse_profile(["batch:1x1x4", "height:16x32x64", "width:32x48x64"])
    bundle = Bundle.open(sized)
    return plan_profile(bundle.manifest, asked, bundle.file)


class Dynamic:
    """The dynamic graphs of a bundle, saved beside copies of their weights."""

    def __init__(self, bundle: Bundle, plan: ProfilePlan, folder: Path) -> None:
        self._bundle, self._plan, self._folder = bundle, plan, folder

    def __call__(self, onnx: str) -> Path:
        path = self._folder / Path(onnx).name
        if not path.exists():
            model = load(self._bundle.root / onnx)
            shapes = self._plan.engines[onnx]
            make_dynamic(model, shapes.ports, shapes.own, name=onnx)
            ir.save(model, path, external_data=f"{path.stem}.data")
        return path


@pytest.fixture(scope="module")
def dynamic(sized: Path, plan: ProfilePlan, tmp_path_factory: pytest.TempPathFactory) -> Dynamic:
    return Dynamic(Bundle.open(sized), plan, tmp_path_factory.mktemp("dynamic"))


def session(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def pairs(first: Manifest, size: Manifest) -> Iterator[tuple[str, str]]:
    """Yield the ONNX files of the first size, each with its namesake in another."""
    mine, its = ([onnx for onnx, _ in view._graphs()] for view in (first, size))
    return iter(dict(zip(mine, its, strict=True)).items())


def feeds(ports: list[Any], rng: np.random.Generator) -> Arrays:
    """Return random inputs; token ids end in the last one, which the encoder looks for."""
    found: Arrays = {}
    for port in ports:
        if port.type == "tensor(int64)":
            found[port.name] = rng.integers(0, 500, port.shape)
            found[port.name][:, -1] = 547
        else:
            found[port.name] = rng.standard_normal(port.shape).astype(TYPES[port.type])
    return found


@pytest.mark.parametrize("label", ["32x32", "48x32", "32x32:2"])
def test_every_graph_of_a_bundle_does_what_the_static_one_of_that_size_does(
    sized: Path, plan: ProfilePlan, dynamic: Dynamic, label: str
) -> None:
    first, *_ = sizes = Bundle.open(sized).manifest.sizes
    size = next(size for size in sizes if size.shapes.label == label)
    rng = np.random.default_rng(0)
    for onnx, its in pairs(first, size):
        static, made = session(sized / its), session(dynamic(onnx))
        given = feeds(static.get_inputs(), rng)
        # What has one row for the whole batch in the dynamic graph is repeated in the static one.
        once = [port.name for port in made.get_inputs() if port.shape[0] == 1 and port.name != "timestep"]
        for name in once:
            given[name][:] = given[name][:1]
        mine = {name: array[:1] if name in once else array for name, array in given.items()}
        results = zip(static.get_outputs(), made.run(None, mine), static.run(None, given), strict=True)
        for port, found, wanted in results:
            shape = tuple(e.at(size.shapes.sizes) for e in plan.engines[onnx].ports[port.name])
            assert found.shape == shape, (onnx, port.name)
            exact = port.type in ("tensor(float)", "tensor(int64)")
            tolerance = 2e-6 if exact else 5e-4  # how many rows a product has decides the order of its sums
            assert relative(found, wanted[: len(found)]) < tolerance, (onnx, port.name)


def test_only_what_says_shapes_is_another_node(sized: Path, plan: ProfilePlan, dynamic: Dynamic) -> None:
    """Q/DQ, attention and weights are those of the static graph, so that compilers fuse what they fused."""
    helpers = {"Shape": 0, "Gather": 0, "Concat": 0}
    for onnx in plan.engines:
        if "blocks" not in onnx:
            continue
        static, made = ir.load(sized / onnx), ir.load(dynamic(onnx))
        before, after = ([node.op_type for node in m.graph] for m in (static, made))
        assert [op for op in before if op not in helpers] == [op for op in after if op not in helpers]
        read = after.count("Shape")
        assert after.count("Gather") - before.count("Gather") == read <= 1  # the height of the block
        for name, value in static.graph.initializers.items():
            if value.dtype != ir.DataType.INT64:
                copy = made.graph.initializers[name]
                assert copy.dtype == value.dtype, name  # INT4 stays packed
                np.testing.assert_array_equal(copy.const_value.numpy(), value.const_value.numpy())


def test_graph_says_how_its_ports_vary(dynamic: Dynamic) -> None:
    model = ir.load(dynamic("onnx/down_blocks.1.a8.onnx"))
    assert [str(value.shape) for value in (*model.graph.inputs, *model.graph.outputs)] == [
        "[2*batch,16,height/8,width/8]",
        "[1,64]",
        "[2*batch,16,32]",
        "[2*batch,32,height/8,width/8]",
        "[2*batch,32,height/16,width/16]",
    ]


@pytest.mark.parametrize(("batch", "height", "width"), [(1, 8, 8), (3, 12, 4), (2, 4, 16)])
def test_whole_denoiser_predicts_what_torch_does(
    captured: ir.Model, denoiser: Any, parameters: Arrays, batch: int, height: int, width: int
) -> None:
    own: dict[Axis, int] = {"batch": 1, "height": 32, "width": 32}
    rows, h, w = Extent.parse("2*batch"), Extent.parse("height/4"), Extent.parse("width/4")
    shapes: dict[str, Extents] = {
        "latents": (rows, Extent.of(4), h, w),
        "text": (rows, Extent.of(16), Extent.of(32)),
    }
    made = make_dynamic(captured, shapes, own, name="denoiser")
    assert made.outputs["noise"] == shapes["latents"]
    assert made.steps == {"batch": 1, "height": 16, "width": 16}
    rng = np.random.default_rng(0)
    given: Arrays = {
        "latents": rng.standard_normal((2 * batch, 4, height, width), dtype=np.float32),
        "timestep": np.array([601], dtype=np.float32),
        "text": rng.standard_normal((2 * batch, 16, 32), dtype=np.float32),
    }
    tensors = [torch.from_numpy(given[name]) for name in ("latents", "timestep", "text")]
    wanted = np.asarray(denoiser(*tensors, return_dict=False)[0])
    assert relative(run(captured, given | parameters)["noise"], wanted) < 1e-5


# --- what single operators become, and what is refused

X = {"x": tuple(map(Extent.parse, ("batch", "8", "height", "width")))}
OWN: dict[Axis, int] = {"batch": 1, "height": 6, "width": 6}


def made_of(text: str) -> ir.Model:
    """Return a dynamic graph of `x` (batch, 8, height, width), whose own size is 1, 6, 6."""
    model = graph(text)
    make_dynamic(model, X, OWN, name="some.onnx")
    return model


def test_resize_to_sizes_becomes_one_by_scales() -> None:
    model = made_of(
        """agraph (float[1,8,6,6] x) => (float[1,8,12,18] y)
        <int64[4] sizes = {1, 8, 12, 18}> { y = Resize <mode="nearest"> (x, , , sizes) }"""
    )
    assert str(model.graph.outputs[0].shape) == "[batch,8,2*height,3*width]"
    assert run(model, {"x": np.zeros((2, 8, 3, 5), np.float32)})["y"].shape == (2, 8, 6, 15)


def test_two_numbers_that_vary_at_once_are_read_from_another_shape() -> None:
    model = made_of(
        """agraph (float[1,8,6,6] x) => (float[1,6,6,8] y)
        <int64[3] flat = {1, 8, 36}, int64[4] back = {1, 6, 6, 8}> {
            a = Reshape (x, flat)  b = Transpose <perm=[0, 2, 1]> (a)  y = Reshape (b, back)
        }"""
    )
    x = np.arange(2 * 8 * 3 * 5, dtype=np.float32).reshape(2, 8, 3, 5)
    np.testing.assert_array_equal(run(model, {"x": x})["y"], x.transpose(0, 2, 3, 1))
    assert [node.op_type for node in model.graph].count("Shape") == 1


def test_expand_repeats_what_does_not_vary_and_constants_give_their_row() -> None:
    text = """agraph (float[2,1,6,6] x) => (float[2,4,6,6] y)
        <int64[4] to = {2, 4, 6, 6}, float[2,1,1,1] same = {3.0, 3.0}> {
            a = Expand (x, to)  y = Add (a, same)
        }"""
    shapes = {"x": tuple(map(Extent.parse, ("batch", "1", "height", "width")))}
    model = graph(text)
    make_dynamic(model, shapes, OWN | {"batch": 2}, name="some.onnx")
    found = run(model, {"x": np.ones((3, 1, 2, 5), np.float32)})["y"]
    np.testing.assert_array_equal(found, np.full((3, 4, 2, 5), 4.0))


def test_what_is_computed_of_constants_gives_its_row() -> None:
    """The mask of a text encoder: chosen by a folded condition that was repeated for the batch."""
    text = """agraph (float[2,1,6,6] x) => (float[2,1,6,6] y)
        <bool[2,1,1,1] seen = {1, 1}, float zero = {0.0}, float low = {-9.0}> {
            mask = Where (seen, zero, low)  y = Add (x, mask)
        }"""
    shapes = {"x": tuple(map(Extent.parse, ("batch", "1", "6", "6")))}
    model = graph(text)
    make_dynamic(model, shapes, {"batch": 2}, name="some.onnx")
    found = run(model, {"x": np.ones((3, 1, 6, 6), np.float32)})["y"]
    np.testing.assert_array_equal(found, np.ones((3, 1, 6, 6)))


REFUSED = {
    "a constant of one size": (
        "<float[6] c = {1.0, 1.0, 1.0, 1.0, 1.0, 1.0}> { y = Add (x, c) }",
        "width meets 6",
    ),
    "rows that differ": ("<float[1,8,6,1] c> { y = Mul (x, c) }", "height meets 6"),
    "a part of what varies": (
        "<int64[1] from = {0}, int64[1] to = {6}, int64[1] axis = {3}> { y = Slice (x, from, to, axis) }",
        "a constant part of width is taken",
    ),
    "an operator of unknown shape": ("{ y = CumSum (x, axis) }", "nothing is known"),
}


@pytest.mark.parametrize(("body", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_a_constant_ties_to_one_size_is_refused(body: str, reason: str) -> None:
    head = "float[1,8,6,6] x, int64 axis" if "CumSum" in body else "float[1,8,6,6] x"
    body = body.replace("<float[1,8,6,1] c>", "<float[1,8,6,1] c = {" + ", ".join(map(str, range(48))) + "}>")
    with pytest.raises(QlipError, match=r"some\.onnx: node .* has no shape that follows") as caught:
        made_of(f"agraph ({head}) => (float[1,8,6,6] y) {body}")
    assert reason in str(caught.value.found)


def test_dimensions_come_apart_into_what_they_were_merged_from() -> None:
    own: dict[Axis, int] = {"batch": 1, "height": 4, "width": 4}
    rows, h, w = (Dim(Extent.parse(text)) for text in ("2*batch", "height", "width"))
    tokens = regroup((rows, h, w), (2, 16), own)
    assert [str(dim.extent) for dim in tokens] == ["2*batch", "height*width"]
    assert [str(d.extent) for d in regroup(tokens, (2, 4, 4), own)] == ["2*batch", "height", "width"]
    assert [str(d.extent) for d in regroup(tokens, (8, 4), own)] == ["2*batch*height", "width"]
    assert [str(d.extent) for d in regroup((h,), (2, 2), own)] == ["height/2", "2"]
    with pytest.raises(NotDynamicError, match="does not come apart"):
        regroup((Dim(Extent.of(6)), h), (4, 6), own)


def test_sizes_that_the_graph_was_not_made_for_name_the_multiple(sized: Path) -> None:
    bundle = Bundle.open(sized)
    with pytest.raises(QlipError, match=r"height:24x32x48 does not fit(.|\n)*multiples of 16(.|\n)*24"):
        plan_profile(bundle.manifest, parse_profile(["height:24x32x48"]), bundle.file)
    with pytest.raises(QlipError, match=r"leaves out the bundle's own size(.|\n)*a range with 32"):
        plan_profile(bundle.manifest, parse_profile(["height:48x48x64"]), bundle.file)


def test_extents_are_read_as_they_are_written() -> None:
    batch, height, width = map(Extent.of, AXES)
    area = height * width / 64 + Extent.of(77)
    for extent in (batch * Extent.of(2), area, height / 8 - Extent.of(1), Extent.of(5), height * height):
        assert Extent.parse(str(extent)) == extent
    assert str(area) == "height*width/64+77"
    assert area.at({"batch": 1, "height": 64, "width": 8}) == 85
    with pytest.raises(QlipError, match="is no whole number"):
        (height / 8).at({"batch": 1, "height": 12, "width": 8})
