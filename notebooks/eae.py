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
# # Experiment: the entropic autoencoder
#
# Three models with the same networks, data and training: the plain autoencoder, the same with batch norm on its code,
# and the same with batch norm and an entropy term, which is the entropic autoencoder (EAE).
# We decode $N(0, I)$ with each, and measure what batch norm gave and what entropy added.
# The derivations are in the chapter *The entropic autoencoder*.

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
import dataclasses
import time

import matplotlib.pyplot as plt
import torch
from scipy import stats

from gae_core import data, metrics, plots
from gae_core.entropy import knn_entropy, knn_local_entropy
from gae_core.gaussian import gaussian_entropy
from gae_core.normalization import CodeBatchNorm
from gae_core.studies import image_models

device = "cuda" if torch.cuda.is_available() else "cpu"
SIZE = data.size_from_environment("full" if device == "cuda" else "short")
SEED = 0
images = data.example_images()
print(f"size: {SIZE}, device: {device}")

# %% [markdown]
# ## Step 1: batch norm fixes mean and variance
#
# Without scale and shift, batch norm subtracts the mean of the batch and divides by its standard deviation.
# Predict: mean, variance and correlation of the result, if two coordinates go in that are the same up to a factor?

# %% tags=["nbval-check-output"]
torch.manual_seed(SEED)
u = torch.randn(256, 2)
u[:, 1] = 5 * u[:, 0] + 40
z = CodeBatchNorm(2)(u)
print("means are 0:", bool((z.mean(0).abs() < 1e-4).all()))
print("variances are 1:", bool(((z.var(0, correction=0) - 1).abs() < 1e-3).all()))
print(f"correlation: {torch.corrcoef(z.T)[0, 1]:.3f}")

# %% [markdown]
# The correlation is untouched. Batch norm fixes the marginals' mean and variance and nothing else.
# That is where the entropy comes in: among all codes with these marginals, independent normal ones have the most.
#
# ## Step 2: the loss, put together by hand
#
# $\|x - D(z)\|^2 - \lambda \hat H(z)$, where the entropy estimate is made of distances between codes of the batch.

# %% tags=["nbval-check-output"]
recipe = image_models.recipe("eae", images.name, "short")
model = image_models.build(recipe, images.shape, SEED).double()
x = data.to_unit(images.x_train[:128]).double()
loss = model.loss(x)
z = model.normalization(model.encoder(x))
by_hand = (x - model.decoder(z)).square().sum(
    (1, 2, 3)
) - model.lam * knn_local_entropy(z)
print("the model's loss is what we wrote:", torch.allclose(loss.total, by_hand))
print("one value per image:", loss.total.shape == (128,))

# %% [markdown]
# ## Step 3: train all three

# %%
names = {
    "autoencoder": "plain autoencoder",
    "batch_norm": "batch norm alone",
    "eae": "EAE",
}
models, histories = {}, {}
for name, title in names.items():
    start = time.perf_counter()
    recipe = image_models.recipe(name, images.name, SIZE)
    models[title] = image_models.build(recipe, images.shape, SEED)
    histories[title] = recipe.fit(models[title], images.x_train, seed=SEED).history
    steps, seconds = len(histories[title]["total"]), time.perf_counter() - start
    print(f"{title:<18} {steps} steps in {seconds:.0f} s")

# %% [markdown]
# ## Predict, then look
#
# The same random codes from $N(0, I)$ go into each decoder. Which of the three shows digits?

# %% mystnb={"figure": {"name": "fig-eae-samples", "caption": "Decoded codes from N(0, I), the same for the three models, and real images."}, "image": {"alt": "Four grids of images. The plain autoencoder shows grey smears. With batch norm alone many are digits, others broken shapes. The EAE shows about as many digits as batch norm alone, with broken shapes among them. Real images for comparison."}}
panels = {
    title: m.sample(36, generator=torch.Generator().manual_seed(SEED)).cpu()
    for title, m in models.items()
}
figure = plots.image_panels(
    {**panels, "real images": images.x_test[:36]}, columns=6, per_row=2, size=3
)

# %% [markdown]
# ## What do the reconstructions cost?
#
# First row: held-out images. Below: what each model makes of them. The weight $\lambda = 1$ is small against squared errors
# near 20 on MNIST. Against those of the small digits, near 1, it is large: there it costs much more.

# %% mystnb={"figure": {"name": "fig-eae-reconstructions", "caption": "Held-out images and their reconstructions by the three models."}, "image": {"alt": "Four rows of twelve digits: held-out images on top, then reconstructions by the plain autoencoder, batch norm alone and the EAE, in most columns alike in all three."}}
rows = [
    images.x_test[:12],
    *(metrics.in_batches(m, images.x_test[:12]) for m in models.values()),
]
figure, axes = plt.subplots(4, 1, figsize=(8, 3.2), layout="constrained")
for ax, title, row in zip(axes, ["held-out image", *models], rows, strict=True):
    plots.draw_images(ax, row, columns=12, title=title)

# %% [markdown]
# ## Measure
#
# Squared error on held-out images; Fréchet distance to them of images decoded from $N(0, I)$, from one Gaussian and from
# a mixture of ten fitted to the codes afterwards, and of reconstructions; and how normal the codes are.
# If the codes were $N(0, I)$ exactly, a fitted density could do no better than $N(0, I)$.

# %%
n = 2000 if SIZE == "short" else 10_000
measured = {
    title: image_models.measure(
        m, images, dataclasses.replace(recipe, drawn=n), seed=SEED
    )
    for title, m in models.items()
}
print(f"{'':<25}" + "".join(f"{title:>19}" for title in measured))
for key in measured["EAE"]:
    print(f"{key:<25}" + "".join(f"{m[key]:>19.3f}" for m in measured.values()))

# %% tags=["nbval-check-output"]
frechet = {title: m["Fréchet, N(0, I)"] for title, m in measured.items()}
print(
    "batch norm alone is nearer to the data than plain:",
    frechet["batch norm alone"] < frechet["plain autoencoder"],
)
print(
    "it more than halves the distance:",
    frechet["batch norm alone"] < 0.5 * frechet["plain autoencoder"],
)
# The EAE is nearer than batch norm alone on MNIST. On the digits they differ by no
# more than trainings of one model do.
assert frechet["EAE"] < 1.2 * frechet["batch norm alone"]

# %% [markdown]
# ## What batch norm gave, what entropy added
#
# The divergence of the codes' distribution $q$ from $N(0, I)$ is a sum of two parts. The first compares moments: it is the
# divergence of the Gaussian with $q$'s mean and covariance, in closed form. The second is shape, the entropy that $q$ lacks
# against that Gaussian, which we estimate with nearest neighbours on held-out codes. In eight dimensions this can be used
# with care; in thirty-two it would be wrong by nats, and negative for a normal sample.


# %%
def parts(z):
    z = z.double()
    mean, cov = z.mean(0), torch.cov(z.T)
    moments = 0.5 * (
        mean.square().sum() + cov.trace() - len(mean) - torch.logdet(cov)
    )
    shape = gaussian_entropy(cov) - knn_entropy(z, k=3)
    return float(moments), float(shape)


held_out = images.x_test[
    :: max(1, len(images.x_test) // 5000)
]  # every other one of MNIST: its halves differ
split = {
    title: parts(metrics.in_batches(m.encode, held_out))
    for title, m in models.items()
}
for title, (moments, shape) in split.items():
    print(f"{title:<18} moments {moments:8.2f} nats, shape {shape:5.2f} nats")
    bound = min(1.0, ((moments + shape) / 2) ** 0.5)
    print(f"{'':<18} so the total variation from N(0, I) is at most {bound:.2f}")
# For truly normal codes the estimates are 0 to within 0.07 (moments) and 0.2
# (shape),
# at these numbers of images.
assert (
    split["EAE"][0] < split["batch norm alone"][0] < split["plain autoencoder"][0]
)

# %% tags=["nbval-check-output"]
print(
    "batch norm removes most of the moment part:",
    split["batch norm alone"][0] < 0.1 * split["plain autoencoder"][0],
)
print(
    "the entropy brings the codes nearer to N(0, I):",
    sum(split["EAE"]) < sum(split["batch norm alone"]),
)

# %% mystnb={"figure": {"name": "fig-eae-parts", "caption": "Divergence of the codes from N(0, I) in nats, split into moments and shape. Logarithmic scale."}, "image": {"alt": "Bar chart on a logarithmic scale with two bars for each model. The moment part falls by orders of magnitude from the plain autoencoder to batch norm alone, and again to the EAE. The shape part is the same for the first two and smaller for the EAE."}}
figure, ax = plt.subplots(figsize=(6.5, 3.4), layout="constrained")
for shift, part, label in ((-0.2, 0, "moments"), (0.2, 1, "shape")):
    bars = ax.bar(
        [i + shift for i in range(3)],
        [values[part] for values in split.values()],
        0.36,
        label=label,
    )
    ax.bar_label(bars, fmt="%.2f", fontsize=9)
ax.set(xticks=range(3), xticklabels=list(split), ylabel="nats", yscale="log")
ax.margins(y=0.15)
legend = ax.legend()

# %% [markdown]
# Batch norm removes nearly all of the moment part, and leaves the shape as it was. What is left of the moments is
# correlation, and the entropy removes most of that, and some of the shape.
#
# ## Are the codes normal now?
#
# Each coordinate looks so. But look at $|z|^2$, which for $N(0, I)$ follows a chi-squared law with $d$ degrees of freedom.

# %% mystnb={"figure": {"name": "fig-eae-gaussianity", "caption": "Held-out codes against N(0, I): one coordinate, and the squared length."}, "image": {"alt": "Left, histograms of one code coordinate for batch norm alone and the EAE, both close to the standard normal curve. Right, histograms of the squared length of the code: for the EAE it is more concentrated than the chi-squared curve."}}
figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
codes = {
    title: metrics.in_batches(models[title].encode, images.x_test)
    for title in ("batch norm alone", "EAE")
}
d = recipe.dim
for title, z in codes.items():
    axes[0].hist(
        z[:, 0], bins=50, range=(-4, 4), density=True, alpha=0.5, label=title
    )
    axes[1].hist(
        z.square().sum(1),
        bins=50,
        range=(0, 30),
        density=True,
        alpha=0.5,
        label=title,
    )
t, r = torch.linspace(-4, 4, 200), torch.linspace(0, 30, 200)
axes[0].plot(t, stats.norm.pdf(t), color="black", label="$N(0, 1)$")
axes[1].plot(r, stats.chi2.pdf(r, d), color="black", label=rf"$\chi^2_{d}$")
axes[0].set(title="first coordinate", yticks=[])
axes[1].set(title="$|z|^2$", yticks=[])
for ax in axes:
    ax.legend(fontsize=8)

# %% [markdown]
# The lengths vary less than those of normal codes: `radius std` in the table above would be 1. Most of that is there with
# batch norm alone. The entropy adds to it, and `ks radius` gets larger, not smaller. For eight dimensions and batches of
# 128 the chapter on nearest neighbours measures why: the *estimate* is largest, on average over batches, where lengths
# vary by seven tenths of what those of normal codes do.
#
# ## What a coordinate does
#
# Each row starts at the code of one held-out image and moves one coordinate from $-2.5$ to $2.5$.

# %% mystnb={"figure": {"name": "fig-eae-traversals", "caption": "Traversals of the EAE: each row moves one coordinate of the code of one image from -2.5 to 2.5."}, "image": {"alt": "A grid of decoded digits with eight rows and eleven columns. Along each row slant, width or the digit itself changes gradually."}}
eae = models["EAE"]
start = metrics.in_batches(eae.encode, images.x_test[:1])
walk = start.repeat(d, 11, 1)
for j in range(d):
    walk[j, :, j] = torch.linspace(-2.5, 2.5, 11)
figure, ax = plt.subplots(figsize=(7, 5), layout="constrained")
plots.draw_images(
    ax, metrics.in_batches(eae.decode, walk.reshape(-1, d)), columns=11
)

# %% [markdown]
# ## Training sees other codes than evaluation
#
# In training a code is normalised by its batch, in evaluation by running averages. How far apart are the two, for the
# same images and weights? Against ideal statistics the chapter has a mean squared difference of about
# $\frac1B\left(1 + \frac{\kappa - 1}{4}\right)$ in each coordinate, for batches of $B$ codes with kurtosis $\kappa$. Running
# averages in which the newest batch has the weight $w$ fluctuate too, and make it $\frac{2}{2-w}$ times as much.

# %%
generator = torch.Generator().manual_seed(SEED)
before = metrics.in_batches(eae.encoder, images.x_train)  # not yet normalised
norm, B = CodeBatchNorm(d), 128
differences = []
for step in range(600):
    # Drawn at random: neighbouring images of MNIST are by the same writers.
    batch = before[torch.randint(len(before), (B,), generator=generator)]
    in_evaluation = norm.eval()(batch)
    in_training = norm.train()(batch)  # and the running averages move on
    if step >= 100:  # from here on the averages have forgotten where they began
        differences.append((in_training - in_evaluation).square().mean())
difference = torch.stack(differences).mean()
kurtosis = ((before - before.mean(0)) / before.std(0)).pow(4).mean()
ideal = (1 + (kurtosis - 1) / 4) / B
predicted = ideal * 2 / (2 - norm.momentum)
print(f"mean squared difference {difference:.5f}, predicted {predicted:.5f}")
print(f"against ideal statistics it would be    {ideal:.5f}")
# 500 batches, whose averages overlap over ten or twenty: a standard error near 2 %.
assert 0.92 < difference / predicted < 1.08

# %% [markdown]
# ## What you have seen
#
# - Batch norm alone turns $N(0, I)$ into a usable source of codes, because it fixes mean and variance.
# - The entropy brings the codes nearer to $N(0, I)$ than batch norm alone can, in nats, and their lengths farther from
#   the law that those of normal codes have.
# - Neither makes the codes normal: a mixture fitted afterwards still samples better.
# - A mixture fitted to the codes of the *plain* autoencoder is a strong rival: compare its row in the table.
#
# Try: $\lambda = 0.1$ or $10$ in `EAE(..., lam=...)`. Watch the squared error, the correlations and the Fréchet distance.
