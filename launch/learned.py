"""What a quick start leaves: a local copy of the newest checkpoint and a verdict on its samples."""

from pathlib import Path

import numpy as np
import torch

from data_pipeline.split_reader import read_split
from data_pipeline.storage import Storage
from eval.results import Result, ResultBook
from eval.sampling import SamplerSettings, sample_images
from launch.digits_check import DigitsVerdict, UInt8Array, judge
from trainer.run import Run
from trainer.weights import load_for_inference


def copy_newest(run: Run, book: ResultBook, result: Result, folder: Path) -> tuple[Path, Path]:
    """Copy recipe, attempts, one checkpoint and its results to a local run directory.

    The store of a quick start ends with it; the copy can be sampled from later.

    Returns:
        The local run directory and the sample grid in it.
    """
    target = Storage(str(folder / "run"))
    manifest = run.manifest(result.checkpoint)
    checkpoint = f"checkpoints/{result.checkpoint}"
    results = f"eval/{book.directory}"
    paths = ["recipe.yaml", *(f"attempts/{name}" for name in run.storage.list("attempts"))]
    paths += [f"{results}/{name}" for name in run.storage.list(results) if Path(name).suffix]
    paths += [f"{checkpoint}/{entry.path}" for entry in manifest.files]
    for path in [*paths, f"{checkpoint}/manifest.json"]:
        target.create(path, run.storage.read(path))
    return Path(target.url), Path(target.url, results, result.grid)


def judge_run(run: Run, checkpoint: str, shards: str, samples: int) -> DigitsVerdict:
    """Let a digit classifier judge a checkpoint's samples, drawn as its evaluation draws them.

    Args:
        run: A run on the embedded digits.
        checkpoint: Name of the checkpoint.
        shards: URL of the shards.
        samples: How many samples.
    """
    recipe = run.recipe()
    (spec,) = recipe.evaluation.values()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded = load_for_inference(run, checkpoint, ema=spec.ema, device=device)
    settings = SamplerSettings(spec.sampler, spec.steps, spec.eta, spec.seed, spec.chunk)
    drawn = sample_images(loaded, ids=range(samples), settings=settings, device=device)
    return judge(drawn.images, _pictures(shards, "train"), _pictures(shards, "val"))


def _pictures(shards: str, split: str) -> UInt8Array:
    return np.concatenate(list(read_split(shards, split, channels=1, image_size=8, batch=512)))
