"""Bundles and validation reports as tables of 80 columns."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from qlip_export.bundle import Bundle
from qlip_export.spec import variant_name

if TYPE_CHECKING:
    from qlip_export.validate import ValidationReport


def print_bundle(bundle: Bundle) -> None:
    """Print model, blocks, engines and sizes of a bundle on stdout."""
    manifest, console = bundle.manifest, Console(highlight=False, markup=False, soft_wrap=True)
    sampler, shapes = manifest.sampler, manifest.shapes
    height, width = shapes.image
    layers = [layer for block in manifest.blocks for layer in block.layers]
    console.print(
        f"{manifest.model.name} ({manifest.model.family}), {width}x{height}, "
        f"batch {shapes.batch_size}, {len(sampler.steps)} steps of {sampler.scheduler}"
    )
    console.print(
        f"{len(layers)} layers, {sum(layer.quantized for layer in layers)} with activations at "
        f"{'/'.join(map(str, manifest.bits))} bits; weights {manifest.quantization.weight_bits} bits "
        f"({manifest.quantization.weight_method})"
    )
    if manifest.backend is not None:
        console.print(
            f"engines: {manifest.backend.name} {manifest.backend.version} on {manifest.backend.device}"
        )
    table = Table("block", "layers", "MACs", *(f"{b} bits, MB" for b in manifest.bits))
    table.columns[0].no_wrap = True
    for block in manifest.blocks:
        cells = []
        for bits in manifest.bits:
            engine = block.variants[variant_name(bits)].engine
            size = manifest.files[engine.path].size / 1e6 if engine else 0
            cells.append(f"{engine.container.value} {size:.1f}" if engine else "no engine")
        macs = sum(layer.macs for layer in block.layers)
        table.add_row(block.name, str(len(block.layers)), f"{macs / 1e9:.2f} G", *cells)
    console.print(table)
    console.print(
        ", ".join(f"{kind} {size / 1e6:.1f} MB" for kind, size in manifest.bytes_by_kind.items() if size)
    )


def print_validation(report: ValidationReport) -> None:
    """Print every comparison of a validation, and the verdict, on stdout."""
    console = Console(highlight=False, markup=False, soft_wrap=True)
    table = Table("block", "bits", "error", "tolerance", "cosine", "")
    for row in report.rows:
        table.add_row(
            row.block,
            str(row.bits),
            f"{row.error:.1e}",
            f"{row.tolerance:.0e}",
            f"{row.cosine:.6f}",
            "ok" if row.passed else "OFF" if row.finite else "NOT FINITE",
        )
    console.print(table)
    console.print(
        "error: relative L2; 16 and 32 bits against the FP32 graph, INT8 against the quantized graph"
    )
    for image in report.images:
        found = "not finite" if image.psnr is None else f"{image.psnr:.1f} dB"
        wanted = f" (at least {image.least:.0f})" if image.least is not None else ""
        console.print(f"image at {image.bits} bits against {image.reference}: {found}{wanted}")
    for note in report.notes:
        console.print(f"note: {note}")
    off = [f"{row.block} at {row.bits} bits" for row in report.rows if not row.passed]
    off += [f"the image at {image.bits} bits" for image in report.images if not image.passed]
    images = "" if report.images else "; images were not compared"
    console.print(f"all engines agree{images}" if report.passed else f"off: {', '.join(off)}{images}")
