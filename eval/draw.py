"""Pictures for people: draw from a checkpoint into a local folder, with a note of how they were made."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final

import torch

from data_pipeline.documents import Document
from data_pipeline.errors import UserError
from data_pipeline.progress import Progress
from eval.pictures_folder import PicturesFolder
from eval.precision import forbid_tf32
from eval.report.grid import sample_grid
from eval.sampling import SamplerSettings, sample_images
from trainer.recipe import Recipe
from trainer.recipe_evaluation import EvaluationSpec, SamplerName
from trainer.run import Run, worker_name
from trainer.weights import load_for_inference

GRID_PICTURES: Final = 256
"""At most so many of the pictures, the first ones, are shown in the grid."""


@dataclass(frozen=True)
class DrawOptions:
    """What to draw; None means: as the recipe's first evaluation specification.

    Attributes:
        number: How many pictures, ids 0 to number - 1.
        checkpoint: Its name; None for the newest live one.
        ema: EMA profile, or `raw`.
        steps: Sampling steps.
        seed: Seed of the pictures' noise.
        sampler: Name of the sampler.
    """

    number: int
    checkpoint: str | None = None
    ema: str | None = None
    steps: int | None = None
    seed: int = 0
    sampler: str | None = None


class Samples(Document):
    """`samples.json`: how the pictures beside it were made; the same facts give the same pictures.

    Attributes:
        run: The run directory.
        checkpoint: Name of the checkpoint.
        manifest_sha256: Hash of its manifest: the checkpoint's identity.
        images: Training images it has seen.
        ema: Weights used.
        sampler: Sampler used.
        steps: Its steps.
        eta: DDIM's stochasticity.
        seed: Seed of the noise.
        chunk: Pictures per network call.
        number: How many pictures, `000000.png` and so on.
        not_finite: How many of them are not finite.
    """

    SCHEMA: ClassVar[str] = "samples/1"

    run: str
    checkpoint: str
    manifest_sha256: str
    images: int
    ema: str
    sampler: SamplerName
    steps: int
    eta: float
    seed: int
    chunk: int
    number: int
    not_finite: int


def draw(run: Run, out: Path, options: DrawOptions, device: torch.device) -> Samples:
    """Draw pictures and write `000000.png` …, `grid.png` and, last, `samples.json` into a folder.

    Raises:
        UserError: No such run, checkpoint or weights, more steps than timesteps, or a folder that holds
            samples already or cannot be written.
        CheckpointGoneError: Retention removed the checkpoint.
    """
    forbid_tf32()
    recipe = run.recipe()
    spec = _spec(recipe, options)
    if (out / "samples.json").exists():
        raise UserError(f"{out}: holds samples already; choose another folder with --out")
    name = run.select(options.checkpoint)
    settings = SamplerSettings(spec.sampler, spec.steps, spec.eta, options.seed, spec.chunk)
    with (
        run.pin(name, worker_name()),
        Progress("sample", options.number, "img") as progress,
    ):
        loaded = load_for_inference(run, name, ema=spec.ema, device=device)
        manifest_sha256 = run.manifest_sha256(name)
        drawn = sample_images(
            loaded, ids=range(options.number), settings=settings, device=device, progress=progress.update
        )
    facts = Samples(
        run=run.url,
        checkpoint=name,
        manifest_sha256=manifest_sha256,
        images=loaded.manifest.images,
        ema=spec.ema,
        sampler=spec.sampler,
        steps=spec.steps,
        eta=spec.eta,
        seed=options.seed,
        chunk=spec.chunk,
        number=options.number,
        not_finite=int((~drawn.finite).sum()),
    )
    PicturesFolder(out, options.number)(0, drawn)
    try:
        sample_grid(drawn.images[:GRID_PICTURES]).save(out / "grid.png")
        (out / "samples.json").write_bytes(facts.to_json())
    except OSError as error:
        raise UserError(f"{out}: cannot write pictures ({error.strerror}); choose another folder") from error
    return facts


def _spec(recipe: Recipe, options: DrawOptions) -> EvaluationSpec:
    """Return the recipe's first specification with the options over it."""
    steps = min(50, recipe.diffusion.num_timesteps)
    plain = EvaluationSpec(samples=2, steps=steps, ema=recipe.default_ema, eta=0.0, chunk=64, seed=0)
    spec = next(iter(recipe.evaluation.values()), plain)
    if options.sampler is not None and options.sampler not in set(SamplerName):
        raise UserError(f"--sampler {options.sampler}: unknown; known: {', '.join(SamplerName)}")
    sampler = None if options.sampler is None else SamplerName(options.sampler)
    given = {"ema": options.ema, "steps": options.steps, "sampler": sampler}
    spec = spec.model_copy(update={key: value for key, value in given.items() if value is not None})
    timesteps = recipe.diffusion.num_timesteps
    most = spec.sampler.most_steps(timesteps)
    if spec.steps > most:
        raise UserError(
            f"--steps {spec.steps}: the model has {timesteps} timesteps, of which {spec.sampler} can take "
            f"{most}; lower it"
        )
    return spec
