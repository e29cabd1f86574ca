"""Where a build works: beside the bundle, product by product, so that nothing whole is ever lost.

A build of `engines/emoji` works in `engines/.emoji.qlip-building`. Every product has a key made from all that
went into it; a product that is there with the same key and its recorded hash is not made again, whether it
comes from an interrupted build or from the bundle that is being replaced. When all is there, the folder is
renamed.

Compiling adds a target to a bundle that stays where it is: only new engines are made beside it, in
`engines/.emoji.qlip-compiling-TARGET`. Once all are there, they are moved in and the manifest is replaced.
Before that, engines that are about to be overwritten leave the manifest: it tells the truth at every moment.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Set
from pathlib import Path

from pydantic import JsonValue, RootModel, ValidationError

from qlip_export.bundle import MANIFEST, Bundle, building_folder
from qlip_export.compiled import TargetEntry
from qlip_export.errors import QlipError
from qlip_export.files import explained_os_errors, locked, sha256_of, write_json, written_aside
from qlip_export.manifest import FileEntry, Manifest
from qlip_export.spec import BundlePath, Frozen

JOURNAL = "journal.json"


class _Journal(RootModel[dict[BundlePath, FileEntry]]):
    """What the workspace holds."""


class Workspace:
    """The working folder of one build, locked against others.

    Attributes:
        out: The bundle.
        root: The folder.
        files: What this build asked for so far.
        built: How many of them were made.
        reused: How many were there.
    """

    def __init__(self, out: Path, root: Path, *, in_place: bool = False) -> None:
        """Use `Workspace.open` or `Workspace.open_target` instead."""
        self.out = out
        self.root = root
        self.files: dict[str, FileEntry] = {}
        self.built = 0
        self.reused = 0
        self._in_place = in_place  # what is in the bundle already stays there
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
            workspace = cls(out, building_folder(out))
            workspace._recover()
            with workspace._prepared():
                yield workspace

    @classmethod
    @contextlib.contextmanager
    def open_target(cls, bundle: Path, name: str, on_wait: Callable[[], None]) -> Iterator[Workspace]:
        """Lock a bundle and prepare the workspace of its target ``name``; wait while another build has it.

        Raises:
            QlipError: No bundle there, or it cannot be written.
        """
        out = bundle.resolve()
        Bundle.open(bundle)  # before a lock is left beside what is no bundle
        with locked(out.with_name(f".{out.name}.lock"), on_wait):
            workspace = cls(out, out.with_name(f".{out.name}.qlip-compiling-{name}"), in_place=True)
            with workspace._prepared():
                yield workspace

    @contextlib.contextmanager
    def _prepared(self) -> Iterator[None]:
        with explained_os_errors(self.root):
            self.root.mkdir(exist_ok=True)
        self._read_journal()
        try:
            yield
        finally:
            if not self._known and self.root.is_dir():
                shutil.rmtree(self.root)  # nothing in it is worth going on from

    def has(self, path: str, key: str) -> bool:
        """Return whether ``path`` is there with this key, by journal and size alone."""
        return any(
            entry is not None and entry.key == key and _has_size(root / path, entry.size)
            for root, entry in self._candidates(path)
        )

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
        if self._known.get(path) != entry and target.is_file():
            self._known[path] = entry
            write_json(self.root / JOURNAL, _Journal(self._known).model_dump())
        return target, entry.facts

    def add_target(self, manifest: Manifest, name: str, target: TargetEntry) -> Bundle:
        """Move new engines into the bundle and replace its manifest by one with this target.

        Args:
            manifest: The bundle's.
            name: Of the target.
            target: Its engines are all that this workspace was asked for.
        """
        fresh = [path for path in self.files if (self.root / path).is_file()]
        if stale := manifest.files.keys() & set(fresh):
            self._write_manifest(_without(manifest, stale))
        for path in fresh:
            (self.out / path).parent.mkdir(parents=True, exist_ok=True)
            (self.root / path).replace(self.out / path)
        before = manifest.targets.get(name)
        dropped = {e.path for e in before.engines.values()} - self.files.keys() if before else set()
        kept = {path: entry for path, entry in manifest.files.items() if path not in dropped}
        update = {"targets": {**manifest.targets, name: target}, "files": kept | self.files}
        self._write_manifest(manifest.model_copy(update=update))
        for path in dropped:
            (self.out / path).unlink(missing_ok=True)
        shutil.rmtree(self.root)
        return Bundle.open(self.out)

    def replace_target(self, manifest: Manifest, name: str, target: TargetEntry) -> None:
        """Replace what the bundle's manifest says of a target whose engines stay as they are."""
        self._write_manifest(manifest.model_copy(update={"targets": {**manifest.targets, name: target}}))

    def _write_manifest(self, manifest: Manifest) -> None:
        write_json(self.out / MANIFEST, manifest.model_dump(mode="json"))

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
            self._known = _files_of(self.root)
        journal = self.root / JOURNAL
        if journal.is_file():
            # A journal of another version or a torn one only means that products are made again.
            with contextlib.suppress(ValidationError):
                self._known = _Journal.model_validate_json(journal.read_bytes()).root
        if (self.out / MANIFEST).is_file():
            self._previous = _files_of(self.out)

    def _candidates(self, path: str) -> list[tuple[Path, FileEntry | None]]:
        places = [(self.root, self._known.get(path)), (self.out, self._previous.get(path))]
        # Killed while engines were moved into the bundle: the journal knows them, its manifest does not yet.
        return [*places, (self.out, self._known.get(path))] if self._in_place else places

    def _reusable(self, path: str, key: str) -> FileEntry | None:
        for root, entry in self._candidates(path):
            file = root / path
            if entry is None or entry.key != key or not _has_size(file, entry.size):
                continue
            if sha256_of(file) != entry.sha256:
                continue
            target = self.root / path
            if root is self.out and self._in_place:
                target.unlink(missing_ok=True)  # of an interrupted run; this is the one that counts
            elif root is self.out:
                # Not a hard link: ONNX readers refuse external data with two names.
                with written_aside(target) as aside:
                    shutil.copyfile(file, aside)
            return entry
        return None


class _Files(Frozen, extra="ignore"):
    files: dict[BundlePath, FileEntry]


def _files_of(bundle: Path) -> dict[str, FileEntry]:
    """Return what a manifest lists, of whatever schema version: keys and hashes say what is good for what."""
    try:
        return dict(_Files.model_validate_json((bundle / MANIFEST).read_bytes()).files)
    except ValidationError:
        return {}  # everything is made again


def _has_size(file: Path, size: int) -> bool:
    return file.is_file() and file.stat().st_size == size


def _without(manifest: Manifest, paths: Set[str]) -> Manifest:
    """Return the manifest without these engines."""
    targets = {
        name: target.model_copy(
            update={"engines": {o: e for o, e in target.engines.items() if e.path not in paths}}
        )
        for name, target in manifest.targets.items()
    }
    files = {path: entry for path, entry in manifest.files.items() if path not in paths}
    return manifest.model_copy(update={"targets": targets, "files": files})


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
