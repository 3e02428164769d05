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
# # Experiment: posterior collapse and batch norm
#
# A decoder that sees the pixels before needs no code, and a plain VAE lets its code collapse.
# We watch that happen, put norms on the encoder's output against it, and measure what each norm really guarantees:
# the divergence, the information in the code, and what the decoder makes of it.
# The derivations are in the chapter *Posterior collapse and batch norm*.

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
import math
import time

import matplotlib.pyplot as plt
import torch
from torch import nn

from gae_core import data, plots
from gae_core.gaussian import kl_to_standard_normal
from gae_core.metrics import in_batches
from gae_core.normalization import (
    FixedScaleBatchNorm,
    FixedScaleLayerNorm,
)
from gae_core.studies import bn_vae

device = "cuda" if torch.cuda.is_available() else "cpu"
SIZE = data.size_from_environment("full" if device == "cuda" else "short")
SEED = 0
images = data.example_images()
print(f"size: {SIZE}, device: {device}")

# %% [markdown]
# ## Step 1: which directions collapse
#
# The smallest case: a linear encoder and a linear decoder with noise $s^2$, on data whose covariance has the eigenvalues
# below. Here the mean loss has a closed form, so that we can train without sampling anything.
# The theory says that a direction with variance $\lambda$ keeps $\frac12 \log(\lambda / s^2)$ nats, and collapses if
# $\lambda \le s^2$. Predict: how many of the five directions are alive at $s^2 = 0.7$?

# %%
eigenvalues = torch.tensor([4.0, 2.0, 1.0, 0.5, 0.25], dtype=torch.float64)
noise = torch.logspace(-1, 0.9, 12, dtype=torch.float64)  # s², one linear VAE each
torch.manual_seed(SEED)
encoder, decoder = (
    0.3 * torch.randn(len(noise), 5, 5, dtype=torch.float64) for _ in range(2)
)
log_variance = torch.zeros(len(noise), 5, dtype=torch.float64)
weights = [w.requires_grad_() for w in (encoder, decoder, log_variance)]
optimizer = torch.optim.Adam(weights, lr=0.1)


def linear_vae():
    """Mean reconstruction term and mean divergence of each."""
    residual = (
        torch.eye(5, dtype=torch.float64) - decoder @ encoder
    ) * eigenvalues.sqrt()
    variance = log_variance.exp()
    error = residual.square().sum((1, 2)) + (
        decoder.square().sum(1) * variance
    ).sum(1)
    second_moment = (encoder.square() * eigenvalues).sum(2)
    return error / (2 * noise), 0.5 * (
        second_moment + variance - log_variance - 1
    ).sum(1)


for step in range(1000):
    optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 1000)
    optimizer.zero_grad()
    sum(linear_vae()).sum().backward()
    optimizer.step()
trained = linear_vae()[1].detach()
theory = 0.5 * (eigenvalues / noise[:, None]).log().clamp_min(0).sum(1)
assert (
    (trained - theory).abs() < 0.02
).all()  # trained to the minimum but for Adam's last small steps

# %% mystnb={"figure": {"name": "fig-bn_vae-linear", "caption": "Divergence of a trained linear VAE against the noise of its decoder, and the theory."}, "image": {"alt": "Dots on a falling line with five kinks, on a logarithmic axis of the noise. Vertical dotted lines mark the eigenvalues, where the slope changes. Right of the largest the divergence is 0."}}
figure, ax = plt.subplots(figsize=(6.5, 3.4), layout="constrained")
fine = torch.logspace(-1, 0.9, 300, dtype=torch.float64)
ax.plot(
    fine,
    0.5 * (eigenvalues / fine[:, None]).log().clamp_min(0).sum(1),
    color="black",
    label="theory",
)
ax.plot(noise, trained, "o", label="trained")
for value in eigenvalues:
    ax.axvline(float(value), color="gray", linestyle=":", linewidth=1)
ax.set(xscale="log", xlabel="noise of the decoder $s^2$", ylabel="KL, nats")
legend = ax.legend()

# %% [markdown]
# Left of all dotted lines every direction is used. At each line one dies, and beyond the largest eigenvalue the whole
# posterior has collapsed. This is not a failure of training: it is the optimum.
#
# ## Step 2: collapse happening
#
# Now images, black and white and small. The decoder predicts each pixel from the code *and* from a few pixels before
# it. Six encoders, one decoder: no norm, layer norm, batch norm on the means with three scales $\gamma$, and batch norm
# on means and standard deviations.

# %%
x_train, x_test = bn_vae.binary_images(images)
shape = tuple(x_train.shape[1:])
STEPS = 120 if SIZE == "short" else 5000
x_train = x_train[:8960] if SIZE == "short" else x_train
x_test = x_test[:: max(1, len(x_test) // 1000)]


def fit(norm, steps=STEPS, start=None):
    """A model, trained; ``start`` may change its weights before."""
    epochs = math.ceil(steps / (len(x_train) // 128))
    recipe = bn_vae.Recipe(epochs=epochs, **norm)
    model = bn_vae.build(recipe, shape, SEED)
    if start is not None:
        start(model)
    return model, recipe.fit(model, x_train, seed=SEED, device=device).history


norms = {
    "no norm": {},
    "layer norm, 0.7": {"norm": "layer", "gamma": 0.7},
    "batch norm, 0.4": {"norm": "batch", "gamma": 0.4},
    "batch norm, 0.7": {"norm": "batch", "gamma": 0.7},
    "batch norm, 1.2": {"norm": "batch", "gamma": 1.2},
    "coupled, 0.5": {"norm": "coupled", "tau": 0.5},
}
models, histories = {}, {}
for name, norm in norms.items():
    begin = time.perf_counter()
    models[name], histories[name] = fit(norm)
    print(
        f"{name:<16} {len(histories[name]['kl'])} steps in "
        f"{time.perf_counter() - begin:.0f} s"
    )

# %% mystnb={"figure": {"name": "fig-bn_vae-floor", "caption": "Divergence of the training batches, and its floor (dashed)."}, "image": {"alt": "Four curves against training steps on a logarithmic axis. Without a norm the divergence rises and falls again to a fraction of a nat. With layer norm and with batch norm it stays on or above a dashed line at 3.92 nats. With the coupled norm it stays far above a higher dashed line."}}
figure, ax = plt.subplots(figsize=(7.5, 3.8), layout="constrained")
for i, name in enumerate(
    ("no norm", "layer norm, 0.7", "batch norm, 0.7", "coupled, 0.5")
):
    ax.plot(histories[name]["kl"], color=f"C{i}", label=name)
    if name != "no norm":
        lowest = bn_vae.Recipe.dim * (
            -0.5 * math.log(0.5) if name.startswith("coupled") else 0.7**2 / 2
        )
        ax.axhline(lowest, color=f"C{i}", linestyle="--", linewidth=1)
ax.set(xlabel="step", ylabel="KL of the batch, nats", yscale="log")
legend = ax.legend(ncols=2)

# %% tags=["nbval-check-output"]
for name in ("batch norm, 0.4", "batch norm, 0.7", "batch norm, 1.2"):
    gamma = models[name].norm.gamma
    lowest = float(histories[name]["kl"].min())
    # One in a hundred is for eps: the encoder would have to give variances of
    # 0.001 to lose as much.
    print(
        name,
        "never below its floor:",
        lowest > 0.99 * bn_vae.Recipe.dim * gamma**2 / 2,
    )
lowest = float(histories["coupled, 0.5"]["kl"].min())
print(
    "coupled, 0.5 never below its floor:",
    lowest > bn_vae.Recipe.dim * 0.5 * math.log(2),
)
print(
    "no norm: below a nat at some step:",
    float(histories["no norm"]["kl"].min()) < 1,
)

# %% [markdown]
# ## Step 3: what the code is worth
#
# A divergence above 0 is what was asked for. What we want is another thing: that the code says something
# (mutual information), that the decoder listens (gain: what it loses when it is given the codes of other images), and that
# the model is no worse for it (NLL). Predict: which row tells a used code from a useless one, and which does not?

# %%
# The likelihood of the first images, by a mixture of proposals; its next column is
# by how much it falls when the draws are doubled.
n_images, n_samples = (100, 64) if SIZE == "short" else (1000, 256)
measured = {
    name: bn_vae.measure(m, x_test, images=n_images, samples=n_samples, seed=SEED)
    for name, m in models.items()
}
columns = (
    "NLL",
    "NLL, fall on doubling",
    "KL",
    "floor of the KL",
    "mutual information",
    "gain from z",
    "active units",
)
print(f"{'':<22}" + "".join(f"{name:>16}" for name in measured))
for c in columns:
    print(f"{c:<22}" + "".join(f"{v[c]:>16.2f}" for v in measured.values()))
print(
    "the information cannot exceed "
    f"{measured['no norm']['cap of the information']:.2f}, the logarithm of the "
    "images"
)

# %% tags=["nbval-check-output"]
print(
    "all units active with batch norm:",
    all(
        measured[f"batch norm, {g}"]["active units"] == 16 for g in (0.4, 0.7, 1.2)
    ),
)
more = (
    measured["batch norm, 0.7"]["mutual information"]
    > measured["no norm"]["mutual information"]
)
print("batch norm, 0.7, carries more information than no norm:", more)
print(
    "and its decoder uses it:",
    measured["batch norm, 0.7"]["gain from z"] > measured["no norm"]["gain from z"],
)

# %% [markdown]
# Active units are full with batch norm, whatever the code is worth: the norm sets the variance that they count.
#
# ## Step 4: the scale
#
# A larger $\gamma$ forces more divergence. Below 1 it buys information. Above 1 the codes have more variance than
# the prior has, and the divergence of the *aggregate* from $N(0, I)$ grows: samples from the prior are no longer codes.
# How far it is, the estimate of the information cannot tell near its cap, which is drawn as a line. At least it is what
# the variances of the aggregate demand, $\frac12\sum_j(V_j - 1 - \log V_j)$, and that can be computed.

# %% mystnb={"figure": {"name": "fig-bn_vae-gamma", "caption": "Batch norm with three scales on held-out images: the divergence and its floor, the estimated information, and what the variances of the aggregate cost at least."}, "image": {"alt": "Curves against gamma at 0.4, 0.7 and 1.2. The divergence lies near its floor, a parabola, or above it. The estimated information grows more slowly and comes within two nats of its cap. What the variances of the aggregate cost at least is next to nothing up to 0.7 and about three nats at 1.2."}}
gammas = [0.4, 0.7, 1.2]
figure, ax = plt.subplots(figsize=(6.5, 3.6), layout="constrained")
for key, label in (("KL", "KL"), ("mutual information", "information")):
    ax.plot(
        gammas,
        [measured[f"batch norm, {g}"][key] for g in gammas],
        "o-",
        label=label,
    )
ax.axhline(
    measured["no norm"]["cap of the information"],
    color="C1",
    linestyle=":",
    label="cap of its estimate",
)


def least_mismatch(model):
    """What the variances of the aggregate demand of its divergence from N(0, I)."""
    mu, logvar = in_batches(model.posterior, x_test)
    variance = mu.var(0, correction=0) + logvar.exp().mean(0)
    return float(0.5 * (variance - 1 - variance.log()).sum())


least = [least_mismatch(models[f"batch norm, {g}"]) for g in gammas]
ax.plot(gammas, least, "o-", color="C2", label="KL of the aggregate, at least")
fine = torch.linspace(0.3, 1.3, 100)
ax.plot(
    fine,
    bn_vae.Recipe.dim * fine**2 / 2,
    "--",
    color="gray",
    label=r"floor $d\gamma^2/2$",
)
ax.set(xlabel=r"$\gamma$", ylabel="nats, held-out images")
legend = ax.legend()

# %% [markdown]
# ## Step 5: a floor without a code
#
# Layer norm normalises the means of one image over the coordinates. The floor is the same number.
# Take an encoder that gives every image the same means. What does each norm make of it?

# %% tags=["nbval-check-output"]
torch.manual_seed(SEED)
same = torch.randn(1, 16, dtype=torch.float64).expand(64, -1)
no_spread = torch.zeros(
    64, 16, dtype=torch.float64
)  # log-variances: the prior's own
mu, logvar = FixedScaleLayerNorm(16, 0.7)(same, no_spread)
print(
    f"layer norm: divergence {kl_to_standard_normal(mu, logvar).mean():.3f}"
    f" nats, floor {16 * 0.49 / 2:.3f}"
)
print(
    "all posteriors are one, so the code says nothing:", bool((mu == mu[0]).all())
)
nearly = same + 0.1 * torch.randn(64, 16, dtype=torch.float64)
mu = FixedScaleBatchNorm(16, 0.7).double()(nearly, no_spread)[0].detach()
print(
    "batch norm, with the least of differences: "
    f"{kl_to_standard_normal(mu, no_spread).mean():.3f} nats"
)
print(
    "standard deviations of the means over the images are 0.7:",
    bool(((mu.std(0, correction=0) - 0.7).abs() < 0.001).all()),
)

# %% [markdown]
# That is an encoder made by hand. Does training find its way out? Both models start from such an encoder: a large
# bias, the same for all images, is added to its means. Batch norm subtracts it at once. Layer norm keeps it.


# %%
def constant_means(model):
    last = [
        layer for layer in model.encoder.modules() if isinstance(layer, nn.Linear)
    ][-1]
    with torch.no_grad():
        last.bias[: bn_vae.Recipe.dim] += 30 * torch.randn(
            bn_vae.Recipe.dim, generator=torch.Generator().manual_seed(SEED)
        )


stuck = {}
for name in ("layer norm, 0.7", "batch norm, 0.7"):
    model, _ = fit(norms[name], start=constant_means)
    stuck[name] = bn_vae.measure(model, x_test, images=10, samples=5, seed=SEED)
    print(
        name,
        {
            key: round(stuck[name][key], 2)
            for key in ("KL", "mutual information", "gain from z")
        },
    )

# %% tags=["nbval-check-output"]
layer, batch = stuck["layer norm, 0.7"], stuck["batch norm, 0.7"]
print(
    "layer norm: divergence at its floor or above:",
    layer["KL"] > 0.999 * layer["floor of the KL"],
)
print(
    "layer norm carries less information than a fifth of batch norm's:",
    layer["mutual information"] < batch["mutual information"] / 5,
)

# %% mystnb={"figure": {"name": "fig-bn_vae-stuck", "caption": "Divergence and information of layer norm and batch norm from two starts."}, "image": {"alt": "Pairs of bars for layer norm and batch norm, from the usual start and from nearly equal means. All four divergences are about as high. The information is several nats but for layer norm from equal means, where it is next to none."}}
starts = {
    f"{name.split(',')[0]},\n{start}": values[name]
    for name in stuck
    for start, values in (("usual start", measured), ("equal means", stuck))
}
figure, ax = plt.subplots(figsize=(6.5, 3.4), layout="constrained")
for shift, key, label in (
    (-0.2, "KL", "KL"),
    (0.2, "mutual information", "information"),
):
    bars = ax.bar(
        [i + shift for i in range(4)],
        [values[key] for values in starts.values()],
        0.36,
        label=label,
    )
    ax.bar_label(bars, fmt="%.2f", fontsize=9)
ax.set(xticks=range(4), xticklabels=list(starts), ylabel="nats")
ax.margins(y=0.15)
legend = ax.legend(ncols=2)

# %% [markdown]
# ## Step 6: what eps takes away
#
# The floor has $\gamma^2 v / (v + \epsilon)$ where $v$ is the variance of an encoder's output before the norm and
# $\epsilon = 10^{-5}$. Predict: at which $v$ is half of the floor gone?

# %% tags=["nbval-check-output"]
for exponent in (0, -2, -3, -4, -5, -6):
    v = 10.0**exponent
    mu = torch.tensor([[-1.0], [1.0]], dtype=torch.float64) * v**0.5
    out = FixedScaleBatchNorm(1, 1.0).double()(mu, torch.zeros_like(mu))[0].detach()
    print(
        f"variance 1e{exponent:+d}: share of the floor that is left "
        f"{float(out.square().mean()):.5f}"
    )

# %% [markdown]
# And what running averages cost: in evaluation the variance is an average over past batches. How far is the mean of
# $\mu_j^2$ on the training images from its value on a batch, $\gamma^2 + \beta_j^2$?

# %%
model = models["batch norm, 0.7"]
mu, _ = in_batches(model.posterior, x_train)
share = (
    mu.square().mean(0) / (0.49 + model.norm.beta.detach().cpu().square())
).double()
print(
    f"share of the floor at evaluation, by coordinate: {share.min():.2f} to "
    f"{share.max():.2f}, mean {share.mean():.3f}"
)
assert (
    0.7 < share.mean() < 1.3
)  # running averages of the last ten batches or so, while the weights still move

# %% [markdown]
# ## Step 7: a standard deviation with a sign
#
# The coupled norm normalises $\sigma$ too. Its mean over the batch is 0, so it has both signs, and where it passes
# through 0 the posterior is a spike, for which the divergence charges $-\log\sigma^2$. What does that cost?

# %% mystnb={"figure": {"name": "fig-bn_vae-sigma", "caption": "Coupled norm: the standard deviation of one coordinate over held-out images, and what each coordinate pays."}, "image": {"alt": "Left, a histogram of sigma with both signs around 0, with dashed lines at plus and minus its scale. Right, bars for sixteen coordinates: the mean divergence of each, with the floor and the level of a normal sigma drawn as lines; all bars are above the floor."}}
model = models["coupled, 0.5"].to("cpu")
with torch.no_grad():
    mu, logvar = model.posterior(x_test)
    raw = model.encoder(x_test)[:, bn_vae.Recipe.dim :]
    scale = model.norm.squared_scales()[1]
    sigma = scale.sqrt() * model.norm.norm_sigma(raw)
paid = torch.stack(
    [
        kl_to_standard_normal(mu[:, [j]], logvar[:, [j]]).mean()
        for j in range(bn_vae.Recipe.dim)
    ]
)
least = -0.5 * scale.log()
gap = 0.5 * (math.log(2) + 0.5772156649)  # of normal sigmas
figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
axes[0].hist(sigma[:, 0], bins=50)
for sign in (-1, 1):
    axes[0].axvline(
        sign * float(scale[0].sqrt()), color="black", linestyle="--", linewidth=1
    )
axes[0].set(title=r"$\sigma$ of the first coordinate", yticks=[])
axes[1].bar(range(bn_vae.Recipe.dim), paid)
axes[1].step(
    torch.arange(bn_vae.Recipe.dim + 1) - 0.5,
    [*least, least[-1]],
    where="post",
    color="black",
    label="floor",
)
axes[1].step(
    torch.arange(bn_vae.Recipe.dim + 1) - 0.5,
    [*(least + gap), least[-1] + gap],
    where="post",
    color="C1",
    label=r"floor, normal $\sigma$",
)
axes[1].set(title="KL, nats", xlabel="coordinate")
legend = axes[1].legend(fontsize=8)

# %% tags=["nbval-check-output"]
print(
    "standard deviations of both signs in every coordinate:",
    bool(((sigma > 0).any(0) & (sigma < 0).any(0)).all()),
)
shares = sum(model.norm.squared_scales())
print(
    "squared scales add up to 1:",
    bool(torch.allclose(shares, torch.ones(bn_vae.Recipe.dim))),
)

# %% [markdown]
# ## Step 8: sampling, interpolation, traversal
#
# A sample is a code from $N(0, I)$, and then pixel after pixel from $p(x | z)$. The walks use the same random numbers
# for all images of a row, so that they differ by their codes alone.

# %% mystnb={"figure": {"name": "fig-bn_vae-samples", "caption": "Samples of three models after a short training, and data."}, "image": {"alt": "Four grids of small black and white images: samples without a norm, with batch norm and with the coupled norm show strokes that look like parts of digits, some whole; real images for comparison."}}
panels = {
    name: models[name]
    .to("cpu")
    .sample(24, generator=torch.Generator().manual_seed(SEED))
    for name in ("no norm", "batch norm, 0.7", "coupled, 0.5")
}
figure = plots.image_panels(
    {**panels, "data": x_test[:24]}, columns=8, per_row=2, size=3.4
)

# %% mystnb={"figure": {"name": "fig-bn_vae-walks", "caption": "Interpolations between the codes of two held-out images and traversals of single coordinates."}, "image": {"alt": "Two grids of six rows of images. Without a norm the images of an interpolation are nearly alike, and a traversal adds and removes some strokes. With batch norm the strokes change along the rows."}}
STEPS_OF_A_WALK = 9


def walks(model):
    """Three interpolations, three traversals: shared random numbers along a row."""
    mu = in_batches(model.encode, x_test[:6])
    t = torch.linspace(0, 1, STEPS_OF_A_WALK)[:, None]
    rows = [(1 - t) * mu[i] + t * mu[i + 3] for i in range(3)]
    for j in range(3):
        row = mu[:1].repeat(STEPS_OF_A_WALK, 1)
        row[:, j] = torch.linspace(-2.5, 2.5, STEPS_OF_A_WALK)
        rows.append(row)
    generator = torch.Generator().manual_seed(SEED)
    return torch.cat(
        [model.decode(row, generator=generator, shared=True) for row in rows]
    )


figure = plots.image_panels(
    {name: walks(models[name]) for name in ("no norm", "batch norm, 0.7")},
    columns=STEPS_OF_A_WALK,
    per_row=2,
    size=4.4,
)

# %% [markdown]
# Three interpolations from top to bottom, then three traversals. Where the code has collapsed, the codes of all images
# are nearly one, and an interpolation repeats itself. A traversal walks through the noise around them, and changes strokes.
#
# ## What you have seen
#
# - A linear VAE collapses exactly where the variance of a direction is below the decoder's noise.
# - A decoder that sees pixels lets the code collapse. A norm on the encoder keeps the divergence above a floor.
# - Layer norm has the same floor, and a code that says nothing. A floor of the divergence proves no use of the code.
# - Batch norm spreads the means, which is what makes its codes useful; a scale above 1 spreads them too far.
# - The coupled norm fixes both moments and pays for standard deviations that pass through 0.
#
# Try: another reach of the decoder's neighbourhood, `PixelDecoder(..., reach=0)` is one of independent pixels.
