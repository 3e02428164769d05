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
# # Experiment: the conditional VAE
#
# Digits on demand, one writer's hand in all ten digits, and images of which a quarter is seen.
# The label enters either both networks or the mean of the prior alone, and the two behave differently.
# The derivations are in the chapter *The conditional variational autoencoder*.

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

import matplotlib.pyplot as plt
import torch

from gae_core import data, metrics, plots
from gae_core.gaussian import kl_to_standard_normal
from gae_core.metrics import importance_weighted_nll
from gae_core.models.cvae import quadrant_mask
from gae_core.studies import completion, judge
from gae_core.studies import cvae as study

device = "cuda" if torch.cuda.is_available() else "cpu"
SIZE = data.size_from_environment("full" if device == "cuda" else "short")
images = data.example_images()
print(f"size: {SIZE}, device: {device}")
few = images.name == "digits"
x, y = (
    images.x_train[: 10_000 if SIZE == "short" else 60_000],
    images.y_train[: 10_000 if SIZE == "short" else 60_000],
)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


# %% [markdown]
# ## Step 1: two places for a label
#
# In the first model the label stands beside the input of both networks. In the second it moves the mean of the prior,
# $p(z|y) = N(w_y, I)$, and the networks never see it. Predict: which of the two can show the wrong digit, and why?

# %%
epochs = {"short": 40 if few else 4, "full": 100}[SIZE]
batch_size = 64 if few else 128
models = {}
for name, title in (
    ("cvae", "label beside both networks"),
    ("cvae_prior_mean", "label in the prior's mean"),
):
    recipe = dataclasses.replace(
        study.recipe(name, images.name, SIZE),
        beta=2.0,
        epochs=epochs,
        batch_size=batch_size,
    )
    model = study.build(recipe, images.shape, seed=0)
    training = recipe.fit(model, x, y, seed=0)
    models[title] = model.cpu()
    loss, kl = (
        float(training.history[term][-50:].mean()) for term in ("total", "kl")
    )
    print(
        f"{title:<28} loss {loss:6.1f}, divergence {kl:5.2f} nats, "
        f"{training.seconds:.0f} s"
    )

# %% tags=["nbval-check-output"]
beside = models["label beside both networks"]
for bad in (torch.tensor([10]), torch.tensor([0.0])):
    try:
        beside.sample(1, bad)
    except ValueError as error:
        print("refused:", error)

# %% mystnb={"figure": {"name": "fig-cvae-classes", "caption": "A row for each label: the label beside both networks, and in the prior's mean alone."}, "image": {"alt": "Two grids of ten rows of ten digits. In the left one most images of a row show the digit of its number, in several hands. In the right one the rows mix digits: the classes overlap."}}
asked = torch.arange(10).repeat_interleave(10)
grids = {
    title: model.sample(100, asked, generator=seeded(0))
    for title, model in models.items()
}
figure = plots.image_panels(grids, columns=10, per_row=2, size=4)

# %%
classifier = judge.classifier(images)
many = torch.arange(10).repeat_interleave(200)
shares = {}
for title, model in models.items():
    labels = metrics.in_batches(
        classifier, model.sample(2000, many, generator=seeded(1))
    ).argmax(1)
    shares[title] = float((labels == many).double().mean())
    print(
        f"{title:<28} shows the label asked for in {shares[title]:.1%} of 2,000"
        " images"
    )
w = models["label in the prior's mean"].means
distance = torch.pdist(w)
limit = 1 - torch.distributions.Normal(0.0, 1.0).cdf(-distance.min() / 2)
print(
    f"means of the prior: nearest two {distance.min():.2f} apart, at most "
    f"{limit:.1%} of that pair can be right"
)

# %% tags=["nbval-check-output"]
beside_both, in_prior = shares.values()
print("the label beside the networks is shown more often:", beside_both > in_prior)

# %% [markdown]
# ## Step 2: the hand of one writer
#
# Encode an image with its label, decode the code with every label. What stays, if the code does not hold the label?

# %% mystnb={"figure": {"name": "fig-cvae-style", "caption": "The code of the image on the left, decoded with the labels 0 to 9."}, "image": {"alt": "Six rows. The first column is a held-out digit, the other ten are, most of them, the digits 0 to 9 in a similar slant and stroke."}}
test = data.to_unit(images.x_test[:6])
with torch.no_grad():
    codes = beside.encode(test, images.y_test[:6])
    rows = [
        torch.cat(
            [
                test[i : i + 1],
                beside.decode(codes[i].expand(10, -1), torch.arange(10)),
            ]
        )
        for i in range(len(test))
    ]
figure, ax = plt.subplots(figsize=(8, 4.4), layout="constrained")
plots.draw_images(ax, torch.cat(rows), columns=11)

# %% mystnb={"figure": {"name": "fig-cvae-walks", "caption": "Above: between the codes of two images, with the label fixed. Middle: along the coordinate that varies most, with the label fixed. Below: between the codes of images of two classes, in the model with the label in the prior."}, "image": {"alt": "Six rows of eleven digits. In the upper two the hand changes; the 3 stays, the 8 ends near a 2. The middle two are a 2 and a 7 between ends that look like other digits. In the lower two one digit turns into another."}}
t = torch.linspace(0, 1, 11)[:, None]
prior_mean = models["label in the prior's mean"]
first = data.to_unit(images.x_test[:500])
with torch.no_grad():
    a, b = beside.encode(first[:2], images.y_test[:2])
    between = [
        beside.decode((1 - t) * a + t * b, torch.full((11,), k)) for k in (3, 8)
    ]
    busiest = int(beside.encode(first, images.y_test[:500]).var(0).argmax())
    along = torch.zeros(11, len(a))
    along[:, busiest] = 6 * t[:, 0] - 3
    traversal = [beside.decode(along, torch.full((11,), k)) for k in (2, 7)]
    a, b, c = prior_mean.encode(first[:3], images.y_test[:3])
    classes = [
        prior_mean.decode((1 - t) * u + t * v, torch.zeros(11, dtype=torch.long))
        for u, v in ((a, b), (b, c))
    ]
figure, ax = plt.subplots(figsize=(8, 4.6), layout="constrained")
plots.draw_images(ax, torch.cat([*between, *traversal, *classes]), columns=11)

# %% [markdown]
# ## Step 3: what a label is worth
#
# At most $\log 10 = 2.3$ nats, in a loss of tens. That is why it is learned late. In the prior's mean, the divergence that
# is saved against $N(0, I)$ is half the mean squared length of the class means. We check both sides.

# %%
with torch.no_grad():
    mu, logvar = prior_mean.posterior(data.to_unit(x[:5000]), y[:5000])
    best = torch.stack([mu[y[:5000] == k].mean(0) for k in range(10)])[y[:5000]]
    saved = (
        kl_to_standard_normal(mu, logvar).mean()
        - kl_to_standard_normal(mu - best, logvar).mean()
    )
half = 0.5 * best.square().sum(1).mean()
print(f"saved {saved:.3f} nats, half the squared length of the means {half:.3f}")
assert abs(saved - half) < 1e-3 * half  # an identity: rounding alone

# %% [markdown]
# ## Step 4: complete an image
#
# The bottom left quadrant is seen. A network without a code predicts each missing pixel by itself; the conditional VAE has
# a code whose prior sees the quadrant. Predict how their pictures differ.

# %%
recipe = dataclasses.replace(
    completion.recipe(1, images.name, SIZE),
    dim=20,
    epochs={"short": 30 if few else 4, "full": 60}[SIZE],
    batch_size=batch_size,
    schedule="constant",
)
mask = quadrant_mask(*images.shape[1:], recipe.observed)
(missing, seen), (missing_test, seen_test) = (
    completion.halves(v, mask) for v in (x, images.x_test[:500])
)
plain, completer = completion.build(recipe, images.shape, seed=0)
for seed, network in enumerate((plain, completer)):
    training = recipe.fit(network, missing, seen, seed=seed)
    print(f"{type(network).__name__:<14} {training.seconds:.0f} s")
plain, completer = plain.cpu(), completer.cpu()

# %%
with torch.no_grad():
    without = float(plain.loss(missing_test, seen_test).total.mean())
estimates = {}
for proposal, samples in (("posterior", 1), ("posterior", 50), ("prior", 50)):
    nll = importance_weighted_nll(
        completer,
        missing_test,
        seen_test,
        samples=samples,
        proposal=proposal,
        generator=seeded(0),
    ).nll
    estimates[proposal, samples] = float(nll.mean())
    print(
        f"{samples:>3} draws from the {proposal:<10} "
        f"{estimates[proposal, samples]:7.2f} nats"
    )
print(f"without a code            {without:7.2f} nats")
# Jensen: more draws can only lower the estimate, but for noise; draws from the
# prior are far worse.
assert estimates["posterior", 50] < estimates["posterior", 1] + 0.1
assert estimates["prior", 50] > estimates["posterior", 50]

# %% mystnb={"figure": {"name": "fig-cvae-completion", "caption": "The quadrant seen, the prediction without a code, four completions with one, and the whole image."}, "image": {"alt": "Six rows of seven images: a quadrant of a digit on grey, a blurred prediction, four completions that differ from each other, most of them clearer than the prediction, and the whole digit."}}


def together(rest, part):
    """Images with the missing pixels and those seen put into their places."""
    whole = torch.zeros(len(rest), mask.numel())
    whole[:, ~mask.flatten()], whole[:, mask.flatten()] = rest, part
    return whole.view(-1, *images.shape)


chosen = slice(0, 6)
part = seen_test[chosen]
with torch.no_grad():
    columns = [
        together(torch.full_like(missing_test[chosen], 0.3), part),
        together(plain(part), part),
    ]
    columns += [
        together(completer.sample(6, part, generator=seeded(s)), part)
        for s in range(4)
    ]
columns.append(together(missing_test[chosen], part))
figure, ax = plt.subplots(figsize=(6, 5), layout="constrained")
plots.draw_images(ax, torch.stack(columns, 1).flatten(0, 1), columns=7)

# %% [markdown]
# ## What you have seen
#
# - A label beside both networks is shown; one that only moves the prior's mean is limited by the overlap of the classes.
# - A code that does not hold the label holds the hand.
# - A code lets missing pixels agree with each other. The network without one can only average.
# - A likelihood by draws from the prior is far too large. State estimator and number of draws.
#
# Try: `beta=1.0` in step 1. How does the share of labels change, and how do the images?
