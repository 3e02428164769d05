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
# # Experiment: energies in the plane, and the game with a generator
#
# An energy $U$ has the density $e^{-U}/Z$. In the plane $Z$ is a sum over a grid, so that everything can be checked
# against the truth: what the likelihood's gradient is, what a gradient penalty does to the optimum, and when the game
# between an energy and a generator comes to rest. The derivations are in the chapter *Energies, and GANs as energies*.

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

import matplotlib.pyplot as plt
import torch
from scipy.sparse import csc_matrix, diags
from scipy.sparse.linalg import spsolve

from gae_core import data, nets
from gae_core.energy import (
    gradient_penalty_r1,
    gradient_penalty_wgan,
    log_normalizer_2d,
)

device = "cuda" if torch.cuda.is_available() else "cpu"
SIZE = data.size_from_environment("full" if device == "cuda" else "short")
SEED = 0
print(f"size: {SIZE}, device: {device}")

# %% [markdown]
# ## Step 1: the normaliser by quadrature
#
# The energy $|x|^2 / 2s$ in the plane has $\log Z = \log 2\pi s$. Predict: how many cells a side of $[-8, 8]^2$ does it take
# to get ten digits right for $s = 1$?

# %% tags=["nbval-check-output"]
for points in (8, 16, 32, 64):
    grid = log_normalizer_2d(lambda x: x.square().sum(1) / 2, -8, 8, points)
    error = abs(float(grid.log_z) - math.log(2 * math.pi))
    print(
        f"{points:>3} cells a side, {16 / points:.2f} wide: "
        f"ten digits right: {error < 1e-10}"
    )

# %% [markdown]
# Cells half as wide as the standard deviation are enough. The midpoint rule is that good for whatever is smooth and
# vanishes towards the edge.
#
# ## Step 2: positive and negative phase
#
# Gradient of the negative log-likelihood, by hand from the two phases, against automatic differentiation of $\log Z$.

# %% tags=["nbval-check-output"]
torch.manual_seed(SEED)
net = nets.mlp([2, 16, 1], activation=torch.nn.SiLU).double()
toy = data.toy("eight_gaussians")
x = toy.sample(500, torch.Generator().manual_seed(SEED)).double()


def energy(x):
    return net(x)[:, 0] + x.square().sum(1) / 8  # the bowl makes Z finite


def gradient(value):
    return torch.cat(
        [
            g.flatten()
            for g in torch.autograd.grad(value, net.parameters(), allow_unused=True)
            if g is not None
        ]
    )


grid = log_normalizer_2d(energy, -12, 12, 96)
likelihood = gradient(energy(x).mean() + grid.log_z)
mass = grid.log_density.exp() * grid.area
detached = gradient(energy(x).mean() - mass.detach() @ energy(grid.x))
grid = log_normalizer_2d(energy, -12, 12, 96)
through = gradient(
    energy(x).mean() - (grid.log_density.exp() * grid.area) @ energy(grid.x)
)
print(
    "two phases, samples detached, give the likelihood's gradient:",
    torch.allclose(likelihood, detached),
)
print(
    "the difference of mean energies has it too:",
    torch.allclose(likelihood, through),
)

# %% [markdown]
# The difference of mean energies has another gradient, because the model's distribution moves along. What does its descent do?
# One parameter is enough to see: $U = x^2/2s$, data of variance 1, descent in $\log s$.


# %% mystnb={"figure": {"name": "fig-energy-phases", "caption": "Negative log-likelihood and difference of mean energies over the variance of the model, with steps of descent on the latter, samples detached or not."}, "image": {"alt": "Two curves over the variance of the model. The negative log-likelihood has a minimum at 1, the difference of mean energies falls throughout. Descent with detached samples ends at variance 1, through the samples it runs away."}}
def descend(stop, start=0.3, steps=60, rate=0.4):
    """Descent on v / 2s - E_q[x²] / 2s in log s; E_q[x²] is s, fixed or not."""
    r, path = torch.tensor(math.log(start), requires_grad=True), []
    for _ in range(steps):
        s = r.exp()
        second = s.detach() if stop else s
        (slope,) = torch.autograd.grad(1 / (2 * s) - second / (2 * s), r)
        path.append(float(s.detach()))
        r = (r - rate * slope).detach().requires_grad_()
    return torch.tensor(path)


paths = {"samples detached": descend(True), "through the samples": descend(False)}
s = torch.logspace(-0.7, 1.5, 200)
figure, ax = plt.subplots(figsize=(7, 3.6), layout="constrained")
ax.plot(
    s,
    1 / (2 * s) + 0.5 * (2 * math.pi * s).log(),
    color="tab:blue",
    label="negative log-likelihood $L$",
)
ax.plot(
    s, 1 / (2 * s) - 0.5, color="tab:orange", label="difference of mean energies"
)
ax.plot(
    paths["samples detached"][::3],
    1 / (2 * paths["samples detached"][::3])
    + 0.5 * (2 * math.pi * paths["samples detached"][::3]).log(),
    "o",
    ms=4,
    color="tab:blue",
    label="descent, samples detached",
)
ax.plot(
    paths["through the samples"][::3],
    1 / (2 * paths["through the samples"][::3]) - 0.5,
    "s",
    ms=4,
    color="tab:orange",
    label="descent through the samples",
)
ax.set(xscale="log", xlabel="variance $s$ of the model (data: 1)", ylabel="nats")
legend = ax.legend(fontsize=8)

# %% tags=["nbval-check-output"]
print(
    "samples detached, the variance ends at 1:",
    abs(float(paths["samples detached"][-1]) - 1) < 1e-3,
)
print(
    "through them it has passed 5 and still grows:",
    float(paths["through the samples"][-1]) > 5,
)

# %% [markdown]
# ## Step 3: two gradient penalties
#
# On $U = w \cdot x$ the slope is $|w|$ everywhere, over all entries of one sample. What would the norm over axis 1 give, which
# for images is the norm over channels?

# %% tags=["nbval-check-output"]
images = torch.rand(
    4, 3, 8, 8, generator=torch.Generator().manual_seed(SEED), dtype=torch.float64
)
w = torch.ones(3, 8, 8, dtype=torch.float64) / 4


def linear(x):
    return (x * w).sum((1, 2, 3))


print(f"squared length: {float(w.square().sum()):.2f}")
penalties = {
    "R1": gradient_penalty_r1(linear, images),
    "WGAN-GP": gradient_penalty_wgan(linear, images, images.flip(0)),
}
for name, values in penalties.items():
    print(f"{name}, per sample: {[round(float(v), 2) for v in values]}")
per_pixel = w.expand(4, -1, -1, -1).norm(dim=1)
print(
    "norm over channels, squared, mean over pixels: "
    f"{float(per_pixel.square().mean()):.4f}, 1/64 of R1"
)

# %% [markdown]
# ## Step 4: the penalty is a blur
#
# Among *all* energies on a grid, the one that minimises $E_p U + \log Z + \lambda E_p|\nabla U|^2$ is found by Newton's method,
# since the problem is convex. The chapter says that to first order it is the density of the data blurred with the variance
# $4\lambda$. Predict: for which $\lambda$ will that fail, if the narrow bump has the variance 0.04?


# %%
def penalised_optimum(p, width, lam):
    """Minimiser U of sum p U + log sum e^-U + lam sum p |grad U|².

    The masses p are on a grid of one or two dimensions.
    """
    shape, n = p.shape, p.numel()
    p = p + 1e-12  # far below what is drawn, so that no cell is without data
    p = p / p.sum()
    index = torch.arange(n).reshape(shape)
    pairs = [
        (index.narrow(k, 0, m - 1), index.narrow(k, 1, m - 1))
        for k, m in enumerate(shape)
    ]
    a, b = (torch.cat([pair[i].flatten() for pair in pairs]) for i in (0, 1))
    p = p.flatten()
    spring = 2 * lam * (p[a] * p[b]).sqrt() / width**2
    rows, columns = torch.cat([a, b, a, b]), torch.cat([a, b, b, a])
    entries = torch.cat([spring, spring, -spring, -spring])
    stiffness = csc_matrix(
        (entries.numpy(), (rows.numpy(), columns.numpy())), shape=(n, n)
    )

    def value(u):
        return float(
            p @ u
            + (-u).logsumexp(0)
            + 0.5 * u @ torch.from_numpy(stiffness @ u.numpy())
        )

    u = -p.log() / (1 + 8 * lam**0.5)
    for _ in range(300):
        q = (-u).softmax(0)
        slope = p - q + torch.from_numpy(stiffness @ u.numpy())
        step = torch.from_numpy(
            spsolve(
                diags((q + 1e-15).numpy(), format="csc") + stiffness, -slope.numpy()
            )
        )
        decrease = float(slope @ step)
        if decrease > -1e-9:
            return u.reshape(shape)
        rate = min(1.0, 5 / float(step.abs().max()))
        while value(u + rate * step) > value(u) + 1e-4 * rate * decrease:
            rate /= 2
            assert rate > 1e-9, "no step lowers the value"
        u = u + rate * step
    raise RuntimeError("Newton's method did not converge")


def bumps(x, blur=0.0):
    def normal(x, mean, variance):
        return (-((x - mean) ** 2) / (2 * variance)).exp() / math.sqrt(
            2 * math.pi * variance
        )

    return 0.5 * normal(x, -1.2, 0.04 + blur) + 0.5 * normal(x, 1, 0.25 + blur)


cells = 800
width = 12 / cells
line = -6 + width * (torch.arange(cells, dtype=torch.float64) + 0.5)
p = bumps(line)
lams = torch.logspace(-4, -0.5, 8).tolist()
kl = {"optimum with R1": [], "data blurred by $4\\lambda$": []}
for lam in lams:
    best = (-penalised_optimum(p * width, width, lam)).softmax(0) / width
    for name, q in zip(kl, (best, bumps(line, 4 * lam)), strict=True):
        kl[name].append(float((p * (p / q).log() * width)[p > 1e-12].sum()))
    print(
        f"lambda {lam:.4f}: KL(p | optimum) {kl['optimum with R1'][-1]:.5f}, "
        f"KL(p | blurred) {kl[name][-1]:.5f} nats"
    )
assert 0.8 < kl["optimum with R1"][0] / kl[name][0] < 1.2  # the same to first order

# %% mystnb={"figure": {"name": "fig-energy-heat", "caption": "Optimum over all energies with the R1 penalty, and the data blurred by the variance 4 lambda. Left, densities; right, divergence from the data."}, "image": {"alt": "Left, a density with a narrow and a wide bump; the optimum under the penalty and the blurred density nearly coincide and are lower and wider than the data at the narrow bump. Right, divergence from the data over lambda on logarithmic axes; both curves rise together, then the optimum's more slowly."}}
figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
lam = 0.005
best = (-penalised_optimum(p * width, width, lam)).softmax(0) / width
axes[0].plot(line, p, color="black", label="data")
axes[0].plot(line, best, label=rf"optimum, $\lambda = {lam}$")
axes[0].plot(
    line, bumps(line, 4 * lam), "--", label=rf"blurred by $4\lambda = {4 * lam}$"
)
axes[0].set(xlim=(-3, 3.5), xlabel="$x$", yticks=[])
for name, values in kl.items():
    axes[1].plot(lams, values, "o-", ms=4, label=name)
axes[1].set(
    xscale="log", yscale="log", xlabel=r"$\lambda$", ylabel="nats from the data"
)
for ax in axes:
    ax.legend(fontsize=8)

# %% [markdown]
# ## Step 5: landscapes
#
# A small network as energy, trained with the exact gradient of its likelihood, the normaliser by quadrature at every step.


# %%
class Energy(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(
            nets.FourierFeatures(2, 32, 1.5),
            nets.mlp([66, 64, 64, 1], activation=torch.nn.SiLU),
        )

    def forward(self, x):
        return self.net(x)[:, 0] + x.square().sum(1) / 2


def train(lam, steps):
    torch.manual_seed(SEED)
    model, source = Energy(), torch.Generator().manual_seed(SEED)
    adam = torch.optim.Adam(model.parameters(), 5e-3)
    fall = torch.optim.lr_scheduler.LambdaLR(adam, lambda t: 1 - t / steps)
    for _ in range(steps):
        x = toy.sample(512, source)
        log_z = log_normalizer_2d(model, -3, 3, 60, dtype=torch.float32).log_z
        loss = model(x).mean() + log_z + lam * gradient_penalty_r1(model, x).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        fall.step()
    return model


def truth(x):
    return toy.log_prob(x)


weights = (0.003, 0.03, 0.3)
networks = {
    lam: train(lam, 150 if SIZE == "short" else 3000) for lam in (0, *weights)
}
grids, trained = 120, {}
with torch.no_grad():
    for lam, model in networks.items():
        trained[lam] = log_normalizer_2d(
            lambda x, m=model: m(x.float()).double(), -3, 3, grids
        )

exact = torch.cartesian_prod(
    *[-3 + 6 / grids * (torch.arange(grids, dtype=torch.float64) + 0.5)] * 2
)
optima = {}
for lam in weights:
    u = penalised_optimum(
        truth(exact).exp().reshape(grids, grids) * (6 / grids) ** 2, 6 / grids, lam
    ).flatten()
    optima[lam] = log_normalizer_2d(lambda x, u=u: u, -3, 3, grids)
kl_trained = {lam: float(grid.kl_from(truth)) for lam, grid in trained.items()}
kl_optimum = {lam: float(grid.kl_from(truth)) for lam, grid in optima.items()}
for lam in kl_trained:
    print(
        f"lambda {lam}: KL(truth | network) {kl_trained[lam]:.3f}, "
        f"of the optimum {kl_optimum.get(lam, 0):.3f} nats"
    )

# %% mystnb={"figure": {"name": "fig-energy-landscapes", "caption": "Eight Gaussians: the truth and the optima under three penalties; below, networks trained by exact likelihood. Titles: KL from the truth in nats."}, "image": {"alt": "Two rows of densities on a ring of eight Gaussians. Top, the truth and the optima under penalties of 0.003, 0.03 and 0.3, whose spots grow into flat discs. Bottom, small networks trained with weights 0, 0.003, 0.03 and 0.3."}}
figure, axes = plt.subplots(2, 4, figsize=(9, 4.9), layout="constrained")
panels = [(truth(exact), "truth")] + [
    (optima[m].log_density, f"optimum, $\\lambda$ = {m}\n{kl_optimum[m]:.2f} nats")
    for m in weights
]
panels += [
    (trained[m].log_density, f"network, $\\lambda$ = {m}\n{kl_trained[m]:.2f} nats")
    for m in trained
]
for ax, (log_density, title) in zip(axes.flat, panels, strict=True):
    ax.imshow(
        log_density.exp().sqrt().reshape(grids, grids).T,
        origin="lower",
        extent=(-3, 3, -3, 3),
        cmap="magma",
    )
    ax.set_title(title, fontsize=9)
    ax.axis("off")

# %% tags=["nbval-check-output"]
values = [kl_optimum[lam] for lam in weights]
print(
    "a larger weight, an optimum further from the truth:", values == sorted(values)
)
print("so do the networks:", kl_trained[0.003] < kl_trained[0.03] < kl_trained[0.3])
print(
    "the square cuts nothing off:",
    max(grid.edge for grid in optima.values()) < 1e-2,
)

# %% [markdown]
# Colours show the square root of the density, so that the faint parts are seen too.
#
# ## Step 6: does the game come to rest?
#
# All data at 0, all samples at $\vartheta$, the energy $\psi x$. And Gaussian data of variance 1 with the energy $t x^2/2$ and
# the generator $N(0, a^2)$. Both players follow their gradients. Predict which of the games settle, and where.


# %% mystnb={"figure": {"name": "fig-energy-convergence", "caption": "Left, the Dirac example with simultaneous small steps. Right, the precision of the energy in the Gaussian game."}, "image": {"alt": "Left, three trajectories: without penalty a slowly growing spiral, with R1 a spiral into the origin, with the one-centred penalty a path that stays away from it. Right, precision over time: the GAN oscillates around 0, with R1 it decays to 0, with the entropy it settles at 1."}}
def dirac(zero=0.0, one=0.0, steps=2000, h=0.02):
    psi, theta, path = 0.5, 0.3, []
    for _ in range(steps):
        path.append((psi, theta))
        push = (
            theta
            - 2 * zero * psi
            - 2 * one * (abs(psi) - 1) * math.copysign(1, psi)
        )
        psi, theta = psi + h * push, theta - h * psi
    return torch.tensor(path)


def gaussian(entropy, lam, steps=15_000, h=0.002):
    t, a, path = 0.3, 1.3, []
    for _ in range(steps):
        path.append(t)
        t, a = (
            t + h * ((a * a - 1) / 2 - 2 * lam * t),
            a + h * (entropy / a - t * a),
        )
    return torch.tensor(path)


circles = {
    "no penalty": dirac(),
    "R1, 0.2": dirac(zero=0.2),
    "one-centred, 0.2": dirac(one=0.2),
}
games = {
    "GAN": gaussian(0, 0),
    "GAN with R1, 0.2": gaussian(0, 0.2),
    "with the entropy": gaussian(1, 0),
}
figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
for name, path in circles.items():
    axes[0].plot(path[:, 0], path[:, 1], lw=1, label=name)
axes[0].set(
    xlabel=r"$\psi$, slope of the energy",
    ylabel=r"$\vartheta$, place of the samples",
    aspect="equal",
)
for name, path in games.items():
    axes[1].plot(0.002 * torch.arange(len(path)), path, lw=1.2, label=name)
axes[1].axhline(1, color="black", lw=0.8, ls=":")
axes[1].set(xlabel="time", ylabel="precision $t$ of the energy")
for ax in axes:
    ax.legend(fontsize=8)

# %% tags=["nbval-check-output"]
ends = {name: float(path[-1].norm()) for name, path in circles.items()}
print("no penalty spirals out:", ends["no penalty"] > 0.59)
print("R1 comes to rest:", ends["R1, 0.2"] < 0.02)
print("one-centred stays away:", ends["one-centred, 0.2"] > 0.5)
print(
    "GAN with R1 ends with a flat energy:",
    abs(float(games["GAN with R1, 0.2"][-1])) < 0.02,
)
print(
    "with the entropy the precision is that of the data:",
    abs(float(games["with the entropy"][-1]) - 1) < 1e-3,
)

# %% [markdown]
# ## What you have seen
#
# - The likelihood's gradient is a difference of means over data and model, with the model's samples taken as they are.
# - The R1 penalty is not free: it blurs, by a variance of $4\lambda$ to first order.
# - The networks come near the optimum *with* the penalty, not near the truth.
# - R1 makes a GAN settle, at an energy that says nothing. The entropy makes it settle at the density.
#
# Try: the Swiss roll in place of the eight Gaussians, and a $\lambda$ that you would guess from its noise.
