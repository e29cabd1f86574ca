"""What the stages compute: matches, folded latents, timesteps and metrics; the archives of the data set."""

import math

import numpy
import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("PIL")

import torch

from tools.emoji import augment, clip, data, metrics, unet, vae
from tools.emoji.architecture import REHEARSAL, SHIPPED, build_unet, build_vae, count_layers
from tools.emoji.captions import STYLES, Concept
from tools.emoji.sources import Drawing


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_a_caption_without_a_style_matches_its_concept_in_every_style():
    concept, style = torch.tensor([0, 0, 1]), torch.tensor([0, 1, 0])
    styled = torch.tensor([True, False, True])
    expected = [[True, False, False], [True, True, False], [False, False, True]]
    assert clip.matches(concept, style, styled).tolist() == expected


def test_folding_the_scale_changes_the_latents_and_not_the_pictures():
    torch.manual_seed(0)
    model = build_vae(REHEARSAL).eval()
    pixels = torch.randint(0, 256, (4, 128, 128, 3), dtype=torch.uint8, generator=seeded())
    images = augment.to_unit(pixels)
    with torch.no_grad():
        before = model.encode(images).latent_dist
        restored = model.decode(before.mode()).sample
        vae.standardize(model, pixels, batch=2)
        after = model.encode(images).latent_dist
        again = model.decode(after.mode()).sample
    assert not torch.allclose(before.mean, after.mean, atol=1e-2)
    torch.testing.assert_close(after.mean.mean((0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(after.mean.std((0, 2, 3)), torch.ones(4), atol=1e-3, rtol=0)
    torch.testing.assert_close(
        after.std / before.std, (after.std / before.std)[:1, :, :1, :1].expand(4, 4, 32, 32)
    )
    torch.testing.assert_close(again, restored, atol=1e-4, rtol=1e-3)


def test_timesteps_cover_the_schedule_evenly():
    steps = unet.spread_timesteps(10, 1000, seeded())
    assert (steps // 100).tolist() == list(range(10))


def test_the_shipped_denoiser_has_151_layers_to_quantize():
    assert count_layers(build_unet(SHIPPED)) == 151


def test_frechet_distance_of_known_gaussians():
    points = torch.randn(4000, 3, generator=seeded(), dtype=torch.float64)
    assert metrics.frechet(points, points) == pytest.approx(0, abs=1e-9)
    assert metrics.frechet(points, points + 2) == pytest.approx(12, abs=1e-6)
    # Doubling the deviation of one axis adds (2 - 1)^2 times its variance.
    scaled = points * torch.tensor([2.0, 1.0, 1.0], dtype=torch.float64)
    mean = float(points[:, 0].mean()) ** 2
    assert metrics.frechet(points, scaled) == pytest.approx(float(points[:, 0].var()) + mean, rel=0.05)


def test_retrieval_and_clip_score():
    candidates = torch.eye(3)
    queries = torch.tensor([[1.0, 0.1, 0], [0, 0.2, 1.0]])
    labels = torch.tensor([5, 6, 7])
    assert metrics.retrieval(queries, candidates, torch.tensor([5, 6]), labels) == 0.5
    assert metrics.clip_score(torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, 1.0]])) == pytest.approx(
        math.sqrt(0.5)
    )


def test_halves_share_nothing():
    one, two = metrics.halves(11, seed=1)
    assert sorted([*one.tolist(), *two.tolist()]) == list(range(11))


def test_white_stays_white_when_images_move():
    white = torch.ones(2, 3, 16, 16)
    moved = augment.move(white, seeded(), zoom=0.3, shift=0.3)
    torch.testing.assert_close(moved, white)
    torch.testing.assert_close(augment.recolor(white, seeded(), share=1.0), white)


def test_pixels_survive_the_way_to_unit_range_and_back():
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(1, 16, 16, 3)
    assert torch.equal(augment.to_pixels(augment.to_unit(pixels)), pixels)


def test_images_come_back_from_the_archives_as_they_were(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "ARCHIVE_BYTES", 4000)
    rng = numpy.random.default_rng(0)
    pixels = rng.integers(0, 256, (5, 16, 16, 3), dtype=numpy.uint8)
    concepts = [Concept("1", "one", ("a",), "objects"), Concept("2", "two", (), "objects")]
    drawings = [Drawing(concepts[number % 2], STYLES[number % 4], "") for number in range(5)]
    assert data.write_archives((data.webp(image) for image in pixels), tmp_path) == 5
    data.write_index(tmp_path, concepts, drawings, held_out={"2"})
    assert len(list(tmp_path.glob("images-*.zip"))) > 1
    loaded = data.load(tmp_path)
    assert numpy.array_equal(loaded.pixels, pixels)
    assert loaded.concepts == concepts
    assert [record.held_out for record in loaded.records] == [False, True, False, True, False]
    (tmp_path / "images-00.zip").unlink()
    with pytest.raises(ValueError, match="build the data again"):
        data.load(tmp_path)


def test_an_svg_is_drawn_on_white():
    pytest.importorskip("resvg_py")
    red = (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 8 8"><path fill="#f00" d="M0 0h4v8H0z"/></svg>'
    )
    pixels = data.draw(red, side=8)
    assert pixels.shape == (8, 8, 3)
    assert pixels[0, 0].tolist() == [255, 0, 0] and pixels[7, 7].tolist() == [255, 255, 255]


def test_a_rebuilt_data_set_keeps_the_tokenizer_that_the_weights_know(tmp_path):
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    (shipped / "tokenizer.json").write_text("numbered")
    data.place_tokenizer(tmp_path / "data", shipped, [])
    assert (tmp_path / "data/tokenizer.json").read_text() == "numbered"
