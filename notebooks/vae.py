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
# # Experiment: the variational autoencoder
#
# We measure how noisy its gradient is with and without reparameterisation, train it, look at samples, reconstructions and
# walks through the code, take the divergence away and watch the noise vanish, compare the codes with $N(0, I)$, and tighten
# the bound with more samples.
# The derivations are in the chapter *The variational autoencoder*.

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
from torch import nn

from gae_core import data, metrics, nets, plots, train
from gae_core.gaussian import kl_to_standard_normal
from gae_core.metrics import (
    active_units,
    encoder_information,
    importance_weighted_nll,
)
from gae_core.models.autoencoder import Autoencoder
from gae_core.models.vae import IWAE, VAE

device = "cuda" if torch.cuda.is_available() else "cpu"
SIZE = data.size_from_environment("full" if device == "cuda" else "short")
SEED = 0
images = data.example_images()
print(f"size: {SIZE}, device: {device}")

# %% [markdown]
# ## Step 1: two gradients of one mean
#
# For $f(z) = \frac12\|z - c\|^2$ and $z \sim N(\mu, \sigma^2 I)$, the gradient of $\mathrm{E} f(z)$ in $\mu_1$ is $a_1 = \mu_1 - c_1$.
# *Score function*: $f(z)\,(z_1 - \mu_1)/\sigma^2$, which needs only values of $f$. *Pathwise*: $\partial_1 f(\mu + \sigma\epsilon)$.
#
# Predict: as $\sigma \to 0$, which of the two becomes noisier?

# %%
d, draws = 10, 200_000
noise = torch.Generator().manual_seed(SEED)
a = torch.full((d,), 0.3, dtype=torch.float64)
sigmas = torch.logspace(-1.5, 0.5, 9, dtype=torch.float64)


def both_gradients(sigma):
    eps = torch.randn(draws, d, generator=noise, dtype=torch.float64)
    f = 0.5 * (a + sigma * eps).square().sum(1)
    return f * eps[:, 0] / sigma, a[0] + sigma * eps[:, 0]


def predicted(sigma):
    norm = a.square().sum()
    score = (
        norm**2 / (4 * sigma**2)
        + (d + 4) / 2 * norm
        + a[0] ** 2
        + (d + 2) * (d + 4) / 4 * sigma**2
    )
    return score, sigma**2


measured = [tuple(g.var() for g in both_gradients(sigma)) for sigma in sigmas]
for sigma, (score, path) in zip(sigmas[::4], measured[::4], strict=True):
    print(
        f"sigma {sigma:.3f}: variance of the score function {score:9.3f},"
        f" pathwise {path:7.4f}"
    )
for sigma, found in zip(sigmas, measured, strict=True):
    for value, expected in zip(found, predicted(sigma), strict=True):
        assert (
            abs(value / expected - 1) < 0.1
        )  # 200,000 draws; products of four normals have heavy tails

# %% tags=["nbval-check-output"]
means = [g.mean() for g in both_gradients(0.5)]
print("both are right:", all(abs(m - a[0]) < 0.05 for m in means))
print(
    "pathwise is quieter at every sigma:",
    all(path < score for score, path in measured),
)
print(
    "the score function gets noisier as sigma goes to 0:",
    bool(measured[0][0] > measured[4][0]),
)

# %% [markdown]
# ## Step 2: train a VAE
#
# The images' grey values are taken as probabilities, and a new binary image is drawn at every step: `binarise=True`.
# Beside it, with the same networks: a plain autoencoder, weights 0.1 and 0 on the divergence, and an IWAE with five samples
# in its bound.

# %%
DIM = 16
ROWS = 26_000 if SIZE == "short" else 1_200_000  # seen by each training
EPOCHS = max(1, round(ROWS / len(images.x_train)))


def pair(dim, heads=2, output=nn.Identity):
    torch.manual_seed(SEED)
    encoder, decoder = nets.mlp_pair(
        images.shape, dim, hidden=(256, 128), heads=heads, output=output
    )
    mean = data.to_unit(images.x_train).mean(0).clamp(0.001, 0.999)
    decoder[0][-1].bias.data.copy_(
        mean.flatten().logit()
    )  # the mean image as a start saves the first epoch
    return encoder, decoder


def fit(model, rows=ROWS):
    rate = dict(
        lr=2e-3,
        schedule=lambda t: 1 - 0.9 * t,
        seed=SEED,
        device=device,
        progress=False,
    )
    batch_size = 64 if SIZE == "short" else 128
    train.fit(
        model, images.x_train[:rows], epochs=EPOCHS, batch_size=batch_size, **rate
    )
    return model.cpu()


class Watched(VAE):
    """A VAE that notes the median of sigma at each step."""

    def posterior(self, x, y=None):
        mu, logvar = super().posterior(x, y)
        if self.training:
            self.medians.append(((0.5 * logvar).exp().median() / mu.std()).item())
        return mu, logvar


start = time.perf_counter()
models = {}
for beta in (1.0, 0.1, 0.0):
    models[beta] = Watched(*pair(DIM), DIM, beta=beta, binarise=True)
    models[beta].medians = []
    fit(models[beta])
vae = models[1.0]
iwae = fit(IWAE(*pair(DIM), DIM, samples=5, binarise=True))
plain = fit(Autoencoder(*pair(DIM, heads=1, output=nn.Sigmoid), DIM))
print(
    f"five trainings of {len(vae.medians)} steps: "
    f"{time.perf_counter() - start:.0f} s"
)

# %% [markdown]
# Test images are binarised once. The bound is below $\log p(x)$, and the importance-weighted estimate closes most of the gap.

# %%
grey = data.to_unit(images.x_test)
binary = torch.bernoulli(
    grey[:: max(1, len(grey) // 300)], generator=torch.Generator().manual_seed(SEED)
)
mu, logvar = metrics.in_batches(vae.posterior, binary)
generator = torch.Generator().manual_seed(SEED)
# Draws from q(z | x): with one of them it is the negative bound.
draw = dict(proposal="posterior", generator=generator)
negative_elbo = importance_weighted_nll(vae, binary, samples=1, **draw).nll
nll = importance_weighted_nll(vae, binary, samples=200, **draw).nll
split = encoder_information(mu, logvar, generator=generator)
print(
    f"negative ELBO {negative_elbo.mean():.1f}, NLL with 200 samples "
    f"{nll.mean():.1f} nats an image"
)
# So near its cap, the logarithm of the images, the estimated information says "at
# least".
print(
    f"KL {split.kl:.1f}, of which information at least "
    f"{split.mutual_information:.1f}"
    f" (cap of the estimate {split.cap:.1f})"
)
print(f"active units: {active_units(mu)} of {DIM}")
assert (
    nll.mean() < negative_elbo.mean()
)  # a gap of nats; the standard error of the difference is a tenth of one

# %% mystnb={"figure": {"name": "fig-vae-samples", "caption": "Held-out images, reconstructions, means of p(x | z) for z from N(0, I), and binary draws from the same."}, "image": {"alt": "Four grids of digits: held-out images, their smoother reconstructions, decoder means of codes from N(0, I), many of which are digits, and grainy binary draws from those."}}
fake = vae.sample(36, generator=torch.Generator().manual_seed(SEED))
panels = {
    "held-out images": grey[:36],
    "reconstructions": metrics.in_batches(vae, grey[:36]),
    "means of p(x | z)": fake,
    "draws from p(x | z)": torch.bernoulli(
        fake, generator=torch.Generator().manual_seed(SEED)
    ),
}
figure = plots.image_panels(panels, columns=6, per_row=2, size=3)

# %% [markdown]
# ## Step 3: the same two gradients, in this VAE
#
# The reconstruction term of trained images, differentiated with respect to the posterior's means. For the score function the
# term's value is multiplied by the score; a *baseline*, the mean of the other draws' values, may be taken off before.
# Predict: how many draws of the score function are worth one pathwise draw?

# %%
x, repeats = binary[:20], 200
mu_x, logvar_x = (v.detach() for v in vae.posterior(x))
sigma_x = (0.5 * logvar_x).exp()
found = {"score function": [], "with a baseline": [], "pathwise": []}
noise = torch.Generator().manual_seed(SEED)
for i in range(len(x)):
    eps = torch.randn(repeats, DIM, generator=noise)
    z = (mu_x[i] + sigma_x[i] * eps).requires_grad_()
    value = vae.log_likelihood(x[i : i + 1].expand(repeats, -1, -1, -1), z)
    (path,) = torch.autograd.grad(value.sum(), z)
    score, value = eps / sigma_x[i], value.detach()[:, None]
    others = (value.sum() - value) / (repeats - 1)
    for name, g in zip(
        found, (value * score, (value - others) * score, path), strict=True
    ):
        found[name].append(g)
variances = {name: float(torch.stack(g).var(1).mean()) for name, g in found.items()}
for name, value in variances.items():
    print(
        f"{name:<16} {value:12.1f}: {value / variances['pathwise']:9.1f} times"
        " the pathwise"
    )

# %% tags=["nbval-check-output"]
print(
    "even with a baseline it has three times the variance:",
    variances["with a baseline"] > 3 * variances["pathwise"],
)
print(
    "a baseline helps:",
    variances["with a baseline"] < 0.5 * variances["score function"],
)

# %% mystnb={"figure": {"name": "fig-vae-gradients", "caption": "Variance of the gradient from one draw. Left: a quadratic, theory (lines) and simulation (dots). Right: the trained VAE."}, "image": {"alt": "Left, two variances against sigma on logarithmic axes: that of the score function has a valley and rises as sigma goes to 0, the pathwise one falls to 0; dots lie on the lines. Right, three bars on a logarithmic axis for a VAE: score function, with a baseline, pathwise, each far lower than the one before."}}
figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
fine = torch.logspace(-1.5, 0.5, 100, dtype=torch.float64)
for index, name in enumerate(("score function", "pathwise")):
    (line,) = axes[0].plot(fine, [predicted(s)[index] for s in fine], label=name)
    axes[0].plot(
        sigmas,
        [m[index] for m in measured],
        "o",
        color=line.get_color(),
        markersize=4,
    )
axes[0].set(
    xscale="log",
    yscale="log",
    xlabel=r"$\sigma$",
    title=f"quadratic, $d = {d}$",
    ylabel="variance of one draw",
)
axes[0].legend()
bars = axes[1].bar(list(variances), list(variances.values()))
axes[1].set(yscale="log", title="the VAE's reconstruction term")
axes[1].bar_label(bars, fmt="%.3g", fontsize=9)
axes[1].margins(y=0.2)

# %% [markdown]
# ## Step 4: without the divergence
#
# The encoder chooses the noise. Predict what it chooses when the divergence has weight 0.1, and weight 0, and what the
# decoder then makes of $N(0, I)$. The curve shows $\sigma$ relative to the spread of the means: the scale of the code alone
# means nothing, since the decoder can undo it.

# %% mystnb={"figure": {"name": "fig-vae-no-kl", "caption": "Left: sigma relative to the spread of the means, by the weight of the divergence. Others: decoded N(0, I)."}, "image": {"alt": "Left, median of sigma over the spread of the means against steps on a logarithmic axis for weights 1, 0.1 and 0: the smaller the weight the lower it ends, and for 0 it keeps falling. Beside it three grids of images decoded from N(0, I): blurred digits for weight 1, fewer for 0.1, mostly faint smears for 0."}}
figure = plt.figure(figsize=(9, 3.2), layout="constrained")
axes = figure.subplots(1, 4, width_ratios=[1.5, 1, 1, 1])
for beta, model in models.items():
    axes[0].plot(model.medians, label=rf"$\beta = {beta:g}$")
axes[0].set(yscale="log", xlabel="step", title=r"median $\sigma$ / spread of $\mu$")
axes[0].legend(fontsize=8)
for ax, (beta, model) in zip(axes[1:], models.items(), strict=True):
    shown = model.sample(36, generator=torch.Generator().manual_seed(SEED))
    plots.draw_images(ax, shown, columns=6, title=rf"$\beta = {beta:g}$")

# %%
last = {beta: sum(model.medians[-20:]) / 20 for beta, model in models.items()}
print({beta: round(value, 3) for beta, value in last.items()})
# Twenty steps are averaged; from one weight to the next it changes by a factor of
# two or more.
assert last[0.0] < 0.8 * last[0.1] < 0.8 * last[1.0]

# %% tags=["nbval-check-output"]
print("less divergence, less noise:", last[0.0] < last[0.1] < last[1.0])
print(
    "without it the noise ends far below where it began:",
    last[0.0] < 0.5 * models[0.0].medians[0],
)

# %% [markdown]
# ## Step 5: do autoencoders generalise?
#
# Squared error of reconstructions on training and on held-out images, of the plain autoencoder and of the VAE.

# %%
errors = {}
for name, model in {"plain autoencoder": plain, "VAE": vae}.items():
    parts = [x[:: max(1, len(x) // 5000)] for x in (images.x_train, images.x_test)]
    errors[name] = [float(metrics.squared_error(model, x).mean()) for x in parts]
    print(
        f"{name:<18} training {errors[name][0]:6.2f}, held out "
        f"{errors[name][1]:6.2f}"
    )

# %% tags=["nbval-check-output"]
# The small digits have 1,347 training images alone, which can be learnt by heart
# in part; MNIST has 60,000.
ratio = {name: held_out / training for name, (training, held_out) in errors.items()}
print(
    "new images cost the plain autoencoder less than a third more:",
    ratio["plain autoencoder"] < 4 / 3,
)
print(
    "it reconstructs them better than the VAE does:",
    errors["plain autoencoder"][1] < errors["VAE"][1],
)

# %% [markdown]
# ## Step 6: codes against $N(0, I)$
#
# Two-dimensional codes, so that one can look. One draw from $q(z|x)$ for each held-out image.

# %%
flat = {}
for beta in (0.0, 1.0, 4.0):
    flat[beta] = fit(VAE(*pair(2), 2, beta=beta, binarise=True), rows=ROWS // 2)
clouds, table, mismatch = {}, {}, {}
for beta, model in flat.items():
    mu, logvar = metrics.in_batches(model.posterior, grey)
    eps = torch.randn(mu.shape, generator=torch.Generator().manual_seed(SEED))
    clouds[beta] = mu + (0.5 * logvar).exp() * eps
    part = slice(None, None, max(1, len(mu) // 2000))
    table[beta] = encoder_information(
        mu[part], logvar[part], generator=torch.Generator().manual_seed(SEED)
    )
    mean, second = mu.mean(0), (mu.square() + logvar.exp()).mean(0)
    # Where the estimated information is at its cap, the logarithm of the images,
    # the
    # mismatch is not known. What the two moments alone demand is a lower bound.
    capped = table[beta].mutual_information > table[beta].cap - 2
    least = 0.5 * (second - 1 - (second - mean.square()).log()).sum()
    mismatch[beta] = float(least) if capped else table[beta].kl_aggregate
    print(
        f"beta {beta:g}: information {'at least ' if capped else ''}"
        f"{table[beta].mutual_information:.2f},"
        f" KL of the aggregate {'at least ' if capped else ''}"
        f"{mismatch[beta]:.2f},\n"
        f"        |E mu| up to {mean.abs().max():.2f},"
        f" E mu^2 + E sigma^2 {second[0]:.2f} and {second[1]:.2f}"
    )
    # The split is exact: what is lost between the two sides is rounding.
    assert (
        abs(table[beta].kl - kl_to_standard_normal(mu[part], logvar[part]).mean())
        < 1e-3 * table[beta].kl
    )

# %% tags=["nbval-check-output"]
print(
    "with the divergence a better match than without:",
    max(mismatch[1.0], mismatch[4.0]) < mismatch[0.0],
)
print(
    "the larger its weight, the less the code says:",
    table[4.0].mutual_information < table[1.0].mutual_information,
)

# %% mystnb={"figure": {"name": "fig-vae-aggregate", "caption": "Codes of held-out images, one draw each, coloured by class, for three weights of the divergence. The circle holds 99 % of N(0, I)."}, "image": {"alt": "Three scatter plots of two-dimensional codes coloured by class. For weight 0 they spread far outside the circle, for weight 1 they fill it and overflow it, with a gap beside one class, for weight 4 they fill it more evenly and most classes overlap."}}
figure, axes = plt.subplots(1, 3, figsize=(9, 3.3), layout="constrained")
angle = torch.linspace(0, 6.2832, 100)
for ax, (beta, z) in zip(axes, clouds.items(), strict=True):
    limit = 4.0 if beta else float(z.abs().quantile(0.98)) * 1.3
    plots.draw_codes(
        ax,
        z[:3000],
        images.y_test[:3000],
        title=rf"$\beta = {beta:g}$",
        limit=limit,
    )
    ax.plot(3.035 * angle.cos(), 3.035 * angle.sin(), color="black", linewidth=1)

# %% [markdown]
# ## Step 7: walks
#
# Straight lines between codes, then single coordinates from $-3$ to $3$: the three whose mean moves most, and the one whose
# mean moves least.

# %% mystnb={"figure": {"name": "fig-vae-walks", "caption": "Above: lines between codes of held-out images. Below: one coordinate from -3 to 3, the last row the one whose mean varies least."}, "image": {"alt": "Seven rows of eleven digits. In the first three one digit turns into another. In the next three one coordinate of the code moves and slant, width or the digit changes. In the last row, of the coordinate whose mean varies least, little or nothing changes."}}
codes = metrics.in_batches(vae.encode, grey[:6])
t = torch.linspace(0, 1, 11)[:, None]
lines = [(1 - t) * codes[i] + t * codes[i + 1] for i in (0, 2, 4)]
spread = metrics.in_batches(vae.encode, grey).var(0)
order = spread.argsort(descending=True).tolist()
walks = []
for j in [*order[:3], order[-1]]:
    walk = codes[:1].repeat(11, 1)
    walk[:, j] = torch.linspace(-3, 3, 11)
    walks.append(walk)
figure, axes = plt.subplots(
    2, 1, figsize=(7, 5), height_ratios=[3, 4], layout="constrained"
)
plots.draw_images(
    axes[0],
    metrics.in_batches(vae.decode, torch.cat(lines)),
    columns=11,
    title="between two codes",
)
plots.draw_images(
    axes[1],
    metrics.in_batches(vae.decode, torch.cat(walks)),
    columns=11,
    title="one coordinate at a time",
)

# %% [markdown]
# ## Step 8: more samples, a tighter bound
#
# $-L_k = -\mathrm{E}\log\frac1k\sum_s w_s$ on the same held-out images, for the VAE and for the IWAE, which was trained on $L_5$.
# Predict: which of the two has the better ELBO, $k = 1$? Which falls further?

# %%
counts = [1, 2, 5, 10, 20, 50, 100, 200]
few = binary[:200]
curves = {}
for name, model in {"VAE": vae, "IWAE, trained with k = 5": iwae}.items():
    generator = torch.Generator().manual_seed(SEED)
    eps = torch.randn(len(few), counts[-1], DIM, generator=generator)
    with torch.no_grad():
        log_weights = torch.cat(
            [
                model.log_weights(*rows)
                for rows in zip(few.split(20), eps.split(20), strict=True)
            ]
        )
    log_weights = log_weights.double()
    # All disjoint groups of k of the same 200 draws, so that the curve has the
    # noise of the draws once.
    groups = [log_weights.view(len(few), counts[-1] // k, k) for k in counts]
    curves[name] = [
        float((torch.tensor(float(k)).log() - g.logsumexp(2)).mean())
        for k, g in zip(counts, groups, strict=True)
    ]
    print(f"{name:<26}", " ".join(f"{v:6.1f}" for v in curves[name]))
    # Where a larger group is made of whole smaller ones, Jensen's inequality
    # holds on the draws themselves.
    for small, large in (
        (0, 1),
        (0, 2),
        (1, 3),
        (2, 3),
        (3, 4),
        (3, 5),
        (5, 6),
        (6, 7),
    ):
        assert curves[name][large] <= curves[name][small]

# %% tags=["nbval-check-output"]
print(
    "more samples never raise the negative bound:",
    all(c[-1] <= c[0] for c in curves.values()),
)
gaps = [c[0] - c[-1] for c in curves.values()]
print("the IWAE's falls further:", gaps[1] > gaps[0])

# %% mystnb={"figure": {"name": "fig-vae-bound", "caption": "The negative bound in nats by the number of samples, for a VAE and an IWAE, on held-out images."}, "image": {"alt": "Negative bound against the number of samples from 1 to 200 on a logarithmic axis: two falling curves, of a VAE and of an IWAE. The IWAE's starts higher, falls further and crosses the VAE's."}}
figure, ax = plt.subplots(figsize=(6.5, 3.4), layout="constrained")
for name, curve in curves.items():
    ax.plot(counts, curve, "o-", markersize=4, label=name)
ax.set(xscale="log", xlabel="$k$", ylabel="$-L_k$, nats")
legend = ax.legend()

# %% [markdown]
# ## What you have seen
#
# - The score function gives the right gradient without reparameterisation, with many times the variance.
# - Without the divergence the encoder makes the noise vanish, and $N(0, I)$ decodes to faint mixtures.
# - A plain autoencoder reconstructs new images about as well as those it was trained on. What it lacks is a code to draw.
# - The divergence pays for information and for the mismatch of the aggregate; its weight trades one against the other.
# - More samples tighten the bound, on every set of draws.
#
# Try: `conv_pair` in place of `mlp_pair`; the Gaussian likelihood with `sigma=None`; $\beta = 4$ with sixteen codes, and count
# the active units.
