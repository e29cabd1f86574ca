"""What the compiler of a backend can be told beyond its defaults: part of a target's identity."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, JsonValue, field_validator

from qlip_export.errors import QlipError
from qlip_export.extents import Profile, spelt
from qlip_export.spec import Frozen


class CompileOptions(Frozen):
    """Options of `qlip-export compile`; a backend refuses those that it does not know."""

    optimization_level: int | None = Field(default=None, ge=0, le=5)
    workspace: int | None = Field(default=None, ge=1, description="MiB of GPU memory an engine may use")
    timing_cache: Path | None = None
    hardware_compat: Literal["same-compute-capability", "ampere-plus"] | None = None
    version_compat: bool = False
    tf32: bool = False
    profile: Profile = Field(default_factory=dict, description="batch, height and width that vary")
    target: tuple[str, ...] = Field(default=(), description="GPUs, e.g. sm89; none: the library's default")

    @field_validator("target")
    @classmethod
    def _each_once(cls, target: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(sorted(set(target)))

    @property
    def given(self) -> dict[str, JsonValue]:
        """The options that are not at their defaults, by name."""
        given: dict[str, JsonValue] = self.model_dump(mode="json", exclude_defaults=True)
        return given

    @property
    def identity(self) -> dict[str, JsonValue]:
        """Those of them that make another engine of every graph.

        A timing cache only saves time; a profile changes the graphs that it is about.
        """
        return {name: value for name, value in self.given.items() if name not in ("timing_cache", "profile")}


def refused(
    backend: str, option: str, reason: str | None = None, profile: Profile | None = None
) -> QlipError:
    """Return the error for an option that ``backend`` does not take; for ``profile``, with its ranges."""
    flag = "--" + option.replace("_", "-")
    if option == "profile":
        return QlipError(
            f"{backend} takes no {flag}: its engines have static shapes",
            expected="--backend tensorrt or tensorrt-rtx",
            found=f"--backend {backend} {spelt(profile or {})}".rstrip(),
            fix="give several static sizes at build: --size WIDTHxHEIGHT[:BATCH], repeatable",
        )
    return QlipError(
        f"{backend} takes no {flag}", found=reason, fix=f"leave {flag} out, or choose another --backend"
    )
