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
# # Experiment: mutual information
#
# What a sample tells of its code, measured in five ways, on channels where the answer is known.
# You will see a bound that is tight and one that is not, estimators that cannot count beyond the logarithm of their batch,
# and what none of them can see: a generator that shrinks its samples.
# The derivations are in the chapter *Mutual information*.

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
from sklearn.linear_model import LogisticRegression
from torch import nn

from gae_core.data import size_from_environment
from gae_core.entropy import knn_entropy
from gae_core.information import (
    dv_terms,
    gaussian_information,
    info_nce_terms,
    jsd_terms,
    nwj_terms,
    permute_rows,
    reconstruction_terms,
)

device = "cpu"  # everything here is small
SIZE = size_from_environment("short")
SEED = 0
print(f"size: {SIZE}, device: {device}")


def seeded(seed=SEED):
    return torch.Generator().manual_seed(seed)


def randn(*shape, generator):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


# %% [markdown]
# ## Step 1: codes that can be counted
#
# Eight equally likely codes, and a generator that sends some of them to the same $x$. Predict: $I(x; z)$ in bits?

# %% tags=["nbval-check-output"]
G = [0, 0, 0, 0, 1, 1, 2, 3]  # x = G[z]
joint = torch.zeros(4, 8, dtype=torch.float64)
for z, x in enumerate(G):
    joint[x, z] = 1 / 8
product = joint.sum(1, keepdim=True) * joint.sum(0)
information = torch.where(joint > 0, joint * (joint / product).log(), 0.0).sum()
entropy = -torch.xlogy(joint.sum(1), joint.sum(1)).sum()
print(
    f"I(x; z) = {information / math.log(2):.4f} bits, "
    f"H(x) = {entropy / math.log(2):.4f} bits"
)

# %% [markdown]
# For a deterministic generator and discrete codes they agree: the information *is* the entropy of the samples.
#
# ## Step 2: codes that cannot be counted
#
# Now $z$ is uniform on $[0, 1]$ and $x = z$. Tell $z$ only to one of $k$ equal cells. Predict: what happens as $k$ grows?

# %% tags=["nbval-check-output"]
for k in (2, 16, 1024):
    cell = (
        (torch.arange(1 << 16) + 0.5) / (1 << 16) * k // 1
    )  # of each of 65,536 values of x
    share = torch.bincount(cell.long()) / len(cell)
    told = -(share * share.log()).sum()
    print(f"{k:5d} cells: I(x; cell) = {told:.3f}, log k = {math.log(k):.3f}")

# %% [markdown]
# There is no end to it: $I(x; z) = \infty$ for any smooth $G$, while the entropy of $x = z$ is 0.
# Noise mends it. With $x = G(z) + \tau\epsilon$ the information is the entropy of $x$ less that of the noise.
#
# ## Step 3: how tight is the bound by reconstruction?
#
# $I \ge -\log\mathrm{rmse}$ for a code from $N(0, 1)$ that is reconstructed as well as can be. We compute both sides by
# quadrature for three channels. Predict: for which of them does the bound miss most of the information?


# %%
def channel(G, tau, points=1200):
    """Information of x = G(z) + tau eps on z ~ N(0, 1), and the bound by E[z|x]."""
    z = torch.linspace(-6, 6, points, dtype=torch.float64)
    weight = (-0.5 * z.square()).exp()
    weight = weight / weight.sum()
    x = torch.linspace(
        float(G(z).min()) - 6 * tau,
        float(G(z).max()) + 6 * tau,
        2 * points,
        dtype=torch.float64,
    )
    density = (
        torch.exp(-0.5 * ((x[:, None] - G(z)) / tau) ** 2)
        / (tau * math.sqrt(2 * math.pi))
        @ weight
    )
    entropy = -torch.trapezoid(torch.xlogy(density, density), x)
    mean = (
        torch.exp(-0.5 * ((x[:, None] - G(z)) / tau) ** 2)
        / (tau * math.sqrt(2 * math.pi))
        @ (weight * z)
    )
    rmse = (
        1 - torch.trapezoid(mean.square() / density.clamp_min(1e-300), x)
    ).sqrt()
    return float(entropy - 0.5 * math.log(2 * math.pi * math.e * tau**2)), -float(
        rmse.log()
    )


channels = {
    "linear, $G(z) = z$": lambda z: z,
    r"saturated, $G(z) = \tanh 2z$": lambda z: torch.tanh(2 * z),
    "folded, $G(z) = |z|$": lambda z: z.abs(),
}
taus = torch.logspace(-1.3, 0.5, 8 if SIZE == "short" else 25).tolist()
curves = {name: [channel(G, tau) for tau in taus] for name, G in channels.items()}
for (true, bound), tau in zip(curves["linear, $G(z) = z$"], taus, strict=True):
    assert (
        abs(true - 0.5 * math.log1p(tau**-2)) < 1e-3 and abs(true - bound) < 1e-3
    )  # the quadrature's error
assert all(
    bound <= true + 1e-3 for curve in curves.values() for true, bound in curve
)

# %% mystnb={"figure": {"name": "fig-mutual_information-tightness", "caption": "Information (lines) and the reconstruction bound with the best encoder (dashed, dots), against the noise, for three channels."}, "image": {"alt": "Three panels against the noise on a logarithmic axis. Linear: line and dots coincide. Saturated: the dots lie a little below the line, the more the smaller the noise. Folded: the dots lie at zero while the line rises."}}
figure, axes = plt.subplots(1, 3, figsize=(9, 3), sharey=True, layout="constrained")
for ax, (name, curve) in zip(axes, curves.items(), strict=True):
    ax.plot(taus, [true for true, _ in curve], label="information")
    ax.plot(taus, [bound for _, bound in curve], "o--", markersize=4, label="bound")
    ax.set(xscale="log", xlabel=r"noise $\tau$", title=name)
    ax.title.set_size(10)
axes[0].set_ylabel("nats")
legend = axes[0].legend()

# %% [markdown]
# Folding costs the samples at most one bit of entropy, and all of it as the noise goes. The bound loses everything: from $|z|$
# the best guess of $z$ is 0.
#
# ## Step 4: critics
#
# A critic $T(x, z)$ scores pairs. Four objectives train it. First the best critic there is, which we know here:
# the logarithm of $p(x, z) / p(x)p(z)$, on batches of 64. Predict: which estimate has an average that is too low, which
# one scatters?


# %%
B, d = 64, 4


def pairs(information, n, generator):
    """n pairs (x, z) of d jointly normal coordinates, with that information."""
    rho = math.sqrt(-math.expm1(-2 * information / d))
    z = torch.randn(n, d, generator=generator)
    return rho * z + math.sqrt(1 - rho**2) * torch.randn(
        n, d, generator=generator
    ), z


def best_critic(information):
    rho2 = -math.expm1(-2 * information / d)

    def scores(x, z):
        lengths = x.square().sum(1)[:, None] + z.square().sum(1)
        return information + (2 * math.sqrt(rho2) * x @ z.T - rho2 * lengths) / (
            2 * (1 - rho2)
        )

    return scores


def apart(scores):
    """The scores off the diagonal: each x with the z of every other row."""
    n = len(scores)
    return scores[~torch.eye(n, dtype=torch.bool)].reshape(n, n - 1)


estimators = {
    "MINE": lambda s: dv_terms(s.diagonal(), apart(s)),
    "NWJ": lambda s: nwj_terms(s.diagonal() + 1, apart(s) + 1),
    "InfoNCE": info_nce_terms,
}


def batch_values(critic, information, estimator, generator, batches):
    with torch.no_grad():
        return torch.stack(
            [
                estimator(critic(*pairs(information, B, generator))).mean()
                for _ in range(batches)
            ]
        )


def spread(*arguments):
    """Mean over batches and the range in which the middle 80 % of them lie."""
    values = batch_values(*arguments)
    return float(values.mean()), *values.quantile(torch.tensor([0.1, 0.9])).tolist()


levels = [0.5, 1, 2, 3, 4, 5, 6, 7, 8]
known = {
    name: [
        spread(
            best_critic(level),
            level,
            estimator,
            seeded(),
            100 if SIZE == "short" else 1000,
        )
        for level in levels
    ]
    for name, estimator in estimators.items()
}
print("information  " + "".join(f"{level:6.1f}" for level in levels))
for name, rows in known.items():
    print(f"{name:<13}" + "".join(f"{mean:6.2f}" for mean, _, _ in rows))
# In few batches is there a pair off the diagonal that carries exp(8) = 2981 times
# its share.
assert all(high <= math.log(B) + 1e-5 for _, _, high in known["InfoNCE"])
high = (
    (batch_values(best_critic(8), 8, estimators["NWJ"], seeded(3), 300) > 8)
    .double()
    .mean()
)
print(f"NWJ is without bias, and at 8 nats {high:.0%} of its batches are too high")
assert high > 0.55  # 70 % in a long run; the standard error of 300 batches is 3 %
assert known["MINE"][-1][2] - known["MINE"][-1][1] > 3 * (
    known["InfoNCE"][-1][2] - known["InfoNCE"][-1][1]
)


# %% [markdown]
# Now small networks that have to learn their scores: $T(x, z) = f(x)^\top g(z)$, so that all pairs of a batch cost one
# product of matrices. The Jensen–Shannon critic is read as NWJ: its optimum is the logarithm of the ratio itself.


# %%
class Critic(nn.Module):
    def __init__(self, dim, width=64, features=32):
        super().__init__()
        self.f = nn.Sequential(
            nn.Linear(dim, width), nn.ReLU(), nn.Linear(width, features)
        )
        self.g = nn.Sequential(
            nn.Linear(dim, width), nn.ReLU(), nn.Linear(width, features)
        )

    def forward(self, x, z):
        return self.f(x) @ self.g(z).T


objectives = {**estimators, "JSD": lambda s: jsd_terms(s.diagonal(), apart(s))}


def train(
    information, objective, steps=250 if SIZE == "short" else 3000, rate=5e-3
):
    torch.manual_seed(SEED)
    critic, generator = Critic(d), seeded(1)
    optimizer = torch.optim.Adam(critic.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)
    for _ in range(steps):
        loss = -objective(critic(*pairs(information, B, generator))).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return critic


trained_levels = [1, 2.5, 4, 6]
learned = {name: [] for name in objectives}
for level in trained_levels:
    for name, objective in objectives.items():
        critic = train(level, objective)
        learned[name].append(
            spread(
                critic,
                level,
                estimators.get(name, estimators["NWJ"]),
                seeded(2),
                100,
            )
        )
print("information  " + "".join(f"{level:6.1f}" for level in trained_levels))
for name, rows in learned.items():
    print(f"{name:<13}" + "".join(f"{mean:6.2f}" for mean, _, _ in rows))
# At one nat every objective gets there: 100 batches have a standard error of 0.02,
# what is left is the training's.
assert all(abs(rows[0][0] - 1) < 0.15 for rows in learned.values())

# %% tags=["nbval-check-output"]
print(
    "InfoNCE stays below log 64:",
    all(high < math.log(B) for _, _, high in learned["InfoNCE"]),
)
print("at 6 nats it must fall short by more than 1:", learned["InfoNCE"][-1][0] < 5)
print(
    "all rise with the information from 1 to 2.5 nats:",
    all(rows[1][0] > rows[0][0] + 0.5 for rows in learned.values()),
)

# %% mystnb={"figure": {"name": "fig-mutual_information-estimators", "caption": "Estimates on batches of 64 against the truth, with the best critic (left) and with small trained ones (right). Bands and bars hold 80 % of the batches."}, "image": {"alt": "Two panels of estimated against true information with the diagonal and a horizontal line at log 64. Left, with the best critic: InfoNCE bends below the horizontal line with a thin band, MINE and NWJ follow the diagonal at first, with bands that widen quickly. Right, trained critics: all four are near the diagonal at one nat, and all fall short of it at six."}}
figure, axes = plt.subplots(
    1, 2, figsize=(9, 3.8), sharey=True, layout="constrained"
)
for name, rows in known.items():
    mean, low, high = zip(*rows, strict=True)
    line = axes[0].plot(levels, mean, label=name)[0]
    axes[0].fill_between(levels, low, high, color=line.get_color(), alpha=0.2)
for i, (name, rows) in enumerate(learned.items()):
    mean, low, high = (torch.tensor(v) for v in zip(*rows, strict=True))
    at = torch.tensor(trained_levels) + 0.1 * (i - 1.5)
    axes[1].errorbar(
        at,
        mean,
        yerr=torch.stack([(mean - low).clamp_min(0), (high - mean).clamp_min(0)]),
        fmt="o",
        capsize=2,
        markersize=4,
        label=name if name != "JSD" else "JSD, read as NWJ",
    )
for ax, title in zip(axes, ("the best critic", "trained critics"), strict=True):
    ax.plot([0, 8], [0, 8], color="gray", linewidth=1)
    ax.axhline(math.log(B), color="gray", linestyle=":", linewidth=1)
    ax.set(title=title, xlabel="information, nats", ylim=(-0.5, 9))
    ax.legend(fontsize=8)
label = axes[0].set_ylabel("estimate, nats")

# %% [markdown]
# The dotted line is $\log 64$. After a short training nothing on the right passes much beyond it; after a long one MINE does,
# which has no cap, and is still short of six nats.
#
# ## Step 5: what none of them sees
#
# Multiply all samples by $a$. Predict for each of three measures: does it change?
# The best Jensen–Shannon critic of two Gaussians is quadratic, so logistic regression on products finds it.


# %%
def products(x, z):
    """Products of coordinates of (x, z): Gaussian log ratios are linear in them."""
    both = torch.cat([x, z], 1)
    i, j = torch.triu_indices(both.shape[1], both.shape[1])
    return both[:, i] * both[:, j]


def log_ratio(x, z, negatives):
    """Scores of pairs and of negatives, both (n,), by logistic regression.

    It maximises the Jensen-Shannon objective.
    """
    pairs, others = products(x, z), products(x, negatives)
    features = torch.cat([pairs, others]).numpy()
    labels = torch.cat([torch.ones(len(x)), torch.zeros(len(x))]).numpy()
    fit = LogisticRegression(
        C=1e12, solver="newton-cholesky", max_iter=200, tol=1e-8
    ).fit(features, labels)
    return torch.from_numpy(fit.decision_function(features)).split(len(x))


n, tau = 4000, 0.5
generator = seeded()
z = randn(n, 2, generator=generator)
x = z + tau * randn(n, 2, generator=generator)
negatives = permute_rows(z, generator=generator)
scales = [0.1, 0.3, 1.0, 3.0, 10.0]
measures = {
    "reconstruction bound": [],
    "Jensen–Shannon objective": [],
    "entropy by neighbours": [],
}
for a in scales:
    fit = torch.linalg.lstsq(a * x, z).solution
    measures["reconstruction bound"].append(
        float(reconstruction_terms(z, a * x @ fit).mean())
    )
    measures["Jensen–Shannon objective"].append(
        float(jsd_terms(*log_ratio(a * x, z, negatives)).mean())
    )
    measures["entropy by neighbours"].append(float(knn_entropy(a * x, k=3)))
for name, values in measures.items():
    print(f"{name:<26}" + "".join(f"{value:8.3f}" for value in values))

# %% tags=["nbval-check-output"]
changes = {name: max(values) - min(values) for name, values in measures.items()}
print("reconstruction changes:", changes["reconstruction bound"] > 1e-6)
print("Jensen-Shannon changes:", changes["Jensen–Shannon objective"] > 1e-3)
print(
    "entropy rises by 2 log 100:",
    abs(changes["entropy by neighbours"] - 2 * math.log(100)) < 1e-6,
)

# %% mystnb={"figure": {"name": "fig-mutual_information-blind", "caption": "Three measures of the samples a(z + noise) in the plane, against the scale a."}, "image": {"alt": "Against a on a logarithmic axis, the entropy by neighbours is a rising straight line, the reconstruction bound and the Jensen-Shannon objective are horizontal lines."}}
figure, ax = plt.subplots(figsize=(6, 3.4), layout="constrained")
for name, values in measures.items():
    ax.plot(scales, values, "o-", label=name)
ax.set(xscale="log", xlabel="scale $a$ of the samples", ylabel="nats")
legend = ax.legend()

# %% [markdown]
# ## Step 6: fit an energy with it
#
# The energy $U(x) = x^2/2$ is fixed, so the best generator makes $N(0, 1)$. Ours is $x = az + \tau\epsilon$, with the
# encoder $E(x) = ex$ and the loss $U$ plus reconstruction. Predict where $a$ ends:
#
# 1. no noise, squared error with weight 1, as in the source;
# 2. noise $\tau = 0.5$, squared error with weight 1;
# 3. noise $\tau = 0.5$, and the bound with its best $\sigma$, which is $\log\mathrm{rmse}$.


# %%
def fit_scale(tau, bound, steps=1200):
    """Adam on a and, ten times as fast, e, on batches of 256; the path of a."""
    a, e = (
        torch.tensor(1.0, dtype=torch.float64, requires_grad=True) for _ in range(2)
    )
    optimizer = torch.optim.Adam(
        [{"params": [a], "lr": 2e-3}, {"params": [e], "lr": 2e-2}]
    )
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, steps)
    generator, path = seeded(), []
    for _ in range(steps):
        z, eps = randn(2, 256, generator=generator)
        x = a * z + tau * eps
        error = (z - e * x).square().mean()
        loss = 0.5 * x.square().mean() + (0.5 * error.log() if bound else error)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        path.append(a.item())
    return path


tau = 0.5
cases = {
    "no noise, weight 1": (fit_scale(0.0, False), 0.0),
    "noise, weight 1": (
        fit_scale(tau, False),
        math.sqrt(tau * math.sqrt(2) - tau**2),
    ),
    "noise, best sigma": (fit_scale(tau, True), math.sqrt(1 - tau**2)),
}
for name, (path, predicted) in cases.items():
    print(f"{name:<20} a = {path[-1]:.3f} at the end, predicted {predicted:.3f}")
# Averages over the last 300 steps: Adam's noise at these rates is about 0.01.
for name in ("noise, weight 1", "noise, best sigma"):
    path, predicted = cases[name]
    assert abs(sum(path[-300:]) / 300 - predicted) < 0.03, name

# %% tags=["nbval-check-output"]
path = cases["no noise, weight 1"][0]
print("without noise a has fallen below 0.3:", path[-1] < 0.3)
print("and still falls:", path[-1] < path[-300])

# %% mystnb={"figure": {"name": "fig-mutual_information-collapse", "caption": "Left: the three losses with the best encoder, and the divergence, against the scale a. Right: paths of a in training, with the predicted limits dashed."}, "image": {"alt": "Left: curves against a. Without noise the loss falls steadily to its infimum at a = 0. With noise and weight 1 the minimum is at 0.68, with the best sigma at 0.87, and the divergence has its own at 1. Right: the path of a without noise falls towards 0; the other two level off at their predicted values."}}
figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
a = torch.linspace(0.02, 1.6, 300)
losses = {
    "no noise, weight 1": a**2 / 2,
    "noise, weight 1": a**2 / 2 + tau**2 / (a**2 + tau**2),
    "noise, best sigma": a**2 / 2 - 0.5 * torch.log(1 + a**2 / tau**2),
    "KL, no noise": a**2 / 2 - a.log(),
}
for name, values in losses.items():
    line = axes[0].plot(a, values - values.min(), label=name)[0]
    axes[0].plot(a[values.argmin()], 0, "o", color=line.get_color(), clip_on=False)
    if name in cases:
        axes[1].plot(cases[name][0], color=line.get_color(), label=name)
        axes[1].axhline(
            cases[name][1], color=line.get_color(), linestyle="--", linewidth=1
        )
axes[0].set(ylim=(0, 1), xlabel="scale $a$", ylabel="loss above its least value")
axes[1].set(ylim=(-0.05, 1.1), xlabel="step", ylabel="scale $a$")
legends = [ax.legend(fontsize=8) for ax in axes]

# %% [markdown]
# Only the third is right: with the noise its samples have variance $a^2 + \tau^2 = 1$.
#
# ## Step 7: which negatives?
#
# A pair from $p(x)p(z)$ comes from exchanging whole rows of $z$. Shuffling each coordinate of $z$ on its own gives pairs
# from $p(x)\prod_j p(z_j)$. Predict: for which codes does it make a difference?

# %%
n, tau = 20_000, 0.7
for correlation in (0.0, 0.8):
    generator = seeded()
    cov_z = torch.tensor(
        [[1.0, correlation], [correlation, 1.0]], dtype=torch.float64
    )
    z = randn(n, 2, generator=generator) @ torch.linalg.cholesky(cov_z).T
    x = z + tau * randn(n, 2, generator=generator)
    noisy = cov_z + tau**2 * torch.eye(2, dtype=torch.float64)
    true = float(
        gaussian_information(
            torch.cat([torch.cat([noisy, cov_z], 1), torch.cat([cov_z, cov_z], 1)]),
            2,
        )
    )
    total_correlation = -0.5 * math.log(1 - correlation**2)
    rows = permute_rows(z, generator=generator)
    shuffled = torch.cat(
        [permute_rows(z[:, j : j + 1], generator=generator) for j in range(2)], 1
    )
    by_rows, by_coordinates = (
        float(log_ratio(x, z, other)[0].mean()) for other in (rows, shuffled)
    )
    print(
        f"correlation {correlation}: rows {by_rows:.3f}, information {true:.3f};",
        end=" ",
    )
    print(
        f"coordinates {by_coordinates:.3f}, "
        f"with total correlation {true + total_correlation:.3f}"
    )
    # The standard error of a mean log ratio is below 0.01 here; the regression's is
    # of the same size.
    assert abs(by_rows - true) < 0.05
    assert abs(by_coordinates - true - total_correlation) < 0.05

# %% [markdown]
# ## What you have seen
#
# - For discrete codes the information is the entropy of the samples. For continuous ones it is infinite, until there is noise.
# - The bound by reconstruction is tight on a linear channel, and worth nothing on a folded one.
# - Critics on a batch of 64 do not measure six nats. InfoNCE says at most $\log 64$; the others scatter or fall short.
# - No measure of information sees the scale of the samples. As a substitute for their entropy it lets them collapse.
#
# Try: `B = 256` in step 4, or $\tau = 0.1$ in step 6.
