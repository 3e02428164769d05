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
# # Experiment: an autoencoder is not a generative model
#
# We train an autoencoder on images, look at its reconstructions, and then decode random codes.
# The result is no digit. We find out why, and mend it for the first time, by fitting a density to the codes.
# The derivations are in the chapter *Autoencoders*.

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

from gae_core import data, metrics, nets, plots, train
from gae_core.densities import fit_gaussian_mixture
from gae_core.models.autoencoder import Autoencoder
from gae_core.studies import judge

device = "cuda" if torch.cuda.is_available() else "cpu"
SIZE = data.size_from_environment("full" if device == "cuda" else "short")
SEED = 0
images = data.example_images()
print(f"size: {SIZE}, device: {device}")

# %% [markdown]
# ## Train
#
# Eight numbers a code. The encoder has two hidden layers, the decoder is its mirror image; at full size both are
# convolutional and train longer. The loss is the squared error, summed over pixels.

# %%
steps = {"short": 940, "full": 14_000}[SIZE]  # of 128 images each
epochs = max(1, round(steps * 128 / len(images.x_train)))


def autoencoder(dim):
    torch.manual_seed(SEED)
    if SIZE == "full":
        encoder, decoder = nets.conv_pair(images.shape, dim)
    else:
        encoder, decoder = nets.mlp_pair(images.shape, dim, hidden=(256, 128))
    return Autoencoder(encoder, decoder, dim)


def fit(model):
    start = time.perf_counter()
    history = train.fit(
        model,
        images.x_train,
        epochs=epochs,
        lr=2e-3,
        schedule=lambda t: 1 - t,
        seed=SEED,
        progress=False,
    ).history
    print(f"{epochs} epochs in {time.perf_counter() - start:.0f} s")
    return history


model = autoencoder(dim=8)
history = fit(model)

# %% [markdown]
# ## Does it generalise?
#
# It is often said that plain autoencoders generalise badly. We compare the error on images that the training has seen
# with the error on images that it has not.

# %%
seen = metrics.squared_error(model, images.x_train[: len(images.x_test)]).mean()
unseen = metrics.squared_error(model, images.x_test).mean()
blank = (
    (data.to_unit(images.x_test) - data.to_unit(images.x_train).mean(0))
    .square()
    .flatten(1)
    .sum(1)
    .mean()
)
print(f"squared error: seen {seen:.2f}, unseen {unseen:.2f}, ", end="")
print(f"unseen by the mean image {blank:.2f}")
# Far below the mean image, which knows nothing of the input, and near the error on
# training images.
assert unseen < 0.6 * blank and unseen < 1.5 * seen

# %% [markdown]
# Reconstruction generalises. Something else is wrong with it.
#
# ## Predict, then run
#
# The decoder turns eight numbers into an image. What will it show for eight numbers drawn from $N(0, I)$?

# %%
generator = torch.Generator().manual_seed(SEED)
n = 2000 if SIZE == "short" else 10_000
random_samples = model.sample(n, generator=generator)
z = metrics.in_batches(model.encode, images.x_train[:20_000])
print(f"codes of images: mean of |z| {z.norm(dim=1).mean():.1f}; ", end="")
print(f"codes from N(0, I): {8**0.5:.1f}")

# %% [markdown]
# ## The first mend: fit a density to the codes
#
# One Gaussian with their mean and covariance, and a mixture of ten Gaussians. The decoder stays as it is.

# %%
gaussian = fit_gaussian_mixture(z)
mixture = fit_gaussian_mixture(z[:5000], 10, seed=SEED)
panels = {
    "reconstructions": metrics.in_batches(model, images.x_test[:n]),
    "N(0, I)": random_samples,
    "one Gaussian": metrics.in_batches(
        model.decode, gaussian.sample(n, generator=generator)
    ),
    "mixture of ten": metrics.in_batches(
        model.decode, mixture.sample(n, generator=generator)
    ),
}

# %% mystnb={"figure": {"name": "fig-autoencoder-samples", "caption": "One trained autoencoder, four sources of codes."}, "image": {"alt": "Four grids of images. The reconstructions are clear digits. Decoded codes from N(0, I) are grey smears. Decoded samples of one fitted Gaussian are often digits, those of a mixture of ten nearly always."}}
figure = plots.image_panels(
    {title: x[:36] for title, x in panels.items()}, columns=6, per_row=2, size=3
)

# %% [markdown]
# ## Measure it
#
# The Fréchet distance compares the features that a classifier gives for generated and for real images. The classifier
# is trained on the same data once and then kept. Real training images against real test images show what a perfect
# generator would get for this number of images.

# %%
classifier = judge.classifier(images)


def distance(x):
    features = metrics.in_batches(classifier.features, x)
    return metrics.frechet_distance(
        features, metrics.in_batches(classifier.features, images.x_test)
    )


distances = {
    title: distance(x)
    for title, x in {"real images": images.x_train[:n], **panels}.items()
}
for title, value in distances.items():
    print(f"{title:<16} {value:7.1f}")

# %% tags=["nbval-check-output"]
print(
    "one Gaussian is nearer to the data than N(0, I):",
    distances["one Gaussian"] < distances["N(0, I)"],
)
print(
    "ten are nearer than one:",
    distances["mixture of ten"] < distances["one Gaussian"],
)

# %% [markdown]
# The same decoder that failed on $N(0, I)$ makes digits of other codes: it had been asked about codes that it had never met.
#
# Compare the mixture with the reconstructions. After this short training its images are no farther from the real ones
# than the reconstructions are, so that what remains is mostly blur. That is no law: the distance compares the moments of
# two sets of images, so the reconstructions are no bound for what other codes may reach.
#
# ## Look at the codes
#
# With two numbers a code we can draw all of them, and decode the whole plane.
# Predict: where will the decoder show clear digits, where codes are many or where there are none?

# %%
flat = autoencoder(dim=2)
fit(flat)
z2 = metrics.in_batches(flat.encode, images.x_test[:2000])
centre, reach = z2.mean(0), 3 * z2.std(0).max()
steps_of_grid = torch.linspace(-1, 1, 15)
grid = (
    torch.cartesian_prod(-steps_of_grid, steps_of_grid).flip(1) * reach + centre
)  # rows from top to bottom
plane = metrics.in_batches(flat.decode, grid)

# %% mystnb={"figure": {"name": "fig-autoencoder-codes", "caption": "Left: two-dimensional codes of held-out images by class; the circle holds 99 % of N(0, I). Right: what the decoder shows over the same square."}, "image": {"alt": "Left, a scatter plot of two-dimensional codes, coloured by class, crowded around the origin inside a circle, with long arms that leave it in a few directions; most of the plane has no codes. Right, decoded images over the same square: bright, sharp shapes along most of the edge, where hardly a code is, many of them clear zeros, threes, fours, nines, sevens and ones, others broken zeros and twos; and dim, blurred shapes in the middle, where the codes crowd."}}
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4.4), layout="constrained")
plots.draw_codes(left, z2, images.y_test[:2000], title="codes")
radius = (
    (2 * torch.log(torch.tensor(100.0))).sqrt().item()
)  # P(|z| > r) = exp(-r² / 2) = 1 %
left.add_patch(plt.Circle((0, 0), radius, fill=False, color="black", linewidth=1.5))
for set_limits, middle in ((left.set_xlim, centre[0]), (left.set_ylim, centre[1])):
    set_limits(middle - reach, middle + reach)
left.set(aspect="equal", xlabel="$z_1$", ylabel="$z_2$")
plots.draw_images(right, plane, columns=15, title="the decoded plane")

# %% [markdown]
# The other way round, perhaps, than you thought. Far out, where no code is, the decoder goes on with the digit of that
# direction, and mostly clearly. In the middle many classes share the room, and it blurs them. Where no code is, anything may be
# shown, digits too: nothing was asked there. In two dimensions little is left uncovered, in eight nearly everything:

# %%
report = metrics.gaussianity(z)  # of the eight-dimensional codes
print("mean Kolmogorov-Smirnov distance of a coordinate to N(0, 1): ", end="")
print(f"{report.ks_marginal:.2f}")
print(f"the same for |z|² and its chi-squared law: {report.ks_radius:.2f}")
# Codes drawn from N(0, I) would exceed 0.02 once in twenty times for these numbers
# of images, or less often.
assert report.ks_radius > 0.5

# %% [markdown]
# ## The loss cannot see where the codes are
#
# Move and stretch the code space by any invertible map, and undo it in the decoder: every reconstruction stays.
# Random codes then decode to something else altogether.

# %% tags=["nbval-check-output"]
x = data.to_unit(images.x_test[:100]).double()
plain = autoencoder(dim=8).double()
plain.load_state_dict(
    {name: value.cpu() for name, value in model.state_dict().items()}
)


def there(z):
    return 7 * z.flip(1) + 3


def back(z):
    return ((z - 3) / 7).flip(1)


with torch.no_grad():
    moved = plain.decode(back(there(plain.encode(x))))
    noise = torch.randn(100, 8, generator=generator).double()
    print("same reconstructions:", torch.allclose(moved, plain(x), atol=1e-9))
    print(
        "same samples:",
        torch.allclose(plain.decode(back(noise)), plain.decode(noise), atol=1e-2),
    )

# %% [markdown]
# ## With linear maps it is PCA
#
# A linear encoder and decoder, trained by the same loss, must end at the error that principal component analysis has,
# and cannot end below. We use the small digits here, whatever the images above, and let L-BFGS do the training.

# %% tags=["nbval-check-output"]
digits = data.load("digits").x_train.flatten(1).double()
centred = digits - digits.mean(0)
tail = torch.linalg.svdvals(centred).square()[8:].sum() / len(
    centred
)  # what components 9 to 64 carry

torch.manual_seed(SEED)
linear = torch.nn.Sequential(
    torch.nn.Linear(64, 8, bias=False), torch.nn.Linear(8, 64, bias=False)
).double()
optimizer = torch.optim.LBFGS(
    linear.parameters(), max_iter=600, line_search_fn="strong_wolfe"
)


def closure():
    optimizer.zero_grad()
    loss = (centred - linear(centred)).square().sum(1).mean()
    loss.backward()
    return loss


optimizer.step(closure)
final = closure().detach()
print("principal components leave", f"{tail:.4f}")
print(
    "the linear autoencoder is within one part in 1,000 of it:",
    bool(tail <= final <= 1.001 * tail),
)

# %% [markdown]
# ## What you have seen
#
# - Reconstruction generalises to new images.
# - Decoding $N(0, I)$ fails, because no code is there; nothing in the loss puts one there.
# - A density fitted to the codes afterwards makes samples out of the very same decoder.
#
# Try: a code of 2 or of 32 numbers. Which of the four distances gets better, which worse, and why?
