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
# # Experiment: the normal density has the largest entropy
#
# With mean 0 and variance 1, no density has more entropy than the standard normal. Here we look at it: in four
# known densities, in a family that passes through the normal, by raising the entropy of a density on a grid with
# gradients, and for other constraints. At the end the same machine shows what a reconstruction loss does to the
# codes of an autoencoder. The proofs are in the chapter *Maximum entropy*.
#
# Each step asks for a prediction. Make it before you run the cell.

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
import itertools
import math

import matplotlib.pyplot as plt
import numpy as np
import sympy as sp
import torch
from scipy import integrate, special, stats

from gae_core.data import size_from_environment
from gae_core.entropy import knn_entropy
from gae_core.gaussian import gaussian_entropy

device = "cuda" if torch.cuda.is_available() else "cpu"
SIZE = size_from_environment("full" if device == "cuda" else "short")
SEED = 0
MAXIMUM = 0.5 * math.log(2 * math.pi * math.e)  # entropy of N(0, 1) in nats
print(f"size: {SIZE}, device: {device}")

# %% [markdown]
# ## Four densities with variance 1
#
# **Predict.** Order these by entropy: normal, uniform, Laplace, logistic. Which comes closest to the normal?
#
# First the exact values. SymPy integrates $-p\log p$ for densities scaled to variance 1.

# %% tags=["nbval-check-output"]
z = sp.symbols("z", real=True)
root3, root2 = sp.sqrt(3), sp.sqrt(2)
# On z > 0; all four are symmetric. The logistic comes below, in its distribution
# function u.
halves = {
    "normal": (
        sp.exp(-(z**2) / 2) / sp.sqrt(2 * sp.pi),
        sp.log(2 * sp.pi) / 2 + z**2 / 2,
        sp.oo,
    ),
    "Laplace": (sp.exp(-root2 * z) / root2, sp.log(2) / 2 + root2 * z, sp.oo),
    "uniform": (1 / (2 * root3), sp.log(2 * root3), root3),
}
exact = {
    name: sp.simplify(2 * sp.integrate(density * minus_log, (z, 0, end)))
    for name, (density, minus_log, end) in halves.items()
}
u = sp.symbols("u", positive=True)
scale = (
    root3 / sp.pi
)  # logistic with variance 1: p = u (1 - u) / scale, and z -> u has the uniform law
exact["logistic"] = sp.simplify(
    sp.log(scale)
    - sp.integrate(sp.log(u), (u, 0, 1))
    - sp.integrate(sp.log(1 - u), (u, 0, 1))
)
for name, value in exact.items():
    gap = float(exact["normal"] - value)
    print(f"{name:8} {value!s:25} = {float(value):.6f}, gap {gap:.6f}")

# %% [markdown]
# Now by numerical integration of the densities from SciPy, as an independent check, and in a picture.

# %% mystnb={"figure": {"name": "fig-max_entropy-densities", "caption": "Four densities with mean 0 and variance 1, and their entropies by numerical integration. The normal has the largest."}, "image": {"alt": "Left, four density curves with mean 0 and variance 1: normal, logistic, Laplace and uniform. Right, a bar for each with its entropy; the normal bar is the longest."}}
known = {
    "normal": stats.norm(),
    "logistic": stats.logistic(scale=math.sqrt(3) / math.pi),
    "Laplace": stats.laplace(scale=1 / math.sqrt(2)),
    "uniform": stats.uniform(loc=-math.sqrt(3), scale=2 * math.sqrt(3)),
}
colours = dict(
    zip(known, ("tab:blue", "tab:orange", "tab:green", "tab:red"), strict=True)
)


def entropy_of(law):
    """Integrate -p log p of a symmetric SciPy distribution."""
    low, high = law.ppf(0.5), min(law.support()[1], 40)
    return 2 * integrate.quad(lambda x: -law.pdf(x) * law.logpdf(x), low, high)[0]


measured = {name: entropy_of(law) for name, law in known.items()}
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), width_ratios=[3, 2])
x = np.linspace(-4, 4, 801)
for name, law in known.items():
    left.plot(x, law.pdf(x), label=name, color=colours[name])
left.set(xlabel="z", ylabel="density", title="mean 0, variance 1")
left.legend()
bars = right.barh(
    list(measured), list(measured.values()), color=list(colours.values())
)
right.bar_label(bars, fmt="%.4f", label_type="center", color="white")
right.axvline(MAXIMUM, color="black", linestyle=":")
right.set(xlabel="entropy in nats", xlim=(1.1, 1.5), title="the axis begins at 1.1")
right.invert_yaxis()
figure.tight_layout()

for name, law in known.items():
    assert abs(law.var() - 1) < 1e-12
    # The integrator's error is about 1e-9.
    assert abs(measured[name] - float(exact[name])) < 1e-8
    assert measured[name] <= MAXIMUM + 1e-8

# %% [markdown]
# Laplace has heavy tails, the uniform density none, and both are below the normal. The logistic is hardly below it.
#
# How much distance does a gap of so many nats allow? Pinsker's inequality bounds the total variation by
# $\sqrt{\varepsilon/2}$, Talagrand's the Wasserstein distance by $\sqrt{2\varepsilon}$.
#
# **Predict.** Are the bounds sharp, or a factor of 2 or of 10 too large?

# %%
print("density        gap     TV  Pinsker     W2  Talagrand")
for name, law in known.items():
    gap = MAXIMUM - float(exact[name])
    crossings = np.linspace(-12, 12, 240_001)
    variation = 0.5 * np.trapezoid(
        np.abs(law.pdf(crossings) - stats.norm.pdf(crossings)), crossings
    )
    # On the line the increasing map is the best transport: z -> law.ppf(Phi(z)),
    # here through the upper tail.
    squared = (
        2
        * integrate.quad(
            lambda t, law=law: (
                (law.isf(stats.norm.sf(t)) - t) ** 2 * stats.norm.pdf(t)
            ),
            0,
            12,
        )[0]
    )
    distance = math.sqrt(squared)
    pinsker, talagrand = math.sqrt(max(gap, 0) / 2), math.sqrt(2 * max(gap, 0))
    print(f"{name:9} {gap:8.4f} {variation:6.3f}   {pinsker:6.3f}", end=" ")
    print(f"{distance:6.3f}     {talagrand:6.3f}")
    # 1e-4: the trapezoid at the jumps of the uniform density
    assert variation <= pinsker + 1e-4 and distance <= talagrand + 1e-6

# %% [markdown]
# ## A family that passes through the normal
#
# The generalised normal density is proportional to $\exp(-|z/\alpha|^\beta)$: Laplace at $\beta=1$, normal at
# $\beta=2$, uniform as $\beta\to\infty$. With $\alpha^2=\Gamma(1/\beta)/\Gamma(3/\beta)$ its variance is 1.
#
# **Predict.** Draw the entropy against $\beta$. Is the peak sharp or flat?
#
# SymPy first: with $u=1/\beta$, slope and curvature at $u=1/2$.

# %% tags=["nbval-check-output"]
u = sp.symbols("u", positive=True)
family = (
    u
    + sp.log(2)
    + sp.log(u)
    + sp.Rational(3, 2) * sp.loggamma(u)
    - sp.loggamma(3 * u) / 2
)
half = sp.Rational(1, 2)
slope = sp.simplify(sp.expand_func(sp.diff(family, u).subs(u, half)))
curvature = sp.diff(family, u, 2).subs(u, half)
curvature = sp.simplify(
    curvature.subs(sp.polygamma(1, 3 * half), sp.polygamma(1, half) - 4)
)  # its recurrence
print("H'(1/2)  =", slope)
print("H''(1/2) =", curvature, "< 0" if curvature < 0 else "")
print("H(1/2)   =", sp.simplify(sp.expand_func(family.subs(u, half))))

# %% mystnb={"figure": {"name": "fig-max_entropy-generalised", "caption": "Entropy of the generalised normal family at variance 1. The peak is at shape 2, the normal density, and it is flat."}, "image": {"alt": "A curve of entropy against the shape beta on a logarithmic axis from 0.4 to 40. It rises steeply to a peak at beta equal to 2 and falls slowly towards the value of the uniform density."}}
shapes = np.geomspace(0.4, 40, 400)
inverse = 1 / shapes
curve = (
    inverse
    + np.log(2 * inverse)
    + 1.5 * special.gammaln(inverse)
    - 0.5 * special.gammaln(3 * inverse)
)
points = np.array([0.5, 1, 1.5, 2, 3, 5, 10, 30])
by_integration = []
for shape in points:
    law = stats.gennorm(
        shape, scale=math.sqrt(special.gamma(1 / shape) / special.gamma(3 / shape))
    )
    end = law.isf(1e-16)
    pieces = np.linspace(0, end, 30)
    by_integration.append(
        2
        * sum(
            integrate.quad(lambda t, law=law: -law.pdf(t) * law.logpdf(t), a, b)[0]
            for a, b in itertools.pairwise(pieces)
        )
    )

figure, axes = plt.subplots(figsize=(7, 3.8))
axes.semilogx(shapes, curve, label="closed form")
axes.plot(points, by_integration, "o", label="numerical integration")
axes.axhline(MAXIMUM, color="black", linestyle=":", label="normal")
axes.axhline(0.5 * math.log(12), color="tab:red", linestyle="--", label="uniform")
axes.axvline(2, color="grey", linewidth=0.8)
axes.set(
    xlabel=r"shape $\beta$", ylabel="entropy in nats", xticks=[0.5, 1, 2, 5, 10, 30]
)
axes.set_xticklabels(["0.5", "1", "2", "5", "10", "30"])
axes.legend()
figure.tight_layout()

assert abs(shapes[curve.argmax()] - 2) < 0.02  # the spacing of the shapes
closed = np.interp(np.log(points), np.log(shapes), curve)
assert (
    np.abs(closed - by_integration).max() < 1e-3
)  # interpolation between 400 points on a curve
assert curve.max() <= MAXIMUM + 1e-12
near = shapes[curve > MAXIMUM - 0.01]
low, high = near.min(), near.max()
print(f"Within 0.01 nats of the maximum: shapes from {low:.2f} to {high:.2f}.")

# %% [markdown]
# The range printed above is the practical message. An entropy known to a hundredth of a nat does not tell these
# shapes apart.

# %% [markdown]
# ## Climb the entropy
#
# No formula now. A density on a grid is a vector of probabilities, $p=\mathrm{softmax}(\theta)$, and its entropy a
# function that autograd differentiates. Each constraint $\mathbb E f=c$ has a multiplier $\lambda$ that rises while
# the expectation is above its target, and a quadratic term that damps the motion. We go uphill in the *natural*
# gradient (the gradient divided by $p$), so that the tails move as fast as the middle.
#
# **Predict.** We start with two lopsided humps, mean 0 and variance 1 required. What comes out? And which numbers
# will the two multipliers show?


# %%
def climb(
    grid, constraints, start, potential=None, steps=600, rate=0.05, damping=3.0
):
    """Maximise entropy minus mean potential over densities on a grid with E f = c.

    Args:
        grid: midpoints of cells of equal width, shape (n,).
        constraints: list of (values of f on the grid, c).
        start: log-density to begin with, up to a constant, shape (n,).
        potential: values on the grid, or None.

    Returns:
        The densities along the way, the entropy at each step, the multipliers.
    """
    width = grid[1] - grid[0]
    theta = start.clone().requires_grad_()
    features = (
        torch.stack([f for f, _ in constraints])
        if constraints
        else torch.zeros(0, len(grid), dtype=grid.dtype)
    )
    target = torch.tensor([c for _, c in constraints], dtype=grid.dtype)
    multiplier = torch.zeros_like(target)
    path, entropies = [], []
    for _ in range(steps):
        log_p = torch.log_softmax(theta, 0)
        p = log_p.exp()
        entropy = -(p * (log_p - width.log())).sum()
        violation = features @ p - target
        value = (
            entropy
            - (multiplier * violation).sum()
            - 0.5 * damping * (violation**2).sum()
        )
        if potential is not None:
            value = value - p @ potential
        (gradient,) = torch.autograd.grad(value, theta)
        with torch.no_grad():
            theta += rate * gradient / p.clamp_min(1e-300)
            multiplier += 4 * rate * violation
        path.append((p / width).detach())
        entropies.append(float(entropy.detach()))
    return path, np.array(entropies), multiplier


def cells(low, high, n=600):
    """Midpoints of n cells between low and high."""
    edges = torch.linspace(low, high, n + 1, dtype=torch.float64)
    return (edges[1:] + edges[:-1]) / 2


grid = cells(-7, 7)
humps = torch.logaddexp(
    math.log(0.3) - (grid + 1.4) ** 2 / 0.5, math.log(0.7) - (grid - 0.6) ** 2 / 0.8
)
path, entropies, multipliers = climb(grid, [(grid, 0.0), (grid**2, 1.0)], humps)
print(f"entropy {entropies[-1]:.6f}, maximum {MAXIMUM:.6f}")
first, second = (float(value) for value in multipliers)
print(f"multiplier of the mean {first:.4f} (theory 0), ", end="")
print(f"of the second moment {second:.4f} (theory 0.5)")

# %% mystnb={"figure": {"name": "fig-max_entropy-ascent", "caption": "Gradient ascent on the entropy of a density on a grid, with mean 0 and variance 1 kept by multipliers. Left: from two humps to the normal density. Right: the entropy, which passes its bound while the variance is still above 1, and the entropy scaled to variance 1, which never does."}, "image": {"alt": "Left, density curves at successive steps of gradient ascent, from a lopsided start with two humps to a bell curve that lies on the dashed normal curve. Right, against the step: the entropy overshoots the dotted line of one half log two pi e and comes back to it, the entropy scaled to variance 1 rises to the line from below."}}
width = float(grid[1] - grid[0])
bell = torch.exp(-(grid**2) / 2) / math.sqrt(2 * math.pi)
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6))
chosen = [0, 10, 30, 80, len(path) - 1]
for index, colour in zip(
    chosen, plt.cm.viridis(np.linspace(0, 0.9, len(chosen))), strict=True
):
    left.plot(grid, path[index], color=colour, label=f"step {index}")
left.plot(grid, bell, "k--", label="N(0, 1)")
left.set(xlabel="z", ylabel="density", xlim=(-4, 4))
left.legend(fontsize=8)
spread = np.array(
    [math.sqrt(float(p @ grid**2 - (p @ grid) ** 2 * width) * width) for p in path]
)
right.plot(entropies, label="entropy $H$")
right.plot(entropies - np.log(spread), label=r"$H - \log\,$(standard deviation)")
right.axhline(
    MAXIMUM, color="black", linestyle=":", label=r"$\frac{1}{2}\log(2\pi e)$"
)
right.set(xlabel="step", ylabel="entropy in nats", xlim=(0, 300))
right.legend()
figure.tight_layout()

variation = 0.5 * float((path[-1] - bell).abs().sum()) * width
assert (
    (entropies - np.log(spread)).max() < MAXIMUM + 1e-6
)  # the theorem, at every step, for the density scaled to variance 1
# Remaining error: the ascent itself, and the normal mass beyond 7, which is 3e-12.
assert variation < 1e-4, variation
assert abs(entropies[-1] - MAXIMUM) < 1e-4
assert abs(float(multipliers[0])) < 1e-3 and abs(float(multipliers[1]) - 0.5) < 1e-3

# %% [markdown]
# On the way the entropy passes *above* the bound. That is no contradiction: the constraints hold only in the end, and
# a wider density may have more entropy. Scaled to variance 1 the same density has the entropy $H-\log\sigma$, and that
# never passes the bound.
#
# ## Other constraints
#
# **Predict.** What comes out (a) on an interval with no constraint, (b) on the positive half line with mean 1,
# (c) on the line with $\mathbb E|z|=1$?

# %% mystnb={"figure": {"name": "fig-max_entropy-constraints", "caption": "The same ascent under other constraints. The computed density covers the one of theory."}, "image": {"alt": "Three panels. In each the density found by gradient ascent lies on the curve of theory: flat on an interval, exponential on the positive half line, and Laplace with its sharp peak on the line."}}
interval, positive, line = cells(-1, 1), cells(0, 20, 1000), cells(-20, 20, 2000)
problems = {
    "interval [-1, 1]: uniform": (
        interval,
        [],
        -4 * (interval - 0.5) ** 2,
        torch.full_like(interval, 0.5),
        math.log(2),
    ),
    "mean 1 on z > 0: exponential": (
        positive,
        [(positive, 1.0)],
        -2 * (positive - 1) ** 2,
        torch.exp(-positive),
        1.0,
    ),
    "E|z| = 1: Laplace": (
        line,
        [(line.abs(), 1.0)],
        -(line**2) / 2,
        torch.exp(-line.abs()) / 2,
        1 + math.log(2),
    ),
}
figure, axes = plt.subplots(1, 3, figsize=(9, 3.2))
for ax, (name, (where, constraints, start, theory, bound)) in zip(
    axes, problems.items(), strict=True
):
    steps, values, prices = climb(where, constraints, start)
    ax.plot(where, steps[0], color="lightgrey", label="start")
    ax.plot(where, steps[-1], linewidth=3, alpha=0.6, label="found")
    ax.plot(where, theory, "k--", linewidth=1, label="theory")
    ax.set(
        title=name,
        xlabel="z",
        xlim=(max(-4, float(where[0])), min(4, float(where[-1]))),
        ylim=(0, None),
    )
    ax.title.set_fontsize(10)
    width = float(where[1] - where[0])
    variation = 0.5 * float((steps[-1] - theory).abs().sum()) * width
    price = ", ".join(f"{float(p):.4f}" for p in prices) or "none"
    print(f"{name:28} entropy {values[-1]:.4f} of {bound:.4f}, multiplier {price}")
    # The cells are 0.02 wide, and the densities of theory are taken at their
    # middles: an error of the order 1e-4.
    assert variation < 1e-3 and abs(values[-1] - bound) < 1e-3
    assert all(
        abs(float(p) - 1) < 5e-3 for p in prices
    )  # theory: 1/m = 1 and 1/s = 1
axes[0].legend(fontsize=8)
figure.tight_layout()

# %% [markdown]
# ## When nothing is found
#
# Ask for mean 0 alone, on the whole line. A computer has no whole line, so we give it longer and longer ones.
#
# **Predict.** Does the entropy settle?

# %%
found = []
for reach in (2, 4, 8, 16):
    where = cells(-reach, reach)
    relative = (
        where / reach
    )  # mean 0 is asked of z / reach: the same, at one speed for all lengths
    _, values, _ = climb(
        where, [(relative, 0.0)], -8 * (relative - 0.1) ** 2, steps=400
    )
    found.append(values[-1])
    print(
        f"line from {-reach:3} to {reach:2}: entropy {values[-1]:.4f}, "
        f"log of its length {math.log(2 * reach):.4f}"
    )
assert np.all(
    np.diff(found) > 0.5
)  # log 2 = 0.69 for every doubling: there is no maximum

# %% [markdown]
# It is the uniform density each time, as long as the line allows. The supremum is infinite.
#
# ## Correlation
#
# Batch normalisation fixes variances, not correlations. Do they need to be fixed?
#
# **Predict.** Two normal coordinates, each with variance 1 and correlation $\rho$. What is their joint entropy at
# $\rho=0.9$, compared with $\rho=0$?
#
# SymPy first, for two and for three coordinates.

# %% tags=["nbval-check-output"]
rho, a, b, c = sp.symbols("rho a b c", real=True)
two = sp.Matrix([[1, rho], [rho, 1]])
three = sp.Matrix([[1, a, b], [a, 1, c], [b, c, 1]])
squares = (a - b * c) ** 2 + b**2 * (1 - c**2) + c**2
print("1 - det R =", sp.factor(1 - two.det()))
print(
    "1 - det R =",
    squares,
    "" if sp.expand(1 - three.det() - squares) == 0 else "WRONG",
)

# %% mystnb={"figure": {"name": "fig-max_entropy-correlation", "caption": "Variances fixed to 1, correlations free. Left: entropy of a two-dimensional normal vector against its correlation. Right: three coordinates, log det R over two correlations. The maximum is at independence."}, "image": {"alt": "Left, a curve of the entropy of two correlated normal coordinates against the correlation rho, with its peak at zero and falling to minus infinity at both ends. Right, a colour map over two correlations of a three-dimensional normal vector with its brightest point at the origin."}}
generator = torch.Generator().manual_seed(SEED)
number = {"short": 4000, "full": 20_000}[SIZE]
rhos = torch.linspace(-0.99, 0.99, 199, dtype=torch.float64)
matrices = torch.eye(2, dtype=torch.float64) + rhos[:, None, None] * torch.tensor(
    [[0.0, 1], [1, 0]], dtype=torch.float64
)
closed = gaussian_entropy(matrices)
marks = torch.tensor([-0.95, -0.8, -0.5, 0.0, 0.5, 0.8, 0.95], dtype=torch.float64)
estimates = []
for mark in marks:
    noise = torch.randn(number, 2, dtype=torch.float64, generator=generator)
    sample = torch.stack(
        [noise[:, 0], mark * noise[:, 0] + (1 - mark**2).sqrt() * noise[:, 1]], 1
    )
    estimates.append(float(knn_entropy(sample, k=3)))

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6))
left.plot(rhos, closed, label=r"$\frac{1}{2}\log\det(2\pi e R)$")
left.plot(marks, estimates, "o", label=f"estimate, {number} samples")
left.axhline(2 * MAXIMUM, color="black", linestyle=":", label=r"$\log(2\pi e)$")
left.set(xlabel=r"correlation $\rho$", ylabel="entropy in nats")
left.legend(fontsize=8)
side = np.linspace(-1, 1, 201)
bb, cc = np.meshgrid(side, side)
determinant = 1 - bb**2 - cc**2  # a = 0
surface = np.where(
    determinant > 0, np.log(np.where(determinant > 0, determinant, 1)), np.nan
)
picture = right.pcolormesh(bb, cc, surface, vmin=-4, shading="auto")
right.plot(0, 0, "k+", markersize=12)
right.set(
    xlabel="correlation b",
    ylabel="correlation c",
    title=r"$\log\det R$, $a = 0$",
    aspect="equal",
)
figure.colorbar(picture, ax=right)
figure.tight_layout()

# Standard deviation of the k = 3 estimate at n = 4000 is about 0.02 in two
# dimensions; 0.12 is six of them.
expected = 2 * MAXIMUM + 0.5 * torch.log1p(-(marks**2))
assert np.abs(np.array(estimates) - expected.numpy()).max() < 0.12
assert int(closed.argmax()) == 99  # rho = 0

# %% [markdown]
# The maximum is at independence all by itself. Variances are enough.
#
# **Predict.** Of ten thousand random correlation matrices in five dimensions, how many have a determinant above 1?

# %% tags=["nbval-check-output"]
rng = np.random.default_rng(0)
factors = rng.normal(size=(10_000, 5, 6))
covariances = factors @ factors.transpose(0, 2, 1)
scales = np.sqrt(np.einsum("nii->ni", covariances))
determinants = np.linalg.det(
    covariances / (scales[:, :, None] * scales[:, None, :])
)
print(
    "determinants above 1:", int((determinants > 1).sum()), "of", len(determinants)
)

# %% [markdown]
# ## Softmax is a maximum of entropy
#
# Six states have the energies below. Among all distributions with a given mean energy, which has the largest entropy?
# Theory says $p_i\propto e^{-U_i/T}$.
#
# **Predict.** If random distributions are points in the plane of mean energy and entropy, where are the Boltzmann
# distributions?

# %% mystnb={"figure": {"name": "fig-max_entropy-softmax", "caption": "Six states with given energies. Left: the distribution of largest entropy at three temperatures. Right: entropy against mean energy; no distribution lies above the curve of Boltzmann distributions, whose slope is 1/T."}, "image": {"alt": "Left, probabilities of six states at three temperatures, from almost all on the lowest energy to almost equal. Right, random distributions as points in the plane of mean energy and entropy, all below the curve of the Boltzmann distributions."}}
energy = np.array([0.0, 0.5, 1.0, 1.2, 2.0, 3.0])


def boltzmann(beta):
    """Softmax of -beta * energy: a distribution over the six states."""
    return special.softmax(-np.multiply.outer(beta, energy), axis=-1)


def discrete_entropy(p):
    """Shannon entropy in nats along the last axis."""
    return special.entr(p).sum(-1)


betas = np.linspace(-6, 12, 400)
curve = boltzmann(betas)
cloud = rng.dirichlet(np.full(6, 0.6), size=3000)
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6))
for offset, (temperature, colour) in enumerate(
    [(0.3, "tab:blue"), (1.0, "tab:orange"), (5.0, "tab:red")]
):
    p = boltzmann(1 / temperature)
    left.bar(
        np.arange(6) + 0.27 * (offset - 1),
        p,
        width=0.27,
        label=f"T = {temperature}",
        color=colour,
    )
    right.plot(p @ energy, discrete_entropy(p), "o", color=colour, zorder=3)
left.set(
    xticks=range(6),
    xticklabels=energy,
    xlabel="energy of the state",
    ylabel="probability",
)
left.legend()
right.plot(
    cloud @ energy,
    discrete_entropy(cloud),
    ".",
    color="grey",
    markersize=2,
    alpha=0.5,
)
right.plot(curve @ energy, discrete_entropy(curve), color="black")
right.set(xlabel="mean energy", ylabel="entropy in nats")
figure.tight_layout()

# No point of the cloud is above the curve: log Z + beta * E[U] bounds the entropy
# for every beta.
bounds = special.logsumexp(-np.multiply.outer(betas, energy), axis=-1)[
    :, None
] + np.outer(betas, cloud @ energy)
assert (discrete_entropy(cloud) <= bounds.min(0) + 1e-12).all()
# The curve's slope is beta = 1/T. Steps of 0.045 in beta: error of the differences
# about 1e-3.
slopes = np.gradient(discrete_entropy(curve)) / np.gradient(curve @ energy)
assert np.abs(slopes - betas)[5:-5].max() < 0.02

# %% [markdown]
# The left half of the curve has positive temperatures. On the right half, beyond the mean of all energies,
# $T$ is negative: to get more energy than chance gives, the distribution must prefer the high states.
#
# The identities behind it, exactly, for three states:

# %% tags=["nbval-check-output"]
beta = sp.symbols("beta", positive=True)
levels = sp.symbols("u1:4", real=True)
partition = sum(sp.exp(-beta * level) for level in levels)
weights = [sp.exp(-beta * level) / partition for level in levels]
mean = sum(w * level for w, level in zip(weights, levels, strict=True))
variance = (
    sum(w * level**2 for w, level in zip(weights, levels, strict=True)) - mean**2
)
print(
    "d log Z / d beta + E[U]  =",
    sp.simplify(sp.diff(sp.log(partition), beta) + mean),
)
print("d E[U] / d beta + Var[U] =", sp.simplify(sp.diff(mean, beta) + variance))

# %% [markdown]
# ## What a reconstruction loss does
#
# An autoencoder minimises $\mathcal R-\lambda H$: reconstruction pulls the codes one way, entropy the other.
# Take a reconstruction loss that wants the codes at $\pm1$: $\mathcal R=\mathbb E(z^2-1)^2$, with mean 0 and
# variance 1 kept. The minimiser is what `climb` finds with the potential $(z^2-1)^2/\lambda$.
#
# **Predict.** How large must $\lambda$ be for the codes to be normal? The chapter proves that the gap is at most
# $(\mathcal R_0-\mathcal R)/\lambda\le\mathcal R_0/\lambda$, with $\mathcal R_0=2$ the loss of normal codes.

# %% mystnb={"figure": {"name": "fig-max_entropy-tradeoff", "caption": "Reconstruction pulls to two clusters, entropy to the normal density. Left: the minimiser for three weights of the entropy. Right: its entropy gap, below both bounds. No finite weight closes it."}, "image": {"alt": "Left, density curves for three weights lambda, from two separate peaks at minus one and one to nearly the normal curve. Right, the entropy gap against lambda on logarithmic axes, below the line of two over lambda."}}
grid = cells(-5, 5, 500)
cost = (grid**2 - 1) ** 2
weights_of_entropy = np.array([0.3, 1, 3, 10, 30, 100])
gaps, sharp = [], []
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6))
for weight in weights_of_entropy:
    start = -(grid**2) / 2
    steps, values, _ = climb(
        grid, [(grid, 0.0), (grid**2, 1.0)], start, potential=cost / float(weight)
    )
    p = steps[-1] * (grid[1] - grid[0])
    assert abs(float(p @ grid**2) - 1) < 1e-6  # the constraint holds at the end
    gaps.append(MAXIMUM - values[-1])
    sharp.append((2 - float(p @ cost)) / weight)
    if weight in (0.3, 3, 100):
        left.plot(grid, steps[-1], label=rf"$\lambda$ = {weight:g}")
left.plot(
    grid, torch.exp(-(grid**2) / 2) / math.sqrt(2 * math.pi), "k--", label="N(0, 1)"
)
left.set(xlabel="code z", ylabel="density", xlim=(-3, 3))
left.legend(fontsize=8)
right.loglog(weights_of_entropy, gaps, "o-", label="gap")
right.loglog(
    weights_of_entropy,
    sharp,
    "s--",
    label=r"$(\mathcal{R}_0 - \mathcal{R})/\lambda$",
)
right.loglog(
    weights_of_entropy,
    2 / weights_of_entropy,
    ":",
    color="black",
    label=r"$\mathcal{R}_0/\lambda$",
)
right.set(xlabel=r"$\lambda$", ylabel="nats")
right.legend(fontsize=8)
figure.tight_layout()
for weight, gap, bound in zip(weights_of_entropy, gaps, sharp, strict=True):
    print(
        f"lambda {weight:5g}: gap {gap:.5f}, "
        f"bounds {bound:.5f} and {2 / weight:.5f}"
    )
    assert (
        0 < gap <= bound + 1e-6 <= 2 / weight + 2e-6
    )  # 1e-6: so far the constraints hold

# %% [markdown]
# The gap shrinks and never closes. In a real autoencoder there is a further difficulty: nobody can compute $H$ of
# the codes. It must be estimated from a batch, which is the subject of the next chapter.
