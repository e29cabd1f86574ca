"""What TensorRT and TensorRT-RTX share. TensorRT itself is not at hand: where RTX stands in, tests say so."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from qlip_export.backends import get_backend, is_installed
from qlip_export.backends import tensorrt_builder as shared
from qlip_export.backends.base import wrong_precisions
from qlip_export.backends.options import CompileOptions
from qlip_export.bundle import Bundle
from qlip_export.compile import compile_bundle
from qlip_export.compiled import EngineFacts, TargetEntry
from qlip_export.errors import QlipError
from qlip_export.graph.precisions import asked_precisions
from qlip_export.graph.store import load
from qlip_export.progress import Plain, Silent
from qlip_export.spec import Asked, Container
from tests import tamper
from tests.backends.test_tensorrt_rtx import shrunk
from tests.conftest import Cli


def test_everything_that_is_used_is_in_the_library(rtx: Any) -> None:
    """mypy holds the code to the types of TensorRT 10; this is the other library."""
    for name in shared.Library.__annotations__:
        assert hasattr(rtx.library, name), name


def test_type_stubs_alone_are_no_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "only_types").mkdir()
    (tmp_path / "only_types/__init__.pyi").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert not is_installed("only_types")
    assert is_installed("numpy")


@pytest.mark.skipif(is_installed("tensorrt"), reason="TensorRT is installed")
def test_tensorrt_that_is_missing_names_its_extra(cli: Cli, bundle: Path) -> None:
    done = cli("compile", bundle, "--backend", "tensorrt", "--json")
    assert json.loads(done.out)["error"]["fix"] == 'pip install "qlip-export[tensorrt]"'


# --- progress, and what is raised meanwhile


class Listening(Silent):
    def __init__(self) -> None:
        self.details: list[str] = []
        self.notes: list[str] = []

    def detail(self, text: str) -> None:
        self.details.append(text)

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_phases_of_a_build_are_shown(bundle: Path, tmp_path: Path, rtx: Any) -> None:
    progress = Listening()
    rtx.prepare(CompileOptions(), progress)
    rtx.compile(bundle / "onnx/stem.a16.onnx", tmp_path / "x.plan", Container.HALF)
    assert "stem.a16: building engine 0/6" in progress.details
    assert len({text.split(": ")[1].rsplit(" ", 1)[0] for text in progress.details}) > 3


def test_detail_is_a_line_every_ten_seconds_in_a_log(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr("qlip_export.progress.time.monotonic", lambda: now[0])
    progress = Plain()
    progress.stage("compile", 3)
    progress.item("a")
    progress.detail("a: timing 1/2")
    now[0] += 11
    progress.detail("a: timing 2/2")
    assert capsys.readouterr().err.splitlines() == ["compile (3)", "compile: 1/3 a: timing 2/2"]


def test_interrupted_within_an_engine_leaves_the_bundle_and_goes_on(
    bundle: Path, tmp_path: Path, rtx: Any
) -> None:
    """Ctrl-C arrives in the library's callback, which must not let it through the library."""
    out = shrunk(tamper.copy_of(bundle, tmp_path))
    before = (out / "manifest.json").read_bytes()

    class Interrupted(Silent):
        def detail(self, text: str) -> None:
            if text.startswith("out.a8: optimizing graph"):
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compile_bundle(out, "tensorrt-rtx", Interrupted())
    assert (out / "manifest.json").read_bytes() == before
    report = compile_bundle(out, "tensorrt-rtx", Silent())
    assert (report.built, report.reused) == (3, 1)


# --- out of memory, out of disk


def test_memory_that_runs_out_leaves_the_bundle(
    cli: Cli, bundle: Path, tmp_path: Path, rtx: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = shrunk(tamper.copy_of(bundle, tmp_path))
    build, count = type(rtx)._build, []

    def short(self: Any, *arguments: Any) -> Any:
        count.append(1)
        if len(count) > 1:
            raise MemoryError
        return build(self, *arguments)

    monkeypatch.setattr(type(rtx), "_build", short)
    done = cli("compile", out, "--backend", "tensorrt-rtx", "--json")
    error = json.loads(done.out)["error"]
    assert (done.code, error["problem"]) == (2, "memory ran out while tensorrt-rtx compiled out.a8.onnx")
    assert list(Bundle.open(out).manifest.targets) == ["openvino"]
    monkeypatch.undo()
    assert compile_bundle(out, "tensorrt-rtx", Silent()).reused == 1


def test_gpu_memory_that_runs_out_is_told_from_other_failures(bundle: Path, rtx: Any) -> None:
    with pytest.raises(QlipError) as caught:
        rtx._fail(bundle / "onnx/stem.a8.onnx", "cannot compile", "Error Code 2: OutOfMemory (no further)")
    assert caught.value.fix == "free memory and run the same command again; what is finished is kept"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_disk_that_fills_up_leaves_the_bundle(
    cli: Cli, bundle: Path, tmp_path: Path, rtx: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = shrunk(tamper.copy_of(bundle, tmp_path))
    write, plans = Path.write_bytes, []

    def full(self: Path, data: bytes) -> int:
        if ".plan." in self.name:
            plans.append(self)
        return write(Path("/dev/full") if len(plans) == 2 else self, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    done = cli("compile", out, "--backend", "tensorrt-rtx", "--json")
    assert done.code == 2
    assert "the disk is full while writing" in json.loads(done.out)["error"]["problem"]
    monkeypatch.undo()
    assert list(Bundle.open(out).manifest.targets) == ["openvino"]
    assert compile_bundle(out, "tensorrt-rtx", Silent()).reused == 1


# --- graphs that are refused


def odd_graph(folder: Path, operator: str, domain: str = "") -> Path:
    x = ir.Value(name="x", shape=ir.Shape([2]), type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.node(operator, [x], domain=domain, name="mid_block.resnets.0.odd/Odd")
    node.outputs[0].name = "y"
    node.outputs[0].shape, node.outputs[0].type = x.shape, x.type
    graph = ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": 21, "nowhere": 1}, name="odd")
    ir.save(ir.Model(graph, ir_version=10), folder / "mid_block.a32.onnx")
    return folder / "mid_block.a32.onnx"


@pytest.mark.parametrize("backend", ["tensorrt-rtx", "openvino", "onnxruntime"])
def test_unsupported_operator_names_node_layer_and_block(tmp_path: Path, rtx: Any, backend: str) -> None:
    onnx = odd_graph(tmp_path, "NoSuchOperator", "nowhere")
    with pytest.raises(QlipError) as caught:
        get_backend(backend).compile(onnx, tmp_path / "odd.plan", Container.FLOAT)
    problem = caught.value.problem
    assert "mid_block.a32.onnx" in problem
    assert "node 'mid_block.resnets.0.odd/Odd' (NoSuchOperator) of layer 'mid_block.resnets.0.odd'" in problem


def test_packed_int4_weights_that_a_library_refuses_are_widened_and_it_is_said(
    bundle: Path, tmp_path: Path, rtx: Any
) -> None:
    class StandInThatReadsNoInt4(type(rtx)):  # type: ignore[misc]
        def _build(self, onnx: Path, source: Path, engine: Path, *rest: Any) -> Any:
            types = {value.dtype for value in ir.load(source).graph.initializers.values()}
            if ir.DataType.INT4 in types:
                raise QlipError("cannot compile", found="no INT4 here")
            return super()._build(onnx, source, engine, *rest)

    progress = Listening()
    backend = StandInThatReadsNoInt4(threads=None)
    backend.prepare(CompileOptions(), progress)
    made = backend.compile(bundle / "onnx/stem.a16.onnx", tmp_path / "x.plan", Container.HALF)
    assert made.facts.int4_weights_widened == 1 and made.facts.wrong == {}
    assert progress.notes == [
        "stem.a16: TensorRT-RTX refuses packed INT4 weights here; they are INT8 now (no INT4 here)"
    ]


# --- TensorRT's own options, with TensorRT-RTX standing in


@pytest.fixture
def tensorrt_stand_in(rtx: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The backend of TensorRT over the library of TensorRT-RTX, which ignores what it does not know."""
    monkeypatch.setitem(sys.modules, "tensorrt", rtx.library)
    monkeypatch.delitem(sys.modules, "qlip_export.backends.tensorrt", raising=False)
    from qlip_export.backends.tensorrt import TensorRtBackend

    monkeypatch.setattr(TensorRtBackend, "_gpu", "A GPU, compute capability 8.9")
    yield TensorRtBackend(threads=None)
    sys.modules.pop("qlip_export.backends.tensorrt")


def test_stand_in_takes_every_option_but_target(tensorrt_stand_in: Any, bundle: Path, tmp_path: Path) -> None:
    options = CompileOptions(optimization_level=2, workspace=4096, hardware_compat="ampere-plus", tf32=True)
    tensorrt_stand_in.prepare(options, Silent())
    tensorrt_stand_in.compile(bundle / "onnx/stem.a32.onnx", tmp_path / "x.plan", Container.FLOAT)
    assert tensorrt_stand_in.capabilities.options == {
        "strongly_typed": True,
        "tf32": True,
        "optimization_level": 2,
        "workspace": 4096,
        "hardware_compat": "ampere-plus",
    }
    with pytest.raises(QlipError, match="tensorrt takes no --target"):
        tensorrt_stand_in.prepare(CompileOptions(target=("sm89",)), Silent())


def test_stand_in_says_why_version_compatible_engines_cannot_be_made(
    tensorrt_stand_in: Any, bundle: Path, tmp_path: Path
) -> None:
    tensorrt_stand_in.prepare(CompileOptions(version_compat=True), Silent())
    with pytest.raises(QlipError, match="libnvinfer_lean"):
        tensorrt_stand_in.compile(bundle / "onnx/stem.a32.onnx", tmp_path / "x.plan", Container.FLOAT)


@pytest.mark.filterwarnings("ignore:.*Timing cache operations are no-ops:DeprecationWarning")
def test_stand_in_ignores_a_timing_cache_of_another_version_and_says_so(
    tensorrt_stand_in: Any, bundle: Path, tmp_path: Path
) -> None:
    """The caches of TensorRT-RTX do nothing, and without a GPU all are refused; the calls are TensorRT's."""
    progress, cache = Listening(), tmp_path / "timing.cache"
    tensorrt_stand_in.prepare(CompileOptions(timing_cache=cache), progress)
    assert "timing_cache" not in tensorrt_stand_in.capabilities.options

    def compile_one() -> None:
        tensorrt_stand_in.compile(bundle / "onnx/stem.a32.onnx", tmp_path / "x.plan", Container.FLOAT)

    compile_one()
    written = cache.read_bytes()
    assert progress.notes == [] and len(written) > 0
    cache.write_bytes(b"of another version" * 20)
    compile_one()
    assert [note.split(" is of another")[0] for note in progress.notes] == [f"timing cache {cache}"]
    assert cache.read_bytes() == written


def entry(**options: Any) -> TargetEntry:
    return TargetEntry(
        backend="tensorrt",
        version="10.3.0.30",
        device="Orin, compute capability 8.7",
        half="float16",
        options=options,
        engines={},
    )


ORIN, L4, T4 = (f"{n}, compute capability {c}" for n, c in (("Orin", "8.7"), ("L4", "8.9"), ("T4", "7.5")))


@pytest.mark.parametrize(
    ("options", "version", "gpu", "against"),
    [
        ({}, "10.3.0.30", ORIN, None),
        ({}, "10.7.0.23", ORIN, "another version"),
        ({"version_compat": True}, "10.7.0.23", ORIN, None),
        ({"version_compat": True}, "10.2.0.19", ORIN, "another version"),
        ({"version_compat": True}, "11.4.0.106", ORIN, "another version"),
        ({}, "10.3.0.30", L4, "another GPU"),
        ({"hardware_compat": "ampere-plus"}, "10.3.0.30", L4, None),
        ({"hardware_compat": "ampere-plus"}, "10.3.0.30", T4, "another GPU"),
        ({"hardware_compat": "same-compute-capability"}, "10.3.0.30", L4, "another GPU"),
        ({"hardware_compat": "same-compute-capability"}, "10.3.0.30", "Orin NX" + ORIN[4:], None),
    ],
)
def test_engine_of_another_version_or_gpu_names_both_sides(
    options: dict[str, Any], version: str, gpu: str, against: str | None
) -> None:
    from qlip_export.backends.tensorrt_family import check_fit

    if against is None:
        check_fit(entry(**options), version, gpu, "rebuild")
        return
    with pytest.raises(QlipError, match=f"the engines belong to {against}") as caught:
        check_fit(entry(**options), version, gpu, "rebuild")
    sides = f"{caught.value.expected} {caught.value.found}"
    assert ("10.3.0.30" in sides and version in sides) or (ORIN in sides and gpu in sides)
    assert caught.value.fix == "rebuild"


# --- precisions


def test_what_a_graph_asks_of_its_layers(bundle: Path) -> None:
    layers = {layer.name: layer for layer in Bundle.open(bundle).manifest.blocks[3].layers}
    for bits, precision in ((8, "int8"), (16, "float16"), (32, "float32")):
        asked = asked_precisions(load(bundle / f"onnx/down_blocks.1.a{bits}.onnx"))
        assert {found.layer for found in asked.values()} == set(layers)
        for found in asked.values():
            quantized = layers[found.layer].quantized or bits > 8
            assert found.precision == (precision if quantized else "float16")


def test_layer_of_another_precision_is_named() -> None:
    asked = {"node_a": Asked("down.a", "int8"), "node_b": Asked("down.b", "int8")}
    assert wrong_precisions(asked, {"node_a": "int8", "node_b": "float16"}) == {"down.b": "float16"}
    assert wrong_precisions(asked, {"node_a": "int8"}) == {"down.b": "not found"}


def test_engine_inspector_of_tensorrt_10_as_its_documentation_shows_it() -> None:
    """No engine could be inspected here; this is the form of the documents, not a recording."""

    def layer(nodes: list[str], datatype: str) -> dict[str, Any]:
        metadata = "\u001e".join(f"[ONNX Layer: {node}]" for node in nodes)
        return {"Name": "x", "Inputs": [{"Format/Datatype": datatype}], "Metadata": metadata}

    asked = {"a": Asked("a", "int8"), "b": Asked("b", "int8"), "c": Asked("c", "float16")}
    parsed = EngineFacts(source="parsed network", layers=9, precisions={}, wrong={}, int4_weights_widened=2)
    layers = [
        layer(["a", "norm"], "Thirty-two wide channel vectorized row major Int8 format"),
        layer(["b"], "Half"),
        layer(["a", "c"], "Float"),  # fused: says nothing of one of them
    ]
    facts = shared.engine_facts(json.dumps({"Layers": [*layers, "a name only"]}), asked, parsed)
    assert (facts.source, facts.layers, facts.int4_weights_widened) == ("engine", 3, 2)
    assert facts.precisions == {"float16": 1, "float32": 1, "int8": 1}
    assert facts.wrong == {"b": "float16"}
