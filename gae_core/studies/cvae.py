"""Conditional models on MNIST: images of a class asked for, and missing quadrants.

Records ``cvae...`` and ``completion_...``.
"""

import functools
import time

import torch
from torch import Tensor, nn

from gae_core import data, metrics, nets, plots, train
from gae_core.densities import fit_gaussian_mixture
from gae_core.metrics import importance_weighted_nll
from gae_core.models.cvae import CVAE, Beside, FactorisedNet, LabelPriorVAE, quadrant_mask
from gae_core.records import Outcome, Study
from gae_core.studies.judge import Classifier, classifier

EPOCHS = {"short": 1, "medium": 12, "full": 100}
# Images that are drawn and measured, and the epochs of the classifier that learns from them.
DRAWN = {"short": (500, 8), "medium": (10_000, 8), "full": (10_000, 8)}
RECIPE = {"batch_size": 128, "lr": 2e-3}
DIM, HIDDEN = 16, (512, 256)

# Quadrants that are seen, by their number; the task is harder the fewer there are.
OBSERVED = {1: ["bottom left"], 2: ["bottom left", "top left"], 3: ["bottom left", "top left", "top right"]}
COMPLETION_EPOCHS = {
    "short": (1, 1),
    "medium": (8, 8),
    "full": (30, 100),
}  # of the network without a code, and with one
TEST = {"short": (100, 10), "medium": (1000, 100), "full": (10_000, 1000)}  # test images, and samples for each
WIDTH = 500  # of the two hidden layers, and codes: 50


def build(shape: tuple[int, ...], classes: int, *, kind: str, beta: float, seed: int) -> CVAE:
    """A model of images given labels, with fresh weights: "beside" both networks, or moving the "prior" alone."""
    pixels = int(torch.Size(shape).numel())
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        if kind == "prior":
            pair = nets.mlp_pair(shape, DIM, hidden=HIDDEN, heads=2, output=nn.Identity)
            return LabelPriorVAE(*pair, DIM, classes=classes, beta=beta)
        encoder = Beside(nets.mlp([pixels + classes, *HIDDEN, 2 * DIM]))
        body = nn.Sequential(nets.mlp([DIM + classes, *reversed(HIDDEN), pixels]), nn.Unflatten(1, shape))
        return CVAE(encoder, Beside(body), DIM, classes=classes, beta=beta)


def _diversity(x: Tensor, y: Tensor) -> float:
    """Mean distance between two images of a class, over the classes; 500 images each."""
    return float(torch.stack([torch.pdist(x[y == k].flatten(1)[:500]).mean() for k in y.unique()]).mean())


@torch.no_grad()
def codes_of_classes(model: CVAE, x: Tensor, y: Tensor, asked: Tensor, *, seed: int) -> Tensor:
    """Codes for the labels asked for, from a mixture fitted to each class: ten Gaussians, or one for 200 of its codes.

    Args:
        model: in evaluation mode.
        x: training images in [0, 1], (n, ...).
        y: their labels, (n,).
        asked: labels, (m,).
        seed: of the codes drawn from q(z | x, y), of the fits and of the draws.

    Returns:
        Codes (m, dim).
    """
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.cat([*model.posterior(a, b)], 1) for a, b in zip(x.split(1000), y.split(1000), strict=True)]
    mu, logvar = torch.cat(parts).chunk(2, 1)
    z = mu + (0.5 * logvar).exp() * torch.randn(mu.shape, generator=generator)
    found = torch.empty(len(asked), z.shape[1])
    for label in asked.unique():
        of_class = z[y == label]
        fit = fit_gaussian_mixture(of_class, max(1, min(10, len(of_class) // 200)), seed=seed)
        found[asked == label] = fit.sample(int((asked == label).sum()), generator=generator)
    return found


def _classes(
    name: str, size: str, seed: int, device: torch.device, *, kind: str, beta: float, codes: str = "prior"
) -> Outcome:
    images = data.load(name)
    classes = int(images.y_train.max()) + 1
    model = build(images.shape, classes, kind=kind, beta=beta, seed=seed)
    epochs = EPOCHS[size]
    start = time.perf_counter()
    options = {"epochs": epochs, "schedule": lambda t: 1 - t, "seed": seed, "device": device, "progress": False}
    train.fit(model, images.x_train, images.y_train, **RECIPE, **options)
    seconds = time.perf_counter() - start

    drawn, rounds = DRAWN[size]
    y = torch.arange(classes).repeat_interleave(drawn // classes)
    judge = classifier(images)
    test, labels = data.to_unit(images.x_test), images.y_test
    model = model.cpu()
    if codes == "prior":
        x = model.sample(len(y), y, generator=torch.Generator().manual_seed(seed))
    else:
        z = codes_of_classes(model, data.to_unit(images.x_train), images.y_train, y, seed=seed)
        x = model.decode(z, y).detach()
    with torch.no_grad():
        again = torch.cat([model(a, b) for a, b in zip(test.split(1000), labels.split(1000), strict=True)])

    def right(x: Tensor, y: Tensor, judge: nn.Module = judge) -> float:
        return float((metrics.in_batches(judge, x).argmax(1) == y).double().mean())

    def trained_on(x: Tensor, y: Tensor) -> float:
        """Accuracy on the real test images of a classifier that has seen x alone."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            student = Classifier(images.shape, classes)
        how = {"epochs": rounds, "lr": 2e-3, "schedule": lambda t: 1 - t, "seed": seed, "device": device}
        train.fit(student, x, y, progress=False, **how)
        return right(test, labels, student.cpu())

    found = _diversity(x, y), _diversity(again, labels), _diversity(test, labels)
    n = len(x)
    draw = torch.randperm(len(images.x_train), generator=torch.Generator().manual_seed(seed))[:n]
    first = torch.cat([x[y == k][:10] for k in range(classes)])
    return Outcome(
        metrics={
            "share of the label asked for": right(x, y),
            "the same of reconstructions": right(again, labels),
            "accuracy trained on samples": trained_on(x, y),
            "accuracy trained on as many real images": trained_on(images.x_train[draw], images.y_train[draw]),
            "diversity over that of reconstructions": found[0] / found[1],
            "diversity": found[0],
            "diversity of reconstructions": found[1],
            "diversity of data": found[2],
            "Fréchet": metrics.frechet_distance(*(metrics.in_batches(judge.features, v) for v in (x, test))),
        },
        parameters=sum(p.numel() for p in model.parameters()),
        training_seconds=seconds,
        samples=epochs * len(images.x_train),
        figure=plots.image_panels({"a class a row, means of p(x | z, y)": first}, columns=10, size=5),
    )


def halves(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Binary pixels at the threshold of one half: those to be completed (n, rest), and those seen (n, observed)."""
    binary = (data.to_unit(x).flatten(1) > 0.5).float()
    return binary[:, ~mask.flatten()], binary[:, mask.flatten()]


def completion(seen: int, rest: int, *, seed: int, dim: int = 50) -> tuple[FactorisedNet, CVAE]:
    """The network without a code and the conditional VAE, with a prior network, for so many pixels seen and missing."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        plain = FactorisedNet(nets.mlp([seen, WIDTH, WIDTH, rest]))
        encoder = Beside(nets.mlp([seen + rest, WIDTH, WIDTH, 2 * dim]))
        decoder = Beside(nets.mlp([dim + seen, WIDTH, WIDTH, rest]))
        prior = nets.mlp([seen, WIDTH, WIDTH, 2 * dim])
        return plain, CVAE(encoder, decoder, dim, prior=prior)


def _completion(name: str, size: str, seed: int, device: torch.device, *, quadrants: int) -> Outcome:
    images = data.load(name)
    mask = quadrant_mask(*images.shape[1:], OBSERVED[quadrants])
    (x, y), (x_test, y_test) = (halves(v, mask) for v in (images.x_train, images.x_test))
    held = len(x) // 10  # for choosing when to stop
    plain, model = completion(y.shape[1], x.shape[1], seed=seed)
    curves, best = {}, {}
    start = time.perf_counter()
    for kind, network, epochs in zip(("plain", "cvae"), (plain, model), COMPLETION_EPOCHS[size], strict=True):

        def look(network: nn.Module, epoch: int, kind: str = kind) -> None:
            """Keep the weights with the least loss on the images held back."""
            with torch.no_grad():
                rows = zip(x[-held:].split(1000), y[-held:].split(1000), strict=True)
                noise = torch.Generator(device).manual_seed(0)
                parts = [network.loss(a.to(device), b.to(device), generator=noise).total for a, b in rows]
            loss = float(torch.cat(parts).mean())
            curves.setdefault(f"held-back loss, {kind}", []).append(loss)
            if loss == min(curves[f"held-back loss, {kind}"]):
                best[kind] = {key: value.clone() for key, value in network.state_dict().items()}

        options = {"epochs": epochs, "lr": 1e-3, "seed": seed, "device": device, "progress": False, "callback": look}
        if kind == "cvae":
            options["schedule"] = lambda t: 1 - t
        train.fit(network, x[:-held], y[:-held], batch_size=128, **options)
        network.load_state_dict(best[kind])
    seconds = time.perf_counter() - start

    n, samples = TEST[size]
    noise = torch.Generator().manual_seed(seed)
    x_test, y_test = x_test[:n], y_test[:n]
    with torch.no_grad():
        without = float(plain.cpu().loss(x_test, y_test).total.mean())
    model = model.cpu()
    nll = functools.partial(importance_weighted_nll, model, x_test, y_test, generator=noise)
    weighted = float(nll(samples=samples, proposal="posterior").nll.mean())
    bound = float(nll(samples=1, proposal="posterior").nll.mean())
    return Outcome(
        metrics={
            "NLL without a code": without,
            "NLL, importance weighted": weighted,
            "NLL, by draws from the prior": float(nll(samples=samples, proposal="prior").nll.mean()),
            "negative bound": bound,
            "gain of the code": without - weighted,
        },
        parameters=sum(p.numel() for p in model.parameters()),
        training_seconds=seconds,
        samples=sum(COMPLETION_EPOCHS[size]) * (len(x) - held),
        curves=curves,
    )


def _settings(data_name: str, size: str, **about) -> dict:
    return {"epochs": EPOCHS[size], **RECIPE, "dim": DIM, **about}


def _completion_settings(data_name: str, size: str, *, quadrants: int) -> dict:
    plain, code = COMPLETION_EPOCHS[size]
    images, samples = TEST[size]
    return {
        "epochs": code,
        "epochs without a code": plain,
        "observed": OBSERVED[quadrants],
        "binary": "grey above one half",
        "test images": images,
        "samples": samples,
    }


STUDIES = {
    name: Study(
        about,
        ("mnist", "digits"),
        functools.partial(_settings, kind=kind, beta=beta, **more),
        functools.partial(_classes, kind=kind, beta=beta, **more),
        judged=data.load,
    )
    for name, kind, beta, more, about in (
        ("cvae", "beside", 2.0, {}, "conditional VAE: labels beside both networks, beta = 2"),
        ("cvae_beta1", "beside", 1.0, {}, "conditional VAE: labels beside both networks, beta = 1"),
        (
            "cvae_mixture",
            *("beside", 1.0, {"codes": "a mixture of Gaussians fitted to each class"}),
            "conditional VAE: the same, codes from a mixture of Gaussians fitted to each class",
        ),
        ("cvae_prior_mean", "prior", 2.0, {}, "conditional VAE: labels move the mean of the prior alone, beta = 2"),
    )
} | {
    f"completion_{quadrants}": Study(
        f"the other quadrants of an image, given {quadrants}",
        ("mnist", "digits"),
        functools.partial(_completion_settings, quadrants=quadrants),
        functools.partial(_completion, quadrants=quadrants),
    )
    for quadrants in OBSERVED
}
