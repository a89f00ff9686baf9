"""Export: diffusers loads the folder, computes the same, and its pipeline draws the same pictures."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMPipeline, UNet2DModel
from torch import Tensor

from data_pipeline.documents import sha256_hex
from data_pipeline.errors import UserError
from tests.trainer.unet_support import inputs
from tests.trainer.weights_support import random_run
from trainer.diffusion.samplers import ancestral, evenly_spaced, final
from trainer.run import Run
from trainer.weights import load_for_inference
from trainer.weights.export import export_diffusers, split_place


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model.profile=openai", "model.num_heads=1"],
        ["model.profile=diffusers", "image.channels=3"],
        ["model.profile=openai", "model.head_channels=4", "model.scale_shift_norm=true"],
        [
            "model.attention_resolutions=[]",
            "model.num_heads=2",
            "diffusion.variance=learned-range",
            "loss.kind=hybrid",
        ],
        ["model.channel_multipliers=[1,1,3]", "model.attention_resolutions=[8,2]", "model.num_res_blocks=2"],
    ],
    ids=lambda overrides: ",".join(overrides) or "paper",
)
def test_diffusers_computes_what_our_network_computes(tmp_path: Path, overrides: list[str]) -> None:
    run = random_run(tmp_path / "run", overrides)
    export_diffusers(run, tmp_path / "out", ema="raw")
    theirs = UNet2DModel.from_pretrained(tmp_path / "out" / "unet").eval()
    ours = load_for_inference(run, run.checkpoints()[0], ema="raw", device="cpu").model
    x, t = inputs(ours.config)
    with torch.no_grad():
        found, wanted = theirs(x, t).sample, ours(x, t)
    assert float(wanted.abs().max()) > 0.3
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


def draws(seed: int, shape: tuple[int, ...]) -> Any:
    """Noise as diffusers draws it: one generator, one draw after another."""
    generator = torch.Generator().manual_seed(seed)
    return lambda draw: torch.randn(shape, generator=generator)


@pytest.mark.parametrize(
    ("overrides", "steps"),
    [
        (["diffusion.variance=fixed-large"], 20),
        (["diffusion.variance=fixed-small"], 20),
        (["diffusion.variance=learned-range", "loss.kind=hybrid"], 20),
        (["diffusion.num_timesteps=16", "diffusion.variance=fixed-large"], 16),
        (["diffusion.prediction=x0", "diffusion.schedule=quadratic"], 10),
        (["diffusion.prediction=v", "diffusion.schedule=cosine"], 20),
        (["diffusion.prediction=v", "diffusion.schedule=jsd", "diffusion.num_timesteps=16"], 16),
        (["diffusion.schedule=warmup10", "model.profile=openai", "model.head_channels=4"], 20),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, list) else "",
)
def test_the_pipeline_draws_the_same_pictures(tmp_path: Path, overrides: list[str], steps: int) -> None:
    run = random_run(tmp_path / "run", overrides)
    export_diffusers(run, tmp_path / "out")
    pipeline = DDPMPipeline.from_pretrained(tmp_path / "out")
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    theirs = pipeline(batch_size=4, generator=generator, num_inference_steps=steps, output_type="pt").images

    loaded = load_for_inference(run, run.checkpoints()[0], ema="main", device="cpu")
    config, T = loaded.model.config, loaded.diffusion.num_timesteps
    noise = draws(3, (4, config.in_channels, config.image_size, config.image_size))
    ours = final(ancestral(loaded.diffusion, loaded.model, noise(0), noise, evenly_spaced(T, steps)))
    wanted: Tensor = (ours / 2 + 0.5).clamp(0, 1)
    assert float(wanted.std()) > 0.05  # neither black nor white
    # Their tables are float32; one step of 8-bit pictures is 4e-3.
    torch.testing.assert_close(theirs, wanted, atol=2e-5, rtol=0)


def test_the_facts_and_the_files(tmp_path: Path) -> None:
    run = random_run(tmp_path / "run", images=(64, 128))
    facts = export_diffusers(run, tmp_path / "out", checkpoint="0000000064-000001", ema="raw")
    assert (facts.checkpoint, facts.ema, facts.images) == ("0000000064-000001", "raw", 64)
    assert facts.manifest_sha256 == run.manifest_sha256(facts.checkpoint)
    written = {
        str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()
    }
    assert {file.path for file in facts.files} == written
    assert facts.files[-1].path == "model_index.json"
    for file in facts.files:
        data = (tmp_path / "out" / file.path).read_bytes()
        assert (file.bytes, file.sha256) == (len(data), sha256_hex(data))
    assert facts.manifest_sha256 in (tmp_path / "out" / "README.md").read_text()
    again = export_diffusers(run, tmp_path / "again", checkpoint="0000000064-000001", ema="raw")
    assert again.files == facts.files
    newest = export_diffusers(run, tmp_path / "newest")
    assert (newest.checkpoint, newest.ema) == ("0000000128-000001", "main")
    assert run.pins() == {}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["model.block_size=2", "model.attention_resolutions=[2]"],
            r"model\.block_size=2: .*no space-to-depth",
        ),
        (["diffusion.prediction=mu"], r"diffusion\.prediction=mu: .* has eps, x0, v only"),
        (
            ["diffusion.variance=learned", "loss.kind=vb"],
            r"diffusion\.variance=learned: .* has fixed-small, fixed-large, learned-range",
        ),
        (["model.num_heads=2"], r"model\.num_heads=2: .* heads of one width only, here they are 4 and 8"),
        (
            ["model.channel_multipliers=[2,2]"],
            r"model\.channel_multipliers=\[2, 2\]: .*first multiplier must be 1",
        ),
    ],
)
def test_what_diffusers_cannot_express(tmp_path: Path, overrides: list[str], message: str) -> None:
    wide = ["model.attention_resolutions=[8,4]"] if "num_heads" in overrides[0] else []
    run = random_run(tmp_path / "run", [*overrides, *wide])
    with pytest.raises(UserError, match=message):
        export_diffusers(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    run = random_run(tmp_path / "run")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds notes\.txt already .*choose an empty folder"):
        export_diffusers(run, tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="no folder can be made there"):
        export_diffusers(run, tmp_path / "file")


def test_a_half_written_folder_is_no_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, whole = random_run(tmp_path / "run"), Path.write_bytes

    def full_disk(path: Path, data: bytes) -> int:
        if path.name == "README.md":
            raise OSError(28, "No space left on device")
        return whole(path, data)

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(UserError, match=r"README\.md: cannot be written \(No space left on device\)"):
        export_diffusers(run, tmp_path / "out")
    monkeypatch.undo()
    assert (tmp_path / "out" / "unet" / "config.json").exists()
    assert not (tmp_path / "out" / "model_index.json").exists()
    with pytest.raises(UserError, match=r"without model_index\.json, so no finished export"):
        export_diffusers(run, tmp_path / "out")


def test_missing_weights_and_runs(tmp_path: Path) -> None:
    run = random_run(tmp_path / "run")
    with pytest.raises(UserError, match="holds no weights 'slow'; known: raw, main"):
        export_diffusers(run, tmp_path / "out", ema="slow")
    assert not list((tmp_path / "out").iterdir())
    with pytest.raises(UserError, match="holds no run"):
        export_diffusers(Run(str(tmp_path / "none")), tmp_path / "out")


@pytest.mark.parametrize(
    ("place", "parts"),
    [
        ("runs/a", ("runs/a", None)),
        ("s3://bucket/a/checkpoints/0000000064-000001", ("s3://bucket/a", "0000000064-000001")),
        ("runs/a/checkpoints/0000000064-000001/", ("runs/a", "0000000064-000001")),
        ("runs/a/checkpoints", ("runs/a/checkpoints", None)),
        ("checkpoints/0000000064-000001", ("checkpoints/0000000064-000001", None)),
    ],
)
def test_places(place: str, parts: tuple[str, str | None]) -> None:
    assert split_place(place) == parts
