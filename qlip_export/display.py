"""Bundles and validation reports as tables of 80 columns."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from qlip_export.bundle import Bundle, compile_command
from qlip_export.compiled import TargetEntry
from qlip_export.manifest import BlockEntry, Manifest, PolicyEntry
from qlip_export.memory import MemoryRow, kibibytes, mebibytes
from qlip_export.spec import variant_name

if TYPE_CHECKING:
    from qlip_export.build import BuildReport
    from qlip_export.evaluate import EvaluationReport
    from qlip_export.metrics import Estimate
    from qlip_export.validate import BlockRow, ImageRow, ValidationReport

Record = dict[str, Any]
_CELL = 3
"""Columns of a step: two digits and a space."""
_COLOURS = ("black on green", "black on cyan", "black on yellow", "white on red")


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
    if manifest.other_sizes:
        console.print(
            f"further sizes: {', '.join(s.shapes.label for s in manifest.other_sizes)}; tables: the first"
        )
    if manifest.model.random_weights is not None:
        console.print(f"random weights of seed {manifest.model.random_weights}: images are noise")
    console.print(
        f"{len(layers)} layers, {sum(layer.quantized for layer in layers)} with activations at "
        f"{'/'.join(map(str, manifest.bits))} bits; weights {manifest.quantization.weight_bits} bits "
        f"({manifest.quantization.weight_method})"
    )
    for target in manifest.targets.values():
        console.print(f"engines: {target.backend} {target.version} on {target.device}")
        if target.profile:
            held = (f"{axis} {r.told} (tuned for {r.opt})" for axis, r in target.profile.items())
            console.print(f"one set of engines for {'; '.join(held)}")
        console.print(_block_table(manifest, target))
        for line in (*_timing_lines(manifest, target), *_precision_lines(manifest, target)):
            console.print(line)
    if not manifest.targets:
        console.print(f"no engines yet: {compile_command(bundle.root)}")
        console.print(_block_table(manifest, None))
    console.print(_policy_text(manifest.policy))
    console.print(
        ", ".join(f"{kind} {size / 1e6:.1f} MB" for kind, size in manifest.bytes_by_kind.items() if size)
    )


def _block_table(manifest: Manifest, target: TargetEntry | None) -> Table:
    if manifest.precision == "layer":
        return _mixed_table(manifest, target)
    table = Table("block", "layers", "MACs", *(f"{b} bits, MB" for b in manifest.bits))
    table.columns[0].no_wrap = True
    for block in manifest.blocks:
        cells = []
        for bits in manifest.bits:
            variant = block.variants[variant_name(bits)]
            engine = target.engines.get(variant.onnx) if target else None
            size = f"{manifest.files[engine.path].size / 1e6:.1f}" if engine else "no engine"
            cells.append(f"{variant.container.value} {size}")
        macs = sum(layer.macs for layer in block.layers)
        table.add_row(block.name, str(len(block.layers)), f"{macs / 1e9:.2f} G", *cells)
    return table


def _mixed_table(manifest: Manifest, target: TargetEntry | None) -> Table:
    table = Table("block", "layers", "MACs", "variants", "mean bits", "engines, MB")
    table.columns[0].no_wrap = True
    for block in manifest.blocks:
        means = [sum(bits) / len(bits) for name in block.variants if (bits := block.layer_bits(name))]
        paths = {v.onnx for v in block.variants.values()}
        engines = [e for onnx, e in target.engines.items() if onnx in paths] if target else []
        size = sum(manifest.files[engine.path].size for engine in engines)
        table.add_row(
            block.name,
            str(len(block.layers)),
            f"{sum(layer.macs for layer in block.layers) / 1e9:.2f} G",
            str(len(block.variants)),
            f"{min(means):.1f} to {max(means):.1f}" if means else "",
            f"{size / 1e6:.1f}" if engines else "no engines",
        )
    return table


def print_dominated(root: Path, target: str) -> None:
    """Print what timing a target found out, on stdout."""
    manifest, console = Bundle.open(root).manifest, Console(highlight=False, markup=False, soft_wrap=True)
    for line in _timing_lines(manifest, manifest.targets[target]):
        console.print(f"  {line}")


def _timing_lines(manifest: Manifest, target: TargetEntry) -> Iterator[str]:
    if (timing := target.timing) is None:
        return
    totals = {
        b: sum(timing.milliseconds[block.variants[variant_name(b)].onnx] for block in manifest.blocks)
        for b in manifest.uniform
    }
    if totals:
        yield (
            f"a step at {' / '.join(map(str, totals))} bits: "
            f"{' / '.join(f'{total:.1f}' for total in totals.values())} ms, blocks alone, "
            f"medians of {timing.repeats}"
        )
    for block in manifest.blocks:
        instead = timing.instead.get(block.name, {})
        told = {
            name: f"{name} ({timing.milliseconds[block.variants[name].onnx]:.2f} ms)"
            for name in (*instead, *instead.values())
        }
        for fast in dict.fromkeys(instead.values()):
            slow = " and ".join(told[name] for name, other in instead.items() if other == fast)
            yield f"{block.name}: {told[fast]} runs where {slow} would"


def _precision_lines(manifest: Manifest, target: TargetEntry) -> Iterator[str]:
    for block in manifest.blocks:
        for name, variant in block.variants.items():
            engine = target.engines.get(variant.onnx)
            if engine is not None and engine.facts is not None and engine.facts.wrong:
                layers = ", ".join(f"{layer} ({found})" for layer, found in engine.facts.wrong.items())
                yield f"{block.name} {name}: NOT in the precision of the graph: {layers}"


def _policy_text(policy: PolicyEntry | None) -> str:
    if policy is None:
        return "no policy: every run is at uniform bits"
    table = policy.table
    choices = [choice for row in table.choices for choice in row]
    changes = sorted(q for choice in choices for q in choice.thresholds)
    steady = sum(not choice.thresholds for choice in choices)
    between = f"{changes[0]:.3f} and {changes[-1]:.3f}" if changes else "nowhere"
    return (
        f"policy {policy.name}: {policy.criterion} chooses {'/'.join(map(str, table.options))} bits for each "
        f"of {len(table.units)} {policy.unit}s, cost {policy.cost}\n"
        f"  {len(table.group_of_step)} steps in {len(table.choices)} groups, the first {table.forced_steps} "
        f"at p_q = 1; {policy.fab:.2f} bits on average over training prompts\n"
        f"  T2Q on held-out prompts: SROCC {policy.srocc:.3f}, PLCC {policy.plcc:.3f}\n"
        f"  {len(changes)} thresholds, between q = {between}; "
        f"{steady} of {len(choices)} choices do not depend on q"
    )


def print_variants(report: BuildReport) -> None:
    """Print what other numbers of variants would have cost and given, and which was built."""
    console = Console(highlight=False, markup=False, soft_wrap=True)
    table = Table("variants of a block", "engines", "MB, about", "expected FAB", "expected seconds")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in report.variants:
        seconds = "not known" if row.seconds is None else f"{row.seconds:.3f}"
        size = "not known" if row.bytes is None else f"{row.bytes / 1e6:.0f}"
        count = "all there are" if row.variants is None else f"at most {row.variants}"
        table.add_row(count, str(row.engines), size, f"{row.fab:.2f}", seconds)
    console.print(table)
    assert report.chosen is not None
    count = "all" if report.chosen.variants is None else f"at most {report.chosen.variants}"
    console.print(
        f"built: {count}, {report.chosen.engines} engines of the denoiser, FAB {report.chosen.fab:.2f} "
        "expected over calibration prompts"
    )
    console.print("seconds are those of the denoiser for an image, from times of uniform blocks")


def print_memory(rows: Sequence[MemoryRow]) -> None:
    """Print an account of bytes on stdout."""
    console = Console(highlight=False, markup=False, soft_wrap=True)
    table = Table("", "part", "size", "what it is")
    table.columns[2].justify = "right"
    for group, inside in groupby(rows, key=lambda row: row.group):
        for i, row in enumerate(inside):
            table.add_row("" if i else group, row.part, _size(row.bytes), row.note)
        table.add_section()
    console.print(table)
    console.print("KB and MB are 2**10 and 2**20 bytes, as in the paper's section F")


def _size(size: int) -> str:
    return f"{mebibytes(size):.2f} MB" if size >= 2**20 / 10 else f"{kibibytes(size):.1f} KB"


def print_schedules(bundle: Bundle, records: Sequence[Record], *, stderr: bool = False) -> None:
    """Draw the bits of every block (a row) at every step (a column) of the runs that made ``records``.

    Images of one schedule share a map. A map that is too wide for the terminal continues below itself.
    """
    console = Console(highlight=False, markup=False, stderr=stderr)
    policy = bundle.manifest.policy
    chosen = {bits for record in records for row in record["bits"] for bits in row}
    options = sorted({*(b for b in chosen if b == int(b)), *(policy.table.options if policy else ())})
    for _, group in groupby(records, key=lambda record: record["bits"]):
        images = list(group)
        console.print()
        for record in images:
            quality = "uniform bits" if record["q"] is None else f"q {record['q']:.4f}"
            console.print(Text.assemble((record["prompt"], "bold"), f"  {quality}"), overflow="ellipsis")
        record = images[0]
        _draw_map(console, bundle.manifest.blocks, record["bits"], options)
        legend = Text()
        for bits in options:
            legend.append(f"{bits:>2} ", _colour(bits, options)).append(" ")
        legend.append(f" bits     FAB {record['fab']:.2f}     {record['engine_switches']} engine switches")
        console.print(legend)
    console.print()


def _draw_map(
    console: Console, blocks: Sequence[BlockEntry], bits: Sequence[Sequence[int]], options: Sequence[int]
) -> None:
    layers = [sum(layer.quantized for layer in block.layers) for block in blocks]
    margin = max(len(block.name) for block in blocks) + 1
    room = max(1, (console.width - margin - len("  mean")) // _CELL)
    parts = -(-len(bits) // room)
    size = -(-len(bits) // parts)
    for start in range(0, len(bits), size):
        part = bits[start : start + size]
        last = start + size >= len(bits)
        steps = range(start + 1, start + 1 + len(part))
        numbers = [f"{step:>2} " if step in (1, steps[0]) or step % 5 == 0 else "   " for step in steps]
        console.print(Text("step".ljust(margin) + "".join(numbers) + ("  mean" if last else ""), "dim"))
        for i, block in enumerate(blocks):
            line = Text(block.name.ljust(margin))
            for row in part:
                if layers[i]:
                    line.append(f"{round(row[i]):>2} ", _colour(row[i], options))
                else:
                    line.append(" · ", "dim")
            if last and layers[i]:
                line.append(f"{sum(row[i] for row in bits) / len(bits):6.1f}")
            console.print(line, no_wrap=True)
    if not all(layers):
        idle = ", ".join(block.name for block, count in zip(blocks, layers, strict=True) if not count)
        console.print(Text(f"· {idle}: no layer follows the bit options", "dim"))


def _colour(bits: float, options: Sequence[int]) -> str:
    """Return the style of ``bits``: from green for the lowest option to red for the highest."""
    rank = bisect_left(options, bits)
    return _COLOURS[round(rank * (len(_COLOURS) - 1) / max(1, len(options) - 1))]


def print_validation(report: ValidationReport) -> None:
    """Print every comparison of a validation, and the verdict, on stdout."""
    console = Console(highlight=False, markup=False, soft_wrap=True)
    if report.other_sizes:
        console.print(f"at {report.size}:")
    table = Table("block", "bits", "error", "tolerance", "cosine", "")
    for row in report.rows:
        table.add_row(
            row.block,
            _variant_bits(row).removeprefix("at ").removesuffix(" bits"),
            f"{row.error:.1e}",
            f"{row.tolerance:.0e}",
            f"{row.cosine:.6f}",
            "ok" if row.passed else "NOT FINITE" if not row.finite else "PRECISION" if row.wrong else "OFF",
        )
    console.print(table)
    console.print(
        "column error: relative L2; 16 and 32 bits against the FP32 graph, INT8 against the quantized graph"
    )
    if (policy := report.policy) is not None:
        told = "not finite" if policy.q is None else f"q {policy.q:.4f}, {policy.error:.1e} from the graph's"
        table_told = "" if policy.follows_table else "; the graph's bits are NOT the table's"
        console.print(f"policy: {told} (at most {policy.tolerance:.0e}){table_told}")
    for image in report.images:
        found = "not finite" if image.psnr is None else f"{image.psnr:.1f} dB"
        wanted = f" (at least {image.least:.0f})" if image.least is not None else ""
        console.print(f"image at {_image_bits(image)} against {image.reference}: {found}{wanted}")
    for note in report.notes:
        console.print(f"note: {note}")
    for row in report.rows:
        for layer, found in row.wrong.items():
            console.print(f"{row.block} {_variant_bits(row)}: {layer} computes in {found}")
    off = [f"{row.block} {_variant_bits(row)}" for row in report.rows if not row.passed]
    off += ["the policy"] if policy is not None and not policy.passed else []
    off += [f"the image at {_image_bits(image)}" for image in report.images if not image.passed]
    images = "" if report.images else "; images were not compared"
    console.print(f"off: {', '.join(off)}{images}" if off else f"all {report.target} engines agree{images}")
    for command in report.commands:
        console.print(command, soft_wrap=True)
    for other in report.other_sizes:
        console.print(f"\nat {other.size}:")
        print_validation(other)


def _variant_bits(row: BlockRow) -> str:
    return f"at {row.bits} bits" if row.variant == variant_name(row.bits) else row.variant


def _image_bits(image: ImageRow) -> str:
    return "the policy's bits" if image.bits is None else f"{image.bits} bits"


FEW = 2000
"""Images below which Fréchet distances in features of a few hundred dimensions say little by themselves."""


def print_evaluation(report: EvaluationReport) -> None:
    """Print the metrics of every configuration, each with its interval and its ratio to the baseline."""
    console = Console(highlight=False, markup=False, soft_wrap=True)
    metrics = list(report.rows[0].metrics)
    table = Table("bits", *(_METRIC_NAMES[metric] for metric in metrics))
    table.columns[0].no_wrap = True
    for row in report.rows:
        table.add_row(row.configuration, *(_estimate(metric, row.metrics[metric]) for metric in metrics))
    console.print(table)
    where = (
        f"the engines of {report.target}" if report.target else f"the fake-quantized model on {report.device}"
    )
    console.print(
        f"{report.samples} images of {report.size} each by {where}, {report.steps} steps, "
        f"guidance {report.guidance:g}, seeds from {report.seed}, "
        f"weights {report.weight_bits} bits; prompts: {report.prompts}"
    )
    if report.reference is not None:
        console.print(f"distances to {report.reference}; FID in {report.features} features")
    if report.reference is not None and report.samples < FEW:
        console.print(
            f"fewer than {FEW} images: distances are far too high and compare rows of this table only"
        )
    console.print(
        f"± is half a 95 % bootstrap interval; x is the ratio to {report.baseline}, resampled in pairs"
    )


_METRIC_NAMES = {
    "fid": "FID",
    "sfid": "sFID",
    "clip": "CLIP score",
    "fab": "FAB",
    "bitops": "BitOPs, T",
    "latency": "s an image",
}


def _estimate(metric: str, found: Estimate) -> str:
    unit, digits = (1e12, 4) if metric == "bitops" else (1, 4 if metric in ("clip", "latency") else 2)
    text = f"{found.value / unit:.{digits}f} ±{(found.high - found.value) / unit:.{digits}f}"
    if found.ratio is not None and found.ratio_high is not None:
        text += f"\nx{found.ratio:.3f} ±{found.ratio_high - found.ratio:.3f}"
    return text
