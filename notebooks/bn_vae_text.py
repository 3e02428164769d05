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
# # Experiment: codes of sentences
#
# A language whose perfect model is known, an LSTM that reads its sentences into a code, and one that speaks them again.
# We watch the plain VAE drop its code, keep it by batch norm, and then let a model of small English sentences sample and
# interpolate. The derivations are in the chapter *Codes of sentences*.

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
import os
import tempfile
import time

import matplotlib.pyplot as plt
import torch

from gae_core import languages, metrics, nets, text, train
from gae_core.data import size_from_environment
from gae_core.models.text_vae import CommittedRate, TextVAE
from gae_core.normalization import FixedScaleBatchNorm

device = "cuda" if torch.cuda.is_available() else "cpu"
SIZE = size_from_environment("full" if device == "cuda" else "short")
SEED = 0
DIM = 8
print(f"size: {SIZE}, device: {device}")

# %% [markdown]
# ## Step 1: a language with a known optimum
#
# A code $z$ is drawn from four Gaussians in the plane, and an LSTM with random weights speaks ten words about it.
# Since we made the language, we can compute what a perfect model of it would reach, from both sides.
# Predict: how much does it help to know $z$, in nats a sentence?

# %%
sentences = languages.synthetic("learnable", train=16_000, test=300)
language = languages.SyntheticLanguage(languages.RECIPES["learnable"])
for words in sentences.vocabulary.decode(sentences.test[:4]):
    print(" ".join(words))
generator = torch.Generator().manual_seed(SEED)
optimum = language.optimum(
    sentences.test, sentences.z_test, samples=1500, generator=generator
)
print(
    f"\n-log p(x) is between {optimum.nll_below.mean():.2f} and "
    f"{optimum.nll.mean():.2f} nats, on average"
)
print(
    f"-log p(x | z) is {optimum.given_code.mean():.2f}: knowing z is worth I(x;"
    f" z) = {optimum.information:.2f}"
)

# %% tags=["nbval-check-output"]
gap = optimum.nll - optimum.nll_below
print("the bracket is narrower than 0.1 nat:", bool(gap.mean() < 0.1))
print(
    "and it is a bracket:",
    bool((gap.mean() > 0) & (optimum.nll.mean() > optimum.given_code.mean())),
)

# %% [markdown]
# ## Step 2: train three models alike
#
# The plain VAE; the one with a committed rate ($\delta$-VAE), which pays at least a quarter of a nat in each of 8
# dimensions whatever it says; and batch norm with $\gamma = 0.7$ on the means, whose divergence is at least
# $8 \cdot 0.7^2/2 = 1.96$ nats on average.
# Predict: which of the three have a divergence, and which of them say something with it?


# %%
def build(tokens, norm=None):
    encoder = nets.LSTMEncoder(tokens, 2 * DIM)
    return TextVAE(encoder, nets.LSTMDecoder(tokens, DIM), DIM, norm=norm)


recipe = dict(
    batch_size=32,
    lr=1.0,
    optimizer="sgd",
    clip=5.0,
    schedule=lambda t: 1 - t,
    progress=False,
)
norms = {
    "plain": lambda: None,
    "δ-VAE": lambda: CommittedRate(0.25),
    "BN-VAE": lambda: FixedScaleBatchNorm(DIM, 0.7),
}
models, histories = {}, {}
for name, norm in norms.items():
    torch.manual_seed(SEED)
    models[name] = build(len(sentences.vocabulary), norm())
    start = time.perf_counter()
    histories[name] = train.fit(
        models[name],
        sentences.train,
        epochs=2 if SIZE == "short" else 10,
        seed=SEED,
        **recipe,
    ).history
    print(
        f"{name:<7} {len(histories[name]['kl'])} steps in "
        f"{time.perf_counter() - start:.0f} s"
    )

# %% mystnb={"figure": {"name": "fig-bn_vae_text-collapse", "caption": "KL divergence and reconstruction in training."}, "image": {"alt": "Two panels over training steps. Left: the KL divergence of the plain VAE falls to 0 within the first hundred steps, that of the delta-VAE stays at 2 nats, that of the BN-VAE just above. Right: the cost of the words falls for all three, lowest for the BN-VAE."}}
figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
for name, history in histories.items():
    for ax, key in zip(axes, ("kl", "reconstruction"), strict=True):
        ax.plot(
            torch.arange(0, len(history[key]), 25),
            history[key].view(-1, 25).mean(1),
            label=name,
        )
axes[0].axhline(8 * 0.7**2 / 2, color="grey", linestyle=":", label="8 · 0.7² / 2")
axes[0].set(title="KL, nats a sentence", xlabel="step", ylim=(-0.1, 4))
axes[1].set(title="-log p(x | z), nats", xlabel="step", ylim=(11, 20))
axes[0].legend()
plt.show()

# %% [markdown]
# ## Step 3: measure what the code says
#
# The divergence alone does not tell. We ask for the information on which sentence was read (MI), the units that move
# (AU), and how much worse a sentence is spoken with the code of another (gain from z).

# %%
found = {}
for name, model in models.items():
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        x = sentences.test.to(device)
        mu, logvar = model.posterior(x)
        z = mu + (0.5 * logvar).exp() * torch.randn(
            mu.shape, generator=generator
        ).to(device)
        gain = (
            model.log_likelihood(x, z) - model.log_likelihood(x, z.roll(1, 0))
        ).mean()
    split = metrics.encoder_information(mu, logvar, generator=generator)
    nll = metrics.importance_weighted_nll(
        model, x, samples=96, generator=generator
    ).nll.mean()
    found[name] = (
        nll,
        split.kl,
        split.mutual_information,
        metrics.active_units(mu),
        gain,
    )
print(f"{'':<7}{'NLL':>8}{'KL':>8}{'MI':>8}{'AU':>6}{'gain':>8}")
for name, (nll, kl, mi, active, gain) in found.items():
    print(f"{name:<7}{nll:>8.2f}{kl:>8.2f}{mi:>8.2f}{active:>6}{gain:>8.2f}")

# %% tags=["nbval-check-output"]
print("the plain VAE has no divergence:", found["plain"][1] < 0.1)
print("the δ-VAE has two nats of it:", found["δ-VAE"][1] > 1.99)
print(
    "and the BN-VAE says more with them:",
    found["BN-VAE"][2] > 1.3 * max(found["δ-VAE"][2], found["plain"][2]),
)
print(
    "every unit of the BN-VAE is active, as it must be:", found["BN-VAE"][3] == DIM
)
print(
    "no model is better than the optimum:",
    all(values[0] > optimum.nll_below.mean() for values in found.values()),
)

# %% [markdown]
# ## Step 4: is it the code that the sentence was made from?
#
# A linear map from the means of $q(z \mid x)$ to the true codes, fitted to training sentences and drawn for new ones.
# The colours are the four Gaussians of the language, which no model has been told of.
# Predict: what will it find in the means of the plain VAE, whose divergence is 0?

# %% mystnb={"figure": {"name": "fig-bn_vae_text-codes", "caption": "True codes, and what a linear map finds in the codes of three models."}, "image": {"alt": "Four scatter plots in the plane. The true codes are four clouds in four colours. Those found in the codes of the delta-VAE and of the BN-VAE are four clouds at nearly the same places, those in the plain VAE's run into one another."}}
figure, axes = plt.subplots(
    1, 4, figsize=(9, 2.6), layout="constrained", sharex=True, sharey=True
)
mode = (sentences.z_test[:, None] - languages.MODES).square().sum(2).argmin(1)
axes[0].scatter(*sentences.z_test.T, c=mode, cmap="tab10", s=6)
axes[0].set_title("true codes")
explained = {}
for ax, (name, model) in zip(axes[1:], models.items(), strict=True):
    seen, new = (
        torch.nn.functional.pad(
            model.encode(x.to(device)).detach().cpu().double(), (0, 1), value=1.0
        )
        for x in (sentences.train[:2000], sentences.test)
    )
    read = (
        new @ torch.linalg.lstsq(seen, sentences.z_train[:2000].double()).solution
    )
    spread = (sentences.z_test - sentences.z_test.mean(0)).square().sum()
    explained[name] = 1 - float((read - sentences.z_test).square().sum() / spread)
    ax.scatter(*read.T, c=mode, cmap="tab10", s=6)
    ax.set_title(f"{name}: R² = {explained[name]:.2f}")
plt.show()
# An R² above 0.7 says that the modes are told apart: they make up 4/5 of the
# variance of z.
assert explained["BN-VAE"] > 0.7

# %% [markdown]
# The map finds a good deal in the plain VAE's means, too: they still move, by a few hundredths of the noise that is
# added to them. A regression scales that up. The decoder, which sees mean plus noise, sees nothing.

# %%
with torch.no_grad():
    mu, logvar = models["plain"].posterior(sentences.test.to(device))
ratio = mu.std(0) / (0.5 * logvar).exp().mean(0)
print(
    "plain VAE, spread of the means over the noise, by dimension:",
    [f"{r:.3f}" for r in ratio.tolist()],
)
# The information of a dimension is about r² / 2 nats for small r: at 0.15 it is
# 0.01.
assert (ratio < 0.15).all()

# %% [markdown]
# ## Step 5: a file of one's own
#
# Any text file will do, one sentence a line; here we write one, of small sentences about ships or about bread, and train
# a BN-VAE on it. `text.load_sentences(path)` reads it; words that the training part lacks become `<unk>`.

# %%
lines = []
choose = torch.Generator().manual_seed(SEED)
for topic in torch.randint(2, (6000,), generator=choose).tolist():
    who = (("sailor", "captain", "pilot"), ("baker", "cook", "miller"))[topic]
    does = (("steers", "loads", "sinks"), ("bakes", "cuts", "sells"))[topic]
    what = (("ship", "boat", "raft"), ("bread", "cake", "pie"))[topic]
    how = ("old", "small", "fine", "grey")
    pick = torch.randint(12, (5,), generator=choose).tolist()
    lines.append(
        f"the {how[pick[0] % 4]} {who[pick[1] % 3]} {does[pick[2] % 3]} the "
        f"{how[pick[3] % 4]} {what[pick[4] % 3]}"
    )
with tempfile.TemporaryDirectory() as folder:
    path = os.path.join(folder, "lines.txt")
    with open(path, "w", encoding="utf-8") as file:
        file.write("\n".join(lines))
    english = text.load_sentences(path)
print(
    f"{len(english.train)} + {len(english.test)} sentences, "
    f"{len(english.vocabulary)} tokens"
)
torch.manual_seed(SEED)
model = build(len(english.vocabulary), FixedScaleBatchNorm(DIM, 0.7))
train.fit(
    model, english.train, epochs=6 if SIZE == "short" else 20, seed=SEED, **recipe
)
length = english.train.shape[1]
generator = torch.Generator().manual_seed(SEED)
drawn = model.sample(6, length=length, generator=generator)
print("\ndrawn from the model:")
for words in english.vocabulary.decode(drawn):
    print("  " + " ".join(words))

# %% tags=["nbval-check-output"]
drawn = english.vocabulary.decode(
    model.sample(400, length=length, generator=generator)
)
ships = {
    "sailor",
    "captain",
    "pilot",
    "steers",
    "loads",
    "sinks",
    "ship",
    "boat",
    "raft",
}
bread = {
    "baker",
    "cook",
    "miller",
    "bakes",
    "cuts",
    "sells",
    "bread",
    "cake",
    "pie",
}
pure = [not (ships & set(words) and bread & set(words)) for words in drawn]
print(
    "nine of ten drawn sentences have seven words:",
    sum(len(words) == 7 for words in drawn) > 0.9 * len(drawn),
)
print("and keep to their topic:", sum(pure) > 0.9 * len(pure))

# %% [markdown]
# Between the codes of two sentences, the most likely sentence at each point of the line; and from its middle a walk along
# the coordinate that tells the topics apart best, all others kept.


# %%
def draw_sentences(ax, tokens, labels, vocabulary):
    """A row a sentence; the colour of a word is its token."""
    ax.imshow(tokens.cpu() % 9, cmap="Pastel1", aspect="auto", vmin=0, vmax=8)
    for i, row in enumerate(vocabulary.decode(tokens)):
        for j, word in enumerate(row):
            ax.text(j, i, word, ha="center", va="center", fontsize=9)
    ax.set(xticks=[], yticks=range(len(labels)), yticklabels=labels)


# %% mystnb={"figure": {"name": "fig-bn_vae_text-interpolation", "caption": "Sentences on the line between two codes, and along one coordinate."}, "image": {"alt": "Two tables of seven sentences, a row each. Above: from a pilot who steers a raft to a baker who bakes a cake, in whole sentences on the way. Below: along one coordinate the sentence changes from one about bread to one about a ship."}}
with torch.no_grad():
    mu = model.encode(english.test.to(device))
about_ships = torch.tensor(
    [bool(ships & set(words)) for words in english.vocabulary.decode(english.test)],
    device=device,
)
start, end = mu[about_ships][0], mu[~about_ships][0]
steps = torch.linspace(0, 1, 7, device=device)[:, None]
line = start + steps * (end - start)
axis = int((mu[about_ships].mean(0) - mu[~about_ships].mean(0)).abs().argmax())
walk = ((start + end) / 2).repeat(7, 1)
walk[:, axis] = torch.linspace(-2, 2, 7, device=device)
figure, axes = plt.subplots(2, 1, figsize=(8, 5), layout="constrained")
draw_sentences(
    axes[0],
    model.decode(line, length),
    [f"{t:.2f}" for t in steps[:, 0]],
    english.vocabulary,
)
draw_sentences(
    axes[1],
    model.decode(walk, length),
    [f"{v:.1f}" for v in walk[:, axis]],
    english.vocabulary,
)
axes[0].set_title("between two sentences")
axes[1].set_title(f"along coordinate {axis}")
plt.show()
