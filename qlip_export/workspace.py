"""Where a build works: beside the bundle, product by product, so that nothing whole is ever lost.

A build of `engines/emoji` works in `engines/.emoji.qlip-building`. Every product has a key made from all that
went into it; a product that is there with the same key and its recorded hash is not made again, whether it
comes from an interrupted build or from the bundle that is being replaced. When all is there, the folder is
renamed.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from pydantic import JsonValue, RootModel, ValidationError

from qlip_export.bundle import MANIFEST, Bundle, BundlePath, FileEntry, Manifest, building_folder
from qlip_export.errors import QlipError
from qlip_export.files import locked, sha256_of, write_json, written_aside

JOURNAL = "journal.json"


class _Journal(RootModel[dict[BundlePath, FileEntry]]):
    """What the workspace holds."""


class Workspace:
    """The working folder of one build, locked against others."""

    def __init__(self, out: Path) -> None:
        """Use `Workspace.open` instead."""
        self.out = out
        self.root = building_folder(out)
        self.files: dict[str, FileEntry] = {}
        self.built = 0
        self.reused = 0
        self._known: dict[str, FileEntry] = {}
        self._previous: dict[str, FileEntry] = {}

    @classmethod
    @contextlib.contextmanager
    def open(cls, out: Path, on_wait: Callable[[], None]) -> Iterator[Workspace]:
        """Lock and prepare the workspace of the bundle ``out``; wait while another build has it.

        Raises:
            QlipError: ``out`` is something other than a bundle, or cannot be written.
        """
        out = out.resolve()
        check_replaceable(out)
        with locked(out.with_name(f".{out.name}.lock"), on_wait):
            workspace = cls(out)
            workspace._recover()
            workspace.root.mkdir(exist_ok=True)
            workspace._read_journal()
            try:
                yield workspace
            finally:
                if not workspace._known and workspace.root.is_dir():
                    shutil.rmtree(workspace.root)  # nothing in it is worth going on from

    def product(self, path: str, key: str, make: Callable[[Path], JsonValue]) -> tuple[Path, JsonValue]:
        """Return the whole file ``path`` of the bundle and its facts, made by ``make`` unless it is there.

        Args:
            path: Relative to the bundle.
            key: Changes whenever the content would.
            make: Writes the file to the path it is given, which is renamed into place afterwards, and returns
                the file's facts: JSON that is kept with it.
        """
        target = self.root / path
        done = self.files.get(path)
        if done is not None and done.key == key:
            return target, done.facts  # asked for before in this build
        entry = self._reusable(path, key)
        if entry is not None:
            self.reused += 1
        else:
            with written_aside(target) as aside:
                facts = make(aside)
            entry = FileEntry(sha256=sha256_of(target), size=target.stat().st_size, key=key, facts=facts)
            self.built += 1
        self.files[path] = entry
        if self._known.get(path) != entry:
            self._known[path] = entry
            write_json(self.root / JOURNAL, _Journal(self._known).model_dump())
        return target, entry.facts

    def finish(self, manifest: Manifest) -> Bundle:
        """Write the manifest, drop what it does not list, and put the workspace in the bundle's place."""
        write_json(self.root / MANIFEST, manifest.model_dump(mode="json"))
        keep = {self.root / MANIFEST, *(self.root / path for path in manifest.files)}
        for path in sorted(self.root.rglob("*"), reverse=True):
            if path.is_dir():
                with contextlib.suppress(OSError):
                    path.rmdir()  # succeeds only where nothing is left in it
            elif path not in keep:
                path.unlink()
        previous = self._previous_root
        if self.out.exists():
            self.out.rename(previous)
        self.root.rename(self.out)
        shutil.rmtree(previous, ignore_errors=True)
        return Bundle.open(self.out)

    @property
    def _previous_root(self) -> Path:
        return self.out.with_name(f".{self.out.name}.qlip-previous")

    def _recover(self) -> None:
        """Undo a swap that was interrupted between its two renames."""
        if self._previous_root.exists():
            if self.out.exists():
                shutil.rmtree(self._previous_root)
            else:
                self._previous_root.rename(self.out)

    def _read_journal(self) -> None:
        if (self.root / MANIFEST).is_file():
            # Killed while finishing: the manifest lists what the journal did.
            with contextlib.suppress(QlipError):
                self._known = dict(Bundle.open(self.root).manifest.files)
        journal = self.root / JOURNAL
        if journal.is_file():
            # A journal of another version or a torn one only means that products are made again.
            with contextlib.suppress(ValidationError):
                self._known = _Journal.model_validate_json(journal.read_bytes()).root
        if (self.out / MANIFEST).is_file():
            with contextlib.suppress(QlipError):
                self._previous = dict(Bundle.open(self.out).manifest.files)

    def _reusable(self, path: str, key: str) -> FileEntry | None:
        for root, entries in ((self.root, self._known), (self.out, self._previous)):
            entry, file = entries.get(path), root / path
            if entry is None or entry.key != key or not file.is_file():
                continue
            if file.stat().st_size != entry.size or sha256_of(file) != entry.sha256:
                continue
            if root is self.out:
                target = self.root / path
                # Not a hard link: ONNX readers refuse external data with two names.
                with written_aside(target) as aside:
                    shutil.copyfile(file, aside)
            return entry
        return None


def check_replaceable(out: Path) -> None:
    """Refuse an output folder that holds something other than a bundle.

    Raises:
        QlipError: It is a file, or a folder with files but no manifest.
    """
    if out.is_dir() and not (out / MANIFEST).is_file() and any(out.iterdir()):
        raise QlipError(
            f"{out} is not empty and is no bundle",
            expected="a new folder, an empty one, or a bundle to replace",
            found=", ".join(sorted(p.name for p in out.iterdir())[:5]),
            fix="choose another -o",
        )
    if out.exists() and not out.is_dir():
        raise QlipError(f"{out} is a file", expected="a folder", fix="choose another -o")
