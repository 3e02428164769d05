"""Samples a second of ``gae_core.train.fit``, of pythae's trainer and of a bare loop, on the same networks.

``python benchmarks/training.py`` prints a table; ``--write`` also puts it into benchmarks/README.md. Who is measured
alternates within one process, and each ratio is taken within a round, so that a slow minute of the machine slows all.
What is timed is one epoch of a warm trainer: no one's setting up. ``fit`` and the bare loop train with torch's fused
Adam, pythae with its default one and, in a line of its own, with the fused one too. The data are random bytes of
MNIST's shape, on CUDA as many rows; pythae gets them as floats, since it takes no bytes.
"""

import argparse
import contextlib
import functools
import io
import logging
import platform
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from gae_core import nets, train  # noqa: E402
from gae_core.models.vae import VAE  # noqa: E402

BATCH, LR, DIM, SHAPE = 128, 1e-3, 16, (1, 28, 28)
ROWS = {"cpu": {"MLP": 12_800, "convolutional": 1_280}, "cuda": {"MLP": 60_000, "convolutional": 60_000}}


def networks(kind: str) -> tuple[nn.Module, nn.Module]:
    """Encoder to (batch, 2 * DIM) and decoder to logits: 784-512-16 MLPs, or the book's convolutions."""
    torch.manual_seed(0)
    pair = functools.partial(nets.mlp_pair, hidden=(512,)) if kind == "MLP" else nets.conv_pair
    return pair(SHAPE, DIM, heads=2, output=nn.Identity)


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def of_fit(kind: str, x: Tensor, device: torch.device, **options) -> Callable[[], float]:
    """Seconds of an epoch of ``fit``: from the end of the first to the end of the second."""
    model = VAE(*networks(kind), DIM)

    def epoch() -> float:
        marks = []

        def mark(model: nn.Module, epoch: int) -> None:
            wait(device)
            marks.append(time.perf_counter())

        train.fit(model, x, epochs=2, batch_size=BATCH, lr=LR, device=device, callback=mark, progress=False, **options)
        return marks[1] - marks[0]

    return epoch


def of_bare_loop(kind: str, x: Tensor, device: torch.device) -> Callable[[], float]:
    """Seconds of an epoch of the loop that one writes by hand; no checks, no checkpoints, no history."""
    encoder, decoder = (network.to(device) for network in networks(kind))
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=LR, fused=True)
    x = x.to(device)

    def epoch() -> float:
        start = time.perf_counter()
        order = torch.randperm(len(x), device=device)
        for i in range(0, len(x) - BATCH + 1, BATCH):
            batch = x[order[i : i + BATCH]].float() / 255
            mu, logvar = encoder(batch).chunk(2, 1)
            z = mu + (0.5 * logvar).exp() * torch.randn_like(mu)
            error = F.binary_cross_entropy_with_logits(decoder(z), batch, reduction="none").flatten(1).sum(1)
            kl = 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum(1)
            optimizer.zero_grad()
            (error + kl).mean().backward()
            optimizer.step()
        wait(device)
        return time.perf_counter() - start

    return epoch


def of_pythae(kind: str, x: Tensor, device: torch.device, **optimizer) -> Callable[[], float]:
    """Seconds of an epoch of pythae's trainer, without its setting up and saving; options go to its Adam."""
    from pythae.data.datasets import BaseDataset
    from pythae.models import VAE as Theirs
    from pythae.models import VAEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder
    from pythae.trainers import BaseTrainer, BaseTrainerConfig

    logging.disable(logging.INFO)
    encoder, decoder = networks(kind)

    class Encoder(BaseEncoder):
        def __init__(self):
            super().__init__()
            self.network = encoder

        def forward(self, x):
            mu, logvar = self.network(x).chunk(2, 1)
            return ModelOutput(embedding=mu, log_covariance=logvar)

    class Decoder(BaseDecoder):
        def __init__(self):
            super().__init__()
            self.network = decoder

        def forward(self, z):
            return ModelOutput(reconstruction=self.network(z).sigmoid())

    config = VAEConfig(input_dim=SHAPE, latent_dim=DIM, reconstruction_loss="bce")
    how = BaseTrainerConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=BATCH,
        learning_rate=LR,
        optimizer_cls="Adam",
        optimizer_params=optimizer,
        no_cuda=device.type == "cpu",
    )
    floats = x.float() / 255
    with contextlib.redirect_stderr(io.StringIO()):
        trainer = BaseTrainer(Theirs(config, Encoder(), Decoder()), BaseDataset(floats, torch.zeros(len(x))), None, how)
        trainer.prepare_training()

    def epoch() -> float:
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
            start = time.perf_counter()
            trainer.train_step(1)
            wait(device)
            return time.perf_counter() - start

    return epoch


def launch_share(kind: str, x: Tensor, device: torch.device, **options) -> float:
    """Share of a step in which the GPU waits to be given work: 1 - time of its kernels / time of the step."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    epoch = of_fit(kind, x, device, **options)
    epoch()
    seconds = epoch()  # without the profiler, which slows the launches but not the kernels
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        epoch()
        wait(device)
    kernels = sum(e.self_device_time_total for e in profiler.key_averages() if e.device_type == DeviceType.CUDA)
    return 1 - kernels / 2 / 1e6 / seconds  # two epochs were profiled


def spread(values: list[float], digits: int) -> str:
    """Median, and the smallest and largest."""
    low, high = min(values), max(values)
    return f"{statistics.median(values):,.{digits}f} ({low:,.{digits}f} to {high:,.{digits}f})"


def measure(kind: str, device: torch.device, rounds: int) -> list[str]:
    """Lines of the table for one network."""
    x = torch.randint(256, (ROWS[device.type][kind], *SHAPE), dtype=torch.uint8)
    makers = {"fit": of_fit, "bare loop": of_bare_loop, "pythae": of_pythae}
    makers["pythae, fused Adam"] = functools.partial(of_pythae, fused=True)
    makers["fit, bf16"] = functools.partial(of_fit, precision="bf16")
    if device.type == "cuda":
        makers["fit, compiled"] = lambda *a: of_fit(*a, compile="reduce-overhead")
    epochs = {}
    for name, make in makers.items():
        try:
            epochs[name] = make(kind, x, device)
        except ImportError as error:
            print(f"{name} is not measured: {error}; `pip install -e .[benchmarks]` brings it", file=sys.stderr)
    for epoch in epochs.values():
        epoch()  # warm
    rows = len(x) // BATCH * BATCH
    speed = {name: [] for name in epochs}
    for i in range(rounds):
        names = list(epochs)
        for name in names[i % len(names) :] + names[: i % len(names)]:
            # pythae also takes the rows that fill no batch
            speed[name].append((len(x) if name.startswith("pythae") else rows) / epochs[name]())
    lines = []
    for name, values in speed.items():
        ratio = [ours / theirs for ours, theirs in zip(speed["fit"], values, strict=True)]
        lines.append(f"| {kind} | {name} | {spread(values, 0)} | {'' if name == 'fit' else spread(ratio, 2)} |")
    if device.type == "cuda":
        for name, options in {"fit": {}, "fit, compiled": {"compile": "reduce-overhead"}}.items():
            share = launch_share(kind, x, device, **options)
            lines.append(f"| {kind} | {name}: share of the step that is launch overhead | {share:.0%} | |")
    return lines


def place(text: str) -> None:
    """Put a table into benchmarks/README.md, between the marks of the device that it begins with."""
    path = ROOT / "benchmarks" / "README.md"
    marked = rf"(<!-- {'cpu' if text.startswith('CPU') else 'cuda'} -->\n).*?(<!-- end -->)"
    new = re.sub(marked, lambda m: m[1] + text + m[2], path.read_text(encoding="utf-8"), flags=re.S)
    path.write_text(new, encoding="utf-8")


def main() -> None:
    """Measure, print, and write where asked."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--note", default="", help="what else the reader should know of the machine")
    parser.add_argument("--write", action="store_true", help="into benchmarks/README.md")
    parser.add_argument("--out", type=Path, help="file that receives the table")
    options = parser.parse_args()
    device = train.pick_device(options.device)
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else f"CPU, threads of torch: {torch.get_num_threads()}"
    lines = [
        f"{name}. Batch {BATCH}, {options.rounds} rounds, Python {platform.python_version()}, "
        f"torch {torch.__version__}. {options.note}",
        "",
        "| network | | samples a second: median (smallest to largest) | speed of `fit` over it |",
        "|---|---|---:|---:|",
    ]
    for kind in ROWS[device.type]:
        lines += measure(kind, device, options.rounds)
    text = "\n".join(lines) + "\n"
    print(text)
    if options.out:
        options.out.write_text(text, encoding="utf-8")
    if options.write:
        place(text)


if __name__ == "__main__":
    main()
