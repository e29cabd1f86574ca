"""Build the data set: fetch the art, draw it at 128x128 on white, write one archive and its index.

`python -m tools.emoji.data` writes `build/emoji-data/`: `images-NN.zip` (lossless WebP), `index.json` (the
concepts, the split and the order of the images) and `tokenizer/`. It needs npm, and about two minutes on two
cores.
"""

import argparse
import io
import json
import os
import random
import shutil
import time
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from multiprocessing import Pool
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy
from PIL import Image

from tools.emoji import tokenizer as bpe
from tools.emoji.architecture import SHIPPED
from tools.emoji.captions import LEVELS, STYLES, Concept, caption, split
from tools.emoji.sources import Drawing, load_concepts, load_drawings

DEFAULT_FOLDER = Path("build/emoji-data")
HELD_OUT_LIST = Path(__file__).parent / "held_out.json"
SHIPPED_TOKENIZER = Path("qlip_export/zoo/emoji/tokenizer")
HELD_OUT = 60
SEED = 20261122
MARGIN = 0.04
ARCHIVE_BYTES = 12 * 2**20
CAPTIONS_FOR_TOKENIZER = 8


@dataclass(frozen=True)
class ImageRecord:
    """One image of the data set: its concept's place in the list of concepts, its style, and its split."""

    concept: int
    style: str
    held_out: bool


@dataclass(frozen=True)
class Dataset:
    """Every concept, one record an image, and the images as a (count, 128, 128, 3) uint8 array."""

    concepts: list[Concept]
    records: list[ImageRecord]
    pixels: numpy.ndarray


def draw(svg: str, side: int = SHIPPED.image) -> numpy.ndarray:
    """Render `svg` at `side` x `side` pixels on white, as a (side, side, 3) uint8 array.

    Rendering at twice the size and averaging keeps thin strokes that one sample a pixel would lose.
    """
    import resvg_py  # Only the drawing needs it: training reads the finished archives.

    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=2 * side, height=2 * side))
    image = Image.open(io.BytesIO(png)).convert("RGBA")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return numpy.asarray(Image.alpha_composite(white, image).convert("RGB").reduce(2))


def webp(pixels: numpy.ndarray) -> bytes:
    """Encode a (height, width, 3) uint8 array without loss."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "WEBP", lossless=True, quality=80, method=4)
    return stream.getvalue()


def decode(image: bytes) -> numpy.ndarray:
    """Decode one image to a (height, width, 3) uint8 array."""
    return numpy.asarray(Image.open(io.BytesIO(image)).convert("RGB"))


def draw_webp(svg: str) -> bytes:
    """Render one SVG and encode it, in a worker process."""
    return webp(draw(svg))


def write_archives(images: Iterator[bytes], folder: Path) -> int:
    """Write `images` to numbered archives of about 12 MiB at most and return how many there were."""
    count = 0
    archive: zipfile.ZipFile | None = None
    size = number = 0
    for image in images:
        if archive is None or size + len(image) > ARCHIVE_BYTES:
            if archive is not None:
                archive.close()
            archive = zipfile.ZipFile(folder / f"images-{number:02d}.zip", "w", zipfile.ZIP_STORED)
            size, number = 0, number + 1
        archive.writestr(f"{count:05d}.webp", image)
        size += len(image)
        count += 1
    if archive is not None:
        archive.close()
    return count


def tokenizer_texts(concepts: list[Concept], seed: int) -> list[str]:
    """Return the captions that the tokenizer learns from: eight draws of every level for every concept."""
    rng = random.Random(seed)
    texts = [
        caption(concept, style, level, rng)
        for concept in concepts
        for style in STYLES
        for level in LEVELS
        for _ in range(CAPTIONS_FOR_TOKENIZER // len(STYLES))
    ]
    return texts + [word for concept in concepts for word in concept.keywords]


def write_index(folder: Path, concepts: list[Concept], drawings: list[Drawing], held_out: set[str]) -> None:
    """Write `index.json`: the concepts and, in the order of the archives, one record an image."""
    place = {concept.hexcode: number for number, concept in enumerate(concepts)}
    records = [
        ImageRecord(place[d.concept.hexcode], d.style.key, d.concept.hexcode in held_out) for d in drawings
    ]
    content = {
        "seed": SEED,
        "concepts": [asdict(concept) for concept in concepts],
        "images": [asdict(record) for record in records],
    }
    (folder / "index.json").write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")


def read_index(folder: Path) -> tuple[list[Concept], list[ImageRecord]]:
    """Read the concepts and the image records of the data set in `folder`."""
    index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    concepts = [Concept(**{**entry, "keywords": tuple(entry["keywords"])}) for entry in index["concepts"]]
    return concepts, [ImageRecord(**entry) for entry in index["images"]]


def load(folder: Path) -> Dataset:
    """Read the data set that `build` wrote to `folder`.

    Raises:
        ValueError: the archives hold more or fewer images than the index names.
    """
    concepts, records = read_index(folder)
    encoded: list[bytes] = []
    for path in sorted(folder.glob("images-*.zip")):
        with zipfile.ZipFile(path) as archive:
            encoded += [archive.read(name) for name in sorted(archive.namelist())]
    with ThreadPool() as threads:
        images = threads.map(decode, encoded, chunksize=64)
    if len(images) != len(records):
        raise ValueError(
            f"expected {len(records)} images in {folder}, found {len(images)}; build the data again"
        )
    return Dataset(concepts, records, numpy.stack(images))


def place_tokenizer(folder: Path, shipped: Path | None, trained: list[Concept]) -> None:
    """Copy the `shipped` tokenizer to `folder`, or train a new one on captions of `trained` where it is None.

    The token numbers are a part of the text tower. The trainer breaks ties between equally frequent pairs
    differently in every run, so that a new tokenizer fits new towers only.
    """
    if shipped is None:
        bpe.save(bpe.train(tokenizer_texts(trained, SEED), SHIPPED.vocabulary), folder)
    else:
        shutil.copytree(shipped, folder, dirs_exist_ok=True)


def build(folder: Path, cache: Path, processes: int, limit: int | None, tokenizer: Path | None) -> None:
    """Build the whole data set in `folder`; `limit` keeps only the first images of each style."""
    started = time.monotonic()
    concepts = load_concepts(cache)
    trained, held_out = split(concepts, HELD_OUT, SEED)
    drawings = load_drawings(concepts, cache, MARGIN)
    if limit is not None:
        by_style = [[d for d in drawings if d.style == style] for style in STYLES]
        drawings = [d for of_style in by_style for d in of_style[:limit]]
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("images-*.zip"):
        stale.unlink()
    with Pool(processes) as pool:
        count = write_archives(pool.imap(draw_webp, [d.svg for d in drawings], chunksize=16), folder)
    write_index(folder, concepts, drawings, {concept.hexcode for concept in held_out})
    place_tokenizer(folder / "tokenizer", tokenizer, trained)
    if limit is None:
        names = {concept.hexcode: concept.name for concept in held_out}
        bpe.write_json(HELD_OUT_LIST, {"seed": SEED, "concepts": names})
    styles = Counter(d.style.key for d in drawings)
    size = sum(path.stat().st_size for path in folder.glob("images-*.zip"))
    print(
        f"{count} images of {len(concepts)} concepts ({len(held_out)} held out), {size / 1e6:.1f} MB: "
        f"{dict(styles)}"
    )
    print(f"built in {time.monotonic() - started:.0f} s")


def main() -> None:
    """Read the command line and build the data set."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=DEFAULT_FOLDER)
    parser.add_argument("--cache", type=Path, default=Path("build/npm"))
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--limit", type=int, help="images of each style, for a rehearsal")
    parser.add_argument(
        "--new-tokenizer", action="store_true", help="train a tokenizer; the shipped towers cannot read it"
    )
    arguments = parser.parse_args()
    tokenizer = None if arguments.new_tokenizer else SHIPPED_TOKENIZER
    build(arguments.out, arguments.cache, arguments.processes, arguments.limit, tokenizer)


if __name__ == "__main__":
    main()
