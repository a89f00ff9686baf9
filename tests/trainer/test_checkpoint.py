"""Checkpoints: verified by hash, loadable by any layout, never half-published."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import UserError
from tests.support import make_run, publish_checkpoint, reseal
from tests.trainer.checkpoint_support import draft, load_whole, newest_loadable
from tests.trainer.thread_ranks import alone, on_ranks
from trainer.checkpoint import Slice, newest_whole, publish, verify, write_state
from trainer.distributed import Ranks
from trainer.manifest import DamagedCheckpointError, Manifest
from trainer.parts import Part, read_part, write_part
from trainer.restore import load_state, read_weights
from trainer.run import Run
from trainer.unet import UNet
from trainer.weights import assemble, load_for_inference

ROLES = ("master", "exp_avg", "exp_avg_sq", "ema.main")


def cut(numel: int, cuts: list[int]) -> list[tuple[int, int]]:
    edges = sorted({0, numel, *(c % numel for c in cuts)})
    return list(itertools.pairwise(edges))


Truth = dict[str, dict[str, torch.Tensor]]
"""By parameter and role."""


def some_state(sizes: list[int]) -> Truth:
    return {f"layer{n}.weight": {role: torch.randn(size) for role in ROLES} for n, size in enumerate(sizes)}


def pieces_by_stage(truth: Truth, stage: int, rank: int, world: int) -> list[tuple[str, int, int]]:
    """How ZeRO divides parameters: 3 each one, 1 and 2 all of them laid end to end."""
    if stage == 3:
        sizes = {name: len(roles["master"]) for name, roles in truth.items()}
        parts = {name: -(-size // world) for name, size in sizes.items()}
        return [
            (name, min(rank * part, sizes[name]), min((rank + 1) * part, sizes[name]))
            for name, part in parts.items()
            if rank * part < sizes[name]
        ]
    total = sum(len(roles["master"]) for roles in truth.values())
    first, last, begin, found = total * rank // world, total * (rank + 1) // world, 0, []
    for name, roles in truth.items():
        size = len(roles["master"])
        start, stop = max(first - begin, 0), min(last - begin, size)
        if start < stop:
            found.append((name, start, stop))
        begin += size
    return found


def slices_of(truth: Truth, pieces: list[tuple[str, int, int]], *, empty: bool = False) -> list[Slice]:
    def view(role: str, name: str, start: int, stop: int) -> torch.Tensor:
        return torch.full((stop - start,), torch.nan) if empty else truth[name][role][start:stop]

    return [
        Slice(name, start, stop, {role: view(role, name, start, stop) for role in ROLES})
        for name, start, stop in pieces
    ]


def write_checkpoint(run: Run, truth: Truth, stage: int, world: int) -> Manifest:
    run.storage.write("attempts/000001.json", b"{}")
    name = draft(64, world=world).name
    whole = {name: roles["master"] for name, roles in truth.items()}
    parts: list[Part] = [
        write_state(run, name, rank, slices_of(truth, pieces_by_stage(truth, stage, rank, world)))
        for rank in range(world)
    ]
    parts.append(write_part(run, name, "weights.safetensors", whole, "weights"))
    averages = {name: roles["ema.main"] for name, roles in truth.items()}
    parts.append(write_part(run, name, "ema-main.safetensors", averages, "ema", "main"))
    return publish(run, draft(64, world=world), parts)


@given(
    numel=st.integers(1, 50),
    written=st.lists(st.integers(0, 49), max_size=4),
    read=st.lists(st.integers(0, 49), max_size=4),
)
@settings(max_examples=40, deadline=None)
def test_any_cuts_load_any_cuts(
    tmp_path_factory: pytest.TempPathFactory, numel: int, written: list[int], read: list[int]
) -> None:
    run = Run(str(tmp_path_factory.mktemp("run")))
    run.storage.write("attempts/000001.json", b"{}")
    truth = {"layer.weight": {role: torch.randn(numel) for role in ROLES}}
    parts = [
        write_state(run, draft(64).name, rank, slices_of(truth, [("layer.weight", start, stop)]))
        for rank, (start, stop) in enumerate(cut(numel, written))
    ]
    manifest = publish(run, draft(64, world=len(parts)), parts)
    for start, stop in cut(numel, read):
        slices = slices_of(truth, [("layer.weight", start, stop)], empty=True)
        load_state(run, manifest, slices, alone())
        for role, tensor in slices[0].tensors.items():
            assert torch.equal(tensor, truth["layer.weight"][role][start:stop])


@pytest.mark.parametrize(("stage", "world"), [(1, 1), (1, 2), (3, 2), (3, 3)])
@pytest.mark.parametrize(("to_stage", "to_world"), [(1, 1), (1, 3), (3, 2), (3, 4)])
def test_any_layout_loads_any_layout_and_reads_little_more_than_its_share(
    tmp_path: Path, stage: int, world: int, to_stage: int, to_world: int
) -> None:
    run = Run(str(tmp_path))
    truth = some_state([600_000, 64, 400_000, 900_000, 7, 64, 500_000])
    manifest = write_checkpoint(run, truth, stage, world)

    def load(ranks: Ranks) -> tuple[list[Slice], int, dict[str, torch.Tensor]]:
        slices = slices_of(truth, pieces_by_stage(truth, to_stage, ranks.rank, ranks.world), empty=True)
        return slices, load_state(run, manifest, slices, ranks), read_weights(run, manifest, ranks)

    loaded = on_ranks(to_world, load)
    for slices, _, weights in loaded:
        for piece in slices:
            for role, tensor in piece.tensors.items():
                assert torch.equal(tensor, truth[piece.parameter][role][piece.start : piece.stop])
        assert {name: tensor.shape for name, tensor in weights.items()} == {
            name: roles["master"].shape for name, roles in truth.items()
        }
        assert all(torch.equal(weights[name], roles["master"]) for name, roles in truth.items())
    content = sum(entry.bytes for entry in manifest.files if entry.role != "weights")
    assert sum(read for _, read, _ in loaded) <= 1.1 * content
    assert max(read for _, read, _ in loaded) <= 1.1 * content / to_world


def test_state_that_does_not_cover_is_refused(tmp_path: Path) -> None:
    run = make_run(str(tmp_path), images_list=(64,))
    manifest = run.manifest("0000000064-000001")
    slices = [Slice("no.such.parameter", 0, 3, {"master": torch.zeros(3)})]
    with pytest.raises(DamagedCheckpointError, match=r"lacks 3 numbers of master/no\.such\.parameter"):
        load_state(run, manifest, slices, alone())


def test_whatever_is_damaged_is_named_and_the_previous_checkpoint_is_used(tmp_path: Path) -> None:
    """200 single flipped bits, truncations and missing files, over every file of a checkpoint."""
    run = make_run(str(tmp_path), images_list=(64, 128))
    previous, newest = "0000000064-000001", "0000000128-000001"
    assert newest_loadable(run) == newest_loadable(run, 2) == newest
    files = sorted(run.storage.sizes(f"checkpoints/{newest}"))
    assert {"manifest.json", "checksums.crc32c", "weights.safetensors"} < set(files)
    rng = np.random.default_rng(0)
    for trial in range(200):
        file = tmp_path / "checkpoints" / newest / files[trial % len(files)]
        good = file.read_bytes()
        damage = rng.choice(["flip", "flip", "flip", "truncate", "remove"])
        if damage == "remove":
            file.unlink()
        elif damage == "truncate":
            file.write_bytes(good[: rng.integers(len(good))])
        else:
            bad = bytearray(good)
            bad[rng.integers(len(bad))] ^= 1 << rng.integers(8)
            file.write_bytes(bad)
        assert newest_loadable(run, 1 + trial % 2) == previous, (file.name, damage)
        if file.name != "manifest.json":
            with pytest.raises(DamagedCheckpointError, match=file.name):
                verify(run, run.manifest(newest))
        file.write_bytes(good)
    assert newest_loadable(run) == newest


def test_an_average_that_is_new_begins_with_the_weights(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = make_run(str(tmp_path), images_list=(64,))
    manifest = run.manifest("0000000064-000001")
    weights = read_weights(run, manifest, alone())
    slices = [
        Slice(name, 0, w.numel(), {"master": torch.empty(w.numel()), "ema.new": w.flatten().clone()})
        for name, w in weights.items()
    ]
    load_state(run, manifest, slices, alone())
    assert all(torch.equal(piece.tensors["ema.new"], piece.tensors["master"]) for piece in slices)
    assert "average new is new: it begins with the weights" in caplog.text


def test_no_start_from_random_weights_where_all_checkpoints_are_damaged(tmp_path: Path) -> None:
    run = make_run(str(tmp_path), images_list=(64, 128))
    for name in run.checkpoints():
        (tmp_path / "checkpoints" / name / "weights.safetensors").unlink()
    with pytest.raises(DamagedCheckpointError, match="none of the 2 live checkpoints"):
        newest_whole(run)


def test_no_start_from_random_weights_where_the_parents_manifest_is_gone(tmp_path: Path) -> None:
    run = make_run(str(tmp_path), images_list=(64,))
    run.claim_attempt("0000000064-000001", "test", run.recipe(), "0" * 64)
    (tmp_path / "checkpoints" / "0000000064-000001" / "manifest.json").unlink()
    with pytest.raises(DamagedCheckpointError, match="none of the 0 live checkpoints"):
        newest_whole(run)


def test_parts_without_a_manifest_do_not_exist(tmp_path: Path) -> None:
    run = make_run(str(tmp_path), images_list=(64, 128))
    (tmp_path / "checkpoints" / "0000000128-000001" / "manifest.json").unlink()
    assert run.checkpoints() == ["0000000064-000001"]


def test_publishing_checks_the_parts_and_never_rewrites(tmp_path: Path) -> None:
    run = make_run(str(tmp_path), images_list=(64,))
    recipe, manifest = run.recipe(), run.manifest("0000000064-000001")
    before = (tmp_path / "checkpoints" / manifest.name / "manifest.json").read_bytes()
    parts = [Part(entry, b"") for entry in manifest.files]
    with pytest.raises(UserError, match="already published"):
        publish(run, manifest.model_copy(update={"position": 1}), parts)
    assert (tmp_path / "checkpoints" / manifest.name / "manifest.json").read_bytes() == before
    incomplete = manifest.model_copy(update={"images": 128})
    with pytest.raises(DamagedCheckpointError, match="missing"):
        publish(run, incomplete, parts)
    assert run.checkpoints() == ["0000000064-000001"]
    publish_checkpoint(run, recipe, 1, 192, UNet(recipe.unet_config()), "0" * 64)


def test_unknown_schema_version_is_refused_by_name(tmp_path: Path) -> None:
    run = make_run(str(tmp_path), images_list=(64,))
    file = tmp_path / "checkpoints" / "0000000064-000001" / "manifest.json"
    file.write_bytes(reseal({**json.loads(file.read_bytes()), "schema": "manifest/3"}))
    with pytest.raises(UserError, match="manifest/3"):
        newest_whole(run)


def test_a_manifest_of_version_1_is_migrated_and_its_checkpoint_loads(tmp_path: Path) -> None:
    """As written before blocks had checksums: every part is then verified as a whole."""
    run = make_run(str(tmp_path), images_list=(64,))
    name = "0000000064-000001"
    folder = tmp_path / "checkpoints" / name
    new = run.manifest(name)
    old = {
        key: value
        for key, value in json.loads((folder / "manifest.json").read_bytes()).items()
        if key not in ("checksums", "sha256")
    }
    (folder / "manifest.json").write_text(json.dumps({**old, "schema": "manifest/1"}))
    (folder / "checksums.crc32c").unlink()
    migrated = run.manifest(name)
    assert migrated == new.model_copy(update={"checksums": None})
    verify(run, migrated)
    assert newest_loadable(run) == newest_loadable(run, 3) == name
    part = folder / "state" / "rank-0000.safetensors"
    data = bytearray(part.read_bytes())
    data[-1] ^= 1
    part.write_bytes(data)
    with pytest.raises(DamagedCheckpointError, match="rank-0000"):
        on_ranks(2, lambda ranks: load_whole(run, migrated, ranks))


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
