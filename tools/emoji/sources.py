"""The npm packages behind the data set: fetching, concepts and the drawing of each concept in each style."""

import json
import shutil
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.emoji.captions import STYLES, Concept, Style, clean, merge_keywords

NAMES = ("emojibase-data", "17.0.0")
ANNOTATIONS = ("cldr-annotations-full", "48.2.0")
# Skin tones and hair ("component") and flags are drawn by other rules than the rest.
LEFT_OUT_GROUPS = ("component", "flags")
# @iconify-json/fluent-emoji has no chars.json; its icons carry the names of the flat set.
CHARACTERS_FROM = {"fluent-color": "fluent-flat"}


@dataclass(frozen=True)
class Drawing:
    """One concept drawn in one style, as a whole SVG document."""

    concept: Concept
    style: Style
    svg: str


def fetch(package: str, version: str, cache: Path) -> Path:
    """Return the unpacked npm package under `cache`, downloading it with `npm pack` where it is missing."""
    target = cache / f"{package.replace('@', '').replace('/', '-')}-{version}"
    if target.is_dir():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    npm = shutil.which("npm")
    if npm is None:
        raise FileNotFoundError(
            f"expected npm on the PATH to fetch {package}@{version}; install Node.js first"
        )
    command = [npm, "pack", f"{package}@{version}", "--silent", "--pack-destination", str(cache)]
    packed = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1]
    aside = cache / f"{target.name}.partial"
    shutil.rmtree(aside, ignore_errors=True)
    with tarfile.open(cache / packed) as archive:
        archive.extractall(aside, filter="data")
    (aside / "package").rename(target)
    aside.rmdir()
    (cache / packed).unlink()
    return target


def read_json(path: Path) -> Any:
    """Read one JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def plain_hexcode(hexcode: str) -> str:
    """Return `hexcode` in lower case without variation selectors, which the sources use differently."""
    return "-".join(part for part in hexcode.lower().split("-") if part != "fe0f")


def concepts_of(
    emoji: list[dict[str, Any]], groups: dict[str, str], annotations: dict[str, Any]
) -> list[Concept]:
    """Merge emojibase records with CLDR annotations into concepts, without flags, skin tones and letters."""
    concepts = []
    for record in emoji:
        group = groups.get(str(record.get("group")))
        if group is None or group in LEFT_OUT_GROUPS:
            continue
        annotation = annotations.get(record["emoji"].replace("\ufe0f", ""), {})
        concepts.append(
            Concept(
                hexcode=plain_hexcode(record["hexcode"]),
                name=clean(record["label"]),
                keywords=merge_keywords(
                    record["label"], record.get("tags", []), annotation.get("default", [])
                ),
                group=group,
            )
        )
    return concepts


def load_concepts(cache: Path) -> list[Concept]:
    """Fetch the names and keywords and return every concept, in emojibase's order."""
    names = fetch(*NAMES, cache)
    annotations = fetch(*ANNOTATIONS, cache) / "annotations/en/annotations.json"
    return concepts_of(
        read_json(names / "en/data.json"),
        read_json(names / "meta/groups.json")["groups"],
        read_json(annotations)["annotations"]["annotations"],
    )


def svg_document(icons: dict[str, Any], name: str, margin: float) -> str | None:
    """Return one icon of an iconify set as an SVG with `margin` (a fraction of its side) around it, or None.

    Icons and aliases may carry their own box; aliases that turn or flip their parent are not used by the four
    sets and are refused.
    """
    alias = icons.get("aliases", {}).get(name)
    if alias is not None:
        if set(alias) & {"rotate", "hFlip", "vFlip"}:
            raise ValueError(f"expected an alias without turns or flips, found {name}: {alias}")
        return svg_document(icons, alias["parent"], margin)
    icon = icons["icons"].get(name)
    if icon is None:
        return None
    left, top = icon.get("left", 0), icon.get("top", 0)
    width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
    side = max(width, height) * (1 + 2 * margin)
    box = f"{left + width / 2 - side / 2:g} {top + height / 2 - side / 2:g} {side:g} {side:g}"
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{box}">{icon["body"]}</svg>'
    )


def load_drawings(concepts: list[Concept], cache: Path, margin: float) -> list[Drawing]:
    """Fetch the four icon sets and return every drawing of `concepts`, style by style."""
    folders = {style.key: fetch(style.package, style.version, cache) for style in STYLES}
    drawings = []
    for style in STYLES:
        icons = read_json(folders[style.key] / "icons.json")
        characters = read_json(folders[CHARACTERS_FROM.get(style.key, style.key)] / "chars.json")
        by_hexcode = {plain_hexcode(code): name for code, name in characters.items()}
        for concept in concepts:
            name = by_hexcode.get(concept.hexcode)
            svg = None if name is None else svg_document(icons, name, margin)
            if svg is not None:
                drawings.append(Drawing(concept, style, svg))
    return drawings
