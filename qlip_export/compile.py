"""From typed ONNX to engines of one backend: every variant, the text encoder and the VAE decoder."""

from __future__ import annotations

from pathlib import Path

from pydantic import JsonValue, TypeAdapter

from qlip_export.backends.base import Backend
from qlip_export.bundle import BlockEntry, ComponentEntry, EngineEntry, Exported, TensorEntry
from qlip_export.files import content_key, sha256_of
from qlip_export.progress import Progress
from qlip_export.spec import Container
from qlip_export.workspace import Workspace

_PORTS = TypeAdapter(tuple[tuple[TensorEntry, ...], tuple[TensorEntry, ...]])


def compile_engines(
    exported: Exported, bits: tuple[int, ...], backend: Backend, workspace: Workspace, progress: Progress
) -> Exported:
    """Compile what ``exported`` lists at ``bits`` and return it with the engines filled in.

    Raises:
        QlipError: The backend refuses a graph.
    """
    compiler = _Compiler(backend, workspace, progress)
    variants = sum(v.bits in bits for b in exported.blocks for v in b.variants.values())
    progress.stage("compile", variants + 2 + (exported.policy is not None))
    return exported.model_copy(
        update={
            "blocks": tuple(compiler.block(block, bits) for block in exported.blocks),
            "text_encoder": compiler.component(exported.text_encoder),
            "vae_decoder": compiler.component(exported.vae_decoder),
            "policy": exported.policy and compiler.component(exported.policy),
        }
    )


class _Compiler:
    def __init__(self, backend: Backend, workspace: Workspace, progress: Progress) -> None:
        self._backend, self._workspace, self._progress = backend, workspace, progress
        source = Path(__file__).parent / "backends" / f"{backend.name}.py"
        can = backend.capabilities
        self._key = content_key("engine", backend.name, can.version, can.device, can.half, sha256_of(source))

    def block(self, block: BlockEntry, bits: tuple[int, ...]) -> BlockEntry:
        variants = {
            name: v.model_copy(update={"engine": self._engine(v.onnx, v.container)}) if v.bits in bits else v
            for name, v in block.variants.items()
        }
        return block.model_copy(update={"variants": variants})

    def component(self, entry: ComponentEntry) -> ComponentEntry:
        return entry.model_copy(update={"engine": self._engine(entry.onnx, Container.FLOAT)})

    def _engine(self, onnx: str, container: Container) -> EngineEntry:
        name = Path(onnx).stem
        self._progress.item(name)
        # The key of the ONNX file covers its weights as well, which its own bytes do not.
        key = content_key(self._key, self._workspace.files[onnx].key)
        path = f"engines/{self._backend.name}/{name}{self._backend.capabilities.suffix}"

        def make(engine: Path) -> JsonValue:
            inputs, outputs = self._backend.compile(self._workspace.root / onnx, engine, container)
            return [[port.model_dump(mode="json") for port in side] for side in (inputs, outputs)]

        _, facts = self._workspace.product(path, key, make)
        inputs, outputs = _PORTS.validate_python(facts)
        return EngineEntry(path=path, container=container, inputs=inputs, outputs=outputs)
