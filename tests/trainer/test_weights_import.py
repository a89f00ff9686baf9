"""Import: the weights of other code bases compute the same here, and become a checkpoint like any other."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from torch import Tensor

from data_pipeline.errors import UserError
from eval.sampling import SamplerSettings, sample_images
from tests.trainer.thread_ranks import alone
from tests.trainer.unet_support import output
from tests.trainer.weights_support import (
    OPENAI,
    PAPER,
    as_npz,
    bring,
    diffusers_unet,
    openai_unet,
    other,
    paper_recipe,
    paper_variables,
    random_run,
    save,
)
from trainer.checkpoint import Slice, verify
from trainer.manifest import ANY_DATA
from trainer.parts import read_part
from trainer.restore import load_state
from trainer.run import Run
from trainer.unet import UNet
from trainer.weights import load_for_inference
from trainer.weights.convert import read_foreign, take
from trainer.weights.export import export_diffusers
from trainer.weights.formats import openai
from trainer.weights.imports import Imported, ImportOptions, import_weights
from trainer.weights.names import Network


def imported_output(run: Path, ema: str = "raw") -> Tensor:
    """Output of the imported network on `inputs`."""
    opened = Run(str(run))
    model = load_for_inference(opened, opened.select(None), ema=ema, device="cpu").model
    return output(model, model.config)


def converted(place: Path, overrides: Sequence[str] = (), new_order: bool = False) -> UNet:
    """Our network with foreign weights, without a run."""
    recipe = paper_recipe(overrides)
    model = UNet(recipe.unet_config()).eval()
    model.load_state_dict(read_foreign(str(place), recipe, new_order).weights)
    return model


def test_the_recipe_is_that_of_the_other_networks() -> None:
    assert paper_recipe().unet_config() == PAPER


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_pesser(tmp_path: Path, suffix: str) -> None:
    variables, wanted = paper_variables(PAPER, "pesser")
    save(variables, tmp_path / f"model{suffix}")
    facts = bring(tmp_path / f"model{suffix}", tmp_path / "run")
    assert (facts.format, facts.averages, facts.tensors) == ("pesser", False, len(variables))
    torch.testing.assert_close(imported_output(tmp_path / "run"), wanted, atol=1e-5, rtol=0)
    assert torch.equal(imported_output(tmp_path / "run", "main"), imported_output(tmp_path / "run"))


def test_tensorflow_with_averages(tmp_path: Path) -> None:
    variables, of_weights = paper_variables(PAPER, "tensorflow")
    network_of_averages = {name: 0.5 * tensor for name, tensor in variables.items()}
    everything = {f"model/{name}": tensor for name, tensor in variables.items()}
    everything |= {
        f"model/{name}/ExponentialMovingAverage": tensor for name, tensor in network_of_averages.items()
    }
    everything |= {f"model/{name}/Adam": torch.zeros_like(tensor) for name, tensor in variables.items()}
    everything |= {f"model/{name}/Adam_1": torch.zeros_like(tensor) for name, tensor in variables.items()}
    everything |= {"global_step": torch.tensor(790000), "beta1_power": torch.tensor(0.0)}
    as_npz(str(tmp_path / "model.npz"), everything)
    # At 0 images the first update would copy the weights over the averages.
    with pytest.raises(UserError, match="say with --images how many they have seen"):
        bring(tmp_path / "model.npz", tmp_path / "run")
    assert not (tmp_path / "run").exists()
    facts = bring(tmp_path / "model.npz", tmp_path / "run", (), ImportOptions(images=101120000))
    assert (facts.format, facts.averages) == ("tensorflow", True)
    torch.testing.assert_close(imported_output(tmp_path / "run"), of_weights, atol=1e-5, rtol=0)
    run = Run(str(tmp_path / "run"))
    averages = load_for_inference(run, run.select(None), ema="main", device="cpu").model
    half = 0.5 * variables["conv_in/W"].permute(3, 2, 0, 1)
    assert torch.equal(averages.get_parameter("stem.weight"), half)


@pytest.mark.parametrize("ending", [":0", "/ExponentialMovingAverage"])
def test_tensorflow_alone(tmp_path: Path, ending: str) -> None:
    variables, wanted = paper_variables(PAPER, "tensorflow")
    as_npz(
        str(tmp_path / "model.npz"), {f"model/{name}{ending}": tensor for name, tensor in variables.items()}
    )
    found = read_foreign(str(tmp_path / "model.npz"), paper_recipe())
    assert found.has_averages == ending.startswith("/")
    assert all(torch.equal(found.averages[name], tensor) for name, tensor in found.weights.items())
    torch.testing.assert_close(output(converted(tmp_path / "model.npz"), PAPER), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("options", "overrides", "new_order"),
    [
        ({"num_heads": 4}, OPENAI, False),
        ({"num_heads": 4, "use_new_attention_order": True}, OPENAI, True),
        ({"num_heads": 1}, ("model.profile=openai", "model.num_heads=1"), False),
        (
            {"num_head_channels": 16, "use_scale_shift_norm": True},
            ("model.profile=openai", "model.head_channels=16", "model.scale_shift_norm=true"),
            False,
        ),
        (
            {"num_heads": 4, "out_channels": 6},
            (*OPENAI, "diffusion.variance=learned-range", "loss.kind=hybrid"),
            False,
        ),
    ],
    ids=["legacy-order", "new-order", "one-head", "scale-shift", "learned-variance"],
)
def test_openai(tmp_path: Path, options: dict[str, Any], overrides: tuple[str, ...], new_order: bool) -> None:
    shape = other(PAPER, out_channels=options.pop("out_channels", 3))
    theirs = openai_unet(shape, **options)
    torch.save(theirs.state_dict(), tmp_path / "model.pt")
    found = output(converted(tmp_path / "model.pt", overrides, new_order), shape)
    torch.testing.assert_close(found, output(theirs, shape), atol=2e-5, rtol=0)


def test_the_order_of_openais_attention_shows(tmp_path: Path) -> None:
    """The file does not tell it: read wrongly, the tensors fit and the network is another."""
    theirs = openai_unet(PAPER, num_heads=4, use_new_attention_order=True)
    torch.save(theirs.state_dict(), tmp_path / "model.pt")
    difference = output(converted(tmp_path / "model.pt", OPENAI), PAPER) - output(theirs, PAPER)
    assert float(difference.abs().max()) > 1e-3


def test_openai_with_labels() -> None:
    config = paper_recipe(OPENAI).unet_config()
    config = other(config, num_classes=10)
    theirs = openai_unet(config, num_heads=4, num_classes=10)
    ours = UNet(config).eval()
    ours.load_state_dict(take(theirs.state_dict(), openai.NAMING, Network.of(config), "model.pt"))
    labels = torch.tensor([0, 9, 4, 2])
    found = output(ours, config, labels)
    torch.testing.assert_close(found, output(theirs, config, labels), atol=2e-5, rtol=0)
    assert not torch.equal(found, output(ours, config, labels.flip(0)))


@pytest.mark.parametrize(
    ("safe", "options", "overrides"),
    [
        (False, {}, ()),
        (
            True,
            {
                "downsample_padding": 1,
                "flip_sin_to_cos": True,
                "freq_shift": 0,
                "norm_eps": 1e-5,
                "attention_head_dim": 8,
            },
            ("model.profile=diffusers",),
        ),
        (
            True,
            {"attention_head_dim": 16, "resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 32},
            ("model.head_channels=16", "model.scale_shift_norm=true"),
        ),
    ],
    ids=["paper", "defaults", "scale-shift"],
)
def test_a_folder_of_diffusers(
    tmp_path: Path, safe: bool, options: dict[str, Any], overrides: tuple[str, ...]
) -> None:
    theirs = diffusers_unet(PAPER, **options)
    DDPMPipeline(theirs, DDPMScheduler()).save_pretrained(tmp_path / "theirs", safe_serialization=safe)
    found = output(converted(tmp_path / "theirs", overrides), PAPER)
    torch.testing.assert_close(found, output(theirs, PAPER), atol=1e-5, rtol=0)


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_the_google_layout(tmp_path: Path, suffix: str) -> None:
    """Configuration and weights at the root, attention under its old names."""
    theirs = diffusers_unet(PAPER)
    DDPMPipeline(theirs, DDPMScheduler()).save_pretrained(tmp_path / "saved")
    folder = google_folder(tmp_path / "saved", tmp_path / "google", suffix)
    torch.testing.assert_close(output(converted(folder), PAPER), output(theirs, PAPER), atol=1e-5, rtol=0)


def google_folder(saved: Path, folder: Path, suffix: str) -> Path:
    from diffusers import UNet2DModel

    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = UNet2DModel.from_pretrained(saved / "unet").state_dict()
    renamed = {}
    for name, tensor in state.items():
        for new, before in old.items():
            name = name.replace(f".{new}.", f".{before}.")
        renamed[name] = tensor
    folder.mkdir()
    save(renamed, folder / f"diffusion_pytorch_model{suffix}")
    config = json.loads((saved / "unet" / "config.json").read_text())
    later = ("add_attention", "attn_norm_num_groups", "class_embed_type", "dropout", "num_class_embeds")
    for key in (*later, "downsample_type", "upsample_type", "resnet_time_scale_shift", "time_embedding_dim"):
        config.pop(key)
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copy(saved / "scheduler" / "scheduler_config.json", folder)
    shutil.copy(saved / "model_index.json", folder)
    return folder


def test_averages_beside_a_folder_of_diffusers(tmp_path: Path) -> None:
    """The layout of diffusers' own training script: unet/ and unet_ema/."""
    weights, averages = diffusers_unet(PAPER), diffusers_unet(PAPER)
    with torch.no_grad():
        averages.conv_in.weight.add_(0.1)
    weights.save_pretrained(tmp_path / "theirs" / "unet")
    averages.save_pretrained(tmp_path / "theirs" / "unet_ema")
    facts = bring(tmp_path / "theirs", tmp_path / "run", (), ImportOptions(images=64))
    assert facts.averages
    assert len(facts.files) == 2
    torch.testing.assert_close(imported_output(tmp_path / "run"), output(weights, PAPER), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        imported_output(tmp_path / "run", "main"), output(averages, PAPER), atol=1e-5, rtol=0
    )


def test_out_and_in_again_is_bit_equal(tmp_path: Path) -> None:
    run = random_run(tmp_path / "run")
    for ema in ("raw", "main"):
        export_diffusers(run, tmp_path / ema, ema=ema)
        back = Run(str(tmp_path / f"back-{ema}"))
        import_weights(str(tmp_path / ema), run.recipe(), back, ImportOptions())
        before = load_for_inference(run, run.select(None), ema=ema, device="cpu").model.state_dict()
        after = load_for_inference(back, back.select(None), ema="raw", device="cpu").model.state_dict()
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
        export_diffusers(back, tmp_path / f"again-{ema}", ema="raw")
        name = "unet/diffusion_pytorch_model.safetensors"
        assert (tmp_path / ema / name).read_bytes() == (tmp_path / f"again-{ema}" / name).read_bytes()


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Weights with averages apart from them, for two profiles."""
    folder = tmp_path_factory.mktemp("imported")
    variables = paper_variables(PAPER, "tensorflow")[0]
    averages = {f"{name}/ExponentialMovingAverage": 0.5 * tensor for name, tensor in variables.items()}
    as_npz(str(folder / "model.npz"), variables | averages)
    ema = ("ema.slow.decay=0.9999", "ema.slow.per_images=128")
    bring(folder / "model.npz", folder / "run", ema, ImportOptions(images=12800))
    return Run(str(folder / "run"))


def test_the_checkpoint_is_published(imported: Run) -> None:
    (name,) = imported.live_checkpoints()
    manifest = imported.manifest(name)
    verify(imported, manifest)
    assert (manifest.images, manifest.position, manifest.updates) == (12800, 12800, 0)
    assert manifest.index_sha == ANY_DATA
    assert manifest.recipe_sha == imported.recipe().sha256
    assert {entry.ema for entry in manifest.files if entry.role == "ema"} == set(imported.recipe().ema)
    (attempt,) = imported.attempts()
    assert (attempt.parent, attempt.attempt, attempt.run) == (None, manifest.attempt, manifest.run)
    ended = imported.ended()
    assert ended is not None
    assert (ended.outcome, ended.checkpoint) == ("finished", name)
    facts = Imported.from_json(imported.storage.read("import.json"), "import.json")
    assert (facts.checkpoint, facts.manifest_sha256) == (name, imported.manifest_sha256(name))
    assert facts.parameters == sum(p.numel() for p in UNet(PAPER).parameters())


def test_training_can_load_its_state(imported: Run) -> None:
    """Every number training keeps is there, cut as any layout may cut it."""
    manifest = imported.manifest(imported.select(None))
    averages = [f"ema.{profile}" for profile in imported.recipe().ema]
    roles = ["master", "exp_avg", "exp_avg_sq", *averages]
    slices = []
    for name, p in UNet(PAPER).named_parameters():
        middle = p.numel() // 3
        for start, stop in ((0, middle), (middle, p.numel())):
            slices.append(
                Slice(name, start, stop, {role: torch.full((stop - start,), torch.nan) for role in roles})
            )
    load_state(imported, manifest, slices, alone())
    (entry,) = [entry for entry in manifest.files if entry.role == "weights"]
    weights = read_part(imported, manifest, entry)
    for piece in slices:
        wanted = weights[piece.parameter].flatten()[piece.start : piece.stop]
        assert torch.equal(piece.tensors["master"], wanted), piece.parameter
        for role in averages:
            assert torch.equal(piece.tensors[role], 0.5 * wanted), (role, piece.parameter)
        assert not piece.tensors["exp_avg"].any()
        assert not piece.tensors["exp_avg_sq"].any()


def test_it_samples(imported: Run) -> None:
    loaded = load_for_inference(imported, imported.select(None), ema="slow", device="cpu")
    settings = SamplerSettings("ddim", steps=3, eta=0.0, seed=0, chunk=4)
    drawn = sample_images(loaded, ids=range(4), settings=settings, device=torch.device("cpu"))
    assert drawn.images.shape == (4, 16, 16, 3)
    assert drawn.finite.all()


def test_a_run_in_use_is_refused(tmp_path: Path, imported: Run) -> None:
    save(paper_variables(PAPER, "pesser")[0], tmp_path / "model.ckpt")
    with pytest.raises(UserError, match="holds a run already; import into another directory"):
        import_weights(str(tmp_path / "model.ckpt"), imported.recipe(), imported, ImportOptions())
