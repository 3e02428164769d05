"""What trains, but not what was meant: images without their channel, copies, NaN, ranges, sigmoids taken for logits."""

import math

import pytest
import torch
from torch import nn

from gae_core import data, metrics, nets
from gae_core.models.autoencoder import Autoencoder, squared_distance
from gae_core.models.cvae import CVAE, FactorisedNet, FirstAlone, LabelPriorVAE
from gae_core.models.eae import EAE
from gae_core.models.vae import IWAE, VAE
from gae_core.train import fit

SHAPE = (1, 8, 8)
OPTIONS = dict(batch_size=32, device="cpu", progress=False)


def images(n=64, seed=0):
    return torch.rand(n, *SHAPE, generator=torch.Generator().manual_seed(seed))


def make(kind, **options):
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return kind(*nets.mlp_pair(SHAPE, 4, hidden=(16,)), 4, **options)


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- shapes and types -------------------------------------------------------------------------------------------

USES = {
    "loss": lambda model, x: model.loss(x),
    "fit": lambda model, x: fit(model, x, epochs=1, **OPTIONS),
    "squared_error": metrics.squared_error,
}
WRONG = {
    "no channel": (lambda x: x[:, 0], r"\(n, 1, 8, 8\), got \(n, 8, 8\): x\.unsqueeze\(1\)"),
    "flat": (lambda x: x.flatten(1), r"\(n, 1, 8, 8\), got \(n, 64\): x\.reshape\(-1, 1, 8, 8\)"),
    "channel last": (lambda x: x.movedim(1, -1), r"got \(n, 8, 8, 1\): x\.reshape\(-1, 1, 8, 8\)"),
}


@pytest.mark.parametrize("kind", [Autoencoder, EAE])
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("wrong", WRONG)
def test_images_of_another_shape_than_the_decoders_are_refused(kind, use, wrong):
    """The encoder flattens all of these alike, so that only the comparison with the decoder's output can notice."""
    change, told = WRONG[wrong]
    model = make(kind)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="x must have the shape that the decoder gives, .*" + told):
        USES[use](model, change(images()))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)), "nothing was trained"


@pytest.mark.parametrize("shape", [(6, 3), (6, 1, 2, 3), (1, 3), (6, 0)])
def test_the_squared_distance_is_a_sum_over_the_entries_of_equal_shapes_alone(shape):
    a, b = (torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in range(2))
    expected = torch.stack([((x - y) ** 2).sum() for x, y in zip(a, b, strict=True)])
    torch.testing.assert_close(squared_distance(a, b), expected)
    with pytest.raises(ValueError, match="must end in what x is made of"):
        squared_distance(a, torch.zeros(len(a), 7))


@pytest.mark.parametrize("kind", [Autoencoder, EAE])
def test_bytes_and_other_precisions_are_named_and_fit_takes_bytes(kind):
    model, x = make(kind), (255 * images()).byte()
    with pytest.raises(ValueError, match=r"x must be torch.float32 .* got torch.uint8: .*to_unit\(x\)"):
        model.loss(x)
    with pytest.raises(ValueError, match=r"x must be torch.float32 .* got torch.float64"):
        model.loss(images().double())
    with pytest.raises(ValueError, match=r"x must be torch.float32 .* got torch.int64"):
        fit(model, x.long(), epochs=1, **OPTIONS)
    fit(model, x, epochs=1, **OPTIONS)
    error = (data.to_unit(x) - model(data.to_unit(x))).square().sum((1, 2, 3))
    torch.testing.assert_close(metrics.squared_error(model, x), error.detach())


@pytest.mark.parametrize("kind", [Autoencoder])
def test_a_dim_that_is_not_the_codes_is_named_before_anything_is_trained(kind):
    model = kind(*nets.mlp_pair(SHAPE, 4, hidden=(16,)), 3)
    with pytest.raises(ValueError, match=r"encoder must give codes of shape \(64, 3\), got \(64, 4\)"):
        model.loss(images())


# ---- the entropic autoencoder in training -----------------------------------------------------------------------


def test_nan_in_the_data_is_found_before_the_training_and_leaves_the_model_as_it_was():
    model, x = make(EAE), images()
    x[5, 0, 3, 3] = math.nan
    before = state(model)
    with pytest.raises(ValueError, match="x must be finite, got NaN or infinite entries in 1 rows: 5"):
        fit(model, x, epochs=1, **OPTIONS)
    assert same(state(model), before)
    with pytest.raises(FloatingPointError, match="NaN or an infinity in the data, or the training has diverged"):
        model.train().loss(x)
    assert same(state(model), before), "the running averages have not seen it"
    assert model.eval().encode(images()).isfinite().all()


def test_a_training_that_diverges_says_so_and_where_and_leaves_finite_averages():
    model = make(EAE)
    with pytest.raises(FloatingPointError, match=r"training has diverged.*; at epoch \d+, step \d+, on rows \["):
        fit(model, images(), epochs=40, lr=1e12, **OPTIONS)
    assert not model.training
    assert all(value.isfinite().all() for value in state(model).values())


def test_copies_in_the_data_are_named_as_such_and_clamping_goes_on():
    x = images()
    x[40:] = x[:24]
    options = {**OPTIONS, "batch_size": 64}
    with pytest.raises(ValueError, match=r"x has 24 copies .* among 64.*torch\.unique.*duplicates=\"clamp\" to EAE"):
        fit(make(EAE), x, epochs=1, **options)
    history = fit(make(EAE, duplicates="clamp"), x, epochs=2, **options).history
    assert history["total"].isfinite().all()
    fit(make(EAE), x.unique(dim=0), epochs=1, **{**options, "batch_size": 40})


def test_one_code_for_different_data_is_no_fault_of_the_data():
    model = make(EAE)
    with torch.no_grad():
        model.encoder[1][-1].weight.zero_()
    with pytest.raises(
        FloatingPointError, match=r"64 different x have 1 different codes.* diverged .*lower learning ra"
    ):
        model.loss(images())


def test_too_few_rows_for_the_neighbour_are_still_named_by_the_estimate():
    with pytest.raises(ValueError, match="k must be an integer with 1 <= k < n, got k=3 for n=3"):
        make(EAE, k=3).loss(images(3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(lam=math.inf), "lam must be a number of at least 0, got inf"),
        (dict(lam=math.nan), "lam must be a number of at least 0, got nan"),
        (dict(k=0), "k must be at least 1, got 0"),
        (dict(duplicates="drop"), 'duplicates must be "raise" or "clamp", got .drop'),
    ],
)
def test_settings_without_a_meaning_are_named_when_the_model_is_made(options, message):
    with pytest.raises(ValueError, match=message):
        make(EAE, **options)


# ---- ranges, and sigmoids taken for logits ----------------------------------------------------------------------

VARIATIONAL = {
    "VAE": lambda pair, **options: VAE(*pair, 4, **options),
    "IWAE": lambda pair, **options: IWAE(*pair, 4, samples=2, binarise=True, **options),
    "LabelPriorVAE": lambda pair, **options: LabelPriorVAE(*pair, 4, classes=2, **options),
    "CVAE": lambda pair, **options: CVAE(FirstAlone(pair[0]), FirstAlone(pair[1]), 4, classes=2, **options),
}
RANGES = {
    "-1 to 1": (
        lambda x: 2 * x - 1,
        r"x must be in \[0, 1\] for the Bernoulli .*got -0\.\d+ to 0\.\d+: .*\(x \+ 1\) / 2",
    ),
    "0 to 255": (lambda x: 255 * x, r"got 0\.\d+ to 25\d(\.\d+)?: gae_core.data.to_unit\(x\)"),
}


@pytest.mark.parametrize("name", VARIATIONAL)
@pytest.mark.parametrize("wrong", RANGES)
def test_images_outside_of_the_unit_interval_have_no_bernoulli_loss(name, wrong):
    """Below 0 the loss falls without end: -x f is what it has of the logit f, which grows."""
    change, told = RANGES[wrong]
    model, x, y = VARIATIONAL[name](nets.mlp_pair(SHAPE, 4, hidden=(16,), heads=2)), images(), torch.arange(64) % 2
    for call in (lambda x: model.loss(x, y), lambda x: fit(model, x, y, epochs=1, **OPTIONS)):
        call(x)
        with pytest.raises(ValueError, match=told):
            call(change(x))


def test_the_network_without_a_code_has_that_range_too():
    model, y = FactorisedNet(nn.Sequential(nn.Linear(2, 64), nn.Unflatten(1, SHAPE))), torch.ones(64, 2)
    assert model.loss(images(), y).total.isfinite().all()
    with pytest.raises(ValueError, match=RANGES["-1 to 1"][1]):
        model.loss(2 * images() - 1, y)


def test_the_gaussian_likelihood_takes_any_range():
    model = VAE(*nets.mlp_pair(SHAPE, 4, hidden=(16,), heads=2), 4, likelihood="gaussian")
    assert model.loss(2 * images() - 1).total.isfinite().all()


@pytest.mark.parametrize("name", VARIATIONAL)
def test_bytes_and_integers_are_named_by_the_variational_models_too(name):
    model, y = VARIATIONAL[name](nets.mlp_pair(SHAPE, 4, hidden=(16,), heads=2)), torch.arange(64) % 2
    for kind, mend in ((torch.uint8, "to_unit"), (torch.int64, "convert it"), (torch.float64, "convert it")):
        with pytest.raises(ValueError, match=rf"x must be torch.float32 .* got {kind}: .*{mend}"):
            model.loss(images().round().to(kind), y)


@pytest.mark.parametrize("name", VARIATIONAL)
@pytest.mark.parametrize("make_pair", [nets.mlp_pair, nets.conv_pair])
def test_two_heads_give_logits_and_a_sigmoid_before_the_likelihoods_own_is_refused(name, make_pair):
    model = VARIATIONAL[name](make_pair(SHAPE, 4, heads=2))
    assert sum(isinstance(m, nn.Sigmoid) for m in model.modules()) == 0
    assert any(isinstance(m, nn.Sigmoid) for m in make_pair(SHAPE, 4)[1].modules()), "one head: an autoencoder's"
    pair = make_pair(SHAPE, 4, heads=2, output=nn.Sigmoid)
    with pytest.raises(ValueError, match=r"decoder must give logits .* got one that ends in a Sigmoid.*nn\.Identity"):
        VARIATIONAL[name](pair)
    if name != "IWAE":  # which is made to binarise here
        VARIATIONAL[name](pair, likelihood="gaussian")  # means in [0, 1]


def test_a_sigmoid_inside_or_before_another_layer_is_none_at_the_end():
    encoder = nn.Linear(3, 4)
    VAE(encoder, nn.Sequential(nn.Linear(2, 5), nn.Sigmoid(), nn.Linear(5, 3), nn.Sequential()), 2)
    VAE(encoder, nn.Linear(2, 3), 2)
    for end in (nn.Identity(), nn.Flatten(), nn.Sequential(nn.Sigmoid(), nn.Unflatten(1, (1, 3)))):
        with pytest.raises(ValueError, match="ends in a Sigmoid"):
            VAE(encoder, nn.Sequential(nn.Linear(2, 3), nn.Sigmoid(), end), 2)


@pytest.mark.parametrize("beta", [-1.0, math.inf, math.nan])
def test_a_weight_that_is_none_is_named(beta):
    with pytest.raises(ValueError, match="beta must be at least 0 and finite, got"):
        VAE(nn.Linear(3, 4), nn.Linear(2, 3), 2, beta=beta)
