"""`ddpm weights ema` as users type it, and what they do next."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from typer.testing import CliRunner

from data_pipeline.documents import sha256_hex
from data_pipeline.errors import UserError
from launch.cli import app
from tests.trainer.power_support import BATCH, Walk, walked_run

UPDATES = 64
NAME = f"{UPDATES * BATCH:010d}-000001"


@pytest.fixture
def walk(tmp_path: Path) -> Walk:
    return walked_run(tmp_path / "run", updates=UPDATES)


def ddpm(*arguments: str) -> str:
    done = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_made_and_sampled_from(walk: Walk, tmp_path: Path) -> None:
    first, sample, export = ddpm("weights", "ema", walk.run.url, "--std", "0.08").splitlines()
    place = f"{walk.run.url}/ema/{NAME}-std0.0800"
    assert first.startswith(f"{place}: std 0.08 at 4096 images, of 8 of 8 stored averages, residual 0.03")
    assert sample == f"sample: ddpm sample {walk.run.url} --checkpoint {NAME} --ema std0.0800 --out samples"
    assert export == f"export: ddpm weights export {place} DIR"
    options = ["-n", "2", "--steps", "2", "--out", str(tmp_path / "samples")]
    ddpm(*sample.removeprefix("sample: ddpm ").replace(" --out samples", "").split(), *options)
    facts = json.loads((tmp_path / "samples" / "samples.json").read_text())
    assert (facts["checkpoint"], facts["ema"]) == (NAME, "std0.0800")
    assert (tmp_path / "samples" / "000001.png").exists()


def test_exported_from_the_folder_alone(walk: Walk, tmp_path: Path) -> None:
    made, out, same = (str(tmp_path / name) for name in ("made", "out", "same"))
    facts = json.loads(ddpm("weights", "ema", walk.run.url, "--std", "0.08", "--out", made, "--json"))
    assert (facts["folder"], facts["schema"]) == (made, "posthoc-ema/1")
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    text = ddpm("weights", "export", made, out)
    assert text == f"{out}: {NAME}, std0.0800; DDPMPipeline.from_pretrained opens it\n"
    (tmp_path / "elsewhere").rename(tmp_path / "run")
    ddpm("weights", "ema", walk.run.url, "--std", "0.08")
    exported = json.loads(ddpm("weights", "export", walk.run.url, same, "--ema", "std0.0800", "--json"))
    assert (exported["checkpoint"], exported["ema"]) == (NAME, "std0.0800")
    left, right = (
        safetensors.torch.load_file(Path(place) / "unet" / "diffusion_pytorch_model.safetensors")
        for place in (out, same)
    )
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    card = (tmp_path / "out" / "README.md").read_text()
    assert sha256_hex((tmp_path / "made" / "posthoc.json").read_bytes()) in card
    with pytest.raises(UserError, match="is one average; leave out --checkpoint and --ema"):
        ddpm("weights", "export", made, str(tmp_path / "more"), "--ema", "raw")


def test_moments_and_limits(walk: Walk, tmp_path: Path) -> None:
    arguments = ["--std", "0.08", "--at", "3072", "--snapshots", "2"]
    text = ddpm("weights", "ema", walk.run.url, *arguments)
    assert "at 3072 images, of 4 of 4 stored averages" in text
    assert "sample:" not in text, "there is no such checkpoint"
    assert (tmp_path / "run" / "ema" / "0000003072-000001-std0.0800" / "posthoc.json").exists()
    with pytest.raises(UserError, match=r"--at 3000: .* the nearest is at 3072"):
        ddpm("weights", "ema", walk.run.url, "--std", "0.08", "--at", "3000")
