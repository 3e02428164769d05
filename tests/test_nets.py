"""Networks: shapes there and back, ranges, parameter counts by hand, gradients that reach every weight."""

import pytest
import torch
from torch import nn

from gae_core.nets import LSTMEncoder, conv_pair, mlp, mlp_pair
from gae_core.studies.judge import Classifier

PAIRS = {"mlp": mlp_pair, "conv": conv_pair}


def images(shape, n=6):
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def fixed_weights():
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        yield


@pytest.mark.parametrize("sizes", [(3, 5), (4, 7, 2), [2, 3, 3, 1]])
def test_mlp_is_the_composition_of_its_layers(sizes):
    net = mlp(sizes, activation=nn.Tanh)
    linear = [layer for layer in net if isinstance(layer, nn.Linear)]
    assert [layer.in_features for layer in linear] + [linear[-1].out_features] == list(sizes)
    x = expected = torch.randn(9, sizes[0])
    for i, layer in enumerate(linear):
        expected = expected @ layer.weight.T + layer.bias
        expected = expected if i == len(linear) - 1 else torch.tanh(expected)  # none after the last
    torch.testing.assert_close(net(x), expected)


def test_mlp_has_relu_between_layers_by_default_and_is_unbounded():
    net = mlp([3, 50, 4])
    assert [type(layer) for layer in net] == [nn.Linear, nn.ReLU, nn.Linear]
    assert net(100 * torch.randn(20, 3)).min() < -1


@pytest.mark.parametrize("sizes", [(), (3,), (3, 0), (-1, 2), (3, 0, 2)])
def test_mlp_rejects_widths(sizes):
    with pytest.raises(ValueError, match="sizes must be at least two positive widths"):
        mlp(sizes)


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 12, 20)])
@pytest.mark.parametrize("dim", [1, 5])
def test_shapes_go_there_and_back_and_images_stay_in_the_unit_interval(pair, shape, dim):
    encoder, decoder = PAIRS[pair](shape, dim)
    x = images(shape)
    z = encoder(x)
    assert z.shape == (6, dim)
    assert decoder(z).shape == x.shape
    far = decoder(1e3 * torch.randn(6, dim))
    assert far.min() >= 0 and far.max() <= 1
    assert encoder(x[:1]).shape == (1, dim)


@pytest.mark.parametrize("pair", PAIRS)
def test_gradient_reaches_every_parameter(pair):
    encoder, decoder = PAIRS[pair]((3, 8, 8), 4)
    decoder(encoder(images((3, 8, 8), 32))).square().sum().backward()
    for module in (encoder, decoder):
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("pair", PAIRS)
def test_rows_are_independent(pair):
    """No layer mixes the images of a batch."""
    encoder, decoder = PAIRS[pair]((1, 8, 8), 4)
    x = images((1, 8, 8))
    whole = decoder(encoder(x))
    torch.testing.assert_close(whole, torch.cat([decoder(encoder(row[None])) for row in x]))


def test_the_decoder_mirrors_the_encoder():
    encoder, decoder = mlp_pair((1, 4, 4), 3, hidden=(11, 7))
    widths = [[m.out_features for m in net.modules() if isinstance(m, nn.Linear)] for net in (encoder, decoder)]
    assert widths == [[11, 7, 3], [7, 11, 16]]
    encoder, decoder = mlp_pair((1, 4, 4), 3, hidden=())
    assert sum(p.numel() for p in encoder.parameters()) == 16 * 3 + 3


def test_conv_pair_has_the_parameters_of_its_layers():
    encoder, decoder = conv_pair((3, 8, 12), 5, channels=4)
    small = 8 * 2 * 3  # twice the channels, a quarter of each side
    convolutions = 3 * 4 * 16 + 4 * 8 * 16
    assert sum(p.numel() for p in encoder.parameters()) == convolutions + 4 + 8 + small * 256 + 256 + 256 * 5 + 5
    assert sum(p.numel() for p in decoder.parameters()) == convolutions + 4 + 3 + 5 * 256 + 256 + 256 * small + small


@pytest.mark.parametrize("shape", [(1, 6, 8), (1, 8, 6), (1, 9, 9)])
def test_conv_pair_rejects_sides_that_do_not_halve_twice(shape):
    with pytest.raises(ValueError, match=r"divisible by 4.*pad the images"):
        conv_pair(shape, 2)


def test_an_image_without_channels_is_named():
    with pytest.raises(ValueError, match=r"shape must be \(channels, height, width\), got \(28, 28\): .*unsqueeze"):
        conv_pair((28, 28), 2)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([3, 0, 4, 1], "padding, token 0, at the ends of rows"),
        ([0, 3, 4, 1], "padding, token 0, at the ends of rows"),
        ([0, 0, 0, 0], "each with a token before it"),
        ([3, 4, 7, 0], "x must be tokens 0 to 6, got 0 to 7"),
        ([3, -1, 4, 0], "x must be tokens 0 to 6, got -1 to 4"),
    ],
)
def test_sentences_that_would_be_read_wrongly_are_named(row, message):
    encoder = LSTMEncoder(7, 4, embedding=3, hidden=5)
    assert encoder(torch.tensor([[3, 4, 1, 0], [5, 6, 2, 1]])).shape == (2, 4)
    with pytest.raises(ValueError, match=message):
        encoder(torch.tensor([[3, 4, 1, 0], row]))


@pytest.mark.parametrize("shape", [(28, 28), (1, 30, 28), (1, 28, 30)])
def test_the_classifier_names_shapes_that_it_cannot_halve_twice(shape):
    with pytest.raises(ValueError, match=r"shape must be \(channels, height, width\), sides divisible by 4, got"):
        Classifier(shape)


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (torch.tensor([0, 1, 10]), "y must be labels 0 to 9, got 0 to 10"),
        (torch.tensor([0, 1, -100]), "y must be labels 0 to 9, got -100 to 1"),  # torch's sign for: leave it out
        (torch.tensor([0.0, 1.0, 2.0]), r"y must be integer labels of shape \(3,\), got torch.float32"),
        (torch.tensor([[0], [1], [2]]), r"y must be integer labels of shape \(3,\), got torch.int64 \(3, 1\)"),
    ],
)
def test_the_classifier_names_labels_that_are_none(y, message):
    model, x = Classifier((1, 8, 8)), images((1, 8, 8), 3)
    with pytest.raises(ValueError, match=message):
        model.loss(x, y)
    right = torch.tensor([3, 0, 9])
    expected = -torch.log_softmax(model.eval()(x), 1)[torch.arange(3), right]
    torch.testing.assert_close(model.loss(x, right.byte()).total, expected)
