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
# # Experiment: codes without an encoder
#
# A generative autoencoder (GAE) has a decoder and no encoder: the code of a datum is found by making it likely.
# We watch the search converge and diverge, see that "lower bounds" by a maximum need not be lower, find k-means, PCA, local
# PCA and NMF as one model with its parts exchanged, and train a GAE with a network for its decoder.
# The derivations are in the chapter *One framework: codes without an encoder*.

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
from scipy.stats import norm
from sklearn.cluster import KMeans
from sklearn.datasets import make_swiss_roll
from sklearn.decomposition import NMF, PCA

from gae_core import data, metrics, nets, plots, train
from gae_core.densities import fit_gaussian_mixture
from gae_core.models.autoencoder import Autoencoder
from gae_core.models.gae import GAE, GGAE, KernelMixture, soft_minimum
from gae_core.models.local_linear import (
    factor_log_likelihood,
    fit_local_linear,
    nmf_step,
)

device = "cuda" if torch.cuda.is_available() else "cpu"
SIZE = data.size_from_environment("full" if device == "cuda" else "short")
print(f"size: {SIZE}, device: {device}")


def seeded(seed):
    return torch.Generator().manual_seed(seed)


# %% [markdown]
# ## Step 1: a bound that is none
#
# For finitely many codes $\max_z q(z)\,q(x|z)$ is below $q(x)$, the sum of all terms. Predict: is it so for a continuous code?
# The code is uniform on $[-\frac12, \frac12]$, and $x = z$ plus noise of standard deviation 0.1. We look at $x = 0$.

# %% tags=["nbval-check-output"]
s = 0.1
log_q = torch.tensor(norm.cdf(0.5 / s) - norm.cdf(-0.5 / s)).log()
largest = torch.tensor(norm.pdf(0, 0, s)).log()
print(f"log q(0) = {log_q:.4f}, the 'lower bound' = {largest:.4f} nats")

cells = (
    torch.arange(1000, dtype=torch.float64) + 0.5
) / 1000 - 0.5  # the code in 1000 cells: finitely many
terms = torch.as_tensor(norm.logpdf(0, cells, s)) - torch.log(torch.tensor(1000.0))
print(
    f"in 1000 cells: log q(0) = {terms.logsumexp(0):.4f}, the bound = "
    f"{terms.max():.4f} nats"
)

# %% [markdown]
# A density is no probability. Counted in cells, the bound holds again, and how loose it is depends on the cells.
#
# A second formula to try before it is believed: $-\log\sum_i e^{\beta d_i}$ as a smooth minimum of $-d_i$, for those who care for
# the worst datum. Take a hundred losses $d_i$ from 0 to 2.69, so that the minimum is $-2.69$. Predict its value at $\beta = 50$.

# %% tags=["nbval-check-output"]
values = -torch.linspace(0, 2.69, 100, dtype=torch.float64)
for beta in (1, 5, 50):
    printed = -(-beta * values).logsumexp(0)
    of_sum, of_mean = (
        soft_minimum(values, beta, mean=mean) for mean in (False, True)
    )
    print(
        f"beta = {beta:>2}: {printed:8.2f}, divided by beta {of_sum:5.2f}, "
        f"and of the mean {of_mean:5.2f}"
    )

# %% [markdown]
# Without the factor it is a minimum of nothing. With it the sum comes to the minimum from below, the mean from above.
#
# ## Step 2: the ascent to the code
#
# A linear decoder with noise $\sigma$ and normal codes. The curvature of $-\log q(z)\,q(x|z)$ is $W^\top W/\sigma^2 + I$, and the step
# must be below 2 over its largest eigenvalue. Predict what happens one per cent above.

# %% mystnb={"figure": {"name": "fig-gae-ascent", "caption": "Distance of the code from its maximum during the ascent, for steps relative to the limit."}, "image": {"alt": "Four curves of the error against steps on a logarithmic scale. Three fall as straight lines, the one above the limit rises."}}
sigma = 0.7
W = torch.randn(6, 3, generator=seeded(0), dtype=torch.float64)
mu = torch.randn(6, generator=seeded(1), dtype=torch.float64)
x = torch.randn(5, 6, generator=seeded(2), dtype=torch.float64)
decoder = torch.nn.Linear(3, 6, dtype=torch.float64)
decoder.load_state_dict({"weight": W, "bias": mu})
H = W.T @ W / sigma**2 + torch.eye(3, dtype=torch.float64)
limit = 2 / float(torch.linalg.eigvalsh(H)[-1])
best = torch.linalg.solve(H, W.T @ (x - mu).T / sigma**2).T

errors = {}
for share in (0.2, 0.6, 0.97, 1.01):
    gae = GAE(decoder, 3, steps=1, step_size=share * limit, sigma=sigma)
    with torch.no_grad():
        errors[share] = [
            float((gae.infer(x, steps=t)[0] - best).norm())
            for t in range(0, 201, 10)
        ]
figure, ax = plt.subplots(figsize=(7, 3.4), layout="constrained")
for share, error in errors.items():
    ax.semilogy(range(0, 201, 10), error, label=f"{share} of the limit")
ax.set(xlabel="steps", ylabel="distance from the maximum")
legend = ax.legend(fontsize=8)

# %% tags=["nbval-check-output"]
for share, error in errors.items():
    print(
        f"{share} of the limit:",
        "converges" if error[-1] < error[0] else "diverges",
    )
exact = -factor_log_likelihood(
    x, mu, W, torch.full((6,), sigma**2, dtype=torch.float64)
)
gae = GAE(decoder, 3, steps=300, step_size=0.5 * limit, sigma=sigma)
print(
    "Laplace's correction makes the value the likelihood:",
    torch.allclose(gae.laplace_nll(x), exact),
)
print(
    "the maximum alone is the likelihood:", torch.allclose(gae.loss(x).total, exact)
)

# %% [markdown]
# ## Step 3: the family on the digits
#
# 1,347 images of 8×8 to fit and 450 to test. The same function fits k-means ($q = 0$), PCA ($K = 1$) and local PCA.
# First: are they what we say? Both start from the same centres.

# %% tags=["nbval-check-output"]
digits = data.load("digits")
fit_to, unseen = (v.flatten(1).double() for v in (digits.x_train, digits.x_test))
start = fit_to[torch.randperm(len(fit_to), generator=seeded(0))[:10]]
ours = fit_local_linear(fit_to, 10, 0, start=start)
theirs = KMeans(
    10, init=start.numpy(), n_init=1, max_iter=1000, tol=0, algorithm="lloyd"
).fit(fit_to.numpy())
print(
    "hard codes are Lloyd's k-means:",
    torch.allclose(ours.model.mu, torch.from_numpy(theirs.cluster_centers_)),
)

pca = PCA(5, svd_solver="full").fit(fit_to.numpy())
projected = torch.from_numpy(pca.inverse_transform(pca.transform(unseen.numpy())))
print(
    "one component is PCA:",
    torch.allclose(fit_local_linear(fit_to, 1, 5).model(unseen), projected),
)

linear = torch.nn.Linear(5, 64, dtype=torch.float64)
linear.load_state_dict(
    {
        "weight": torch.from_numpy(pca.components_.T.copy()),
        "bias": torch.from_numpy(pca.mean_),
    }
)
one_step = GAE(linear, 5, steps=1, step_size=1.0, prior="flat", n_starts=3)
code = torch.from_numpy(pca.transform(unseen.numpy()))
print(
    "one step from anywhere is PCA's code:",
    all(torch.allclose(z, code) for z in one_step.infer(unseen)),
)

# %% [markdown]
# A continuous code can choose a component too, by weights $u_k(v) \propto e^{-\|v - w_k\|^2}$. We put the $w_k$ of the ten centres on a
# circle in the plane, and let the code of an unseen image climb from the middle, where all weights are equal. Does it get
# to the centre that is nearest to the image? And what does a prior $N(0, I)$ of the code change?

# %% tags=["nbval-check-output"]
angle = torch.arange(10, dtype=torch.float64) * 2 * torch.pi / 10
mixture = KernelMixture(10, 2, 64).double()
circle = 3 * torch.stack([angle.cos(), angle.sin()], 1)
mixture.load_state_dict({"centres": circle, "means": ours.model.mu})
nearest = ours.model.encode(unseen).component
for prior in ("flat", "normal"):
    gae = GGAE(mixture, 2, steps=100, step_size=0.1, sigma=0.2, prior=prior)
    weights = mixture.log_weights(gae.encode(unseen)).exp()
    right = (weights.argmax(1) == nearest).double().mean()
    print(
        f"prior {prior:<6}: nearest for {right:.2f} of the images, "
        f"with a weight of {weights.amax(1).mean():.2f}"
    )


# %%
def error(model, x=unseen):
    return float((x - model(x)).square().mean())


def local_pca(points, components, q, starts):
    """The fit with the least training error among those started from k-means."""
    fits = []
    for seed in range(starts):
        centres = fit_local_linear(
            points, components, 0, generator=seeded(seed)
        ).model.mu
        fits.append(fit_local_linear(points, components, q, start=centres))
    return fits


def best_fit(fits):
    return max(fits, key=lambda fit: float(fit.objective[-1])).model


def nmf(q):
    """NMF by coordinate descent from scikit-learn's start; new codes likewise."""
    known = NMF(
        q, init="nndsvda", solver="cd", max_iter=1, tol=0
    )  # one round, which is as good a start as its own
    z, W = (
        torch.from_numpy(known.fit_transform(fit_to.numpy())),
        torch.from_numpy(known.components_),
    )
    for _ in range(200):
        z = nmf_step(fit_to, z, W)
        W = nmf_step(fit_to.mT, W.mT, z.mT).mT
    z = torch.zeros(len(unseen), q, dtype=W.dtype)
    for _ in range(200):
        z = nmf_step(unseen, z, W)
    return z @ W


start_time = time.perf_counter()
starts = 4 if SIZE == "short" else 20
table = {"mean": {0: error(fit_local_linear(fit_to, 1, 0).model)}}
table["PCA"] = {
    q: error(fit_local_linear(fit_to, 1, q).model) for q in (2, 5, 10, 20)
}
table["NMF"] = {q: float((unseen - nmf(q)).square().mean()) for q in (2, 5, 10, 20)}
for components in (10, 50):
    table[f"k-means, K = {components}"] = {
        0: error(best_fit(local_pca(fit_to, components, 0, starts)))
    }
table["local PCA, K = 10"] = {
    q: error(best_fit(local_pca(fit_to, 10, q, starts))) for q in (2, 5, 8)
}
print(f"{time.perf_counter() - start_time:.0f} s")
for name, row in table.items():
    print(
        f"{name:<18}"
        + "".join(f"  q = {q:>2}: {value:.4f}" for q, value in row.items())
    )

# %% mystnb={"figure": {"name": "fig-gae-error", "caption": "Held-out squared error a pixel against the dimension of the continuous code."}, "image": {"alt": "Lines of the test error against the dimension on a logarithmic scale. PCA falls, NMF lies above it, local PCA with ten components below. k-means and the mean are horizontal lines."}}
figure, ax = plt.subplots(figsize=(7, 3.6), layout="constrained")
for name, row in table.items():
    if len(row) == 1:
        ax.axhline(*row.values(), linestyle=":", color="grey")
        ax.annotate(name, (20, *row.values()), ha="right", va="bottom", fontsize=8)
    else:
        ax.plot(list(row), list(row.values()), "o-", label=name)
ax.set(
    xlabel="dimension of the continuous code",
    ylabel="squared error a pixel",
    yscale="log",
)
legend = ax.legend(fontsize=8)

# %% tags=["nbval-check-output"]
print(
    "NMF errs more than PCA:",
    all(table["NMF"][q] > table["PCA"][q] for q in table["PCA"]),
)
print(
    "ten planes are better than five numbers:",
    table["local PCA, K = 10"][2] < table["PCA"][5],
)
print(
    "fifty centres are worse than ten planes:",
    table["k-means, K = 50"][0] > table["local PCA, K = 10"][2],
)

# %% [markdown]
# ## Step 4: the start matters
#
# Twenty planes on a Swiss roll, from twenty starts. Which start would you keep, and by which error do you choose it?
# One can also come to the hard components from soft ones: at a large $\sigma$ every plane feels every point, and as it
# falls each settles on its part. Predict which way of starting ends lower.

# %%
roll, new = (
    torch.from_numpy(make_swiss_roll(n, noise=0.05, random_state=n)[0])
    for n in (2000, 1000)
)


def annealed(points, components, q, seed):
    """Soft fits with falling sigma from the centres of k-means, then a hard one."""
    model = fit_local_linear(points, components, 0, generator=seeded(seed)).model.mu
    soft = {"hard": False, "equal_weights": True, "max_steps": 8}
    for sigma in (1.5, 1.0, 0.7, 0.5, 0.35, 0.25, 0.15, 0.1):
        model = fit_local_linear(
            points, components, q, start=model, sigma=sigma, **soft
        ).model
    return fit_local_linear(points, components, q, start=model)


n_starts = 8 if SIZE == "short" else 20
ways = {
    "from k-means": local_pca(roll, 20, 2, 20),
    "from soft planes": [annealed(roll, 20, 2, seed) for seed in range(n_starts)],
}
training, test = (
    {name: [error(fit.model, v) for fit in fits] for name, fits in ways.items()}
    for v in (roll, new)
)
chosen = {
    name: min(range(len(errors)), key=errors.__getitem__)
    for name, errors in training.items()
}

# %% mystnb={"figure": {"name": "fig-gae-swiss-roll", "caption": "Left: twenty planes on a Swiss roll, the component of each point in colour. Right: the test error of each start, for two ways of starting."}, "image": {"alt": "Left, a spiral seen from its end, cut into patches of different colours. Right, dots for the test error of each start, in two rows; the start with the least training error of each row is ringed. The row of soft planes lies further left."}}
figure, axes = plt.subplots(1, 2, figsize=(8.5, 3.6), layout="constrained")
component = (
    ways["from soft planes"][chosen["from soft planes"]].model.encode(new).component
)
axes[0].scatter(new[:, 0], new[:, 2], c=component, cmap="tab20", s=6)
axes[0].set(
    aspect="equal", xticks=[], yticks=[], title="the best start by training error"
)
for row, (name, errors) in enumerate(test.items()):
    axes[1].plot(errors, [row] * len(errors), "o", alpha=0.5)
    axes[1].plot(
        errors[chosen[name]],
        row,
        "o",
        ms=12,
        mfc="none",
        mec="black",
        label="chosen" if row else None,
    )
axes[1].set(
    yticks=range(2),
    yticklabels=list(test),
    ylim=(-0.5, 1.5),
    xlabel="test error of each start",
)
legend = axes[1].legend(fontsize=8)

# %%
for name, errors in test.items():
    median = sorted(errors)[len(errors) // 2]
    print(
        f"{name:<18} chosen by training error {errors[chosen[name]]:.4f}, median "
        f"{median:.4f}, worst {max(errors):.4f}"
    )
    assert (
        errors[chosen[name]] < median
    )  # choosing by training error is better than taking any start

# %% tags=["nbval-check-output"]
better = min(test["from soft planes"]) < min(test["from k-means"])
print("the best soft start is better than the best of the others:", better)

# %% [markdown]
# ## Step 5: a network as decoder
#
# The same decoder three times: with an encoder beside it, as GAE whose gradient passes through the steps of the ascent,
# and as GAE for which the code is a constant. The GAE's loss has normal codes, so that they cannot grow without end.

# %%
images = data.example_images()
x = data.to_unit(images.x_train[: 2000 if SIZE == "short" else 60_000]).to(device)
dim, epochs = 8, {"digits": 40}.get(images.name, 10 if SIZE == "short" else 30)
ascent = {"steps": 6, "step_size": 0.02, "sigma": 0.3}
histories, models = {}, {}
for name in ("autoencoder", "GAE, through the steps", "GAE, code as constant"):
    torch.manual_seed(0)
    encoder, decoder = nets.mlp_pair(images.shape, dim, hidden=(128,))
    through = name == "GAE, through the steps"
    model = (
        Autoencoder(encoder, decoder, dim)
        if name == "autoencoder"
        else GAE(decoder, dim, second_order=through, **ascent)
    )
    start_time = time.perf_counter()
    histories[name] = train.fit(
        model,
        x,
        epochs=epochs,
        batch_size=64,
        lr=3e-3,
        schedule=lambda t: 1 - t,
        progress=False,
    ).history
    models[name] = model
    held_out = metrics.squared_error(model, images.x_test[:1000]).mean()
    print(
        f"{name:<24} held-out squared error {held_out:7.3f}, "
        f"{time.perf_counter() - start_time:.0f} s"
    )

# %%
errors = {
    name: float(metrics.squared_error(m, images.x_test[:1000]).mean())
    for name, m in models.items()
}
mean = data.to_unit(images.x_test[:1000]) - x.mean(0).cpu()
assert all(
    e < 0.8 * float(mean.square().flatten(1).sum(1).mean()) for e in errors.values()
)  # codes that say something

# %% mystnb={"figure": {"name": "fig-gae-network", "caption": "Held-out images, reconstructions, and samples of the GAE from a mixture of ten fitted to its codes."}, "image": {"alt": "Five rows of twelve digits: held-out images, reconstructions by the autoencoder, by the two GAEs, and samples."}}
gae = models["GAE, through the steps"]
density = fit_gaussian_mixture(
    metrics.in_batches(gae.encode, x[:2000].cpu()), 10, seed=0
)
samples = metrics.in_batches(gae.decode, density.sample(12, generator=seeded(0)))
rows = {"held-out image": images.x_test[:12]}
rows |= {
    name: metrics.in_batches(m, images.x_test[:12]) for name, m in models.items()
}
figure, axes = plt.subplots(5, 1, figsize=(8, 4), layout="constrained")
for ax, (title, row) in zip(
    axes, [*rows.items(), ("GAE, samples", samples)], strict=True
):
    plots.draw_images(ax, row, columns=12, title=title)

# %% [markdown]
# ## What you have seen
#
# - A maximum of densities bounds nothing; a maximum of probabilities does; Laplace's correction restores the likelihood.
# - The ascent converges below a step that the curvature sets, and diverges above it.
# - k-means, PCA, local PCA and NMF are one model: which codes are allowed, and how they are found.
# - Local minima differ much. Choose the start by the training error, and look at the test error once.
# - An encoder is not needed to train a decoder. It is needed to be fast.
#
# Try: more steps in `ascent`, or `n_starts=4`. Watch the error and the time.
