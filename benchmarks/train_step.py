"""`python -m benchmarks.train_step`: one whole step on the CIFAR-10 network, against the peers.

A step is forward, backward, Adam and EMA. Everyone gets the same inputs, loss, precision and fused Adam;
ours averages its weights as in training, the peers by one foreach operation over all of them.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.floor import floors, forward_backward
from benchmarks.harness import OURS, Contender, Label, Mode, Precision, Timing
from benchmarks.network import Batch, autocast, compiled, our_network
from benchmarks.options import Options, parser, read
from benchmarks.peers.base import Peer
from benchmarks.peers.diffusers_unet import DIFFUSERS
from benchmarks.profiling import in_optimizer
from benchmarks.report import Bar, Result, best_bar, fastest, least_favourable, speed_bar
from benchmarks.session import run
from trainer.ema import PartitionedEma
from trainer.recipe_sections import EmaProfile
from trainer.unet import compile_blocks

EAGER_BF16_TARGET = 1.08
BEST_TARGET = 1.05
_PAPER = EmaProfile(decay=0.9999, per_images=128)


@dataclass(frozen=True)
class Average:
    """An average of weights.

    Attributes:
        tensors: The averages, one per parameter.
        update: Averages the weights in.
    """

    tensors: list[Tensor]
    update: Callable[[], None]


Averaging = Callable[[list[Tensor], int], Average]
"""(parameters, images per step) -> their average."""


@dataclass(frozen=True)
class Trainee:
    """A network in training, with its optimizer and its average.

    Attributes:
        network: In training mode, so with dropout.
        batch: Its inputs.
        precision: Of the network's arithmetic.
        optimizer: Adam of the paper.
        average: Of its weights.
    """

    network: nn.Module
    batch: Batch
    precision: Precision
    optimizer: torch.optim.Adam
    average: Average

    def step(self, forward: nn.Module) -> None:
        """One whole step.

        Args:
            forward: The network, or its compiled self.
        """
        with autocast(self.precision):
            output: Tensor = forward(self.batch.x_t, self.batch.t)
        torch.autograd.backward(F.mse_loss(output.float(), self.batch.noise))
        with in_optimizer():
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.average.update()


def trainee(network: nn.Module, batch: Batch, precision: Precision, averaging: Averaging) -> Trainee:
    """Put a network into training.

    Args:
        network: Ours or a peer's.
        batch: Its inputs.
        precision: Of its arithmetic.
        averaging: How its weights are averaged.
    """
    parameters: list[Tensor] = list(network.train().parameters())
    # The paper's Adam, as our recipe has it.
    optimizer = torch.optim.Adam(parameters, lr=2e-4, betas=(0.9, 0.999), eps=1e-8, fused=True)
    return Trainee(network, batch, precision, optimizer, averaging(parameters, len(batch.t)))


def our_average(parameters: list[Tensor], images: int) -> Average:
    """The trainer's own averaging."""
    ema = PartitionedEma({"paper": _PAPER}, parameters)
    # From the second update on: the very first one copies.
    return Average(ema.flats["paper"], partial(ema.update, images, images))


def foreach_average(parameters: list[Tensor], images: int) -> Average:
    """The fastest plain PyTorch has: one operation over the list of all weights."""
    shadow = [parameter.detach().clone() for parameter in parameters]
    assert _PAPER.decay is not None
    assert _PAPER.per_images is not None
    weight = 1.0 - _PAPER.decay ** (images / _PAPER.per_images)

    @torch.no_grad()
    def update() -> None:
        torch._foreach_lerp_(shadow, parameters, weight)

    return Average(shadow, update)


def our_contenders(options: Options, precision: Precision) -> Iterator[Contender]:
    """Ours in every mode asked for, and the convolutions alone."""
    batch = Batch.draw(options.config, options.batch[precision])
    modes = options.modes_of(OURS, precision)
    shared = trainee(our_network(options.config), batch, precision, our_average)
    for mode in modes:
        label = Label(contender=OURS, precision=precision, mode=mode, batch=len(batch.t))
        match mode:
            case Mode.EAGER:
                yield _contender(label, shared, shared.network)
            case Mode.COMPILED:
                yield _contender(label, shared, compiled(shared.network, fullgraph=True))
            case Mode.BLOCKS:
                # Compiles in place, so it needs a network of its own.
                network = our_network(options.config)
                compile_blocks(network)
                own = trainee(network, batch, precision, our_average)
                yield _contender(label, own, own.network)
    yield from floors(options.config, batch, precision, forward_backward, calls=1)


def peer_contenders(peer: Peer, options: Options, precision: Precision) -> Iterator[Contender]:
    """A peer in every mode asked for, and eagerly in every layout that its documentation speaks of."""
    batch = Batch.draw(options.config, options.batch[precision])
    for layout in peer.layouts:
        network = peer.network(options.config).to(memory_format=layout.memory_format)
        theirs = trainee(network, batch.to(layout), precision, foreach_average)
        for mode in options.modes_of(peer.name, precision):
            # The compiler chooses layouts itself; it gets the one that is documented for it, the last one.
            if mode is not Mode.EAGER and layout != peer.layouts[-1]:
                continue
            label = Label(
                contender=peer.name, precision=precision, mode=mode, layout=layout, batch=len(batch.t)
            )
            forward = network if mode is Mode.EAGER else compiled(network, fullgraph=peer.fullgraph)
            yield _contender(label, theirs, forward)


def _contender(label: Label, trainee: Trainee, forward: nn.Module) -> Contender:
    return Contender(label, partial(trainee.step, forward))


def contenders(options: Options, precision: Precision) -> list[Contender]:
    """Everyone at one precision."""
    found = list(our_contenders(options, precision))
    for peer in options.taking_part(precision):
        found += peer_contenders(peer, options, precision)
    return found


def bars(timings: Sequence[Timing], options: Options) -> list[Bar]:
    """The claims about training."""

    def name(claim: str, precision: Precision) -> str:
        batch = options.batch[precision]
        return f"{options.prefix}train-{claim}-{precision}-b{batch}-{DIFFUSERS.name}"

    ours = fastest(timings, OURS, Precision.BF16, (Mode.EAGER,))
    theirs = fastest(timings, DIFFUSERS.name, Precision.BF16, (Mode.EAGER,))
    found = [speed_bar(name("eager", Precision.BF16), EAGER_BF16_TARGET, ours, theirs)]
    found += [
        best_bar(name("best", precision), BEST_TARGET, timings, DIFFUSERS.name, precision)
        for precision in options.precisions
    ]
    for peer in options.peers:
        if peer.comparable:
            ours, theirs = least_favourable(timings, peer.name)
            found.append(speed_bar(f"{options.prefix}train-never-slower-{peer.name}", 1.0, ours, theirs))
    return found


def main(arguments: Sequence[str] | None = None) -> Result:
    """Run the benchmark.

    Args:
        arguments: Of the command line; default: the process's.

    Returns:
        What was measured.
    """
    options = read(parser("train_step", __doc__ or "", batch=8).parse_args(arguments))
    return run(
        "train_step",
        options,
        lambda precision: contenders(options, precision),
        lambda timings: bars(timings, options),
    )


if __name__ == "__main__":
    main()
