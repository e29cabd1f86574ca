"""Which of a bundle's targets runs here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qlip_export.backends import BACKENDS, get_backend
from qlip_export.backends.base import Backend
from qlip_export.bundle import Bundle, compile_command
from qlip_export.compiled import TargetEntry
from qlip_export.errors import QlipError
from qlip_export.sizes import sizes_told


@dataclass(frozen=True)
class Target:
    """A target of a bundle, ready to run.

    Attributes:
        name: In the manifest.
        entry: Its engines.
        backend: What loads and runs them.
    """

    name: str
    entry: TargetEntry
    backend: Backend


def choose_target(bundle: Bundle, wanted: str = "auto", *, threads: int | None = None) -> Target:
    """Return the target of backend ``wanted``, or for ``auto`` the first that can run here.

    Targets are tried in the order of ``BACKENDS``: its library must be installed and its device be there.
    Where the bundle was narrowed to a size that not all of its targets run, the error names the others.

    Args:
        bundle: The bundle.
        wanted: A backend or ``auto``.
        threads: CPU threads an engine may use; ``None`` leaves the choice to the library.

    Raises:
        QlipError: The bundle has no such engines, or none that can run here; says why.
    """
    targets = bundle.manifest.targets
    if wanted != "auto" and wanted not in BACKENDS:
        get_backend(wanted)  # tells which there are
    names = [name for name, entry in targets.items() if wanted in ("auto", entry.backend)]
    if not names:
        none = "" if wanted == "auto" else f" of {wanted}"
        raise QlipError(
            f"{bundle.root} holds no engines{none}",
            expected=None if wanted == "auto" else f"engines of {wanted}",
            found=" and ".join(f"engines of {name}" for name in targets) or None,
            fix=compile_command(bundle.root, "openvino" if wanted == "auto" else wanted),
        )
    order = {backend: i for i, backend in enumerate(BACKENDS)}
    obstacles: list[QlipError] = []
    for name in sorted(names, key=lambda n: order.get(targets[n].backend, len(order))):
        entry = targets[name]
        try:
            backend = get_backend(entry.backend, threads=threads)
            backend.require_device()
            backend.check_target(entry, compile_command(bundle.root, entry.backend))
        except QlipError as error:
            obstacles.append(error)
        else:
            return Target(name, entry, backend)
    if wanted == "auto" and bundle.whole.targets.keys() - targets.keys():
        raise _only_these(bundle, obstacles)
    if len(obstacles) == 1:
        raise obstacles[0]
    raise QlipError(
        f"no target of {bundle.root} runs here",
        expected=" or ".join(names),
        found="; ".join(error.problem for error in obstacles),
        fix=obstacles[0].fix,
    )


def _only_these(bundle: Bundle, obstacles: Sequence[QlipError]) -> QlipError:
    """Return the error where no target that has the wanted size runs here."""
    whole, named = bundle.whole, " and ".join(bundle.manifest.targets)
    here = [name for name in whole.targets if name not in bundle.manifest.targets and _runs(bundle, name)]
    backend = whole.targets[here[0]].backend if here else "openvino"
    instead = (
        f"take a size that {' and '.join(here)} can make here: {sizes_told(whole, here)}; or " if here else ""
    )
    return QlipError(
        f"only engines of {named} make images of that size, and they do not run here",
        expected="; ".join(dict.fromkeys(e.expected for e in obstacles if e.expected)) or None,
        found="; ".join(error.problem for error in obstacles),
        fix=f"{instead}build it with one more --size, then {compile_command(bundle.root, backend)}",
    )


def _runs(bundle: Bundle, name: str) -> bool:
    alone = bundle.whole.model_copy(update={"targets": {name: bundle.whole.targets[name]}})
    try:
        choose_target(Bundle(bundle.root, alone))
    except QlipError:
        return False
    return True
