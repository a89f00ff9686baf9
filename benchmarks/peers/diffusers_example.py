"""Training as diffusers' example `train_unconditional.py` does it by default, step for step.

Its defaults: Accelerate in float32 (`mixed_precision` "no"; "bf16" is its option), AdamW of rate 1e-4, betas
(0.95, 0.999) and weight decay 1e-6, a cosine schedule after 500 steps of warm-up over 100 epochs, gradients
clipped to norm 1, no average of the weights (`use_ema` is off), no worker processes, bilinear resizing and
random crops, no flips (`random_flip` is off), the loss logged to TensorBoard in every step. In bf16 pictures
and noise are cast, too, as there.

It is left as it is but for this: the network is the paper's instead of the example's own; pictures come
through torchvision's `ImageFolder` where the example has `datasets` (both open them with Pillow); and, in its
favour, there is no progress bar, no state written every 500 steps, no sampling and saving after an epoch.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
import torch.nn.functional as F

from benchmarks.harness import Precision
from benchmarks.peers.diffusers_unet import DIFFUSERS, DiffusersNetwork
from benchmarks.peers.distribution import LibraryPeer
from benchmarks.report import installed
from trainer.unet import UNetConfig

DIFFUSERS_EXAMPLE = LibraryPeer(
    name="diffusers-example",
    distribution=DIFFUSERS.distribution,
    source="https://github.com/huggingface/diffusers/blob/main/examples/unconditional_image_generation/"
    "train_unconditional.py",
)
REQUIRES: Final = (DIFFUSERS_EXAMPLE.distribution, "accelerate", "torchvision", "tensorboard")
"""Distributions that it is made of."""
_MIXED_PRECISION: Final = {Precision.FP32: "no", Precision.BF16: "bf16"}
_EPOCHS: Final = 100
_WARM_UP_STEPS: Final = 500
_LEARNING_RATE: Final = 1e-4
_MAX_NORM: Final = 1.0


def missing() -> list[str]:
    """Name the distributions that are not installed."""
    return [name for name in REQUIRES if installed(name) is None]


def train(
    config: UNetConfig,
    pictures: Path,
    out: Path,
    *,
    batch: int,
    precision: Precision,
    before_step: Callable[[], None],
    after_step: Callable[[float], None],
) -> None:
    """Train for 100 epochs, or until `before_step` raises.

    Args:
        config: Of our network, of which theirs is built.
        pictures: Holds one folder of picture files.
        out: For TensorBoard's files.
        batch: Pictures of a step.
        precision: Of the network's arithmetic.
        before_step: Called before each step, when its pictures are there.
        after_step: Told the loss of each step.
    """
    from accelerate import Accelerator
    from accelerate.utils import ProjectConfiguration
    from diffusers import DDPMScheduler
    from diffusers.optimization import get_scheduler

    accelerator = Accelerator(
        gradient_accumulation_steps=1,
        mixed_precision=_MIXED_PRECISION[precision],
        log_with="tensorboard",
        project_config=ProjectConfiguration(project_dir=str(out), logging_dir=str(out / "logs")),
    )
    model = DiffusersNetwork(config).unet
    schedule = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear", prediction_type="epsilon")
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=_LEARNING_RATE, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8
    )
    loader = _loader(pictures, config.image_size, batch)
    rate = get_scheduler(
        "cosine",
        optimizer=optimizer,
        num_warmup_steps=_WARM_UP_STEPS,
        num_training_steps=len(loader) * _EPOCHS,
    )
    model, optimizer, loader, rate = accelerator.prepare(model, optimizer, loader, rate)
    accelerator.init_trackers("train_unconditional")
    done = 0
    for _ in range(_EPOCHS):
        model.train()
        for images, _ in loader:
            before_step()
            clean = images.to(precision.dtype)
            noise = torch.randn(clean.shape, dtype=precision.dtype, device=clean.device)
            t = torch.randint(0, schedule.config.num_train_timesteps, (len(clean),), device=clean.device)
            noisy = schedule.add_noise(clean, noise, t)
            with accelerator.accumulate(model):
                loss = F.mse_loss(model(noisy, t).sample.float(), noise.float())
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), _MAX_NORM)
                optimizer.step()
                rate.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                done += 1
            seen = loss.detach().item()
            accelerator.log({"loss": seen, "lr": rate.get_last_lr()[0], "step": done}, step=done)
            after_step(seen)
        accelerator.wait_for_everyone()
    accelerator.end_training()


def _loader(pictures: Path, size: int, batch: int) -> Any:
    """Shuffled batches (float32 [b, 3, H, W] in [-1, 1], labels)."""
    from torch.utils.data import DataLoader
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    steps = [
        transforms.Resize(size, interpolation=transforms.InterpolationMode.BILINEAR),
        transforms.RandomCrop(size),
        transforms.Lambda(_unchanged),  # where the flips would be
        transforms.ToTensor(),
        transforms.Normalize([0.5], [0.5]),
    ]
    dataset = ImageFolder(str(pictures), transform=transforms.Compose(steps))
    return DataLoader(dataset, batch_size=batch, shuffle=True, num_workers=0)


def _unchanged(image: Any) -> Any:
    return image
