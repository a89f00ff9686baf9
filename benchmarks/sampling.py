"""`python -m benchmarks.sampling`: DDIM with our sampler and network against diffusers'.

Everyone starts from the same noise and takes the same steps; the images must agree before anything is timed.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from benchmarks.floor import floors, forward
from benchmarks.harness import OURS, Contender, Label, Layout, Mode, Precision, Timing
from benchmarks.network import Batch, compiled, our_network
from benchmarks.options import Options, parser, read
from benchmarks.peers.diffusers_unet import DIFFUSERS, DiffusersNetwork, ddim_loop, shipped_pipeline
from benchmarks.report import Bar, Result, best_bar, fastest, speed_bar
from benchmarks.session import run
from trainer.diffusion.process import GaussianDiffusion, Prediction, Variance
from trainer.diffusion.samplers import ddim, final
from trainer.diffusion.schedule import ScheduleConfig, from_config
from trainer.unet import compile_blocks

EQUAL_TARGET = 1.05
SHIPPED_TARGET = 1.5
SHIPPED = "diffusers-pipeline"
"""Contender's name of diffusers as it is shipped."""
SEED = 2
"""Of the noise everyone starts from."""
ATOL = {Precision.FP32: 1e-3, Precision.BF16: 0.1}
"""How far images in [-1, 1] may be from our float32 ones. In fp32 no pixel may be farther; in bf16 the mean
is judged, because the network's weights are random: a rounding that moves an estimate across the bound of
clipping may move single pixels far. The mean difference of unrelated images is above 0.5."""


@dataclass(frozen=True)
class Task:
    """What everyone is to do.

    Attributes:
        options: What to measure.
        precision: Of the network's weights and arithmetic; the sampler's own is float32.
        steps: Calls of the network.
    """

    options: Options
    precision: Precision
    steps: int

    def noise(self) -> Tensor:
        """x_T, float32 [B, C, H, W]: what diffusers' pipeline draws from a generator of this seed."""
        config = self.options.config
        shape = (self.options.batch[self.precision], config.in_channels, config.image_size, config.image_size)
        return torch.randn(shape, generator=torch.Generator().manual_seed(SEED))

    def ours(self, forward: nn.Module, dtype: torch.dtype) -> Tensor:
        """Images by our sampler, of a network in this precision."""
        diffusion = GaussianDiffusion(from_config(ScheduleConfig()), Prediction.EPS, Variance.FIXED_LARGE)
        with torch.inference_mode():
            return final(ddim(diffusion, denoiser(forward, dtype), self.noise(), steps=self.steps))

    def contender(
        self, name: str, mode: Mode, sample: Callable[[], Tensor], reference: Tensor, layout: Layout
    ) -> Contender:
        """A contender whose images must agree with the reference."""
        label = Label(
            contender=name, precision=self.precision, mode=mode, layout=layout, batch=len(reference)
        )
        return Contender(label, sample, lambda images: self.compare(label, images, reference))

    def compare(self, label: Label, images: object, reference: Tensor) -> None:
        """Print how far the images are from the reference.

        Raises:
            ValueError: Farther than rounding explains.
        """
        assert isinstance(images, Tensor)
        differences = (images - reference).abs()
        worst = self.precision is Precision.FP32
        difference = float(differences.max() if worst else differences.mean())
        atol = ATOL[self.precision]
        what = "at most" if worst else "on average"
        print(f"images of {label} differ from ours in fp32 by {difference:.1e} {what} (atol {atol:g})")
        if not difference <= atol:
            raise ValueError(
                f"{label} makes other images: {difference:.1e} apart {what} (atol {atol:g}); nothing is timed"
            )


def denoiser(forward: nn.Module, dtype: torch.dtype) -> Callable[[Tensor, Tensor], Tensor]:
    """A network of this precision between float32 images."""

    def predict(x: Tensor, t: Tensor) -> Tensor:
        return cast(Tensor, forward(x.to(dtype), t).float())

    return predict


def our_contenders(task: Task, reference: Tensor) -> Iterator[Contender]:
    """Our sampler over our network in every mode asked for, and the convolutions alone."""
    options, precision = task.options, task.precision
    network = our_network(options.config).to(task.precision.dtype)
    for mode in options.modes_of(OURS, precision):
        match mode:
            case Mode.EAGER:
                called: nn.Module = network
            case Mode.COMPILED:
                called = compiled(network, fullgraph=True)
            case Mode.BLOCKS:
                blocks = our_network(options.config).to(task.precision.dtype)  # compiled in place
                compile_blocks(blocks)
                called = blocks
        sample = partial(task.ours, called, task.precision.dtype)
        yield task.contender(OURS, mode, sample, reference, Layout.CONTIGUOUS)
    batch = Batch.draw(options.config, len(reference))
    yield from floors(options.config, batch, precision, forward, calls=task.steps)


def diffusers_contenders(task: Task, reference: Tensor) -> Iterator[Contender]:
    """Hugging Face's scheduler over its network, and its pipeline as shipped."""
    for layout in DIFFUSERS.layouts:
        network = DIFFUSERS.network(task.options.config).to(task.precision.dtype)
        network = network.to(memory_format=layout.memory_format)
        x_T = task.noise().contiguous(memory_format=layout.memory_format)
        for mode in task.options.modes_of(DIFFUSERS.name, task.precision):
            if mode is not Mode.EAGER and layout != DIFFUSERS.layouts[-1]:
                continue
            forward = network if mode is Mode.EAGER else compiled(network, fullgraph=True)
            sample = partial(ddim_loop, denoiser(forward, task.precision.dtype), x_T, task.steps)
            yield task.contender(DIFFUSERS.name, mode, sample, reference, layout)
    if task.precision is Precision.FP32:
        yield _shipped(task, reference)


def _shipped(task: Task, reference: Tensor) -> Contender:
    network = DIFFUSERS.network(task.options.config)
    assert isinstance(network, DiffusersNetwork)
    sample = shipped_pipeline(network)
    batch = len(reference)
    label = Label(contender=SHIPPED, precision=task.precision, mode=Mode.EAGER, batch=batch)
    # By default it keeps the predicted noise where it clips the estimate, which gives other images: it is
    # compared with that option set, and timed without.
    task.compare(label, sample(batch, SEED, task.steps, use_clipped_model_output=True), reference)
    return Contender(label, partial(sample, batch, SEED, task.steps))


def contenders(task: Task) -> list[Contender]:
    """Everyone at one precision."""
    # Always float32, for the batch of the precision measured.
    reference = task.ours(our_network(task.options.config), torch.float32)
    everyone = [*our_contenders(task, reference)]
    if DIFFUSERS in task.options.present():
        everyone += diffusers_contenders(task, reference)
    return everyone


def bars(timings: Sequence[Timing], options: Options) -> list[Bar]:
    """The claims about sampling."""
    found = []
    for precision in options.precisions:
        name = f"{options.prefix}sampling-{precision}-b{options.batch[precision]}-{DIFFUSERS.name}"
        found.append(best_bar(name, EQUAL_TARGET, timings, DIFFUSERS.name, precision))
    batch = options.batch[Precision.FP32]
    pair = fastest(timings, OURS, batch=batch), fastest(timings, SHIPPED, batch=batch)
    found.append(speed_bar(f"{options.prefix}sampling-b{batch}-{SHIPPED}", SHIPPED_TARGET, *pair))
    return found


def main(arguments: Sequence[str] | None = None) -> Result:
    """Run the benchmark.

    Args:
        arguments: Of the command line; default: the process's.

    Returns:
        What was measured.
    """
    options_parser = parser("sampling", __doc__ or "", batch=16)
    options_parser.add_argument(
        "--steps", type=int, default=2, metavar="N", help="calls of the network per image (default 2)"
    )
    parsed = options_parser.parse_args(arguments)
    options = read(parsed)
    return run(
        "sampling",
        options,
        lambda precision: contenders(Task(options, precision, parsed.steps)),
        lambda timings: bars(timings, options),
        steps=parsed.steps,
    )


if __name__ == "__main__":
    main()
