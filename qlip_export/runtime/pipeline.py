"""Prompt in, image out, through the engines of a bundle."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from qlip_export.bundle import Bundle
from qlip_export.errors import NotFiniteError, QlipError
from qlip_export.manifest import Manifest
from qlip_export.noise import seeded_noise
from qlip_export.runtime.budget import parse_budget
from qlip_export.runtime.chain import Chain, Pattern
from qlip_export.runtime.component import Component
from qlip_export.runtime.conditioning import Conditioner
from qlip_export.runtime.dispatch import dispatch
from qlip_export.runtime.engines import Engines
from qlip_export.runtime.room import Room
from qlip_export.runtime.sampler import Sampler, guided
from qlip_export.runtime.schedule import Scheduler, block_bits, engine_switches, feature_average_bits
from qlip_export.runtime.targets import Target, choose_target
from qlip_export.sizes import choose_size, serving

OnStep = Callable[[int, int], None]
"""Called after each denoiser step with the number of steps done and the total."""
OnImage = Callable[[Image.Image, dict[str, Any]], None]
"""Called with each image and its record as soon as it is made; what it adds to the record stays there."""


@dataclass(frozen=True)
class Previews:
    """Images on the way: what a step foresees, decoded. Each costs a run of the VAE decoder.

    Attributes:
        count: How many of each batch, evenly over its steps; the last step is the image and not one of them.
        show: Called with the images of the batch.
    """

    count: int
    show: Callable[[list[Image.Image]], None]

    def after(self, steps: int) -> set[int]:
        """Return after which of ``steps`` steps there is one, counted from 1."""
        return {round(steps * (i + 1) / (self.count + 1)) for i in range(self.count)} - {0, steps}


@dataclass
class Generation:
    """What one call made: the images, and everything needed to make them again.

    Attributes:
        images: One PIL image for each prompt.
        records: One dictionary for each image, JSON-serialisable. `prompt`, `negative_prompt`, `seed` and
            `guidance` make it again. `q` is the predicted quality, null where bits were forced or the bundle
            has no policy; `bits[step][block]` (the mean of its layers where these differ) with the names in
            `blocks`, `variants[step][block]` (which engine), `fab` (the mean over quantized layers and
            steps) and `engine_switches` (changes of a block's engine between consecutive steps, summed) are
            those of the whole batch. `instead` names, by block, variants that were found to be slower than
            others of at least their bits, and those, which ran in their place (`bits`, `variants` and `fab`
            are those that were chosen). `target` names the engines. `memory`, with a
            budget, is a `MemoryUse`. `seconds`, of the whole batch:
            `total`, `policy` (deciding the bits), `prompt_and_load`, `steps`, `decode`, and `previews` where
            there were any.
    """

    images: list[Image.Image]
    records: list[dict[str, Any]]
    warnings: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Return what `generate --json` prints."""
        return {"images": self.records, "warnings": self.warnings}


class TextToImage:
    """A loaded bundle. Calls are serialised: one instance may be shared by threads."""

    def __init__(self, bundle: Bundle, target: Target) -> None:
        """Use `TextToImage.load` instead."""
        self.bundle = bundle
        self.target = target
        self.backend = target.backend
        self._engines = Engines(bundle, target)
        self.chain = Chain(bundle, target, self._engines)
        self._encoders = {e.name: Component(e, target, self._engines) for e in bundle.manifest.text_encoders}
        self._conditioner = Conditioner(bundle, self._encoders)
        self._vae_decoder = Component(bundle.manifest.vae_decoder, target, self._engines)
        policy = bundle.manifest.policy
        self._policy = Component(policy, target, self._engines) if policy else None
        self._schedule = Scheduler(policy.table, bundle.manifest.blocks) if policy else None
        self._lock = threading.Lock()

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        backend: str = "auto",
        threads: int | None = None,
        height: int | None = None,
        width: int | None = None,
        batch_size: int | None = None,
        images: int | None = None,
    ) -> TextToImage:
        """Open a bundle with one of the backends that it was compiled for.

        Args:
            path: The bundle's folder.
            backend: Whose engines to run; ``auto`` takes the first that can run here.
            threads: CPU threads an engine may use; ``None`` leaves it to the backend.
            height: Of images, pixels, where the bundle has several sizes or a target with a profile; the
                first that fits is taken.
            width: The same.
            batch_size: Images per batch, the same.
            images: How many images a call will draw: chooses among batch sizes; see `sizes.choose_size`.

        Raises:
            QlipError: No bundle, a damaged one, one without such engines or such a size, or none that can run
                here.
        """
        opened = Bundle.open(path)
        size = {"height": height, "width": width, "batch_size": batch_size}
        target = choose_target(serving(opened, backend, **size), backend, threads=threads)
        bundle = choose_size(opened, **size, images=images, target=target.name)
        return cls(bundle, replace(target, entry=bundle.manifest.targets[target.name]))

    def at(
        self,
        *,
        height: int | None = None,
        width: int | None = None,
        batch_size: int | None = None,
        images: int | None = None,
    ) -> TextToImage:
        """Return the same bundle in another of its sizes, on the same backend; itself where that is its own.

        Nothing is loaded yet, and what this one loaded goes when nobody refers to it any more.

        Raises:
            QlipError: The bundle has no such size.
        """
        opened = Bundle(self.bundle.root, self.bundle.whole)
        size = {"height": height, "width": width, "batch_size": batch_size}
        bundle = choose_size(opened, **size, images=images, target=self.target.name)
        if bundle.manifest.shapes == self.bundle.manifest.shapes:
            return self
        entry = bundle.manifest.targets[self.target.name]
        return TextToImage(bundle, replace(self.target, entry=entry))

    def sizes(self) -> list[Manifest]:
        """Return the sizes of the bundle that its target runs, each as a manifest; its own first."""
        own = self.bundle.manifest
        return [
            own,
            *(s for s in self.bundle.whole.sizes if s.shapes != own.shapes and self.target.name in s.targets),
        ]

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | None = None,
        seed: int | None = None,
        latents: NDArray[np.float32] | None = None,
        guidance: float | None = None,
        bits: int | None = None,
        memory_budget: int | str | None = None,
        on_step: OnStep | None = None,
        on_image: OnImage | None = None,
        previews: Previews | None = None,
    ) -> Generation:
        """Generate one image for each prompt.

        The policy of the bundle chooses the bits of each block and step, for a whole batch before its first
        step. Without a policy all blocks run at ``bundle.bits()``.

        Args:
            prompt: One prompt or several.
            negative_prompt: What to steer away from; nothing by default, as the model was trained to say it.
            seed: Seed of the first image; image i uses ``seed + i``. Drawn at random if absent.
            latents: Initial noise instead of a seed, (N, C, H, W) float32 of unit variance.
            guidance: Guidance scale; the model's own by default.
            bits: Activation bits of all blocks at all steps, instead of the policy's choice.
            memory_budget: Most bytes that engines and the values between them may take at any moment, as a
                number or e.g. ``600MB``; see `residency`. The interpreter and the backend's library are not
                in it. Without one, everything that was loaded stays loaded.
            on_step: Progress callback.
            on_image: Called as soon as an image is made.
            previews: How many images on the way to decode, and for whom; not with a memory budget.

        Raises:
            QlipError: No prompt, latents of another shape, bits that are not in the bundle, a memory budget
                that is too small, that comes with previews or that is meant for a GPU, or a negative prompt
                or a guidance scale that the model has no use for.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts:
            raise QlipError("the list of prompts is empty", fix="give at least one prompt")
        self._conditioner.check(negative_prompt)
        scale = self.bundle.guidance(guidance)
        shape = (len(prompts), *self.bundle.manifest.shapes.latents[1:])
        seeds: list[int | None] = [None] * len(prompts)
        if latents is None:
            first = int.from_bytes(os.urandom(4), "little") if seed is None else seed
            if first < 0:
                raise QlipError("the seed is negative", expected="0 or more", found=str(first))
            seeds = [first + i for i in range(len(prompts))]
            noise = np.stack([seeded_noise(s, shape[1:]) for s in seeds if s is not None])
        else:
            noise = np.asarray(latents, dtype=np.float32)
            if noise.shape != shape:
                raise QlipError("latents of the wrong shape", expected=str(shape), found=str(noise.shape))
        if bits is not None or self._policy is None:
            self.bundle.bits(bits)  # refused before anything is loaded
        budget = None if memory_budget is None else parse_budget(memory_budget)
        if budget is not None and not self.backend.budgets:
            raise QlipError(
                "a memory budget is for memory of the process",
                found=f"engines of {self.backend.name}, which take the GPU's",
                fix="leave the budget out, or choose --backend openvino or onnxruntime",
            )
        if budget is not None and previews is not None:
            raise QlipError("previews would load the VAE decoder between steps", fix="drop the memory budget")
        result = Generation([], [])
        size = self.bundle.manifest.shapes.batch_size
        steps = len(self.bundle.manifest.sampler.steps)
        total = steps * -(-len(prompts) // size)
        with self._lock:
            for start in range(0, len(prompts), size):
                done = steps * (start // size)

                def report(step: int, done: int = done) -> None:
                    if on_step is not None:
                        on_step(done + step, total)

                self._batch(
                    prompts[start : start + size],
                    seeds[start : start + size],
                    noise[start : start + size],
                    negative_prompt,
                    scale,
                    bits,
                    budget,
                    result,
                    report,
                    on_image,
                    previews,
                )
        return result

    def qualities(self, prompts: Sequence[str]) -> list[float]:
        """Return q of each prompt, in (0, 1), without drawing anything.

        Raises:
            QlipError: The bundle has no policy.
        """
        if self._policy is None:
            raise QlipError(f"{self.bundle.root} has no policy", fix="build it with --policy auto")
        size = self.bundle.manifest.shapes.batch_size
        found: list[float] = []
        with self._lock:
            for start in range(0, len(prompts), size):
                part = list(prompts[start : start + size])
                pooled = self._conditioner.pooled(part + part[-1:] * (size - len(part)))
                found += [float(q) for q in self._policy(pooled=pooled)["quality"][: len(part)]]
        return found

    def _batch(
        self,
        prompts: list[str],
        seeds: list[int | None],
        noise: NDArray[np.float32],
        negative: str | None,
        guidance: float,
        bits: int | None,
        budget: int | None,
        result: Generation,
        report: Callable[[int], None],
        on_image: OnImage | None,
        previews: Previews | None,
    ) -> None:
        started = time.perf_counter()
        count, size = len(prompts), self.bundle.manifest.shapes.batch_size
        padding = size - count  # the engines' batch is static: the last batch repeats its last prompt
        noise = np.concatenate([noise, np.repeat(noise[-1:], padding, axis=0)])
        adaptive = self._policy if bits is None else None
        first = [*self._encoders.values(), *([] if adaptive is None else [adaptive])]
        timing = self.target.entry.timing
        # Bits that a user asks for run as they are; of bits that were chosen for him, the fastest.
        instead = timing.instead if timing is not None and bits is None else {}
        uniform = None
        if adaptive is None:
            (uniform,) = dispatch(instead, self.chain.blocks, [self.chain.uniform(self.bundle.bits(bits))])
        room = Room(budget, self._engines, self.chain, first, [self._vae_decoder], uniform)
        room.require()
        with room.running([], first):
            conditioned = self._conditioner(prompts + prompts[-1:] * padding, negative, guidance, count)
            result.warnings += [w for w in conditioned.warnings if w not in result.warnings]
            if adaptive is not None and budget is None:
                adaptive.load()
            deciding = time.perf_counter()
            qualities, patterns = self._decide(conditioned.pooled, count, bits)
            decided = time.perf_counter()
        running = dispatch(instead, self.chain.blocks, patterns)
        with room.running(running, [self._vae_decoder]) as before:
            for name, array in conditioned.inputs.items():
                self.chain.hold(name, array)
            loaded = time.perf_counter()
            sampler = Sampler(self.bundle.manifest.sampler)
            sampler.start(noise)
            pair = self.bundle.manifest.guidance.rows
            seconds: list[float] = []
            previewed, previewing = previews.after(len(running)) if previews else set(), 0.0
            for pattern in running:
                begun = time.perf_counter()
                rows = np.concatenate([sampler.denoiser_input()] * pair)
                found = self.chain.step(rows, sampler.timestep, pattern, before)
                sampler.step(guided(found[:size], found[size:], guidance) if pair > 1 else found)
                seconds.append(time.perf_counter() - begun)
                report(len(seconds))
                if previews is not None and len(seconds) in previewed:
                    begun = time.perf_counter()
                    previews.show(self._decoded(sampler.foreseen(), count))
                    previewing += time.perf_counter() - begun
            decoding = time.perf_counter()
            images = self._decoded(sampler.latents, count)
        result.warnings += [note for note in self.backend.notes if note not in result.warnings]
        used = room.used
        ended = time.perf_counter()
        for prompt, seed, q, image in zip(prompts, seeds, qualities, images, strict=True):
            record = {
                "prompt": prompt,
                "negative_prompt": negative,
                "seed": seed,
                "guidance": guidance,
                "q": q,
                "fab": round(feature_average_bits(self.chain.blocks, patterns), 4),
                "bits": [list(map(block_bits, self.chain.blocks, pattern)) for pattern in patterns],
                "variants": [list(pattern) for pattern in patterns],
                "blocks": [b.name for b in self.chain.blocks],
                "instead": instead,
                "engine_switches": engine_switches(running),
                "target": self.target.name,
                **({"memory": used.model_dump()} if used is not None else {}),
                "seconds": {
                    "total": round(ended - started, 4),
                    "policy": round(decided - deciding, 6),
                    "prompt_and_load": round(loaded - started, 4),
                    "steps": [round(s, 5) for s in seconds],
                    "decode": round(ended - decoding, 4),
                    **({"previews": round(previewing, 4)} if previews is not None else {}),
                },
            }
            result.images.append(image)
            result.records.append(record)
            if on_image is not None:
                on_image(image, record)

    def _decoded(self, latents: NDArray[np.float32], count: int) -> list[Image.Image]:
        pixels = self._vae_decoder(latents=latents)["image"]
        if not np.isfinite(pixels).all():
            raise NotFiniteError(
                "the image is not finite",
                fix=f"run 'qlip-export validate {self.bundle.root}' to find the block that overflows",
            )
        return to_images(pixels[:count])

    def _decide(
        self, pooled: NDArray[np.float32], count: int, bits: int | None
    ) -> tuple[list[float | None], list[Pattern]]:
        """Return q of each of the first ``count`` prompts, none where ``bits`` are forced, and the schedule.

        ``pooled`` (N, C_clip) holds the embeddings of the whole batch; what pads it has no say.
        """
        if bits is not None or self._schedule is None or self._policy is None:
            uniform = self.chain.uniform(self.bundle.bits(bits))
            return [None] * count, [uniform] * len(self.bundle.manifest.sampler.steps)
        qualities = [float(q) for q in self._policy(pooled=pooled)["quality"][:count]]
        return [*qualities], self._schedule(qualities)


def to_images(pixels: NDArray[np.float32]) -> list[Image.Image]:
    """Return (N, 3, H, W) in [-1, 1] as PIL images."""
    levels = (np.clip(pixels / 2 + 0.5, 0, 1) * 255).round().astype(np.uint8).transpose(0, 2, 3, 1)
    return [Image.fromarray(image) for image in levels]
