# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Experiment: image priors
#
# A network with random weights restores a photograph that it has never seen, if one stops in time; and a classifier
# is certain of noise, unless it is told what images are.
# The derivations are in the chapter *Image priors*.

# %% tags=["hide-input"]
# In Colab, fetch gae_core; anywhere else this cell does nothing. torch and numpy stay as they are.
import importlib.util
import subprocess
import sys
from pathlib import Path

REPOSITORY = ""  # `make notebooks` writes repository.url of _config.yml here
if "google.colab" in sys.modules and importlib.util.find_spec("gae_core") is None:
    if Path("gae_core.zip").exists():
        sys.path.insert(0, "gae_core.zip")
    elif REPOSITORY:
        subprocess.run(
            [
                sys.executable,
                "-m",
                "pip",
                "install",
                "-q",
                "--no-deps",
                f"git+{REPOSITORY}",
            ],
            check=True,
        )
    else:
        raise RuntimeError(
            "This copy names no repository: upload gae_core.zip, the folder gae_core zipped, beside it."
        )

# %%
import time

import matplotlib.pyplot as plt
import torch

from gae_core import data, nets, plots, train
from gae_core.chains import mala
from gae_core.metrics import importance_weighted_nll
from gae_core.models.image_prior import Hourglass, ImagePrior, psnr
from gae_core.models.vae import VAE
from gae_core.studies import judge
from gae_core.studies.image_prior import SIGMA, SIZES, Recipe, observe, photograph

device = "cuda" if torch.cuda.is_available() else "cpu"
SIZE = data.size_from_environment("full" if device == "cuda" else "short")
SIDE, READ, STEPS = (64, 250, 500) if SIZE == "short" else (256, 1800, 4000)
inputs, widths, skips = (
    (16, (16, 32), (4, 4)) if SIZE == "short" else SIZES["full"][1:4]
)
OPTIONS = {"input_noise": 0.01, "average": 0.98} if SIZE == "short" else {}
LR = 3 * Recipe.lr if SIZE == "short" else Recipe.lr
FIT = {"batch_size": 1, "lr": LR, "progress": False}
images = data.example_images()
print(f"size: {SIZE}, device: {device}")


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def prior(seed, degrade=None):
    """An untrained network with a random input; both depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        net = Hourglass(inputs, 3, widths=widths, skips=skips)
        return ImagePrior(
            net, 0.1 * torch.rand(1, inputs, SIDE, SIDE), degrade=degrade, **OPTIONS
        )


# %% [markdown]
# ## Step 1: stop in time
#
# A crop of a photograph with noise of 25/255. The network is fitted to the noisy image alone. The number of steps at
# which its output will be read off, `READ`, is fixed now. Predict: how do the distances of the output to the noisy image
# and to the clean one go on?

# %%
clean = photograph("flower", SIDE)
noisy, _ = observe("denoising", clean, generator=seeded(13))
model, curve, kept, last = prior(0), [], {}, []


def look(model, step):
    output, averaged = model.output.cpu(), model.averaged.cpu()
    curve.append([psnr(output, noisy), psnr(output, clean), psnr(averaged, clean)])
    if step in (READ // 10, READ, STEPS):
        kept[f"step {step}"] = output
    if step == READ:
        kept[f"average, {step}"] = averaged
    if step > STEPS - 40:
        last.append(output)


start = time.perf_counter()
train.fit(model, noisy, epochs=STEPS, callback=look, **FIT)
print(f"{STEPS} steps: {time.perf_counter() - start:.0f} s")
to_noisy, to_clean, averaged = torch.tensor(curve).T
of_noisy = psnr(noisy, clean)
print(
    f"noisy image {of_noisy:.2f} dB; at step {READ} the output "
    f"{to_clean[READ - 1]:.2f}, the average {averaged[READ - 1]:.2f}"
)
print(
    f"at step {STEPS} the output {to_clean[-1]:.2f}, the average {averaged[-1]:.2f}"
)

# %% tags=["nbval-check-output"]
there = slice(READ - 10, READ + 10)
print(
    "at the step fixed beforehand the average gains 4 dB:",
    bool(averaged[READ - 1] > of_noisy + 4),
)
print(
    "the output goes on towards the noisy image:",
    bool(to_noisy[-20:].mean() > to_noisy[there].mean() + 0.3),
)
print(
    "and away from the clean one:",
    bool(to_clean[-20:].mean() < to_clean[there].mean() - 0.3),
)

# %% mystnb={"figure": {"name": "fig-image_prior-curve", "caption": "Similarity of the output to the noisy and to the clean image in the course of the steps."}, "image": {"alt": "Three curves over steps in decibels. The similarity to the noisy image rises all the time; that to the clean image rises faster, reaches a top and falls; the average's does the same, higher and smoother."}}
figure, ax = plt.subplots(figsize=(7, 3.8), layout="constrained")
steps = range(1, len(curve) + 1)
ax.plot(steps, to_noisy, color="C7", lw=0.8, label="output to the noisy image")
ax.plot(steps, to_clean, color="C0", lw=0.8, label="output to the clean image")
ax.plot(steps, averaged, color="C1", label="average to the clean image")
ax.axhline(
    of_noisy, color="black", ls="--", lw=0.8, label="noisy image to the clean one"
)
ax.axvline(READ, color="black", ls=":", lw=0.8)
ax.set(xlabel="step", ylabel="PSNR in dB", ylim=(12, None))
legend = ax.legend(fontsize=9)

# %% mystnb={"figure": {"name": "fig-image_prior-steps", "caption": "The clean and the noisy image, and the output after some steps."}, "image": {"alt": "Six pictures of a part of a flower: clean; with coloured noise; after few steps, blurred; at the step fixed beforehand, with little noise; the average there, with less; at the end, with much of the noise."}}
panels = {"clean": clean, "noisy": noisy.clamp(0, 1), **kept}
figure = plots.image_panels(panels, columns=1, per_row=3)

# %% [markdown]
# Why is an average better than what it averages? The outputs of the last forty steps differ from each other. What they
# differ by is what their mean gains, to the last digit.

# %%
last = torch.cat(last).double()
mean_of = last.mean(0)
of_each, of_mean = (
    (last - clean).square().mean(),
    (mean_of - clean[0]).square().mean(),
)
print(
    f"mean square error of an output {of_each:.5f}, of the mean of {len(last)} "
    f"{of_mean:.5f}"
)
assert (
    abs(of_each - (last - mean_of).square().mean() - of_mean) < 1e-12
)  # an identity, up to rounding

# %% [markdown]
# ## Step 2: why it learns the image first
#
# For small steps the output moves by $K = JJ^\top$. Here it is, for an untrained network and one grey picture of 32 by
# 32 pixels: a matrix of 1024 by 1024. Predict: how many eigenvectors hold half of a photograph? And of noise?

# %%
small, features = 32, 8
with torch.random.fork_rng(devices=[]):
    torch.default_generator.manual_seed(2)
    net = Hourglass(features, 1, widths=(8, 16, 32), skips=(0, 0, 0)).double()
z = 0.1 * torch.rand(
    1, features, small, small, generator=seeded(3), dtype=torch.float64
)
pixels = net(z).flatten()
each = torch.eye(small**2, dtype=torch.float64)
rows = torch.autograd.grad(
    pixels, list(net.parameters()), each, is_grads_batched=True
)
J = torch.cat([row.flatten(1) for row in rows], 1)
K = J @ J.T
eigenvalues, vectors = torch.linalg.eigh(K)
eigenvalues, vectors = eigenvalues.flip(0), vectors.flip(1)


def shares(image):
    """Share of an image's energy, without its mean, in the first eigenvectors."""
    flat = (image - image.mean()).flatten().double()
    return (vectors.T @ flat).square().cumsum(0) / flat.square().sum()


grey = torch.nn.functional.avg_pool2d(
    photograph("flower", 4 * small).mean(1, keepdim=True), 4
)
photo, noise = shares(grey), shares(torch.randn(small, small, generator=seeded(4)))
half = [int((share < 0.5).sum()) + 1 for share in (photo, noise)]
print(
    f"{J.shape[1]} weights; eigenvectors for half of the energy: photograph "
    f"{half[0]}, noise {half[1]} of {small**2}"
)

# %% tags=["nbval-check-output"]
print("noise needs more than three times as many:", half[1] > 3 * half[0])

# %% mystnb={"figure": {"name": "fig-image_prior-kernel", "caption": "Eigenvectors of K for an untrained network, and the share of a photograph and of noise in the first of them."}, "image": {"alt": "Left, eight small pictures of eigenvectors, from smooth patches to fine patterns. Right, the share of energy against the number of eigenvectors: steep at first for the photograph, nearly a diagonal for noise."}}
figure = plt.figure(figsize=(9, 3.6), layout="constrained")
left, right = figure.subfigures(1, 2, width_ratios=(1.2, 1))
for ax, index in zip(
    left.subplots(2, 4).flat, (1, 2, 4, 8, 30, 100, 300, 1000), strict=True
):
    ax.imshow(vectors[:, index - 1].reshape(small, small), cmap="gray")
    ax.set_title(f"{index}", fontsize=10)
    ax.axis("off")
ax = right.subplots()
ax.plot(photo, label="photograph")
ax.plot(noise, label="noise")
ax.set(xlabel="first eigenvectors", ylabel="share of the energy")
legend = ax.legend()

# %% [markdown]
# Now the linear case with this $K$: the theorem's expected error, and descents as they are, for some draws of noise.
# Predict: is the least error at the beginning, at the end, or between?

# %%
target, f0, eta = grey.flatten().double(), pixels.detach(), 0.9 / eigenvalues[0]
b = vectors.T @ (target - f0)


def error(t):
    """Bias and variance after t steps."""
    left_over = (1 - eta * eigenvalues) ** t
    return (left_over * b).square().sum(), (SIGMA * (1 - left_over)).square().sum()


counts = [2**k for k in range(27)]
bias, variance = torch.tensor([error(t) for t in counts]).T
draws, T = 100, 40
f = f0.expand(draws, -1)
x = target + SIGMA * torch.randn(
    draws, small**2, generator=seeded(5), dtype=torch.float64
)
for _ in range(T):
    f = f - eta * (f - x) @ K
errors, exact = (f - target).square().sum(1), sum(error(T))
z_score = (errors.mean() - exact) / (errors.std() / draws**0.5)
print(
    f"error after {T} steps: {errors.mean():.3f}, exact {exact:.3f}, z = "
    f"{z_score:.2f}"
)
assert abs(z_score) < 4  # four standard errors
least = int((bias + variance).argmin())
print(
    f"least expected error {(bias + variance)[least]:.2f}, that of the noisy image "
    f"{small**2 * SIGMA**2:.2f}"
)
assert (
    0 < least < len(counts) - 1 and (bias + variance)[least] < small**2 * SIGMA**2
)

# %% mystnb={"figure": {"name": "fig-image_prior-error", "caption": "Expected squared error of linear descent, split into bias and variance."}, "image": {"alt": "Curves over steps on logarithmic axes. The bias falls, the variance rises, and their sum has a minimum between, below the line of the noisy image."}}
figure, ax = plt.subplots(figsize=(6.5, 3.6), layout="constrained")
ax.loglog(counts, bias, "--", label="bias")
ax.loglog(counts, variance, "--", label="variance")
ax.loglog(counts, bias + variance, label="squared error")
ax.axhline(small**2 * SIGMA**2, color="black", lw=0.8, label="of the noisy image")
ax.set(xlabel="step", ylabel="squared error", ylim=(0.1, None))
legend = ax.legend()

# %% [markdown]
# ## Step 3: half of the pixels
#
# Such a network, fitted to half of the pixels of the clean image. Beside it each missing pixel is given the mean of its
# seen neighbours. Predict: which is better?

# %%
seen, degrade = observe("inpainting", clean, generator=seeded(6))
hole = (seen == 0).all(1, keepdim=True)
filler = prior(1, degrade)
train.fit(filler, seen, epochs=READ, **FIT)
both = torch.cat([seen, (~hole).float()], 1)
near, far = (
    torch.nn.functional.avg_pool2d(both, width, stride=1, padding=width // 2)
    for width in (3, 7)
)
blur = near + 0.001 * far  # pixels further away decide where no neighbour is seen
neighbours = torch.where(hole, blur[:, :3] / blur[:, 3:], seen)
filled = torch.where(hole, filler.averaged.cpu(), seen)
result = {
    name: psnr(image, clean)
    for name, image in (
        ("seen", seen),
        ("neighbours", neighbours),
        ("prior", filled),
    )
}
print({name: round(value, 2) for name, value in result.items()})

# %% tags=["nbval-check-output"]
print("missing pixels are filled:", result["prior"] > result["seen"] + 10)

# %% mystnb={"figure": {"name": "fig-image_prior-holes", "caption": "Half of the pixels, the mean of their neighbours, and the deep image prior."}, "image": {"alt": "Four pictures of a part of a flower: with half of the pixels black; filled with means of neighbours, rough at edges; filled by the network; the whole image."}}
panels = {
    "seen": seen,
    "neighbours": neighbours,
    "image prior": filled.clamp(0, 1),
    "clean": clean,
}
figure = plots.image_panels(panels, columns=1, per_row=4)

# %% [markdown]
# ## Step 4: what a classifier takes for a digit
#
# The classifier that the book measures samples with, and a model of images: a small VAE, which has seen no labels. Where
# the belief is to be maximised with $\log q(x)$, images are those of its decoder and $\log q(z)$ of their codes counts.

# %%
classifier = judge.classifier(images).requires_grad_(False)
DIM, SPREAD = 10, 0.35
x_train, x_test = (
    data.to_unit(images.x_train[:10_000]),
    data.to_unit(images.x_test[:200]),
)
with torch.random.fork_rng(devices=[]):
    torch.default_generator.manual_seed(0)
    pair = nets.mlp_pair(
        images.shape, DIM, hidden=(256, 128), heads=2, output=torch.nn.Sigmoid
    )
    vae = VAE(*pair, DIM, likelihood="gaussian", sigma=SPREAD)
options = {
    "epochs": max(9, 80_000 // len(x_train)),
    "batch_size": 128,
    "lr": 2e-3,
    "schedule": lambda t: 1 - t,
}
train.fit(vae, x_train, device="cpu", progress=False, **options)
vae.eval().requires_grad_(False)
labels = torch.arange(10)


def belief(x, y):
    """log q(label y | image x), row by row."""
    return classifier(x).log_softmax(1)[torch.arange(len(x)), y]


def code_value(z, y):
    """log q(label y | decoded z) + log q(z), but for a constant."""
    return belief(vae.decode(z), y) - 0.5 * z.square().sum(1)


def ascend(objective, start, *, steps):
    point = start.clone().requires_grad_()
    adam = torch.optim.Adam([point], lr=0.02)
    for _ in range(steps):
        adam.zero_grad()
        (-objective(point, labels).sum()).backward()
        adam.step()
    return point.detach()


# %% [markdown]
# Three ways to ask for each digit. From grey noise, ascent on the belief alone. From the best of many codes, ascent on
# both terms. And Langevin steps with acceptance from there, five chains for each digit. Predict: of which is the
# classifier most certain? Which are digits? Which differ from each other?
#
# Langevin steps can be checked here: to draw a code from N(0, I) and keep it with the probability that the classifier
# gives to its label samples the same distribution, exactly.

# %%
grey_noise = (
    0.5 + 0.1 * torch.randn(10, *images.shape, generator=seeded(8))
).clamp(0, 1)
alone = ascend(belief, grey_noise, steps=100)
z = torch.randn(4000, DIM, generator=seeded(9))
of_labels = classifier(vae.decode(z)).log_softmax(1).T
best = ascend(
    code_value, z[(of_labels - 0.5 * z.square().sum(1)).argmax(1)], steps=200
)

asked = labels.repeat_interleave(5)
options = {
    "step_size": 0.3,
    "n_steps": 150,
    "warmup": 150,
    "thin": 15,
    "generator": seeded(10),
}
chains = mala(
    lambda z: -code_value(z, asked), best.repeat_interleave(5, 0), **options
)
drawn = chains.samples[-1]
kept = torch.rand(of_labels.shape, generator=seeded(11)).log() < of_labels
norms = torch.stack(
    [z[row].square().sum(1).mean() for row in kept]
)  # of exact draws, label by label
of_chains = chains.samples.square().sum(2).reshape(-1, 10, 5).mean((0, 2))
print(
    f"acceptance {chains.acceptance.mean():.2f}; squared norm of a code, mean over "
    "the labels:"
)
print(
    f"maximum {best.square().sum(1).mean():.1f}, chains {of_chains.mean():.1f}, "
    f"exact draws {norms.mean():.1f}"
)
assert (
    (of_chains - norms).mean().abs() < 1.5
)  # three times the spread seen over seeds; the maximum is off by 8 or more

# %%
rows = {
    "belief alone": (alone.clamp(0, 1), labels),
    "with log q": (vae.decode(best), labels),
    "Langevin": (vae.decode(drawn), asked),
    "test images": (x_test, images.y_test[:200]),
}
table = {}
print(
    "              mean belief   log q(x), nats   distance to the nearest training "
    "image"
)
for name, (x, y) in rows.items():
    density = -float(
        importance_weighted_nll(vae, x, generator=seeded(12)).nll.mean()
    )
    distance = float(
        torch.cdist(x.flatten(1), x_train.flatten(1)).min(1).values.mean()
    )
    table[name] = (float(belief(x, y).exp().mean()), density, distance)
    print(f"{name:<14}{table[name][0]:10.3f}{density:16.0f}{distance:20.2f}")

# %% tags=["nbval-check-output"]
noise, digits, chain, real = table.values()
print(
    "with the belief alone the classifier is more certain than of anything else:",
    noise[0] > max(digits[0], real[0]),
)
print("but the image is less likely than test images:", noise[1] < real[1] - 10)
print("and further from every training image:", noise[2] > 2 * real[2])
print("with log q it is more likely than test images:", digits[1] > real[1])
print("and as near to training images as they are:", digits[2] < 1.3 * real[2])
print(
    "the code of a maximum is short, that of a sample is not:",
    bool(best.square().sum(1).mean() < 0.3 * of_chains.mean()),
)

# %% mystnb={"figure": {"name": "fig-image_prior-activation", "caption": "One image for each digit: the belief alone, with log q, and drawn."}, "image": {"alt": "Four rows of ten images, one for each digit: grey noise; blurred but readable digits; and twice digits with different strokes, some of them hard to read."}}
shown = torch.cat(
    [
        alone.clamp(0, 1),
        vae.decode(best),
        vae.decode(drawn[::5]),
        vae.decode(drawn[1::5]),
    ]
)
figure = plots.image_panels(
    {"belief alone; with log q; Langevin, twice": shown}, columns=10, size=7.5
)

# %% [markdown]
# ## What you have seen
#
# - Fitting goes on towards the noise; the best image is on the way. When to stop has to be known beforehand. An average
#   of outputs is better than its parts, by what they differ.
# - The first eigenvectors of $K$ hold much of a photograph and little of noise. In the linear case the error is known.
# - A classifier is certain of noise. With $\log q$ there are digits, and samples of them need noise and acceptance.
#
# Try: `"input_noise": 0` in the first step; `SPREAD = 0.2` in the last.
