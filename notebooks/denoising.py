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
# # Experiment: denoising
#
# Corrupt and restore, again and again: with the right denoiser that samples the data. We see the theorem on a small space
# where everything can be computed, what walkback makes of it there, the score in a denoiser's correction, chains of digits
# with and without walkback, and a popular measure of samples that prefers averages to data.
# The derivations are in the chapter *Denoising*.

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
import numpy as np
import torch

from gae_core import data, metrics, nets, plots, train
from gae_core.models.denoising import (
    ContractiveAutoencoder,
    DenoisingAutoencoder,
    gaussian_noise,
    salt_and_pepper,
)
from gae_core.models.local_linear import fit_local_linear
from gae_core.studies import judge

device = "cuda" if torch.cuda.is_available() else "cpu"
SIZE = data.size_from_environment("full" if device == "cuda" else "short")
images = data.example_images()
print(f"size: {SIZE}, device: {device}")


def seeded(seed):
    return torch.Generator().manual_seed(seed)


# %% [markdown]
# ## Step 1: the theorem where it can be computed
#
# Five states, a random distribution $p$, a random corruption $C$. Bayes' rule gives the best denoiser $P$.
# Predict: which distribution does the chain corrupt, restore, corrupt, restore have in the long run? And if the denoiser is
# one tenth wrong?

# %% tags=["nbval-check-output"]
rng = np.random.default_rng(0)
p, C = rng.dirichlet(np.ones(5)), rng.dirichlet(np.full(5, 0.7), 5)
joint = p[:, None] * C
P = (joint / joint.sum(0)).T
wrong = 0.9 * P + 0.1 * rng.dirichlet(np.ones(5), 5)


def long_run(T):
    return np.linalg.matrix_power(T, 500)[0]


print("the data:          ", p.round(4))
print("the chain:         ", long_run(C @ P).round(4))
print("one tenth wrong:   ", long_run(C @ wrong).round(4))
print("total variation:   ", (0.5 * np.abs(long_run(C @ wrong) - p).sum()).round(4))

# %% [markdown]
# ## Step 2: walkback where it can be computed
#
# A corruption that leaves most states as they are makes a slow chain. Walkback walks five steps from each clean state and
# asks for that state at each of them. The best answer to the walk of the true chain is, in one step, the mean of one to
# five of its steps. But the walk is that of the denoiser in training: answer it, walk with the answer, answer again.
# Predict: where does the slowest eigenvalue go?

# %% tags=["nbval-check-output"]
slow_C = 0.98 * np.eye(5) + 0.02 * C


def reverse(corruption):
    """Bayes' rule: rows are the distributions of the clean state."""
    joint = p[:, None] * corruption
    return (joint / joint.sum(0)).T


def answer(P, k):
    """The best denoiser for walks of k rounds with P."""
    walk, mixed = np.eye(5), np.zeros((5, 5))
    for _ in range(k):
        mixed = mixed + walk @ slow_C / k
        walk = walk @ slow_C @ P
    return reverse(mixed)


def slowest(P):
    return np.sort(np.linalg.eigvals(slow_C @ P).real)[-2]


def optimum(tau, k):
    """The solution s < 1 of s = tau (1 + s + ... + s^(k-1)) / k, from above."""
    s = tau
    for _ in range(20_000):
        s = tau * sum(s**j for j in range(k)) / k
    return s


true_P = reverse(slow_C)
print(f"without walkback:         {slowest(true_P):.4f}")
print(f"a walk of the true chain: {slowest(answer(true_P, 5)):.4f}")
own = true_P
for _ in range(200):
    own = answer(own, 5)
print(f"walks of its own:         {slowest(own):.4f}")
print(f"the equation's solution:  {optimum(slowest(true_P), 5):.4f}")
print("the data are kept:       ", np.allclose(p @ slow_C @ own, p))

# %% mystnb={"figure": {"name": "fig-denoising-walkback", "caption": "Eigenvalue of the chain with k steps of walkback against that of the chain without (lines), and the mean of the powers (dashed); right, the share that is left of what a corrupted state says of the clean one."}, "image": {"alt": "Two panels with five curves. Left, lines for one to five steps: the diagonal, two curves that reach 1 at the right end, two that end at 0.41 and 0.28; dashed curves all reach 1. Right, the quotients: for k steps they start at 1/k and end at the same values."}}
tau = 1 - np.linspace(1, 1e-3, 400) ** 3
figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
for k in range(1, 6):
    s, color = optimum(tau, k), f"C{k - 1}"
    label = "without" if k == 1 else f"{k} steps"
    axes[0].plot(tau, s, color=color, label=label)
    if k > 1:
        powers = sum(tau**j for j in range(1, k + 1)) / k
        axes[0].plot(tau, powers, "--", color=color, lw=1)
    axes[1].plot(tau[1:], s[1:] / tau[1:], color=color, label=label)
axes[0].set(xlabel=r"$\tau$, without walkback", ylabel="$s$, with walkback")
axes[1].set(xlabel=r"$\tau$, without walkback", ylabel=r"$s/\tau$", ylim=(0, 1.05))
legend = axes[0].legend(fontsize=8)

# %% [markdown]
# A chain of five steps of walkback forgets within a few steps, however slow the other is. But look at the right: for that, its $P$
# says little of the state that was corrupted, and much of all the others. A network that gives each pixel a probability
# of its own cannot say "one of these images". It gives their mean. Keep that in mind for step 4.
#
# ## Step 3: the score in the correction
#
# A small network learns to denoise draws from two Gaussians, at three noise levels. Tweedie's identity says that its
# correction, divided by $\sigma^2$, is the score of the smoothed density, whatever the level.

# %%
weights, means, stds = (
    torch.tensor([0.3, 0.7]),
    torch.tensor([-1.0, 1.5]),
    torch.tensor([0.4, 0.6]),
)


def two_gaussians(sigma=0.0):
    parts = torch.distributions.Normal(means, (stds**2 + sigma**2).sqrt())
    return torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(weights), parts
    )


def exact_score(x, sigma):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(two_gaussians(sigma).log_prob(x).sum(), x)[0]


torch.manual_seed(0)
drawn = two_gaussians().sample((8000, 1))
levels, learned, at = (0.25, 0.6, 1.5), {}, torch.linspace(-2.2, 3.2, 41)[:, None]
for sigma in levels:
    torch.manual_seed(0)
    encoder, decoder = (
        nets.mlp([1, 64, 64], activation=torch.nn.Tanh),
        nets.mlp([64, 1]),
    )
    denoiser = DenoisingAutoencoder(
        encoder,
        decoder,
        64,
        corruption=gaussian_noise(sigma),
        likelihood="gaussian",
    )
    how = {
        "epochs": 120,
        "batch_size": 500,
        "lr": 1e-2,
        "schedule": lambda t: 1 - t,
    }
    train.fit(denoiser, drawn, device="cpu", progress=False, **how)
    learned[sigma] = denoiser.score(at, sigma).detach()

# %% mystnb={"figure": {"name": "fig-denoising-score", "caption": "Score of a mixture of two Gaussians: smoothed (line), of the data (dashed), and from a trained denoiser (dots), at three noise levels."}, "image": {"alt": "Three panels. In each a solid curve with dots of a trained denoiser on or near it. A dashed curve, the score of the data, is near the solid one only in the first panel."}}
figure, axes = plt.subplots(1, 3, figsize=(9, 3), layout="constrained", sharey=True)
for ax, sigma in zip(axes, levels, strict=True):
    ax.plot(at, exact_score(at, sigma), label="smoothed")
    ax.plot(at, exact_score(at, 0.0), "--", color="grey", label="data")
    ax.plot(at, learned[sigma], ".", color="black", label="denoiser")
    ax.set(title=rf"$\sigma$ = {sigma}", ylim=(-6, 6), xlabel="x")
axes[0].set_ylabel("score")
legend = axes[0].legend(fontsize=8)

# %%
inside = (at > -1.6) & (at < 2.6)  # where there are data to learn from
for sigma in levels:
    smoothed, bare = (
        (learned[sigma] - exact_score(at, s))[inside].abs().mean()
        for s in (sigma, 0.0)
    )
    print(
        f"sigma = {sigma}: mean distance from the smoothed score {smoothed:.2f}, "
        f"from that of the data {bare:.2f}"
    )
    # a small network on 8,000 draws; the error of a score is that of the denoiser
    # divided by sigma squared
    assert smoothed < 0.04 / sigma**2 and (smoothed < bare or sigma < 0.5)

# %% [markdown]
# ## Step 4: chains of images
#
# The same network twice, on binary images with 40 % of the pixels replaced by coin tosses. With walkback the training
# follows the chain for four steps and asks for the clean image at each.

# %%
binary = (
    (data.to_unit(images.x_train) > 0.5)
    .float()[: 4000 if SIZE == "short" else 60_000]
    .to(device)
)
held_out = (data.to_unit(images.x_test) > 0.5).float()[:1000]
epochs = {"digits": 30}.get(images.name, 9) if SIZE == "short" else 40
models = {}
for name, walkback in (("without walkback", 1), ("with walkback", 4)):
    torch.manual_seed(0)
    pair = nets.mlp_pair(images.shape, 256, hidden=(), output=torch.nn.Identity)
    encoder = torch.nn.Sequential(pair[0], torch.nn.ReLU())
    models[name] = DenoisingAutoencoder(
        encoder, pair[1], 256, corruption=salt_and_pepper(0.4), walkback=walkback
    )
    start = time.perf_counter()
    passes = (
        epochs * 3 if walkback == 1 else epochs
    )  # a step of the walk costs as much as one without it
    history = train.fit(
        models[name], binary, epochs=passes, batch_size=100, lr=2e-3, progress=False
    ).history
    first = history["first"][-50:].mean()
    print(
        f"{name:<18} {passes} epochs, {time.perf_counter() - start:.0f} s, nats a "
        f"clean image {first:.1f}"
    )

# %% mystnb={"figure": {"name": "fig-denoising-chains", "caption": "Chains from six held-out images, every fourth step; above without walkback, below with it."}, "image": {"alt": "Two blocks of six rows of sixteen images. Each row starts with a digit and shows later steps of a chain: sharp strokes above, soft shapes below."}}
chains = {
    name: m.to("cpu").chain(held_out[:6], 64, generator=seeded(0))
    for name, m in models.items()
}
shown = {}
for name, (means_, _) in chains.items():
    steps = torch.cat([held_out[None, :6], means_[3:60:4]])
    shown[name] = steps.transpose(0, 1).flatten(0, 1)
figure = plots.image_panels(shown, columns=16, per_row=1, size=4)

# %% [markdown]
# How much of an image does one restoration keep? The mean image of all digits is what a network says that knows nothing:
# what counts is the share of the distance from it. Predict: with which training is it smaller?

# %%
with torch.no_grad():
    mean = binary.cpu().mean(0)
    away, kept = held_out - mean, {}
    for name, model in models.items():
        model.to("cpu")
        restored = model(model.corruption(held_out, generator=seeded(2)))
        kept[name] = float(((restored - mean) * away).sum() / away.square().sum())
        grey = float(((restored > 0.1) & (restored < 0.9)).float().mean())
        print(
            f"{name:<18} {kept[name]:.2f} of the distance kept, {grey:.0%} of the "
            "pixels grey"
        )
assert kept["with walkback"] < kept["without walkback"]  # drifted to the mean

# %% [markdown]
# ## Step 5: how good, and how different?
#
# Two figures for two virtues. The Fréchet distance of the chains' images to real ones, in the features of the book's
# classifier: small is good. And how fast a chain forgets where it was: the share of chains whose label has changed, and
# how many independent labels a thousand steps are worth, by the effective sample size.

# %%
runs = {
    name: m.chain(held_out[:500], 40, generator=seeded(1))[0]
    for name, m in models.items()
}
classifier = judge.classifier(images)
labels = {
    name: metrics.in_batches(classifier, x.flatten(0, 1)).argmax(1).view(40, -1)
    for name, x in runs.items()
}
origin = metrics.in_batches(classifier, held_out[:500]).argmax(1)
real = metrics.in_batches(classifier.features, held_out)
found, worth = {}, {}
for name, x in runs.items():
    fake = metrics.in_batches(classifier.features, x[[19, 39]].flatten(0, 1))
    found[name] = (
        metrics.frechet_distance(fake, real),
        float((labels[name][-1] != origin).double().mean()),
    )
    worth[name] = metrics.mixing(labels[name], int(images.y_train.max()) + 1).ess
    print(
        f"{name:<18} Fréchet {found[name][0]:8.1f}, another label after 40 steps: "
        f"{found[name][1]:.0%}",
        end=", ",
    )
    print(f"1,000 steps are worth {worth[name]:.0f} labels")
assert all(
    0.05 < moved < 0.95 for _, moved in found.values()
)  # neither stuck nor independent
# By the equation of step 2 the optimum of four steps has more than 400.
assert worth["with walkback"] > 1.3 * worth["without walkback"]

# %% [markdown]
# ## Step 6: a measure that prefers averages
#
# A Parzen estimate puts a Gaussian on each of $n$ samples and reports the likelihood of test images. Predict the order:
# real images, images of the chains, and the centres of k-means, which are averages of images.

# %%
n = 300
pool = data.to_unit(images.x_train[:2000]).flatten(1).double()
centres = fit_local_linear(pool, n, 0, max_steps=5, generator=seeded(0)).model.mu
test = data.to_unit(images.x_test[:1000]).flatten(1)
samples = {"real images": pool[-n:], "centres of k-means": centres}
samples |= {
    f"chain {name}": x[19:40:7, : n // 3].flatten(0, 1).flatten(1)
    for name, x in runs.items()
}
parzen = {
    name: float(metrics.parzen_log_likelihood(v, test, width=0.2).mean())
    for name, v in samples.items()
}
for name, value in parzen.items():
    print(f"{name:<24} {value:8.1f} nats from {len(samples[name])} samples")

# %% tags=["nbval-check-output"]
print(
    "averages are judged better than data:",
    parzen["centres of k-means"] > parzen["real images"],
)

# %% mystnb={"figure": {"name": "fig-denoising-parzen", "caption": "Parzen estimates with the same number of samples and the same width."}, "image": {"alt": "Horizontal bars of the Parzen estimate for real images, centres of k-means and two chains; the centres reach furthest to the right."}}
figure, ax = plt.subplots(figsize=(7, 2.6), layout="constrained")
bars = ax.barh(list(parzen), list(parzen.values()))
ax.bar_label(bars, fmt="%.0f", padding=3)
ax.margins(x=0.15)
text = ax.set_xlabel("nats")

# %% [markdown]
# ## Step 7: contraction
#
# A contractive autoencoder walks along the directions in which its code is sensitive. Two weights of the penalty: what
# happens to the Jacobian, and to the reconstruction?

# %%
small = data.to_unit(images.x_train[:2000])
contractions = {}
for lam in (0.0, 1.0):
    torch.manual_seed(0)
    model = ContractiveAutoencoder(
        *nets.mlp_pair(images.shape, 8, hidden=(128,)), 8, lam=lam
    )
    train.fit(
        model, small, epochs=8, batch_size=50, lr=3e-3, device="cpu", progress=False
    )
    with torch.no_grad():
        loss = model.loss(data.to_unit(images.x_test[:500]))
    contractions[lam] = (
        float(loss.contraction.mean()),
        float(loss.reconstruction.mean()),
    )
    print(
        f"lambda = {lam}: squared Jacobian {contractions[lam][0]:.2f}, squared "
        f"error {contractions[lam][1]:.2f}"
    )
assert contractions[1.0][0] < 0.2 * contractions[0.0][0]  # what is penalised falls
walked = model.chain(
    data.to_unit(images.x_test[:8]), 5, sigma=1.0, generator=seeded(0)
)
assert walked.shape == (5, 8, *images.shape)

# %% [markdown]
# ## What you have seen
#
# - Alternating a corruption and its reverse samples the data, exactly; a wrong reverse is paid for, more the slower the chain.
# - A denoiser's correction is the score of the *smoothed* density, at any noise level.
# - Walkback trains where the chain goes. Its optimum forgets within a few steps, and is out of reach for a product over pixels:
#   compare the chains, their distance, their blur and how fast they forget.
# - A Parzen estimate likes averages better than data. Do not choose a model by it.
#
# Try: `salt_and_pepper(0.2)`. Do the chains still change their label?
