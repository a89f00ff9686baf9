from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from data_pipeline.documents import sha256_hex
from data_pipeline.errors import UserError
from data_pipeline.index import load_index
from eval.features import INCEPTION
from eval.imported import load_statistics, parse_reference_file
from eval.metrics.frechet import frechet_distance
from eval.plan import make_plan
from eval.service import Service, WatchOptions
from eval.team import Team
from launch.cli import app
from tests.eval.helpers import start_run
from tests.support import tiny_recipe

FEATURES = INCEPTION.model_copy(update={"dim": 3})


def npz(folder: Path, **arrays: np.ndarray) -> str:
    path = folder / "statistics.npz"
    np.savez(path, **arrays)
    return str(path)


def named(path: str, kind: str) -> str:
    return f"{path}#sha256={sha256_hex(Path(path).read_bytes())}&kind={kind}"


def gaussian() -> dict[str, np.ndarray]:
    x = np.random.default_rng(1).normal(size=(40, 3))
    return {"mu": x.mean(0), "sigma": np.cov(x, rowvar=False)}


@pytest.mark.parametrize(
    ("kind", "resize"),
    [
        ("clean-fid", "clean"),
        ("clean-fid-legacy", "legacy_tensorflow"),
        ("pytorch-fid", "legacy_pytorch"),
        ("adm", "legacy_tensorflow"),
        ("edm", "legacy_tensorflow"),
    ],
)
def test_kinds(tmp_path: Path, kind: str, resize: str) -> None:
    arrays = gaussian()
    spatial = {"mu_s": arrays["mu"][:2], "sigma_s": arrays["sigma"][:2, :2]} if kind == "adm" else {}
    # float32, as EDM and ADM store them
    path = npz(tmp_path, **{name: value.astype(np.float32) for name, value in (arrays | spatial).items()})
    choice = parse_reference_file(named(path, kind), resize)
    read = load_statistics(choice, FEATURES.model_copy(update={"spatial": 2}))
    torch.testing.assert_close(read.moments.covariance.numpy(), arrays["sigma"], rtol=1e-6, atol=1e-7)
    assert (read.spatial is not None) == (kind == "adm")
    with pytest.raises(UserError, match="distances between both mean nothing; set resize"):
        parse_reference_file(named(path, kind), "clean" if resize != "clean" else "legacy_pytorch")


def test_distance_to_a_file_is_that_to_its_pictures(tmp_path: Path) -> None:
    from eval.moments import moments_of

    x, y = (torch.from_numpy(np.random.default_rng(seed).normal(size=(40, 3))) for seed in (1, 2))
    path = npz(tmp_path, mu=x.mean(0).numpy(), sigma=np.cov(x.numpy(), rowvar=False))
    read = load_statistics(parse_reference_file(named(path, "clean-fid"), "clean"), FEATURES)
    expected = frechet_distance(moments_of(y), moments_of(x))
    assert frechet_distance(moments_of(y), read.moments) == pytest.approx(expected, rel=1e-12)


def test_bad_files(tmp_path: Path) -> None:
    path = npz(tmp_path, **gaussian())
    with pytest.raises(
        UserError, match=r"write PATH_OR_URL#sha256=HEX&kind=KIND with KIND one of clean-fid,"
    ):
        parse_reference_file(path, "clean")
    choice = parse_reference_file(named(path, "clean-fid"), "clean")
    with pytest.raises(UserError, match="statistics of 3 features, inception has 2048"):
        load_statistics(choice, INCEPTION)
    Path(path).write_bytes(b"other")
    with pytest.raises(UserError, match=r"5 bytes with sha256 .*, expected .*; fetch the file anew"):
        load_statistics(choice, FEATURES)
    with pytest.raises(UserError, match=r"no \.npz file of statistics"):
        load_statistics(parse_reference_file(named(path, "clean-fid"), "clean"), FEATURES)
    Path(path).unlink()
    with pytest.raises(UserError, match="cannot read statistics"):
        load_statistics(choice, FEATURES)
    Path(path).write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(UserError, match=r"no \.npz file of statistics"):
        load_statistics(parse_reference_file(named(path, "clean-fid"), "clean"), FEATURES)
    for arrays, message in (
        ({"mu": np.zeros(3)}, "has no arrays mu and sigma"),
        ({"mu": np.zeros(3), "sigma": np.zeros((2, 2))}, r"expected \[d\] and \[d, d\]"),
        ({"mu": np.full(3, np.nan), "sigma": np.zeros((3, 3))}, "is not finite"),
        ({"mu": np.array([{}]), "sigma": np.zeros((1, 1))}, r"no \.npz file of statistics"),  # pickled
    ):
        path = npz(tmp_path, **arrays)
        with pytest.raises(UserError, match=message):
            load_statistics(parse_reference_file(named(path, "clean-fid"), "clean"), FEATURES)


def test_reference_command_and_a_run_against_its_file(
    tmp_path: Path, data_url: str, inception_option: str, team: Team
) -> None:
    """`ddpm eval reference --out` writes what a recipe's reference_file reads; the distance is the same."""
    file = str(tmp_path / "digits.npz")
    taken = ["eval", "reference", data_url, "--features", inception_option, "--out", file]
    done = CliRunner().invoke(app, taken, catch_exceptions=False)
    assert done.exit_code == 0
    assert "pictures" in done.stdout
    shown = CliRunner().invoke(app, ["eval", "reference", file], catch_exceptions=False).stdout
    assert sha256_hex(Path(file).read_bytes()) in shown
    distances = []
    for name, overrides in (
        ("plain", ()),
        ("file", (f"evaluation.quick.reference_file='{named(file, 'clean-fid')}'",)),
    ):
        run = start_run(tmp_path / name, data_url, images=(64,), overrides=overrides)
        found: list[float] = []
        Service(run.url, WatchOptions(features=inception_option), team).once(
            None, lambda result, found=found: found.extend(m.value for m in result.metrics.values())
        )
        distances.append(found[0])
    assert distances[1] == pytest.approx(distances[0], rel=1e-9)


def test_metrics_that_need_pictures_refuse_a_file(tmp_path: Path, data_url: str) -> None:
    path = named(npz(tmp_path, **gaussian()), "clean-fid")
    recipe = tiny_recipe(
        [f"evaluation.quick.reference_file='{path}'", "evaluation.quick.metrics=[distance,kernel]"]
    )
    index = load_index(data_url).sha256
    with pytest.raises(UserError, match="kernel need the reference pictures themselves"):
        make_plan(recipe, "quick", index, "inception=anywhere.pt")
    with pytest.raises(UserError, match="effnetlite0 is another network"):
        make_plan(recipe, "quick", index)
