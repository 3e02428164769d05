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
# # Experiment: the family
#
# The last notebook puts the models of the book and their relatives side by side: on one line, on one map, and on one data
# set. We check the line where everything can be summed, three algorithms that have no decoder or no encoder, and then let
# eleven models compete for six prizes. Guess now: will one model win them all?
# The derivations are in the chapter *The family*.

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
import itertools
import math
import textwrap
import time

import matplotlib.pyplot as plt
import torch
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE, LocallyLinearEmbedding

from gae_core import metrics, plots
from gae_core.data import size_from_environment
from gae_core.studies import family, family_map

device = "cuda" if torch.cuda.is_available() else "cpu"
SIZE = size_from_environment("full" if device == "cuda" else "short")
print(f"size: {SIZE}")


def seeded(seed):
    return torch.Generator().manual_seed(seed)


# %% [markdown]
# ## Step 1: one line
#
# A thousand random models with six codes each, and one datum. Four numbers: the value of the best code, the best bound by
# a distribution on the three best codes, the log-likelihood, and the value of the best code plus $\log 6$.
# Predict their order.

# %% tags=["nbval-check-output"]
joint = 3 * torch.randn(
    1000, 6, generator=seeded(0), dtype=torch.float64
)  # log q(z) q(x | z), up to a constant
point = joint.max(1).values
top = joint.sort(1, descending=True).values[:, :3]
r = top.softmax(1)  # the best distribution on three codes
cloud = (r * top).sum(1) - (r * r.log()).sum(1)
likelihood = joint.logsumexp(1)
print("point <= cloud:", bool((point <= cloud).all()))
print("cloud <= log-likelihood:", bool((cloud <= likelihood).all()))
print(
    "log-likelihood <= point + log 6:",
    bool((likelihood <= point + math.log(6)).all()),
)

# %% [markdown]
# With continuous codes a point has the entropy $-\infty$. We narrow a Gaussian around the best code of a linear model, and
# print its bound with and without its entropy.

# %%
curvature, value = 9.0, -2.0  # l(z) = -2 - 9 z^2 / 2
for s in (1.0, 1 / 3, 0.1, 0.01):
    entropy = 0.5 * math.log(2 * math.pi * math.e * s**2)
    mean = value - curvature * s**2 / 2
    print(
        f"s = {s:4.2f}: bound {mean + entropy:6.3f}, without its entropy "
        f"{mean:6.3f}"
    )
    assert mean + entropy <= value + 0.5 * math.log(2 * math.pi / curvature) + 1e-12
print(
    f"log-likelihood {value + 0.5 * math.log(2 * math.pi / curvature):.3f}, at the "
    f"point {value:.3f}"
)

# %% [markdown]
# The bound is best, and tight, at $s = 1/3$, the width of the posterior. The point alone is no bound: with this curvature it
# lies above the log-likelihood. (For which curvatures does it?)
#
# ## Step 2: relatives with one part missing
#
# NMF's update multiplies. Does the error ever rise? LLE's weights: which of a turn, a scale, a shift and a shear do they notice?
# And t-SNE: is its gradient what automatic differentiation says?

# %% tags=["nbval-check-output"]
W, x, z = (
    torch.rand(shape, generator=seeded(i), dtype=torch.float64)
    for i, shape in enumerate([(7, 4), (7,), (4,)])
)
errors = []
for _ in range(300):
    errors.append(float((x - W @ z).square().sum()))
    z = z * (W.T @ x) / (W.T @ W @ z)
print(
    "NMF's error never rises:",
    all(b <= a + 1e-14 for a, b in itertools.pairwise(errors)),
)


def weights(x, near):
    gram = (x - near) @ (x - near).T
    w = torch.linalg.solve(gram, torch.ones(len(near), dtype=x.dtype))
    return w / w.sum()


x, near = (
    torch.randn(n, 6, generator=seeded(n), dtype=torch.float64) for n in (1, 4)
)
Q = torch.linalg.qr(torch.randn(6, 6, generator=seeded(9), dtype=torch.float64)).Q
shear = torch.eye(6, dtype=torch.float64) + torch.ones(
    6, 6, dtype=torch.float64
).triu(1)
moves = {
    "a turn": lambda v: v @ Q,
    "a scale": lambda v: 7 * v,
    "a shift": lambda v: v + 3,
    "a shear": lambda v: v @ shear,
}
for name, move in moves.items():
    print(
        f"LLE's weights notice {name}:",
        not torch.allclose(weights(move(x), move(near)), weights(x, near)),
    )

y = torch.randn(9, 2, generator=seeded(0), dtype=torch.float64, requires_grad=True)
off = 1 - torch.eye(9, dtype=torch.float64)
p = torch.rand(9, 9, generator=seeded(1), dtype=torch.float64) * off
p = (p + p.T) / (p + p.T).sum()
w = off / (1 + (y[:, None] - y).square().sum(2))
q = w / w.sum()
pair = off > 0
(p[pair] * (p[pair] / q[pair]).log()).sum().backward()
formula = 4 * (((p - q) * w)[..., None] * (y[:, None] - y)).sum(1)
print("t-SNE's gradient is the formula's:", torch.allclose(y.grad, formula))

# %% [markdown]
# ## Step 3: the map
#
# Where would you put PCA, the VAE, t-SNE and a GAN, by how they find a code and by what they assume of it?
# The picture is drawn from the table in `gae_core.studies.family_map`.

# %% mystnb={"figure": {"name": "fig-family-map", "caption": "How a code is found, against what is assumed of its distribution; the colour says what is maximised."}, "image": {"alt": "A grid with five rows, how a code is found, and four columns, what is assumed of its distribution, with the names of the models in coloured boxes."}}
colours = dict(
    zip(
        family_map.GOALS,
        ("#9ecae1", "#a1d99b", "#fdd0a2", "#dadaeb", "#fcaeae"),
        strict=True,
    )
)
line, gap = (
    0.23,
    0.09,
)  # height of a line of text and of the space between two boxes, in rows
figure, ax = plt.subplots(figsize=(6, 5), layout="constrained")
for row, found in enumerate(family_map.FOUND):
    for column, known in enumerate(family_map.KNOWN):
        here = [
            place
            for place in family_map.MAP
            if (place.found, place.known) == (found, known)
        ]
        names = [
            textwrap.fill(
                place.model.replace("autoencoder", "autoenc."),
                13,
                break_on_hyphens=False,
            )
            for place in here
        ]
        heights = [line * (name.count("\n") + 1) for name in names]
        at = row - (sum(heights) + gap * (len(names) - 1)) / 2
        for place, name, height in zip(here, names, heights, strict=True):
            box = {
                "boxstyle": "round,pad=0.1",
                "facecolor": colours[place.goal],
                "edgecolor": "none",
            }
            text = {
                "ha": "center",
                "va": "center",
                "fontsize": 12,
                "linespacing": 0.95,
                "color": "black",
            }
            ax.text(column, at + height / 2, name, bbox=box, **text)
            at += height + gap
for goal, colour in colours.items():
    ax.scatter([], [], marker="s", s=90, color=colour, label=goal)
ax.set(xlim=(-0.5, 3.5), ylim=(4.5, -0.5))
ax.set_xlabel("assumed of the codes", fontsize=12)
ax.set_ylabel("a code is found by", fontsize=12)
ax.set_xticks(range(4), family_map.KNOWN, fontsize=12)
ax.set_yticks(
    range(5), [found.replace(" ", "\n") for found in family_map.FOUND], fontsize=12
)
ax.set_xticks([0.5, 1.5, 2.5], minor=True)
ax.set_yticks([0.5, 1.5, 2.5, 3.5], minor=True)
ax.grid(which="minor", color="0.8")
ax.tick_params(which="both", length=0)
legend = figure.legend(
    loc="outside upper center",
    ncols=3,
    fontsize=12,
    frameon=False,
    handletextpad=0.2,
)

# %% tags=["nbval-check-output"]
direct = [place.model for place in family_map.MAP if place.known == "in the model"]
print("can be sampled at once:", "; ".join(direct))
print(
    "no decoder:",
    "; ".join(
        place.model for place in family_map.MAP if place.known == "no decoder"
    ),
)

# %% [markdown]
# ## Step 4: one table
#
# The 8×8 digits, 1,347 to fit and 450 to test, ten numbers for a code. The chapter's table is on MNIST, with more models and
# longer training. Every network gets what a mixture of Gaussians has: a variance of the noise for each pixel, measured on
# training images. *Odd* is the share of right answers when the density is to tell an image from the halves of two, put
# together; *missing* the squared error of a pixel of the right half, given the left. Before you run: which of these will
# reconstruct best, which will sample best?

# %%
names = [
    "pca",
    "ppca",
    "k_means",
    "mixture",
    "nmf",
    "local_pca",
    "autoencoder",
    "gae",
    "eae",
    "vae",
    "gan",
]
columns = {
    "error": "squared error a pixel",
    "own": "Fréchet, own",
    "fitted": "Fréchet, fitted",
    "density": "log-density, nats",
    "odd": "AUROC of the density, halves",
    "missing": "squared error of a missing pixel",
    "neighbours": "trustworthiness",
}


def recipe_of(name):
    """That of a recorded run, or one with less of everything."""
    recipe = family.recipe(name, "digits", "medium")
    if SIZE != "short":
        return recipe
    epochs = recipe.epochs * 2 // 7
    return dataclasses.replace(
        recipe, epochs=epochs, density=100, draws=50, probe=100
    )


table, pictures = {}, {}
start = time.perf_counter()
for name in ["training_images", *names]:
    recipe = recipe_of(name)
    images = family.images_of("digits", recipe.rows, recipe.test)
    member, _ = family.fit(recipe, images.x_train.flatten(1), images.y_train, 0)
    values, pictures[name] = family.measure(member, images, recipe, 0)
    table[name] = {
        short: values[key] for short, key in columns.items() if key in values
    }
print(f"{time.perf_counter() - start:.0f} s")
print(f"{'':<16}" + "".join(f"{short:>11}" for short in columns))
for name, row in table.items():
    print(
        f"{name:<16}"
        + "".join(f"{row[c]:>11.4f}" if c in row else f"{'-':>11}" for c in columns)
    )

# %% tags=["nbval-check-output"]
trained = {name: table[name] for name in names}


def best_by(*columns, sign=1):
    """The model that has the least of some columns, or with sign=-1 the most."""
    return min(
        trained,
        key=lambda name: min(
            sign * trained[name].get(c, math.inf * sign) for c in columns
        ),
    )


best = {
    "error": best_by("error"),
    "samples": best_by("own", "fitted"),
    "density": best_by("density", sign=-1),
    "odd": best_by("odd", sign=-1),
    "missing": best_by("missing"),
    "neighbours": best_by("neighbours", sign=-1),
}
yardstick = table["training_images"]
print("one model wins all six:", len(set(best.values())) == 1)
print(
    "samples as good as training images:",
    any(
        min(r.get(c, math.inf) for c in ("own", "fitted")) <= yardstick["own"]
        for r in trained.values()
    ),
)
print(
    "noise and a prior cost PCA less than 5 % of its error:",
    1 <= table["ppca"]["error"] / table["pca"]["error"] < 1.05,
)
print(
    "components raise the density:",
    table["mixture"]["density"] > table["ppca"]["density"],
)
print(
    "a mixture fills in better than the mean image:",
    trained["mixture"]["missing"] < yardstick["missing"],
)

# %%
print(best)
assert (
    SIZE != "short" or best["error"] == "local_pca"
)  # longer training may turn it
pixels = images.x_test[0].numel()
shift = pixels * math.log(16)  # the digits' grey levels are 0 to 16
print(
    f"with pixels from 0 to 16 every log-density above would be {shift:.0f} nats "
    "lower"
)
densities = [row["density"] for row in trained.values()]
assert shift > max(densities) - min(densities)

# %% mystnb={"figure": {"name": "fig-family-images", "caption": "Left: held-out digits and their reconstructions. Right: samples, of the model's own distribution where it has one, else from a density fitted to the codes."}, "image": {"alt": "Two columns of rows of digits. Left, test images and reconstructions by six models; right, training images and samples of the same models."}}
chosen = {
    "pca": "PCA",
    "local_pca": "local PCA",
    "gae": "GAE",
    "eae": "EAE",
    "vae": "VAE",
    "gan": "GAN",
}
figure, axes = plt.subplots(
    len(chosen) + 1, 2, figsize=(6, 5), layout="constrained"
)
rows = [
    (
        "test images",
        pictures["pca"]["test images"],
        "training images",
        pictures["training_images"]["samples"],
    )
]
for name, title in chosen.items():
    kind = "samples" if "samples" in pictures[name] else "samples, fitted"
    rows.append(
        (
            title,
            pictures[name]["reconstructions"],
            f"{title}: {kind}",
            pictures[name][kind],
        )
    )
for (left, right), (title, back, other, drawn) in zip(axes, rows, strict=True):
    plots.draw_images(left, back[:10], columns=10, title=title)
    plots.draw_images(right, drawn[:10], columns=10, title=other)

# %% [markdown]
# ## Step 5: two numbers to look at
#
# All 1,797 digits in the plane, by three methods, and two random numbers each. Trustworthiness asks whether the twelve nearest
# in the plane are near in the images. Predict its order, and what the random numbers get.

# %%
x = torch.cat([images.x_train, images.x_test]).flatten(1).double()
y = torch.cat([images.y_train, images.y_test])
start = time.perf_counter()
embeddings = {
    "PCA": PCA(2).fit_transform(x.numpy()),
    "LLE": LocallyLinearEmbedding(
        n_neighbors=30, n_components=2, eigen_solver="dense"
    ).fit_transform(x.numpy()),
    "t-SNE": TSNE(2, init="pca", max_iter=500, random_state=0).fit_transform(
        x.numpy()
    ),
    "chance": torch.rand(len(x), 2, generator=seeded(0)).numpy(),
}
trust = {
    name: metrics.trustworthiness(x, torch.from_numpy(z), 12)
    for name, z in embeddings.items()
}
print(
    {name: round(value, 4) for name, value in trust.items()},
    f"{time.perf_counter() - start:.0f} s",
)
n, k = len(x), 12
expected = 1 - (n - k) * (n - k - 1) / ((n - 1) * (2 * n - 3 * k - 1))
assert (
    abs(trust["chance"] - expected) < 0.02
)  # its standard deviation here is 0.002

# %% tags=["nbval-check-output"]
print("from the most trustworthy:", sorted(trust, key=trust.get, reverse=True))

# %% mystnb={"figure": {"name": "fig-family-embeddings", "caption": "The digits in the plane by three methods, coloured by their label, with the trustworthiness at twelve neighbours."}, "image": {"alt": "Three scatter plots. PCA is one overlapping cloud. LLE is a dense cloud in which most labels mix. t-SNE has about ten separate clusters, each nearly of one colour."}}
figure, axes = plt.subplots(1, 3, figsize=(8.5, 3.2), layout="constrained")
for ax, name in zip(axes, ("PCA", "LLE", "t-SNE"), strict=True):
    z = embeddings[name]
    ax.scatter(z[:, 0], z[:, 1], c=y, cmap="tab10", s=4)
    ax.set(xticks=[], yticks=[])
    ax.set_title(f"{name}: {trust[name]:.3f}", fontsize=13)

# %% [markdown]
# ## What you have seen
#
# - The best code, the best bound and the likelihood stand on one line. For continuous codes the first is no bound.
# - NMF, LLE and t-SNE are optimisations of other things: an error under a sign, weights, neighbourhoods.
# - No model wins everything, and what is easy to fit is hard to beat on small data.
# - A log-density has units; a trustworthiness of one half is no information.
#
# Try: `SIZE = "full"`, which trains the networks three and a half times as long. Who gains?
