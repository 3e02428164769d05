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
# # Entropy from nearest neighbours: experiments
#
# The entropy of a density can be estimated from a sample, by looking only at how far each point is from its neighbours.
# Here you see the one law that makes this work, the estimator against known entropies, and the ways it goes wrong.
# The proofs are in the chapter *Entropy from nearest neighbours*, which comes before this page.
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
import math

import matplotlib.pyplot as plt
import mpmath
import numpy as np
import sympy
import torch
from scipy import stats
from scipy.spatial import KDTree
from scipy.special import digamma, polygamma

from gae_core.data import size_from_environment, toy
from gae_core.entropy import knn_entropy, knn_entropy_bound, log_unit_ball_volume

device = "cuda" if torch.cuda.is_available() else "cpu"
SIZE = size_from_environment("full" if device == "cuda" else "short")
torch.set_num_threads(
    1
)  # the tensors are small: a second thread costs more than it brings
MORE = (
    5 if SIZE == "full" else 1
)  # how many times more repetitions a full run makes
LOG_NORMAL = 0.5 * math.log(2 * math.pi * math.e)  # entropy of N(0, 1)
print(f"{SIZE} size on {device}")


def normal(n, d, generator):
    """Sample of N(0, I), drawn on the CPU: the same on every device."""
    return torch.randn(n, d, generator=generator).to(device)


def batch_norm(x):
    """Mean 0 and variance 1 in each coordinate of the batch."""
    return (x - x.mean(0)) / x.std(0, correction=0)


def mean_and_error(values):
    """Mean of independent values, and its standard error."""
    values = np.asarray([float(v) for v in values])
    return values.mean(), values.std(ddof=1) / math.sqrt(len(values))


# %% [markdown]
# ## 1. A law that forgets the density
#
# Draw $n = 10$ points in the plane. Take the first, and the ball around it that just reaches its third neighbour.
# How much probability does the ball hold? If the density is high the ball is small, if it is low the ball is large.
#
# **Predict:** for a normal and for a uniform sample, does the mass of the ball have the same distribution, or not?

# %% mystnb={"figure": {"name": "fig-knn_entropy-beta", "caption": "Mass of the ball that reaches the third of nine other points, for two densities and two norms, and the density Beta(3, 7)."}, "image": {"alt": "Two histograms of the probability mass of a ball, one for normal points and Euclidean balls, one for uniform points on a torus and square balls. Both follow the same curve, the density of Beta(3, 7)."}}
n, k, clouds = 10, 3, 8000 * MORE
generator = np.random.default_rng(0)

x = generator.standard_normal((clouds, n, 2))  # normal points, Euclidean balls
distance = np.sort(np.linalg.norm(x[:, 1:] - x[:, :1], axis=2), axis=1)[:, k - 1]
mass_normal = stats.ncx2.cdf(
    distance**2, 2, (x[:, 0] ** 2).sum(1)
)  # |y - x|^2 is noncentral chi-square

x = generator.random((clouds, n, 2))  # uniform points on the torus, square balls
difference = np.abs(x[:, 1:] - x[:, :1])
distance = np.sort(np.minimum(difference, 1 - difference).max(axis=2), axis=1)[
    :, k - 1
]
mass_uniform = (2 * distance) ** 2

p = np.linspace(0, 1, 300)
figure, axes = plt.subplots(1, 2, figsize=(8, 3), sharey=True, layout="constrained")
for ax, mass, title in zip(
    axes,
    (mass_normal, mass_uniform),
    ("normal, discs", "uniform, squares"),
    strict=True,
):
    ax.hist(mass, bins=50, density=True, alpha=0.5)
    ax.plot(p, stats.beta.pdf(p, k, n - k), "k")
    ax.set(title=title, xlabel="mass of the ball", xlim=(0, 0.9))
plt.show()

# %% [markdown]
# The two agree, with each other and with Beta($k$, $n-k$). The Kolmogorov–Smirnov distance says how well.
# Under the law, $\sqrt N$ times the distance exceeds 2.2 once in 8,000 runs, and the seed is fixed.

# %%
for name, mass in (
    ("normal, discs", mass_normal),
    ("uniform, squares", mass_uniform),
):
    ks = stats.kstest(mass, "beta", args=(k, n - k)).statistic * math.sqrt(clouds)
    print(
        f"{name:17} sqrt(N) KS = {ks:.2f}   mean {mass.mean():.4f} (law: {k / n})"
    )
    assert ks < 2.2
    assert (
        stats.kstest(mass, "beta", args=(k, n - k + 1)).statistic
        * math.sqrt(clouds)
        > 5
    )  # a near miss is seen

# %% [markdown]
# ## 2. The mean of its logarithm, exactly
#
# The estimator needs the mean of $\log P$. SymPy integrates $\log p$ against the Beta density, monomial by monomial.
# **Predict** the value for $n = 2$, $k = 1$, where $P$ is uniform on $[0, 1]$.

# %% tags=["nbval-check-output"]
p = sympy.symbols("p", positive=True)


def mean_log_mass(n, k):
    """Integral of log p against the density of Beta(k, n - k)."""
    density = (
        sympy.factorial(n - 1) / sympy.factorial(k - 1) / sympy.factorial(n - k - 1)
    )
    density = sympy.expand(density * p ** (k - 1) * (1 - p) ** (n - k - 1))
    return sum(
        sympy.integrate(term * sympy.log(p), (p, 0, 1))
        for term in sympy.Add.make_args(density)
    )


for n in range(2, 7):
    row = [mean_log_mass(n, k) for k in range(1, n)]
    assert row == [
        -sum(sympy.Rational(1, j) for j in range(k, n)) for k in range(1, n)
    ]
    assert all(
        sympy.simplify(sympy.digamma(k) - sympy.digamma(n) - row[k - 1]) == 0
        for k in range(1, n)
    )
    print(
        f"n = {n}:", "   ".join(f"k={k}: {value}" for k, value in enumerate(row, 1))
    )

# %% [markdown]
# Each is $\psi(k) - \psi(n) = -\sum_{j=k}^{n-1} 1/j$.
#
# ## 3. Volumes of balls
#
# The ball of radius $\varepsilon$ has the volume $V_d\,\varepsilon^d$. It depends on the norm.
# **Predict:** which of the three unit balls is the largest, and what happens to the Euclidean one as $d$ grows?

# %% tags=["nbval-check-output"]
t = sympy.symbols("t", positive=True)


def volume(d, p):
    """Slice by slice: the ball in d dimensions is made of balls in d - 1."""
    if d == 1 or p == sympy.oo:
        return sympy.Integer(2) ** d
    return (
        volume(d - 1, p)
        * 2
        * sympy.integrate((1 - t**p) ** sympy.Rational(d - 1, p), (t, 0, 1))
    )


for d in range(1, 6):
    one, two, largest = (
        sympy.nsimplify(sympy.simplify(volume(d, p))) for p in (1, 2, sympy.oo)
    )
    for p, value in ((1, one), (2, two), (math.inf, largest)):
        assert math.isclose(
            math.exp(log_unit_ball_volume(d, p)), float(value), rel_tol=1e-12
        )
    print(f"d = {d}:   p=1: {one!s:6}  p=2: {two!s:10}  p=oo: {largest}")
print(f"d = 128, p=2: {math.exp(log_unit_ball_volume(128)):.3e}")

# %% [markdown]
# ## 4. The estimator against known entropies
#
# $\hat H = \psi(n) - \psi(k) + \log V_d + \frac dn\sum_i \log\varepsilon_k(i)$, on 1,000 points in the plane.
# **Predict:** is the error nearer to 0.3 or to 0.03?

# %%
generator = torch.Generator().manual_seed(1)
n, d, repeats = 1000, 2, 20 * MORE


def laplace(n, d):
    """Unit variance."""
    u = torch.rand(n, d, generator=generator) - 0.5
    return (-u.sign() * torch.log1p(-2 * u.abs()) / math.sqrt(2)).to(device)


def uniform(n, d):
    """Unit variance."""
    return (math.sqrt(12) * (torch.rand(n, d, generator=generator) - 0.5)).to(
        device
    )


CLOUDS = {  # unit variance in each coordinate, and entropy for each coordinate
    "normal": (lambda n, d: normal(n, d, generator), LOG_NORMAL),
    "uniform": (uniform, math.log(12) / 2),
    "Laplace": (laplace, 1 + math.log(2) / 2),
}
print(f"n = {n}, d = {d}, mean of {repeats} estimates")
print(
    f"{'':10}{'true':>8}"
    + "".join(f"{f'k={k}, L{p}':>19}" for k in (1, 5) for p in (2, "∞"))
)
for name, (draw, entropy) in CLOUDS.items():
    row = f"{name:10}{d * entropy:8.3f}"
    for k in (1, 5):
        for p in (2.0, math.inf):
            mean, error = mean_and_error(
                knn_entropy(draw(n, d), k, p=p) for _ in range(repeats)
            )
            row += f"{mean:11.3f} ± {error:.3f}"
            # Bias at most about 0.09 here (Laplace, k = 5); 4 standard errors.
            assert abs(mean - d * entropy) < 0.1 + 4 * error
    print(row)

# %% [markdown]
# Software has been wrong by exactly $d\log 2$ here. Some texts write the estimator with the *diameter* $2\varepsilon$
# and the volume of the ball of diameter 1. Take the volume from one text and the distance from the other, and the
# error is systematic.

# %%
x = normal(1000, 5, generator).double()
eps = KDTree(x.cpu().numpy()).query(x.cpu().numpy(), k=[4])[0][:, 0]
constant = digamma(1000) - digamma(3)
by_radius = constant + log_unit_ball_volume(5) + 5 * np.log(eps).mean()
by_diameter = (
    constant
    + log_unit_ball_volume(5)
    - 5 * math.log(2)
    + 5 * np.log(2 * eps).mean()
)
mixed = constant + log_unit_ball_volume(5) + 5 * np.log(2 * eps).mean()
print(f"true {5 * LOG_NORMAL:.3f}   radius {by_radius:.3f}", end="   ")
print(f"diameter {by_diameter:.3f}   mixed {mixed:.3f}")
print(f"error of mixing: {mixed - by_radius:.6f} = 5 log 2 = {5 * math.log(2):.6f}")
assert abs(by_radius - by_diameter) < 1e-12
assert abs(by_radius - float(knn_entropy(x, 3))) < 1e-9
assert abs(mixed - by_radius - 5 * math.log(2)) < 1e-12

# %% [markdown]
# ## 5. Dimension
#
# Now the same for N(0, I) in 1 to 64 dimensions.
# **Predict:** the sign of the bias in low and in high dimension, and what ten times as many points do to it.
#
# The dashed line is the prediction for fixed $n$ and large $d$: all distances are then close to $\sqrt{2d}$, and
# $\hat H - H \approx \frac d2\log 2 - m\sqrt{3d/8} + \psi(n) - \psi(k) - \frac12\log\pi d$,
# where $m$ is the mean of the largest of $n - 1$ standard normal variables (here $k = 1$).
#
# From each estimate we subtract the mean of $-\log f$ at the same points, in place of its expectation, the entropy.
# That changes no bias and takes away the noise that the two have in common.

# %% mystnb={"figure": {"name": "fig-knn_entropy-bias", "caption": "Bias of the estimate for N(0, I) against the dimension, with standard errors: low dimensions enlarged (left), by number of points and neighbour (middle), and by norm (right)."}, "image": {"alt": "Three panels of bias in nats against the dimension. Left, 1 to 8 dimensions enlarged: the four curves go down from near zero to between minus 0.05 and minus 0.1 and, those of 100 points first, up through zero. Middle and right, 1 to 64 dimensions: all curves look flat up to 8 dimensions and then rise to between 8 and 20 nats at 64. Ten times as many points lower the curve only a little; the maximum norm raises it by three quarters."}}
dimensions = [1, 2, 3, 4, 6, 8, 12, 16, 32, 64]
generator = torch.Generator().manual_seed(2)
settings = {  # repeats up to 12 dimensions, where the bias is small, and beyond
    (100, 1, 2.0): (400, 60),
    (100, 5, 2.0): (400, 60),
    (1000, 1, 2.0): (24, 6),
    (1000, 5, 2.0): (24, 6),
    (100, 1, math.inf): (60, 60),
}


def error_of_estimate(n, k, p, d):
    """Estimate less the mean of -log f at the points, for one normal sample."""
    x = normal(n, d, generator)
    surprise = 0.5 * x.square().sum(1).mean() + 0.5 * d * math.log(2 * math.pi)
    return float(knn_entropy(x, k, p=p) - surprise)


bias = {
    key: np.array(
        [
            mean_and_error(
                error_of_estimate(*key, d)
                for _ in range(repeats[0 if d <= 12 else 1] * MORE)
            )
            for d in dimensions
        ]
    )
    for key, repeats in settings.items()
}
largest = float(
    mpmath.quad(
        lambda t: t * 99 * mpmath.npdf(t) * mpmath.ncdf(t) ** 98, [-8, 0, 2, 4, 8]
    )
)

figure, axes = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
for (n, k, p), values in bias.items():
    options = {"marker": "o", "ms": 3, "label": f"n = {n}, k = {k}"}
    if p == 2:
        for ax in axes[:2]:
            ax.errorbar(dimensions, values[:, 0], values[:, 1], **options)
    if n == 100 and k == 1:
        options["label"] = f"p = {p:g}, {options['label']}"
        axes[2].errorbar(dimensions, values[:, 0], values[:, 1], **options)
d = np.array([16.0, 32, 64])
limit = (
    d / 2 * math.log(2)
    - largest * np.sqrt(3 * d / 8)
    + digamma(100)
    - digamma(1)
    - np.log(math.pi * d) / 2
)
axes[1].plot(d, limit, "k--", label="large d, n = 100, k = 1")
ticks = [1, 2, 4, 8, 16, 32, 64]
for ax in axes:
    ax.axhline(0, color="grey", lw=0.8)
    ax.set(xlabel="dimension d", xscale="log", xticks=ticks, xticklabels=ticks)
    ax.minorticks_off()
    ax.legend(fontsize=8)
axes[0].set(xlim=(0.9, 8.9), ylim=(-0.12, 0.32), ylabel="bias (nats), enlarged")
plt.show()

# %%
print("bias (± standard error)")
names = [f"n={n} k={k} p={p:g}" for n, k, p in bias]
print(f"{'d':>4}" + "".join(f"{name:>16}" for name in names))
for row, d in enumerate(dimensions):
    entries = (f"{v[row, 0]:+.3f} ± {v[row, 1]:.3f}" for v in bias.values())
    print(f"{d:4}" + "".join(f"{entry:>16}" for entry in entries))
base, at = bias[100, 1, 2.0], dimensions.index
for d in (
    2,
    4,
):  # negative where the dimension is low; about 3 standard errors or more
    for k in (1, 5):
        mean, error = bias[100, k, 2.0][at(d)]
        assert -0.1 < mean < -2.5 * error
assert base[at(8), 0] > 4 * base[at(8), 1]  # positive in 8 dimensions
assert 10 < base[-1, 0] < 12  # in 64 dimensions; one standard error is about 0.09
# The maximum norm is much worse there; k adds bias; ten times n hardly helps.
assert bias[100, 1, math.inf][-1, 0] > 1.5 * base[-1, 0]
assert bias[100, 5, 2.0][-1, 0] > base[-1, 0] > bias[1000, 1, 2.0][-1, 0] > 8

# %% [markdown]
# ## 6. Bounded support
#
# At an edge part of the ball is empty, so the mass is less than volume times density and the estimate too high.
# On a torus there is no edge. Both have entropy 0. **Predict** the bias for the uniform density on each.
# In one dimension the bias on the interval is exactly $(2\log 2 - 1)\,k/n$.

# %%
generator = np.random.default_rng(3)
n, k, repeats = 500, 3, 12 * MORE
for d in (1, 2, 4, 8):
    found = {}
    for name, box in (("cube", None), ("torus", 1.0)):
        values = []
        for _ in range(repeats * (5 if d < 8 else 1)):
            x = generator.random((n, d))
            # On the torus with p = ∞ the balls fit at every radius, and the
            # estimate is unbiased for every n, k and d.
            eps = KDTree(x, boxsize=box).query(x, k=[k + 1], p=np.inf)[0]
            values.append(digamma(n) - digamma(k) + d * np.log(2 * eps).mean())
        found[name] = mean_and_error(values)
    (cube, se_cube), (torus, se_torus) = found["cube"], found["torus"]
    print(f"d = {d}: cube {cube:+.4f} ± {se_cube:.4f}", end="   ")
    print(f"torus {torus:+.4f} ± {se_torus:.4f}")
    assert abs(torus) < 4 * se_torus
    if d == 1:
        print(f"       exact {(2 * math.log(2) - 1) * k / n:+.4f} on the interval")
        assert abs(cube - (2 * math.log(2) - 1) * k / n) < 4 * se_cube
    else:
        assert cube > 4 * se_cube

# %% [markdown]
# ## 7. $\log(n-1)$ or $\psi(n)$?
#
# A common form of the estimator has $\log(n-1)$ in the place of $\psi(n)$. The difference is noiseless: it is a bias
# that stays however many batches of size $n$ are averaged. **Predict** which of the three is close to $\psi(100)$.

# %% tags=["nbval-check-output"]
mpmath.mp.dps = 30
names = ["psi(n)", "psi - log(n-1)", "psi - log n", "psi - log(n-1/2)"]
print(f"{'n':>5}" + "".join(f" {name:>17}" for name in names))
for n in (2, 10, 100, 1000):
    psi = mpmath.psi(0, n)
    gaps = [psi - mpmath.log(n - shift) for shift in (1, 0, mpmath.mpf(1) / 2)]
    print(
        f"{n:5} {float(psi):17.12f}"
        + "".join(f" {float(gap):+17.12f}" for gap in gaps)
    )
    assert abs(gaps[2]) < mpmath.mpf(1) / (
        24 * (n - 0.5) ** 2
    )  # the next term of the series is negative
    assert gaps[0] > 0.99 / (2 * (n - 1)) * (1 - mpmath.mpf(1) / (3 * (n - 1)))

# %% [markdown]
# ## 8. Variance
#
# If the $n$ values were independent, the variance of the estimate for a uniform density would be $\psi_1(k)/n$.
# But two points that share a neighbour share an error.
# **Predict:** is the true variance larger or smaller, and for which $k$ most?
# On the circle with $k = 1$ it is known exactly.

# %%
generator = np.random.default_rng(4)
n, repeats, neighbours = 100, 1500 * MORE, [1, 2, 3, 5, 10]
print(
    f"n Var on the torus, n = {n}" + "".join(f"{f'k={k}':>9}" for k in neighbours)
)
print(
    f"{'if independent, ψ₁(k)':28}"
    + "".join(f"{polygamma(1, k):9.3f}" for k in neighbours)
)
for d in (1, 2, 3):
    values = np.empty((repeats, len(neighbours)))
    for r in range(repeats):
        x = generator.random((n, d))
        eps = KDTree(x, boxsize=1.0).query(
            x, k=[k + 1 for k in neighbours], p=np.inf
        )[0]
        values[r] = digamma(n) - digamma(neighbours) + d * np.log(2 * eps).mean(0)
    variance = n * (values**2).mean(0)  # the mean is 0
    error = n * (values**2).std(0) / math.sqrt(repeats)
    print(
        f"{f'd = {d} (± {error.max():.2f})':28}"
        + "".join(f"{v:9.3f}" for v in variance)
    )
    assert (variance - 4 * error > polygamma(1, neighbours)).all()
    if d == 1:
        exact = (
            math.pi**2 / 2
            + 4 * float(mpmath.polylog(2, -0.5))
            - n * polygamma(1, n)
        )
        print(f"{'exact, d = 1':28}{exact:9.3f}")
        assert abs(variance[0] - exact) < 4 * error[0]

# %% [markdown]
# ## 9. The estimate ranks wrongly
#
# With mean 0 and variance 1 in each coordinate, N(0, I) has the largest entropy. Is it so for the estimate?
# **Predict:** which of two batches of 17 points in 16 dimensions gets the higher value, a normal sample, or the
# corners of a regular simplex? Both have been batch-normalised.

# %%
generator = torch.Generator().manual_seed(5)


def simplex(n, d):
    """Corners of a regular simplex, n <= d + 1, mean 0 and mean square radius d."""
    corners = torch.linalg.svd(torch.eye(n, dtype=torch.float64) - 1 / n)[0][
        :, : n - 1
    ]
    x = torch.zeros(n, d, dtype=torch.float64)
    x[:, : n - 1] = corners
    return x * math.sqrt(n * d / float((x * x).sum()))


print(f"{'n':>4} {'d':>4} {'simplex':>10} {'bound':>10} {'N sample':>10}", end="")
print(f" {'entropy of N(0, I)':>20}")
for n, d in ((3, 2), (17, 16), (65, 64), (100, 128)):
    value = float(knn_entropy(simplex(n, d)))
    gaussian = np.mean(
        [float(knn_entropy(batch_norm(normal(n, d, generator)))) for _ in range(20)]
    )
    print(f"{n:4} {d:4} {value:10.3f} {knn_entropy_bound(n, d):10.3f}", end=" ")
    print(f"{gaussian:10.3f} {d * LOG_NORMAL:20.3f}")
    assert abs(value - knn_entropy_bound(n, d)) < 1e-6
    assert value > max(gaussian, d * LOG_NORMAL)

# %% [markdown]
# No special arrangement is needed. Take independent coordinates: uniform, or near $\pm1$ (with noise of
# standard deviation 0.05), or Laplace. All have a lower entropy than the normal.
# **Predict** from which dimension on the estimate puts the atoms above the normal density, at $n = 100$.

# %% mystnb={"figure": {"name": "fig-knn_entropy-ranking", "caption": "Entropy relative to the normal density, as estimated from batch-normalised batches of 100 points (left) and in truth (right)."}, "image": {"alt": "Two panels against the dimension. Left, the estimated difference from the normal: the curves for uniform and for atoms at plus and minus one cross zero between 8 and 32 dimensions and stay above; Laplace falls below. Right, the true differences: all negative, and down to minus 147 nats for the atoms at 64 dimensions."}}
generator = torch.Generator().manual_seed(6)
dimensions, n, repeats = [2, 4, 8, 16, 32, 64], 100, 60 * MORE
atoms_sd = 0.05


def atoms(n, d):
    """±1 with a little noise, scaled to unit variance."""
    signs = 2.0 * torch.randint(2, (n, d), generator=generator) - 1
    return (
        (signs + atoms_sd * torch.randn(n, d, generator=generator))
        / math.sqrt(1 + atoms_sd**2)
    ).to(device)


# The two atoms do not overlap at this noise: entropy log 2 + that of one atom.
atoms_entropy = (
    math.log(2) + LOG_NORMAL + math.log(atoms_sd) - 0.5 * math.log(1 + atoms_sd**2)
)
SHAPES = {
    "uniform": CLOUDS["uniform"],
    "±1 atoms": (atoms, atoms_entropy),
    "Laplace": CLOUDS["Laplace"],
}


def estimates(draw, d):
    """Estimates on batch-normalised batches."""
    return mean_and_error(
        knn_entropy(batch_norm(draw(n, d))) for _ in range(repeats)
    )


generator_normal = torch.Generator().manual_seed(7)
reference = [
    estimates(lambda n, d: normal(n, d, generator_normal), d) for d in dimensions
]
figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
difference = {}
for name, (draw, entropy) in SHAPES.items():
    rows = [estimates(draw, d) for d in dimensions]
    difference[name] = np.array(
        [
            (a - b, math.hypot(s, t))
            for (a, s), (b, t) in zip(rows, reference, strict=True)
        ]
    )
    axes[0].errorbar(
        dimensions,
        difference[name][:, 0],
        difference[name][:, 1],
        marker="o",
        ms=3,
        label=name,
    )
    axes[1].plot(
        dimensions,
        [d * (entropy - LOG_NORMAL) for d in dimensions],
        marker="o",
        ms=3,
        label=name,
    )
for ax, title in zip(
    axes,
    ("estimate − estimate for normal", "entropy − entropy of normal"),
    strict=True,
):
    ax.axhline(0, color="grey", lw=0.8)
    ax.set(
        title=title,
        xlabel="dimension d",
        xscale="log",
        xticks=dimensions,
        xticklabels=dimensions,
    )
    ax.minorticks_off()
    ax.legend(fontsize=8)
axes[0].set_ylabel("nats")
plt.show()

# %%
print(
    f"{'d':>4}" + "".join(f"{name + ': estimated (true)':>29}" for name in SHAPES)
)
for row, d in enumerate(dimensions):
    line = f"{d:4}"
    for name, (_, entropy) in SHAPES.items():
        value, error = difference[name][row]
        line += (
            f"{value:+.2f} ± {error:.2f} ({d * (entropy - LOG_NORMAL):+.2f})".rjust(
                29
            )
        )
    print(line)
assert (
    difference["±1 atoms"][0, 0] < -4
)  # in the plane the atoms are seen for what they are (true: -4.61)
for name in (
    "uniform",
    "±1 atoms",
):  # in 64 dimensions they win: by 7 and more standard errors
    assert difference[name][-1, 0] > 4 * difference[name][-1, 1]
assert difference["Laplace"][-1, 0] < -1  # heavy tails still lose

# %% [markdown]
# Why: with all variances fixed, the mean squared distance of two points is fixed as well, and the *nearest* of many is
# the farther away the less the distances spread. The spread is $\mathrm{Var}\,(x-y)^2 = 2(\kappa+1)$ for each
# coordinate with fourth moment $\kappa$: 8 for the normal, 5.6 for the uniform density, 4 for $\pm1$, 14 for Laplace.
# SymPy confirms:

# %% tags=["nbval-check-output"]
kappa = sympy.symbols("kappa")
x, y, z = sympy.symbols("x y z")
MOMENTS = {0: 1, 1: 0, 2: 1, 3: sympy.symbols("m3"), 4: kappa}


def expectation(expression):
    """Mean of a polynomial in three copies of a variable, mean 0, variance 1."""
    total = 0
    for (i, j, m), c in sympy.Poly(sympy.expand(expression), x, y, z).terms():
        total += c * MOMENTS[i] * MOMENTS[j] * MOMENTS[m]
    return sympy.factor(total)


variance = expectation((x - y) ** 4) - expectation((x - y) ** 2) ** 2
covariance = (
    expectation((x - y) ** 2 * (x - z) ** 2) - expectation((x - y) ** 2) ** 2
)
print("variance of (x - y)^2:", sympy.factor(variance))
print("covariance of (x - y)^2 and (x - z)^2:", sympy.expand(covariance))
for name, value in (
    ("normal", 3),
    ("uniform", sympy.Rational(9, 5)),
    ("±1", 1),
    ("Laplace", 6),
):
    print(f"{name:8} kappa = {value!s:4} variance {variance.subs(kappa, value)}")

# %% [markdown]
# These were independent coordinates. Now keep the directions of a normal sample and squeeze its *lengths* towards their
# mean $\mu$, from $|x|$ to $a\,(\mu + s\,(|x| - \mu))$, with $a$ such that the variances stay 1: $s = 1$ is the normal
# density, $s = 0$ the uniform distribution on a sphere, whose entropy is $-\infty$. Batches are independent, of 128
# points, as in a training.
# **Predict** the dimension from which on the estimate, on average, prefers another $s$ than 1.

# %% mystnb={"figure": {"name": "fig-knn_entropy-radial", "caption": "Expected estimate on batches of 128, minus that for the normal density, against the spread s of the lengths, for four dimensions; black, the true difference in 8 dimensions."}, "image": {"alt": "Differences to the normal density against the spread s of the length, from the sphere at 0 to the normal at 1, for 4, 6, 8 and 16 dimensions. The true entropy, nearly the same curve in all dimensions, falls to minus infinity towards 0. The estimate for 4 dimensions falls to minus 1, for 6 to minus 0.3, for 8 it rises to 0.07 at 0.7 and returns to zero at 0, for 16 it rises all the way to 0.6."}}


def squeezed(x, s):
    """Normal points, the spread of their lengths times s, with covariance I."""
    d, length = x.shape[1], x.norm(dim=1, keepdim=True)
    mu = math.sqrt(2) * math.exp(math.lgamma((d + 1) / 2) - math.lgamma(d / 2))
    a = math.sqrt(d / (mu**2 + s**2 * (d - mu**2)))
    return a * (mu + s * (length - mu)) * x / length, a


def true_difference(d, s):
    """log(a s) + (d - 1) E log(new length / old length), by the chi law."""
    x = torch.zeros(20_000, d)
    quantiles = (np.arange(20_000) + 0.5) / 20_000
    x[:, 0] = torch.from_numpy(stats.chi.ppf(quantiles, d))
    y, a = squeezed(x, s)
    return math.log(a * s) + (d - 1) * float((y[:, 0] / x[:, 0]).log().mean())


spreads, repeats = [0.0, 0.25, 0.5, 0.7, 0.85, 1.0], 100 * MORE
generator = torch.Generator().manual_seed(14)
radial = {}
for d in (4, 6, 8, 16):
    values = []
    for _ in range(repeats):
        x = normal(128, d, generator)
        row = [float(knn_entropy(batch_norm(squeezed(x, s)[0]))) for s in spreads]
        values.append(np.array(row) - row[-1])  # paired with the normal batch
    radial[d] = np.mean(values, 0), np.std(values, 0) / math.sqrt(repeats)
figure, ax = plt.subplots(figsize=(6.5, 3.8), layout="constrained")
for d, (mean, error) in radial.items():
    ax.errorbar(spreads, mean, error, marker="o", ms=3, label=f"d = {d}")
fine = np.linspace(0.2, 1, 41)
ax.plot(fine, [true_difference(8, s) for s in fine], "k", label="true, d = 8")
ax.axhline(0, color="grey", lw=0.8)
ax.set(xlabel="spread of the lengths, s", ylabel="nats", ylim=(-1.15, 0.7))
ax.legend(fontsize=8)
plt.show()

# %%
print(f"{'d':>4}" + "".join(f"{f's = {s}':>16}" for s in spreads[:-1]))
for d, (mean, error) in radial.items():
    entries = [f"{m:+.3f} ± {e:.3f}" for m, e in zip(mean, error, strict=True)]
    print(f"{d:4}" + "".join(f"{entry:>16}" for entry in entries[:-1]))
truth = [true_difference(8, s) for s in spreads[1:-1]]
print("true" + f"{'-inf':>16}" + "".join(f"{value:>+16.3f}" for value in truth))
# Of these s, in four dimensions the normal density is best, in eight s = 0.7
# and not the sphere, in sixteen the sphere; each by 5 standard errors or more.
assert (radial[4][0][:-1] < -5 * radial[4][1][:-1]).all()
assert radial[8][0][3] > 5 * radial[8][1][3] and radial[8][0][3] > radial[8][0][0]
assert radial[16][0].argmax() == 0

# %% [markdown]
# ## 10. Digits lost
#
# Squared distances are often computed as $|x|^2 + |y|^2 - 2x\cdot y$, because a matrix product is fast.
# **Predict** what float32 makes of it for points with mean 1 and standard deviation 0.001.

# %%
generator = torch.Generator().manual_seed(8)
exact = 1 + 1e-3 * torch.randn(1000, 2, generator=generator, dtype=torch.float64)
x = exact.float()
squared = (x**2).sum(1)[:, None] + (x**2).sum(1) - 2 * x @ x.T
squared.fill_diagonal_(math.inf)
nearest = squared.amin(1)
kept = nearest.clamp_min(1e-14).double()  # what is not positive has no logarithm
constant = digamma(1000) - digamma(1) + log_unit_ball_volume(2)
by_product = constant + float(kept.log().mean())
truth = float(knn_entropy(exact))
print(f"float64                      {truth:9.4f}")
print(
    f"float32, differences         {float(knn_entropy(x, duplicates='clamp')):9.4f}"
)
bad = int((nearest <= 0).sum())
print(f"float32, matrix product      {by_product:9.4f}, {bad} squares not positive")
centred = float(knn_entropy(x - x.mean(0), duplicates="clamp"))
print(f"float32, mean subtracted     {centred:9.4f}")
assert (
    abs(float(knn_entropy(x, duplicates="clamp")) - truth) < 0.05
)  # x itself is rounded to 6e-8
assert abs(by_product - truth) > 1

# %% [markdown]
# ## 11. The gradient, and its two identities
#
# Shifting all points changes nothing, so the gradients sum to zero.
# Scaling by $a$ adds $d\log a$, so $\sum_i x_i\cdot\nabla_i\hat H = d$.
# Both are exact for every sample, not only on average.

# %%
generator = torch.Generator().manual_seed(9)
x = torch.randn(200, 7, generator=generator, dtype=torch.float64).requires_grad_()
(gradient,) = torch.autograd.grad(knn_entropy(x, 2), x)
print(f"largest entry of the sum: {float(gradient.sum(0).abs().max()):.1e}")
print(f"sum of x · gradient:      {float((x.detach() * gradient).sum()):.12f}")
assert float(gradient.sum(0).abs().max()) < 1e-12
assert abs(float((x.detach() * gradient).sum()) - 7) < 1e-12

# %% [markdown]
# ## 12. The gradient as a force
#
# Each point is pushed away from its nearest neighbour, with the strength $1/\varepsilon$. Let 1,000 free points move
# uphill, in random batches of 100, each batch normalised. There is no network and no reconstruction here.
# The force has an infinite variance in the plane ($kd \le 2$), so it is clipped.
#
# **Predict** where three tight clusters end.

# %% mystnb={"figure": {"name": "fig-knn_entropy-particles", "caption": "Free points that climb the estimate, after 0 to 3,000 batches. The circle holds 95 % of N(0, I)."}, "image": {"alt": "Four snapshots of 1,000 points in the plane. First three tight clusters, then three wider clouds that touch, then one round cloud inside the circle, at last a round cloud with a denser middle and a few points outside the circle."}}


def climb(x, steps, *, step_size=0.1, clip=3.0, batch=100, seed=0):
    """Ascent of the batch estimate on free points; yields each cloud."""
    generator = torch.Generator().manual_seed(seed)
    x = x.clone()
    for _ in range(steps):
        chosen = torch.randperm(len(x), generator=generator)[:batch].to(x.device)
        points = x[chosen].requires_grad_()
        (force,) = torch.autograd.grad(
            knn_entropy(batch_norm(points), duplicates="clamp"), points
        )
        force = (
            force * batch / x.shape[1]
        )  # a sum over pairs of (x - y) / |x - y|^2
        length = force.norm(dim=1, keepdim=True).clamp_min(1e-12)
        x[chosen] = x[chosen] + step_size * force * (clip / length).clamp_max(1)
        x = batch_norm(x)
        yield x


generator = torch.Generator().manual_seed(10)
corners = torch.tensor([[-1.0, -1.0], [1.0, -0.6], [0.2, 1.2]])
start = corners[torch.randint(3, (1000,), generator=generator)] + 0.1 * torch.randn(
    1000, 2, generator=generator
)
start = batch_norm(start.to(device))
snapshots, shown = {0: start}, (100, 500, 3000)
for step, cloud in enumerate(climb(start, 3000, step_size=0.05), 1):
    if step in shown:
        snapshots[step] = cloud
figure, axes = plt.subplots(
    1, 4, figsize=(9, 2.7), layout="constrained", sharey=True
)
for ax, (step, cloud) in zip(axes, snapshots.items(), strict=True):
    ax.plot(*cloud.T.cpu(), ".", ms=2)
    ax.add_patch(plt.Circle((0, 0), math.sqrt(stats.chi2.ppf(0.95, 2)), fill=False))
    ax.set(
        title=f"{step} batches", xlim=(-3.6, 3.6), ylim=(-3.6, 3.6), aspect="equal"
    )
plt.show()

# %%
before, after = ((snapshots[step] ** 2).sum(1).cpu().numpy() for step in (0, 3000))
inside = [(q < stats.chi2.ppf(0.95, 2)).mean() for q in (before, after)]
distances = [stats.kstest(q, "chi2", args=(2,)).statistic for q in (before, after)]
print(f"inside the circle: {inside[0]:.3f} before, ", end="")
print(f"{inside[1]:.3f} after (normal: 0.95)")
print(f"KS distance of |z|^2 from chi-square: {distances[0]:.3f} before, ", end="")
print(f"{distances[1]:.3f} after")
assert (
    distances[0] > 0.3 and distances[1] < 0.1
)  # nearly normal in the plane: the estimate is good there

# %% [markdown]
# ## 13. In more dimensions the force leads elsewhere
#
# Now start from perfect normal samples in 8 and in 16 dimensions. The true entropy has nothing to gain there.
# **Predict** whether the clouds stay, and whether histograms of single coordinates would tell you.

# %% mystnb={"figure": {"name": "fig-knn_entropy-shell", "caption": "Normal samples in 8 and 16 dimensions before and after climbing the estimate in batches of 128: squared radius (left, middle) and all single coordinates in 16 dimensions (right)."}, "image": {"alt": "Left and middle, histograms of the squared radius in 8 and 16 dimensions: before, it follows the chi-square curve; after, it is a narrow peak at d or a little above, in 8 dimensions with a small remainder between 1 and 6. Right, histograms of single coordinates in 16 dimensions before and after, both on the normal curve."}}
generator = torch.Generator().manual_seed(11)
figure, axes = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
clouds = {}
for ax, d in zip(axes, (8, 16), strict=False):
    start = batch_norm(normal(1000 * MORE, d, generator))
    *_, end = climb(start, 1500 * MORE, batch=128)
    clouds[d] = {"before": start, "after": end}
    for name, cloud in clouds[d].items():
        squared = (cloud**2).sum(1).cpu().numpy()
        bins = np.linspace(0, 3 * d, 91)
        ax.hist(squared, bins=bins, density=True, alpha=0.5, label=name)
    q = np.linspace(0.1, 3 * d, 300)
    ax.plot(q, stats.chi2.pdf(q, d), "k", label=f"chi-square, {d}")
    ax.set(xlabel=f"squared radius |z|², d = {d}")
for name, cloud in clouds[16].items():
    single = cloud.flatten().cpu().numpy()
    axes[2].hist(single, bins=60, density=True, alpha=0.5, label=name)
t = np.linspace(-4, 4, 300)
axes[2].plot(t, stats.norm.pdf(t), "k", label="normal")
axes[2].set(xlabel="one coordinate, d = 16")
for ax in axes:
    ax.legend(fontsize=8)
plt.show()

# %%
for d, name in ((d, name) for d in clouds for name in ("before", "after")):
    cloud = clouds[d][name].cpu().numpy()
    squared = (cloud**2).sum(1)
    spread = squared.std() / math.sqrt(2 * d)
    ks = stats.kstest(squared, "chi2", args=(d,)).statistic
    single = np.mean([stats.kstest(column, "norm").statistic for column in cloud.T])
    print(f"d = {d:2}, {name:6}  sd(|z|²) / sqrt(2d) {spread:.2f}", end="   ")
    print(f"KS of |z|² {ks:.3f}   of a coordinate {single:.3f}")
    if name == "before":
        # A normal sample; KS of 1,000 points is 0.05 at the 1 % level.
        assert 0.85 < spread < 1.15 and ks < 0.07
    else:
        # A shell, in 8 dimensions with some points inside; no coordinate shows it.
        assert spread < {8: 0.65, 16: 0.3}[d] and ks > {8: 0.15, 16: 0.3}[d]
        assert single < 0.05

# %% [markdown]
# ## 14. Which way round is the nearest neighbour taken?
#
# Train a small generator $x = g(\text{noise})$ on eight clusters, three times:
#
# * *data to sample*: each datum pulls the sample that is nearest to it, $\sum_i \min_j \|y_i - x_j\|^2$ (IMLE);
# * the same with $\log$ of the distance: the nearest-neighbour estimate of the cross entropy of the data;
# * *sample to data*: each sample is pulled to its nearest datum, $\sum_j \min_i \|y_i - x_j\|^2$.
#
# **Predict** which of them forgets clusters, and which produces samples where there are no data.

# %% mystnb={"figure": {"name": "fig-knn_entropy-direction", "caption": "Samples of a small generator (orange) after training on eight clusters (blue) with three losses that differ in the direction of the nearest neighbour."}, "image": {"alt": "Three scatter plots. With data to sample, squared or logarithmic, the samples cover all eight clusters and much of the empty space between. With sample to data, all samples lie on two neighbouring clusters and the line between them."}}
LOSSES = {
    "data to sample, squared": lambda squared: squared.amin(1).mean(),
    "data to sample, log": lambda squared: (
        0.5 * squared.amin(1).clamp_min(1e-8).log().mean()
    ),
    "sample to data, squared": lambda squared: squared.amin(0).mean(),
}
modes = toy("eight_gaussians").modes.float().to(device)
data = (
    toy("eight_gaussians")
    .sample(240, generator=torch.Generator().manual_seed(12))
    .float()
    .to(device)
)


def train_generator(loss, steps=300 * MORE, samples=200):
    """A multilayer perceptron from noise in the plane to the plane, by Adam."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = torch.nn.Sequential(
            torch.nn.Linear(2, 64),
            torch.nn.ReLU(),
            torch.nn.Linear(64, 64),
            torch.nn.ReLU(),
            torch.nn.Linear(64, 2),
        ).to(device)
    optimiser = torch.optim.Adam(net.parameters(), lr=5e-3)
    generator = torch.Generator().manual_seed(13)
    for _ in range(steps):
        x = net(normal(samples, 2, generator))
        squared = (data[:, None, :] - x).square().sum(-1)  # (data, samples)
        optimiser.zero_grad()
        loss(squared).backward()
        optimiser.step()
    return net(normal(2000, 2, generator)).detach()


generated = {name: train_generator(loss) for name, loss in LOSSES.items()}
figure, axes = plt.subplots(1, 3, figsize=(9, 3.2), layout="constrained")
for ax, (name, x) in zip(axes, generated.items(), strict=True):
    ax.plot(*x.T.cpu(), ".", ms=2, alpha=0.4, color="tab:orange")
    ax.plot(*data.T.cpu(), ".", ms=2, color="tab:blue")
    ax.set(title=name, xlim=(-3.5, 3.5), ylim=(-3.5, 3.5), aspect="equal")
plt.show()

# %%
for name, x in generated.items():
    nearest, mode = torch.cdist(x, modes).min(1)
    held = torch.bincount(
        mode[nearest < 0.4], minlength=8
    )  # 0.4 is four standard deviations of a cluster
    covered = int((held >= 10).sum())
    share = float((nearest < 0.4).float().mean())
    print(f"{name:25} clusters with samples: {covered}", end="   ")
    print(f"samples in clusters: {share:.0%}")
    if name.startswith("data"):
        assert covered == 8
    else:
        assert covered < 8 and share > 0.9
