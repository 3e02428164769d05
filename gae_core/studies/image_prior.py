"""The deep image prior on a photograph: denoising, missing pixels, fewer pixels. Records ``image_prior_...``.

The methods beside it are those of scikit-image, which only these studies need: ``pip install scikit-image``.
"""

import functools
import importlib.metadata
import itertools
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gae_core import plots, train
from gae_core.models.image_prior import Hourglass, ImagePrior, psnr
from gae_core.records import Outcome, Study

SIGMA = 25 / 255
LR = 0.01
# Top left corners of the crops of scikit-learn's photographs; settings are chosen on the second, figures come from the
# first. At 128 pixels they do not overlap; larger crops are tuned on the other photograph.
CROPS = {"flower": ("flower.jpg", 150, 250), "tuning": ("flower.jpg", 280, 250), "china": ("china.jpg", 160, 330)}
NETS = {  # channels of the input, widths, channels of the skips
    "short": (4, (8, 8), (4, 4)),
    "medium": (32, (16, 32, 64, 64), (4, 4, 4, 4)),
    "full": (32, (128, 128, 128, 128, 128), (4, 4, 4, 4, 4)),
}
SIDE = {"short": 32, "medium": 128, "full": 256}
# Steps until the figure is read off, and in all, to see what follows. Medium: where the average was best in the
# recorded run on the other crop; full: as published.
STEPS = {"short": (20, 40), "medium": (1100, 3000), "full": (1800, 6000)}
CLEAN_STEPS = {"short": 40, "medium": 2000, "full": 6000}  # where there is no noise to fit
EVERY = 50  # steps between two points of a curve


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


def observe(task: str, clean: Tensor, *, seed: int) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """What is seen of an image (1, c, height, width), and the map A of which it is the value, but for noise.

    Args:
        task: "denoising" (noise of 25/255), "inpainting" (half of the pixels, the others 0) or "superresolution"
            (averages over blocks of four by four).
        clean: the image.
        seed: of the noise, or of the choice of pixels.
    """
    generator = torch.Generator().manual_seed(seed)
    if task == "denoising":
        return clean + SIGMA * torch.randn(clean.shape, generator=generator), nn.Identity()
    if task == "inpainting":
        mask = (torch.rand(1, 1, *clean.shape[2:], generator=generator) < 0.5).float()
        return mask * clean, lambda image: mask.to(image) * image
    return F.avg_pool2d(clean, 4), lambda image: F.avg_pool2d(image, 4)


def build(shape: torch.Size, degrade: Callable[[Tensor], Tensor], *, size: str, seed: int) -> ImagePrior:
    """An image prior for an image of this shape (1, c, height, width); weights and input depend on ``seed`` alone."""
    inputs, widths, skips = NETS[size]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        z = 0.1 * torch.rand(1, inputs, *shape[2:])
        return ImagePrior(Hourglass(inputs, shape[1], widths=widths, skips=skips), z, degrade=degrade)


def nonlocal_means(noisy: Tensor, h: float, patch: int, distance: int) -> Tensor:
    """Non-local means of scikit-image for noise of 25/255, its strength ``h`` in units of it, in [0, 1]."""
    from skimage.restoration import denoise_nl_means

    found = denoise_nl_means(
        noisy[0].permute(1, 2, 0).double().numpy(),
        *(patch, distance, h * SIGMA),
        fast_mode=False,
        sigma=SIGMA,
        channel_axis=-1,
    )
    return torch.from_numpy(np.clip(found, 0, 1)).permute(2, 0, 1)[None].float()


def tuning_crop(name: str, side: int) -> str:
    """The crop on which a method's settings are chosen that is measured on the crop ``name``: never that one.

    But for "tuning" itself, at up to 128 pixels, whose record is there to choose settings.
    """
    if side <= 128:
        return "tuning"
    return "flower" if name == "china" else "china"


@functools.cache
def tuned(crop: str, side: int) -> tuple[float, int, int]:
    """Strength, patch and distance of non-local means that are best on a crop."""
    clean = photograph(crop, side)
    noisy, _ = observe("denoising", clean, seed=0)
    grid = itertools.product((0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0), (3, 5, 7), (6, 11))
    return max(grid, key=lambda setting: psnr(nonlocal_means(noisy, *setting), clean))


def scikit_image(task: str) -> str:
    """The version of scikit-image where the method beside it is one of that, else "".

    Raises:
        ModuleNotFoundError: if scikit-image is needed and not installed.
    """
    if task == "superresolution":
        return ""
    try:
        return importlib.metadata.version("scikit-image")
    except importlib.metadata.PackageNotFoundError as error:
        raise ModuleNotFoundError(
            f"the record of {task} has a method of scikit-image beside the network's image, and scikit-image is not "
            f"installed: pip install scikit-image"
        ) from error


def beside(task: str, seen: Tensor, clean: Tensor, *, name: str) -> dict[str, Tensor]:
    """What a known method makes of the same observation, by its name; and what is seen, where that is an image.

    Args:
        task: see :func:`observe`.
        seen: the observation.
        clean: the image, of which the shape is used.
        name: the crop that it is.
    """
    if task == "denoising":
        side = clean.shape[-1]
        return {"noisy": seen, "non-local means": nonlocal_means(seen, *tuned(tuning_crop(name, side), side))}
    if task == "inpainting":
        from skimage.restoration import inpaint_biharmonic

        hidden = (seen == 0).all(1)[0].numpy()  # a seen pixel of pure black is hardly to be had, and is no loss
        found = inpaint_biharmonic(seen[0].permute(1, 2, 0).numpy(), hidden, channel_axis=-1)
        return {"biharmonic": torch.from_numpy(found).permute(2, 0, 1)[None].float().clamp(0, 1)}
    larger = functools.partial(F.interpolate, seen, size=clean.shape[2:])
    return {"bicubic": larger(mode="bicubic").clamp(0, 1), "blocks": larger(mode="nearest")}


def _run(task: str, nets: int, name: str, size: str, seed: int, device: torch.device) -> Outcome:
    clean = photograph(name, SIDE[size])
    seen, degrade = observe(task, clean, seed=seed)
    stop, steps = _steps(task, nets, size)
    curves: dict[str, list[float]] = {"PSNR of the output, dB": [], "PSNR of the average, dB": []}
    at_stop: list[dict[str, Tensor]] = []
    seconds = 0.0
    for k in range(nets):
        # Never the seed of what is observed: from one seed torch's rand and randn are functions of the same draws, and
        # the input would show the network the noise.
        network = seed + 1000 * (k + 1)
        model = build(clean.shape, degrade, size=size, seed=network)

        def look(model: nn.Module, step: int, k: int = k) -> None:
            if step == stop:
                images = {"output": model.output.cpu(), "average": model.averaged.cpu()}
                if task == "inpainting":  # what was seen is known
                    images = {key: torch.where(seen == 0, image, seen) for key, image in images.items()}
                at_stop.append(images)
            if k == 0 and step % EVERY == 0:
                for curve, image in zip(curves.values(), (model.output, model.averaged), strict=True):
                    curve.append(psnr(image.cpu(), clean))

        options = {"epochs": steps, "batch_size": 1, "lr": LR, "seed": network + 500, "device": device}
        start = time.perf_counter()
        train.fit(model, seen, callback=look, progress=False, **options)
        seconds += time.perf_counter() - start
    images = at_stop[0]
    if nets > 1:
        images = {f"average of run {k + 1}": found["average"] for k, found in enumerate(at_stop)}
        images["mean of the averages"] = torch.stack(list(images.values())).mean(0)
    images |= beside(task, seen, clean, name=name)
    found = {f"PSNR of {key}, dB": psnr(image, clean) for key, image in images.items()}
    if "average" in images and "noisy" in images and curves["PSNR of the output, dB"]:
        average = curves["PSNR of the average, dB"]
        found |= {
            "gain of the average, dB": found["PSNR of average, dB"] - found["PSNR of noisy, dB"],
            "highest PSNR in hindsight, dB": max(average),
            "its step": float(EVERY * (1 + average.index(max(average)))),
            "PSNR of output at the end, dB": curves["PSNR of the output, dB"][-1],
        }
    panels = {key: image.clamp(0, 1) for key, image in {"image": clean, **images}.items()}
    return Outcome(
        metrics=found,
        parameters=sum(p.numel() for p in model.parameters()),
        training_seconds=seconds,
        samples=steps * nets,
        curves=curves,
        figure=plots.image_panels(panels, columns=1, per_row=len(panels)),
    )


def _steps(task: str, nets: int, size: str) -> tuple[int, int]:
    """Steps until the figure is read off, and in all."""
    if task != "denoising":
        return (CLEAN_STEPS[size],) * 2
    return STEPS[size] if nets == 1 else (STEPS[size][0],) * 2


def _settings(task: str, nets: int, name: str, size: str) -> dict:
    inputs, widths, skips = NETS[size]
    stop, steps = _steps(task, nets, size)
    return {
        "epochs": steps,
        "read off at step": stop,
        "lr": LR,
        "side": SIDE[size],
        "inputs": inputs,
        "widths": list(widths),
        "skips": list(skips),
    } | ({"scikit-image": version} if (version := scikit_image(task)) else {})


STUDIES = {
    f"image_prior_{name}": Study(
        about, data, functools.partial(_settings, task, nets), functools.partial(_run, task, nets)
    )
    for name, task, nets, data, about in (
        ("denoising", "denoising", 1, ("flower", "tuning", "china"), "deep image prior: noise of 25/255"),
        ("two_runs", "denoising", 2, ("flower", "tuning", "china"), "deep image prior: the same, mean of two networks"),
        ("inpainting", "inpainting", 1, ("flower", "china"), "deep image prior: half of the pixels"),
        ("superresolution", "superresolution", 1, ("flower", "china"), "deep image prior: a sixteenth of the pixels"),
    )
}
