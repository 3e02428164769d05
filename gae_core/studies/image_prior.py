"""The deep image prior on a photograph: denoising, missing pixels, fewer pixels. Records ``image_prior_...``.

The methods beside it are those of scikit-image, which only these studies need: ``pip install scikit-image``.
"""

import functools
import importlib.metadata
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from gae_core import plots
from gae_core.models.image_prior import Hourglass, ImagePrior, psnr
from gae_core.seeds import fresh, seed_of, stream
from gae_core.studies.study import Outcome, Study, Trained, check_known, together

TOPIC = "image_prior"
SIGMA = 25 / 255
TASKS = {"denoising": SIGMA, "inpainting": 0.5, "superresolution": 4}  # and how much is done to the image
VARIANTS = {  # task, networks whose averages are averaged, crops
    "denoising": ("denoising", 1, ("flower", "tuning", "china"), "deep image prior: noise of 25/255"),
    "two_runs": ("denoising", 2, ("flower", "tuning", "china"), "deep image prior: the same, mean of two networks"),
    "inpainting": ("inpainting", 1, ("flower", "china"), "deep image prior: half of the pixels"),
    "superresolution": ("superresolution", 1, ("flower", "china"), "deep image prior: a sixteenth of the pixels"),
}
# Top left corners of the crops of scikit-learn's photographs; settings are chosen on the second, figures come from the
# first. At 128 pixels they do not overlap; larger crops are tuned on the other photograph.
CROPS = {"flower": ("flower.jpg", 150, 250), "tuning": ("flower.jpg", 280, 250), "china": ("china.jpg", 160, 330)}
# Side of the crop; of the network the channels of the input, widths, channels of the skips; steps until the figure is
# read off, and in all, to see what follows; steps where there is no noise to fit. Medium is read off where the average
# was best in the recorded run on the other crop; full as published.
SIZES = {
    "short": (32, 4, (8, 8), (4, 4), 20, 40, 40),
    "medium": (128, 32, (16, 32, 64, 64), (4, 4, 4, 4), 1100, 3000, 2000),
    "full": (256, 32, (128, 128, 128, 128, 128), (4, 4, 4, 4, 4), 1800, 6000, 6000),
}


@dataclass(frozen=True, kw_only=True)
class Recipe(Trained):
    """How an image is degraded, and what restores it; an epoch is a step.

    Attributes:
        task: one of ``TASKS``.
        strength: standard deviation of the noise, share of the pixels that are hidden, or side of a block.
        networks: that restore the image one by one; of several, the mean of their averages is taken.
        side: of the crop in pixels.
        inputs: channels of the input.
        input_scale: its largest value.
        input_noise: standard deviation of noise that is added to it at each step.
        widths: channels of the network at each scale.
        skips: channels that pass by each scale.
        average: weight of the past in the exponential average of the outputs.
        read_off: step at which the images are read off.
        every: steps between two points of a curve.
        scikit_image: version of scikit-image, where the method beside the network's is one of that.
    """

    batch_size: int = 1
    lr: float = 0.01
    schedule: str = "constant"
    task: str
    strength: float
    networks: int = 1
    side: int
    inputs: int
    input_scale: float = 0.1
    input_noise: float = 1 / 30
    widths: tuple[int, ...]
    skips: tuple[int, ...]
    average: float = 0.99
    read_off: int
    every: int = 50
    scikit_image: str | None = None

    def settings(self) -> dict[str, Any]:
        """The fields, as a record keeps them."""
        names = {"read_off": "read off at step", "scikit_image": "scikit-image"}
        return {names.get(key, key): value for key, value in super().settings().items()}


def recipe(name: str, data_name: str, size: str) -> Recipe:
    """The recipe of a recorded run.

    Raises:
        ValueError: for an unknown name or size.
        ModuleNotFoundError: if scikit-image is needed and not installed.
    """
    check_known(name=(name, VARIANTS), size=(size, SIZES))
    task, networks, _, _ = VARIANTS[name]
    side, inputs, widths, skips, read_off, steps, clean_steps = SIZES[size]
    if task != "denoising":
        read_off = steps = clean_steps
    return Recipe(
        epochs=read_off if networks > 1 else steps,
        task=task,
        strength=TASKS[task],
        networks=networks,
        side=side,
        inputs=inputs,
        widths=widths,
        skips=skips,
        read_off=read_off,
        scikit_image=scikit_image(task),
    )


def photograph(name: str, side: int) -> Tensor:
    """A square crop (1, 3, side, side) of a photograph, in [0, 1].

    Args:
        name: one of "flower", "tuning", "china".
        side: of the crop in pixels.

    Raises:
        ValueError: if the photograph ends before the crop does.
    """
    from sklearn.datasets import load_sample_image

    file, top, left = CROPS[name]
    pixels = torch.tensor(load_sample_image(file)[top : top + side, left : left + side])
    if pixels.shape[:2] != (side, side):
        raise ValueError(f"side must be at most {min(pixels.shape[:2])} for the crop {name!r}, got {side}")
    return pixels.permute(2, 0, 1)[None].float() / 255


def observe(
    task: str, clean: Tensor, *, strength: float | None = None, generator: Generator
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """What is seen of an image (1, c, height, width), and the map A of which it is the value, but for noise.

    Args:
        task: "denoising" (noise is added), "inpainting" (some pixels are hidden, which are 0) or "superresolution"
            (averages over square blocks).
        clean: the image.
        strength: standard deviation of the noise, share of the pixels that are hidden, or side of a block; by default
            that of ``TASKS``.
        generator: source of the noise, or of the choice of pixels.
    """
    strength = TASKS[task] if strength is None else strength
    if task == "denoising":
        return clean + strength * torch.randn(clean.shape, generator=generator), nn.Identity()
    if task == "inpainting":
        mask = (torch.rand(1, 1, *clean.shape[2:], generator=generator) < 1 - strength).float()
        return mask * clean, lambda image: mask.to(image) * image
    return F.avg_pool2d(clean, strength), lambda image: F.avg_pool2d(image, strength)


def build(
    recipe: Recipe, shape: Sequence[int], seed: int, degrade: Callable[[Tensor], Tensor] | None = None
) -> ImagePrior:
    """An image prior for an image of this shape (1, c, height, width); weights and input depend on ``seed`` alone."""
    with fresh(seed):
        z = recipe.input_scale * torch.rand(1, recipe.inputs, *shape[2:])
        net = Hourglass(recipe.inputs, shape[1], widths=recipe.widths, skips=recipe.skips)
    return ImagePrior(net, z, degrade=degrade, input_noise=recipe.input_noise, average=recipe.average)


def nonlocal_means(noisy: Tensor, h: float, patch: int, distance: int, *, sigma: float = SIGMA) -> Tensor:
    """Non-local means of scikit-image for noise of ``sigma``, its strength ``h`` in units of it, in [0, 1]."""
    from skimage.restoration import denoise_nl_means

    restored = denoise_nl_means(
        noisy[0].permute(1, 2, 0).double().numpy(),
        *(patch, distance, h * sigma),
        fast_mode=False,
        sigma=sigma,
        channel_axis=-1,
    )
    return torch.from_numpy(np.clip(restored, 0, 1)).permute(2, 0, 1)[None].float()


def tuning_crop(name: str, side: int) -> str:
    """The crop on which a method's settings are chosen that is measured on the crop ``name``: never that one.

    But for "tuning" itself, at up to 128 pixels, whose record is there to choose settings.
    """
    if side <= 128:
        return "tuning"
    return "flower" if name == "china" else "china"


@functools.cache
def tuned(crop: str, side: int, sigma: float) -> tuple[float, int, int]:
    """Strength, patch and distance of non-local means that are best on a crop with noise of ``sigma``."""
    clean = photograph(crop, side)
    noisy, _ = observe("denoising", clean, strength=sigma, generator=stream(0, "data", 1))  # for runs of all seeds
    grid = itertools.product((0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0), (3, 5, 7), (6, 11))
    return max(grid, key=lambda setting: psnr(nonlocal_means(noisy, *setting, sigma=sigma), clean))


def scikit_image(task: str) -> str | None:
    """The version of scikit-image where the method beside the network's is one of that, else None.

    Raises:
        ModuleNotFoundError: if scikit-image is needed and not installed.
    """
    if task == "superresolution":
        return None
    try:
        return importlib.metadata.version("scikit-image")
    except importlib.metadata.PackageNotFoundError as error:
        raise ModuleNotFoundError(
            f"the record of {task} has a method of scikit-image beside the network's image, and scikit-image is not "
            f"installed: pip install scikit-image"
        ) from error


def beside(task: str, observation: Tensor, clean: Tensor, *, name: str, strength: float) -> dict[str, Tensor]:
    """What a known method makes of the same observation, by its name; and the observation, where that is an image.

    Args:
        task: see :func:`observe`.
        observation: what is seen of the image.
        clean: the image, of which the shape is used.
        name: the crop that it is.
        strength: see :func:`observe`.
    """
    if task == "denoising":
        side = clean.shape[-1]
        setting = tuned(tuning_crop(name, side), side, strength)
        return {"noisy": observation, "non-local means": nonlocal_means(observation, *setting, sigma=strength)}
    if task == "inpainting":
        from skimage.restoration import inpaint_biharmonic

        hidden = (observation == 0).all(1)[0].numpy()  # a seen pixel of pure black is hardly to be had, and is no loss
        filled = inpaint_biharmonic(observation[0].permute(1, 2, 0).numpy(), hidden, channel_axis=-1)
        return {"biharmonic": torch.from_numpy(filled).permute(2, 0, 1)[None].float().clamp(0, 1)}
    larger = functools.partial(F.interpolate, observation, size=clean.shape[2:])
    return {"bicubic": larger(mode="bicubic").clamp(0, 1), "blocks": larger(mode="nearest")}


def run(recipe: Recipe, data_name: str, seed: int, device: torch.device) -> Outcome:
    """Degrade a crop, restore it with one network or more, and measure what they and a known method make of it."""
    clean = photograph(data_name, recipe.side)
    observation, degrade = observe(recipe.task, clean, strength=recipe.strength, generator=stream(seed, "data"))
    curves: dict[str, list[float]] = {"PSNR of the output, dB": [], "PSNR of the average, dB": []}
    restored: list[dict[str, Tensor]] = []
    trainings = []
    for k in range(recipe.networks):
        # Each network has a seed of its own. Its input must not be drawn from a state that the observation's noise is
        # drawn from: torch's rand and randn are functions of the same draws, and it would show the network the noise.
        network_seed = seed_of(seed, "weights", k)
        model = build(recipe, clean.shape, network_seed, degrade)

        def look(model: nn.Module, step: int, k: int = k) -> None:
            if step == recipe.read_off:
                images = {"output": model.output.cpu(), "average": model.averaged.cpu()}
                if recipe.task == "inpainting":  # what was seen is known
                    images = {key: torch.where(observation == 0, image, observation) for key, image in images.items()}
                restored.append(images)
            if k == 0 and step % recipe.every == 0:
                for curve, image in zip(curves.values(), (model.output, model.averaged), strict=True):
                    curve.append(psnr(image.cpu(), clean))

        trainings.append(recipe.fit(model, observation, seed=network_seed, device=device, callback=look))
    images = restored[0]
    if recipe.networks > 1:
        images = {f"average of run {k + 1}": each["average"] for k, each in enumerate(restored)}
        images["mean of the averages"] = torch.stack(list(images.values())).mean(0)
    images |= beside(recipe.task, observation, clean, name=data_name, strength=recipe.strength)
    measured = {f"PSNR of {key}, dB": psnr(image, clean) for key, image in images.items()}
    if "average" in images and "noisy" in images and curves["PSNR of the output, dB"]:
        average = curves["PSNR of the average, dB"]
        measured |= {
            "gain of the average, dB": measured["PSNR of average, dB"] - measured["PSNR of noisy, dB"],
            "highest PSNR in hindsight, dB": max(average),
            "its step": float(recipe.every * (1 + average.index(max(average)))),
            "PSNR of output at the end, dB": curves["PSNR of the output, dB"][-1],
        }
    panels = {key: image.clamp(0, 1) for key, image in {"image": clean, **images}.items()}
    figure = plots.image_panels(panels, columns=1, per_row=len(panels))
    return Outcome(measured, together(trainings), curves=curves, figure=figure)


STUDIES = {
    f"image_prior_{name}": Study(about, TOPIC, crops, functools.partial(recipe, name), run)
    for name, (_, _, crops, about) in VARIANTS.items()
}
