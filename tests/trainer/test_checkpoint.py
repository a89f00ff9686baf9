"""Checkpoints: verified by hash, loadable by any layout, never half-published."""

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import UserError
from tests.support import make_run, publish_checkpoint
from trainer.checkpoint import (
    DamagedCheckpointError,
    Slice,
    load_state,
    newest_verified,
    publish,
    read_part,
    verify,
    write_state,
)
from trainer.manifest import Manifest, Topology
from trainer.run import Run
from trainer.unet import UNet
from trainer.weights import assemble, load_for_inference


def cut(numel: int, cuts: list[int]) -> list[tuple[int, int]]:
    edges = sorted({0, numel, *(c % numel for c in cuts)})
    return list(itertools.pairwise(edges))


@given(
    numel=st.integers(1, 50),
    written=st.lists(st.integers(0, 49), max_size=4),
    read=st.lists(st.integers(0, 49), max_size=4),
)
@settings(max_examples=40, deadline=None)
def test_any_layout_loads_any_layout(
    tmp_path_factory: pytest.TempPathFactory, numel: int, written: list[int], read: list[int]
) -> None:
    run = Run(str(tmp_path_factory.mktemp("run")))
    truth = {role: torch.randn(numel) for role in ("master", "exp_avg", "ema.main")}
    files = [
        write_state(
            run,
            "0000000064-000001",
            rank,
            [Slice("layer.weight", start, stop, {role: value[start:stop] for role, value in truth.items()})],
        )
        for rank, (start, stop) in enumerate(cut(numel, written))
    ]
    manifest = Manifest(
        run="r",
        attempt=1,
        images=64,
        position=64,
        updates=1,
        recipe_sha="",
        index_sha="",
        topology=Topology(world=len(files), zero_stage=1, device="cpu"),
        files=files,
    )
    for start, stop in cut(numel, read):
        views = {role: torch.full((stop - start,), float("nan")) for role in truth}
        load_state(run, manifest, [Slice("layer.weight", start, stop, views)])
        for role, value in truth.items():
            assert torch.equal(views[role], value[start:stop])


def test_state_that_does_not_cover_is_refused(tmp_path: Path) -> None:
    run = make_run(str(tmp_path), images_list=(64,))
    manifest = run.manifest("0000000064-000001")
    slices = [Slice("no.such.parameter", 0, 3, {"master": torch.zeros(3)})]
    with pytest.raises(DamagedCheckpointError, match=r"lacks 3 numbers of master/no\.such\.parameter"):
        load_state(run, manifest, slices)


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damage_is_named_and_the_previous_checkpoint_is_used(tmp_path: Path, damage: str) -> None:
    run = make_run(str(tmp_path), images_list=(64, 128))
    newest = run.manifest("0000000128-000001")
    verify(run, newest)
    for entry in newest.files:
        file = tmp_path / "checkpoints" / newest.name / entry.path
        good = file.read_bytes()
        if damage == "flip":
            bad = bytearray(good)
            bad[len(bad) // 2] ^= 1
            file.write_bytes(bad)
        elif damage == "truncate":
            file.write_bytes(good[:-1])
        else:
            file.unlink()
        with pytest.raises(DamagedCheckpointError, match=entry.path):
            verify(run, newest)
        found = newest_verified(run)
        assert found is not None
        assert found.name == "0000000064-000001"
        file.write_bytes(good)
    found = newest_verified(run)
    assert found is not None
    assert found.name == newest.name


def test_parts_without_a_manifest_do_not_exist(tmp_path: Path) -> None:
    run = make_run(str(tmp_path), images_list=(64, 128))
    (tmp_path / "checkpoints" / "0000000128-000001" / "manifest.json").unlink()
    assert run.checkpoints() == ["0000000064-000001"]


def test_publishing_checks_the_parts_and_never_rewrites(tmp_path: Path) -> None:
    run = make_run(str(tmp_path), images_list=(64,))
    recipe, manifest = run.recipe(), run.manifest("0000000064-000001")
    before = (tmp_path / "checkpoints" / manifest.name / "manifest.json").read_bytes()
    with pytest.raises(UserError, match="already published"):
        publish(run, manifest.model_copy(update={"position": 1}))
    assert (tmp_path / "checkpoints" / manifest.name / "manifest.json").read_bytes() == before
    incomplete = manifest.model_copy(update={"images": 128})
    with pytest.raises(DamagedCheckpointError, match="missing"):
        publish(run, incomplete)
    assert run.checkpoints() == ["0000000064-000001"]
    publish_checkpoint(run, recipe, 1, 192, UNet(recipe.unet_config()), "0" * 64)


def test_unknown_schema_version_is_refused_by_name(tmp_path: Path) -> None:
    run = make_run(str(tmp_path), images_list=(64,))
    file = tmp_path / "checkpoints" / "0000000064-000001" / "manifest.json"
    file.write_bytes(file.read_bytes().replace(b"manifest/1", b"manifest/2"))
    with pytest.raises(UserError, match="manifest/2"):
        run.manifest("0000000064-000001")


def test_inference_weights(tmp_path: Path) -> None:
    run = make_run(str(tmp_path), images_list=(64,))
    manifest = run.manifest("0000000064-000001")
    loaded = load_for_inference(run, manifest.name, ema="main", device="cpu")
    entry = next(entry for entry in manifest.files if entry.role == "ema")
    stored = read_part(run, manifest, entry)
    assert not loaded.model.training
    for name, parameter in loaded.model.named_parameters():
        assert torch.equal(parameter, stored[name])
    with pytest.raises(UserError, match="known: raw, main"):
        load_for_inference(run, manifest.name, ema="other", device="cpu")


def test_assemble() -> None:
    whole = {"a": torch.randn(2, 3), "b": torch.randn(4)}
    pieces = [
        ("a", 0, 4, whole["a"].flatten()[:4]),
        ("b", 0, 4, whole["b"]),
        ("a", 4, 6, whole["a"].flatten()[4:]),
    ]
    made = assemble({name: value.shape for name, value in whole.items()}, pieces)
    assert all(torch.equal(made[name], whole[name]) for name in whole)
