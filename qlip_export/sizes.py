"""Which size of a bundle runs: one that it was built with, or one in the range of a target's profile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qlip_export.bundle import Bundle
from qlip_export.errors import QlipError
from qlip_export.extents import AXES, Axis
from qlip_export.manifest import Manifest

OPTIONS: dict[Axis, str] = {"height": "--height", "width": "--width", "batch": "--batch-size"}

_Wanted = Mapping[Axis, int | None]
"""The numbers that are asked for; none: any."""


def choose_size(
    bundle: Bundle,
    *,
    height: int | None = None,
    width: int | None = None,
    batch_size: int | None = None,
    images: int | None = None,
    target: str | None = None,
) -> Bundle:
    """Return a bundle as one of a single size: the first that has these numbers.

    Sizes that a target with a profile runs come after those that the bundle was built with; numbers that
    are not given are then the bundle's own. Where images of that size come in several batch sizes and it
    is known how many are wanted, the one that draws them with the least padding, then in the fewest
    batches; where a target's batch has a range, the fewest batches, and the least padding with these.

    Args:
        bundle: Of all its sizes.
        height: Of images, pixels.
        width: The same.
        batch_size: Images per batch.
        images: How many are wanted; none: not known.
        target: Look only at what this target runs.

    Raises:
        QlipError: The bundle has no such size.
    """
    wanted: dict[Axis, int | None] = {"batch": batch_size, "height": height, "width": width}
    named = bundle.manifest.targets
    held = None if target is None else named[target].profile.get("batch")
    if held is not None and images and batch_size is None:
        batches = -(-images // held.max)
        wanted["batch"] = max(held.min, -(-images // batches))
    fitting = _fitting(bundle.manifest, wanted, [*named] if target is None else [target])
    if not fitting:
        raise _no_such_size(bundle, wanted, [*named] if target is None else [target])

    def cost(size: Manifest) -> tuple[int, int]:
        batches = -(-(images or 0) // size.shapes.batch_size)
        return batches * size.shapes.batch_size, batches

    same_image = (size for size in fitting if size.shapes.image == fitting[0].shapes.image)
    return bundle.narrowed(min(same_image, key=cost))


def serving(
    bundle: Bundle,
    backend: str,
    *,
    height: int | None = None,
    width: int | None = None,
    batch_size: int | None = None,
) -> Bundle:
    """Return a bundle with those targets of ``backend``, or ``auto``, that run such a size.

    Raises:
        QlipError: It has engines of ``backend``, or none at all, but not of that size.
    """
    wanted: dict[Axis, int | None] = {"batch": batch_size, "height": height, "width": width}
    manifest = bundle.manifest
    named = [n for n, entry in manifest.targets.items() if backend in ("auto", entry.backend)]
    fitting = [name for name in named if _fitting(manifest, wanted, [name])]
    if not fitting and (named or not _fitting(manifest, wanted, [])):
        raise _no_such_size(bundle, wanted, named)
    targets = {name: manifest.targets[name] for name in fitting}
    return bundle.narrowed(manifest.model_copy(update={"targets": targets}) if fitting else manifest)


def _fitting(manifest: Manifest, wanted: _Wanted, targets: Sequence[str]) -> list[Manifest]:
    """Return the sizes with these numbers that one of ``targets`` runs; without targets, all of them."""
    found = [
        size
        for size in manifest.sizes
        if all(wanted[axis] in (None, n) for axis, n in size.shapes.sizes.items())
        and (not targets or any(name in size.targets for name in targets))
    ]
    own = manifest.shapes.sizes
    sizes = {axis: n if (given := wanted[axis]) is None else given for axis, n in own.items()}
    ranging = (t for t in (manifest.targets[name] for name in targets) if t.profile)
    if all(size.shapes.sizes != sizes for size in found) and any(t.holds(sizes, own) for t in ranging):
        found.append(manifest.resized(sizes))
    return found


def _no_such_size(bundle: Bundle, wanted: _Wanted, targets: Sequence[str]) -> QlipError:
    """Return the error that names those which ``targets`` run."""
    ranging = any(bundle.manifest.targets[name].profile for name in targets)
    return QlipError(
        f"{bundle.root} holds no engines of that size",
        expected=sizes_told(bundle.manifest, targets),
        found=" ".join(f"{OPTIONS[a]} {wanted[a]}" for a in OPTIONS if wanted[a] is not None),
        fix="build it with one more --size" + (", or compile it with a wider --profile" if ranging else ""),
    )


def sizes_told(manifest: Manifest, targets: Sequence[str]) -> str:
    """Return the sizes and ranges which ``targets`` run, in words; without targets, the sizes."""
    entries = {name: manifest.targets[name] for name in targets}
    known = ""
    if not entries or not all(entry.profile for entry in entries.values()):
        labels = ", ".join(size.shapes.label for size in manifest.sizes)
        known = f"{labels} (WIDTHxHEIGHT, :batch size)"
    own = manifest.shapes.sizes
    ranges = (
        f"{name}: "
        + ", ".join(
            f"{axis} {entry.profile[axis].told if axis in entry.profile else own[axis]}" for axis in AXES
        )
        for name, entry in entries.items()
        if entry.profile
    )
    return "; ".join(filter(None, [known, *ranges]))
