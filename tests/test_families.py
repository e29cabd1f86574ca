"""Denoisers beyond Stable Diffusion 1.x: the captured graph, and its chained blocks, do what torch does."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from qlip_export.capture import Shapes, capture_denoiser, denoiser_family, shapes_of
from qlip_export.checkpoint import Checkpoint
from qlip_export.errors import QlipError
from qlip_export.extents import Axis, Extent, Extents
from qlip_export.families import Family, family_of
from qlip_export.graph.dynamic import make_dynamic
from qlip_export.graph.layers import find_layers, static_shape
from qlip_export.graph.split import split
from qlip_export.spec import Granularity
from tests.graph.conftest import Arrays, relative, run
from tests.tiny_families import DENOISERS, write_configs


@dataclass(frozen=True)
class Captured:
    family: Family
    shapes: Shapes
    graph: ir.Model
    feeds: Arrays
    expected: np.ndarray


@pytest.fixture(scope="module", params=["sdxl", "flux"])
def captured(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Captured:
    """A denoiser's graph on an image wider than high, its inputs and parameters, and what torch predicts."""
    checkpoint = Checkpoint(write_configs(tmp_path_factory.mktemp(request.param) / "model", request.param))
    family = denoiser_family(checkpoint)
    shapes = shapes_of(checkpoint, batch_size=1, height=32, width=48)
    graph = capture_denoiser(checkpoint, shapes)
    rng = np.random.default_rng(0)
    feeds: Arrays = {i.name: rng.standard_normal(shapes.of(i), dtype=np.float32) for i in family.inputs}
    feeds["timestep"] = np.array([601], dtype=np.float32)
    module = torch_denoiser(request.param)
    expected = predict(request.param, module, feeds)
    feeds |= {name: value.numpy() for name, value in module.state_dict().items()}
    return Captured(family, shapes, graph, feeds, expected)


def torch_denoiser(family: str) -> Any:
    import diffusers

    _, class_name, config = DENOISERS[family]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return getattr(diffusers, class_name)(**config).eval().requires_grad_(False)


def predict(family: str, module: Any, feeds: Arrays) -> np.ndarray:
    """Call the denoiser as its diffusers pipeline does."""
    x = {name: torch.from_numpy(value) for name, value in feeds.items()}
    if family == "sdxl":
        condition = {"text_embeds": x["pooled"], "time_ids": x["time_ids"]}
        out = module(x["latents"], x["timestep"], x["text"], added_cond_kwargs=condition, return_dict=False)[
            0
        ]
        return np.asarray(out)
    from diffusers import FluxPipeline

    n, channels, height, width = x["latents"].shape
    image_ids = FluxPipeline._prepare_latent_image_ids(n, height // 2, width // 2, "cpu", torch.float32)
    out = module(
        hidden_states=FluxPipeline._pack_latents(x["latents"], n, channels, height, width),
        timestep=x["timestep"] / 1000,
        guidance=x["guidance"],
        pooled_projections=x["pooled"],
        encoder_hidden_states=x["text"],
        txt_ids=torch.zeros(x["text"].shape[1], 3),
        img_ids=image_ids,
        return_dict=False,
    )[0]
    return np.asarray(FluxPipeline._unpack_latents(out, 8 * height, 8 * width, 8))


def test_graph_predicts_what_torch_does(captured: Captured) -> None:
    found = run(captured.graph, captured.feeds)["noise"]
    assert found.shape == (captured.shapes.denoiser_batch, *captured.shapes.latents[1:])
    assert relative(found, captured.expected) < 1e-5


def varying(captured: Captured, space: Collection[Axis]) -> dict[str, Extents]:
    """Return the shapes of the denoiser's inputs where the batch and ``space`` vary."""
    found = {}
    for value in captured.family.inputs:
        shape = [Extent.of(n) for n in captured.shapes.of(value)]
        if len(shape) > 1:
            shape[0] = Extent.of("batch") * Extent.of(captured.shapes.denoiser_batch)
        if value.name == "latents":
            axes: tuple[tuple[int, Axis], ...] = ((2, "height"), (3, "width"))
            for i, axis in axes:
                shape[i] = Extent.of(axis) / 4 if axis in space else shape[i]
        found[value.name] = tuple(shape)
    return found


@pytest.fixture
def graph_copy(captured: Captured) -> ir.Model:
    return ir.from_proto(ir.to_proto(captured.graph))


def test_dynamic_graph_predicts_what_torch_does_at_another_size(
    captured: Captured, graph_copy: ir.Model
) -> None:
    """FLUX in batches alone, see below."""
    space: dict[Axis, int] = {} if captured.family.name == "flux" else {"height": 32, "width": 48}
    steps = make_dynamic(graph_copy, varying(captured, space), {"batch": 1, **space}, name="denoiser").steps
    assert steps == {"batch": 1, **dict.fromkeys(space, 8)}
    rng = np.random.default_rng(1)
    feeds = dict(captured.feeds)
    for value in captured.family.inputs:
        shape = list(feeds[value.name].shape)
        if len(shape) > 1:
            shape[0] *= 3
            if value.name == "latents" and space:
                shape[2:] = [12, 6]
            feeds[value.name] = rng.standard_normal(shape, dtype=np.float32)
    wanted = predict(captured.family.name, torch_denoiser(captured.family.name), feeds)
    assert relative(run(graph_copy, feeds)["noise"], wanted) < 1e-5


@pytest.mark.parametrize("captured", ["flux"], indirect=True)
def test_rotary_positions_tie_a_graph_to_one_height(captured: Captured, graph_copy: ir.Model) -> None:
    inputs = varying(captured, ["height"])
    with pytest.raises(QlipError, match=r"\(Mul\) of layer 'transformer_blocks.0.attn'(.|\n)* meets 536"):
        make_dynamic(graph_copy, inputs, {"batch": 1, "height": 32}, name="denoiser")


@pytest.mark.parametrize("granularity", ["coarse", "fine", "whole"])
def test_chained_blocks_predict_what_torch_does(captured: Captured, granularity: Granularity) -> None:
    family = captured.family
    blocks = split(captured.graph, family.input_names, lambda scope: family.block_of(scope, granularity))
    values = dict(captured.feeds)
    for block in blocks:
        values |= run(block.model, values)
    assert relative(values["noise"], captured.expected) < 1e-5
    layers = [layer.name for block in blocks for layer in find_layers(block.model.graph)]
    weights = [name for name, value in captured.feeds.items() if name.endswith(".weight") and value.ndim > 1]
    assert sorted(f"{layer}.weight" for layer in layers) == sorted(weights)
    assert [b.name for b in blocks if b.name in family.float32_blocks] == ["time"]


def test_layers_of_the_conditioning_vectors_keep_16_bits(captured: Captured) -> None:
    """What multiplies no more than a row for each image has little to gain from fewer bits."""
    for layer in find_layers(captured.graph.graph):
        rows = static_shape(layer.node.outputs[0])
        if len(rows) == 2 and not layer.name.endswith("time_emb_proj"):
            assert not captured.family.quantizes(layer.name), layer.name


def test_position_embeddings_stand_in_one_block_however_many_read_them(captured: Captured) -> None:
    names = captured.family.input_names
    blocks = split(captured.graph, names, lambda scope: captured.family.block_of(scope, "coarse"))
    large = [
        value.shape
        for block in blocks
        for value in block.model.graph.initializers.values()
        if value.const_value is not None and value.const_value.size > 1000
    ]
    assert large == ([[536, 16], [536, 16]] if captured.family.position_ids else [])


def test_one_class_is_two_families_by_its_config() -> None:
    for name, (_, class_name, config) in DENOISERS.items():
        assert family_of(class_name, config).name == name
    assert family_of("UNet2DConditionModel", {"in_channels": 4}).name == "unet"


def test_conditioning_that_no_family_gives_is_refused_by_its_setting() -> None:
    with pytest.raises(QlipError, match="encoder_hid_dim_type image_proj"):
        family_of("UNet2DConditionModel", {"encoder_hid_dim_type": "image_proj"})


@pytest.mark.parametrize(("family", "multiple"), [("sdxl", 4), ("flux", 8)])
def test_images_of_odd_sizes_are_refused_with_the_next_that_fits(
    tmp_path: Path, family: str, multiple: int
) -> None:
    checkpoint = Checkpoint(write_configs(tmp_path / "model", family))
    with pytest.raises(QlipError, match=f"--width.*\n.*a multiple of {multiple}\n"):
        shapes_of(checkpoint, batch_size=1, height=32, width=42)
    assert shapes_of(checkpoint, batch_size=1, width=40).image_width == 40
