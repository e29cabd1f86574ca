"""An NVIDIA GPU: the chain against one ONNX Runtime session of the whole denoiser, and against torch in FP16.

Needs onnxruntime-gpu, and torch with CUDA for the rows named after it. Not part of `make bench`:

    python -m benchmarks cuda --shape emoji
"""

from __future__ import annotations

import gc
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.bundles import BITS, Subject, prepare
from benchmarks.chain import SIDES
from benchmarks.shapes import write_bk_sdm_tiny
from benchmarks.timing import interleave, ratio, summary
from qlip_export.backends.onnxruntime_cuda import Graphs, OnnxRuntimeCudaBackend
from qlip_export.bundle import Bundle
from qlip_export.runtime.chain import Chain
from qlip_export.runtime.targets import Target
from qlip_export.spec import variant_name

BACKEND = "onnxruntime-cuda"
TARGET = 1.03
SCOPES: dict[Graphs, str] = {
    "none": "chain",
    "engine": "chain, CUDA graph per engine",
    "pattern": "chain, one CUDA graph",
}
ROUNDS, QUICK_ROUNDS = 15, 5
LEAST_SECONDS = 0.1
SAMPLES = 50
WARM_UP = 5
"""Steps before anything is timed: past what chooses kernels and records graphs."""
TORCH_BITS = 16
"""What torch's FP16 is compared with."""

Array = NDArray[np.float32]
Step = Callable[[], Array]


def run(of: Subject, *, quick: bool) -> dict[str, Any]:
    """Return seconds per denoiser step of all sides in turns, batch 2, from numpy to numpy."""
    bundles = compiled(of)
    opened = Bundle.open(bundles["coarse"])
    entry = opened.manifest.targets[BACKEND]
    rounds = QUICK_ROUNDS if quick else ROUNDS
    rows = []
    for bits in BITS:
        chains = {
            graphs: Chain(opened, Target(BACKEND, entry, OnnxRuntimeCudaBackend(threads=None, graphs=graphs)))
            for graphs in SCOPES
        }
        rows.append(_row(of, bundles["whole"], chains, bits, rounds))
        print(f"  {rows[-1]}", file=sys.stderr, flush=True)
        chains.clear()  # sessions of all rows together fill 80 GB
        gc.collect()
    return {"gpu": gpu_name(), "blocks": len(opened.manifest.blocks), "rows": rows}


def _row(of: Subject, whole: Path, chains: dict[Graphs, Chain], bits: int, rounds: int) -> dict[str, Any]:
    inputs = fixed_inputs(chains["none"])
    makers: dict[str, Callable[[], Step]] = {
        **{side: partial(chain_step, chains[scope], bits, inputs) for scope, side in SCOPES.items()},
        "one session": partial(whole_session, whole, bits, inputs, graphs=False),
        "one session, CUDA graph": partial(whole_session, whole, bits, inputs, graphs=True),
    }
    if bits == TORCH_BITS:
        makers["torch eager FP16"] = partial(torch_step, of, inputs, through_inductor=False)
        makers["torch.compile FP16, CUDA graph"] = partial(torch_step, of, inputs, through_inductor=True)
    sides: dict[str, Step] = {}
    failed: dict[str, str] = {}
    for side, make in makers.items():
        started = time.monotonic()
        try:
            step = make()
            for _ in range(WARM_UP):
                step()
            sides[side] = step
        except Exception as error:  # a side that does not run is a result as well
            failed[side] = f"{type(error).__name__}: {error}"[:2000]
            print(f"  {side}: {failed[side]}", file=sys.stderr, flush=True)
        print(f"  {side}: ready in {time.monotonic() - started:.1f} s", file=sys.stderr, flush=True)
    seconds = interleave(sides, rounds=rounds, least_seconds=LEAST_SECONDS)
    # On latents that no step has seen: a graph that replays old ones shows as a difference.
    inputs["latents"] *= -0.5
    results = {side: step() for side, step in sides.items()}
    reference = results["chain"]
    ratios = {}
    for scope, side in SCOPES.items():
        whole_side = "one session" if scope == "none" else "one session, CUDA graph"
        if side in sides and whole_side in sides:
            ratios[side] = ratio(seconds[side].wall, seconds[whole_side].wall)
    return {
        "bits": bits,
        "sides": {side: summary(taken.wall) for side, taken in seconds.items()},
        "failed": failed,
        "ratios": ratios,
        "target": TARGET,
        "largest_value": float(np.abs(reference).max()),
        "largest_difference": {s: float(np.abs(r - reference).max()) for s, r in results.items()},
        "host": {
            side: host_overhead(chains[scope], sides[side], bits)
            for scope, side in SCOPES.items()
            if side in sides
        },
        "notes": [note for chain in chains.values() for note in chain._backend.notes],
        "graph_nodes": [r.nodes for r in chains["pattern"]._backend._recordings][-1:],  # type: ignore[attr-defined]
    }


def compiled(of: Subject) -> dict[str, Path]:
    """Return the bundles of both cuts, with engines for the GPU."""
    from qlip_export.compile import compile_bundle
    from qlip_export.progress import Silent

    if of.shape == "bk-sdm-tiny":
        write_bk_sdm_tiny(Path(of.model))
    prepare(of, SIDES, backend=BACKEND)
    bundles = {granularity: of.bundle(granularity) for granularity in SIDES}
    for bundle in bundles.values():
        started = time.monotonic()
        compile_bundle(bundle, BACKEND, Silent())
        print(f"  {bundle.name} compiled, {time.monotonic() - started:.1f} s", file=sys.stderr, flush=True)
    return bundles


def chain_step(chain: Chain, bits: int, inputs: dict[str, Array]) -> Step:
    """Return a step of the chain."""
    pattern = chain.uniform(bits)
    chain.load([pattern])
    chain.hold("text", inputs["text"])
    return lambda: chain.step(inputs["latents"], float(inputs["timestep"][0]), pattern)


def fixed_inputs(chain: Chain) -> dict[str, Array]:
    """Return random inputs; every step reads them anew."""
    rng = np.random.default_rng(0)
    shapes = {t.name: t.shape for t in chain._bundle.manifest.inputs}
    latents = rng.standard_normal(shapes["latents"], dtype=np.float32)
    text = rng.standard_normal(shapes["text"], dtype=np.float32)
    return {"latents": latents, "timestep": np.array([500.0], np.float32), "text": text}


def whole_session(bundle: Path, bits: int, inputs: dict[str, Array], *, graphs: bool) -> Step:
    """Return a step of the whole denoiser as one ONNX Runtime session, with its CUDA graph or without.

    The engines of the `whole` bundle, timestep embedding and rest, are merged into one ONNX model; the
    session is used as ONNX Runtime documents it, without code of ours.
    """
    import onnx
    import onnxruntime as ort

    opened = Bundle.open(bundle)
    target = opened.manifest.targets[BACKEND]
    models = []
    for block in opened.manifest.blocks:
        variant = block.variants[variant_name(bits)]
        model = onnx.load(opened.root / target.engines[variant.onnx].path)
        models.append(onnx.compose.add_prefix(model, f"{block.name}/", **_INSIDE) if models else model)
    merged = models[0]
    for model in models[1:]:
        merged = _with_matching_types(merged, model)
    ort.preload_dlls()
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    provider = {"device_id": "0", "use_tf32": "0", "enable_cuda_graph": str(int(graphs))}
    session = ort.InferenceSession(
        merged.SerializeToString(), options, providers=[("CUDAExecutionProvider", provider)]
    )
    if "CUDAExecutionProvider" not in session.get_providers():
        raise RuntimeError("ONNX Runtime did not start its CUDA provider")
    binding = session.io_binding()
    held = {}
    for port in session.get_inputs():
        array = inputs[port.name].astype(_NUMPY[port.type])
        held[port.name] = ort.OrtValue.ortvalue_from_numpy(array, "cuda", 0)
        binding.bind_ortvalue_input(port.name, held[port.name])
    (port,) = session.get_outputs()
    out = ort.OrtValue.ortvalue_from_shape_and_type(port.shape, _NUMPY[port.type], "cuda", 0)
    binding.bind_ortvalue_output(port.name, out)
    dtypes = {port.name: _NUMPY[port.type] for port in session.get_inputs()}

    def step() -> Array:
        for key in ("latents", "timestep"):
            held[key].update_inplace(inputs[key].astype(dtypes[key]))
        session.run_with_iobinding(binding)
        result: Array = out.numpy().astype(np.float32)
        return result

    return step


_NUMPY = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
_INSIDE = {
    "rename_inputs": False,
    "rename_outputs": False,
    "rename_nodes": True,
    "rename_edges": True,
    "rename_initializers": True,
    "rename_value_infos": True,
}


def _with_matching_types(first: Any, second: Any) -> Any:
    """Merge two models whose values have the same names; one that is FP32 before and FP16 after is cast."""
    import onnx

    wanted = {port.name: port.type.tensor_type.elem_type for port in second.graph.input}
    for port in first.graph.output:
        there = port.type.tensor_type.elem_type
        if port.name in wanted and wanted[port.name] != there:
            for node in first.graph.node:
                node.output[:] = [f"{o}.uncast" if o == port.name else o for o in node.output]
                node.input[:] = [f"{o}.uncast" if o == port.name else o for o in node.input]
            first.graph.node.append(
                onnx.helper.make_node("Cast", [f"{port.name}.uncast"], [port.name], to=wanted[port.name])
            )
            port.type.tensor_type.elem_type = wanted[port.name]
    shared = [(port.name, port.name) for port in first.graph.output if port.name in wanted]
    return onnx.compose.merge_models(first, second, io_map=shared)


def torch_step(of: Subject, inputs: dict[str, Array], *, through_inductor: bool) -> Step:
    """Return a step of the diffusers UNet in FP16, channels last, eagerly or as torch.compile makes it."""
    import torch
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(Path(of.folder) / "unet", torch_dtype=torch.float16)
    unet = unet.eval().requires_grad_(False).to("cuda", memory_format=torch.channels_last)
    call = torch.compile(unet, mode="reduce-overhead", fullgraph=True) if through_inductor else unet
    text = torch.from_numpy(inputs["text"]).to("cuda", torch.float16)

    def step() -> Array:
        with torch.inference_mode():
            latents = torch.from_numpy(inputs["latents"]).to("cuda", torch.float16)
            timestep = torch.from_numpy(inputs["timestep"]).to("cuda")
            result: Array = call(latents, timestep, text, return_dict=False)[0].float().cpu().numpy()
        return result

    return step


def host_overhead(chain: Chain, step: Step, bits: int) -> dict[str, float]:
    """Return median seconds of a step: on the wall, of the GPU, and until the host has started all of it."""
    from cuda.bindings import runtime

    backend: Any = chain._backend
    step()
    plan = chain._sequences[chain.uniform(bits)]
    (_, before), (_, after) = runtime.cudaEventCreate(), runtime.cudaEventCreate()
    seconds: dict[str, list[float]] = {"wall": [], "device": [], "started": []}
    for _ in range(SAMPLES):
        backend.synchronize()
        runtime.cudaEventRecord(before, backend.gpu.stream)
        start = time.perf_counter()
        plan()
        seconds["started"].append(time.perf_counter() - start)
        runtime.cudaEventRecord(after, backend.gpu.stream)
        backend.synchronize()
        seconds["device"].append(runtime.cudaEventElapsedTime(before, after)[1] / 1000)
        start = time.perf_counter()
        step()
        seconds["wall"].append(time.perf_counter() - start)
    return {what: round(statistics.median(found), 7) for what, found in seconds.items()}


def gpu_name() -> str:
    """Return the GPU and its driver as `nvidia-smi` tells them."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]
