"""Files nobody should trust: each ends in one line, nothing in them runs, and no run is begun."""

import io
import os
import pickle
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from data_pipeline.errors import UserError
from tests.trainer.weights_support import (
    PAPER,
    as_npz,
    diffusers_unet,
    paper_recipe,
    paper_variables,
    random_run,
)
from trainer.run import Run
from trainer.weights.export import export_diffusers
from trainer.weights.imports import ImportOptions, import_weights
from trainer.weights.source import read_tensors

Tensors = dict[str, Tensor]


class Attack:
    """Leaves a trace if it is ever unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.trace),)


@cache
def good(style: Any = "pesser") -> Tensors:
    return paper_variables(PAPER, style)[0]


def refused(source: Path) -> str:
    """The one line an import of a source ends in; nothing may have been made."""
    run = source.parent / "run"
    with pytest.raises(UserError) as raised:
        import_weights(str(source), paper_recipe(), Run(str(run)), ImportOptions())
    assert not run.exists() or not list(run.iterdir())
    line = str(raised.value)
    assert "\n" not in line
    return line


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_code_in_a_pickle_does_not_run(tmp_path: Path, suffix: str, wrapped: bool) -> None:
    path, trace = tmp_path / f"model{suffix}", tmp_path / "trace"
    if wrapped:
        torch.save({**good(), "callback": Attack(trace)}, path)
    else:
        path.write_bytes(pickle.dumps(Attack(trace)))
    assert refused(path).startswith(f"{path}: cannot be read without running code in it")
    assert not trace.exists()


def test_code_in_a_folder_does_not_run(tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    diffusers_unet(PAPER).save_pretrained(folder / "unet")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(
        {"conv_in.weight": Attack(tmp_path / "trace")}, folder / "unet" / "diffusion_pytorch_model.bin"
    )
    assert "cannot be read without running code in it" in refused(folder)
    assert not (tmp_path / "trace").exists()


def test_code_in_a_npz_does_not_run(tmp_path: Path) -> None:
    objects = np.empty(1, dtype=object)
    objects[0] = Attack(tmp_path / "trace")
    np.savez(tmp_path / "model.npz", **{"model/conv_in/W": objects})
    assert "model/conv_in/W cannot be read without unpickling it" in refused(tmp_path / "model.npz")
    np.save(tmp_path / "bare.npy", objects)
    (tmp_path / "bare.npy").rename(tmp_path / "bare.npz")
    assert refused(tmp_path / "bare.npz").startswith(str(tmp_path / "bare.npz"))
    assert not (tmp_path / "trace").exists()


def written(suffix: str) -> bytes:
    """A good file's bytes."""
    out = io.BytesIO()
    match suffix:
        case ".npz":
            np.savez(out, **{f"model/{name}": tensor.numpy() for name, tensor in good("tensorflow").items()})
        case ".safetensors":
            out.write(safetensors.torch.save(good()))
        case _:
            torch.save(good(), out)
    return out.getvalue()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".npz"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_file(tmp_path: Path, suffix: str, share: float) -> None:
    data, path = written(suffix), tmp_path / f"model{suffix}"
    path.write_bytes(data[: int(len(data) * share)])
    line = refused(path)
    assert line.startswith(f"{path}: ")
    assert "damaged" in line


@cache
def small_file(suffix: str) -> bytes:
    out = io.BytesIO()
    tensors = {"conv_in.weight": torch.arange(12.0).view(3, 4), "conv_in.bias": torch.zeros(3)}
    match suffix:
        case ".npz":
            np.savez(out, **{name: tensor.numpy() for name, tensor in tensors.items()})
        case ".safetensors":
            out.write(safetensors.torch.save(tensors))
        case _:
            torch.save(tensors, out)
    return out.getvalue()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".npz"])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_is_a_users_error(tmp_path: Path, suffix: str, data: st.DataObject) -> None:
    """Bytes altered anywhere, or none of a file's at all: tensors, or one line."""
    whole = bytearray(small_file(suffix))
    if data.draw(st.booleans()):
        for place in data.draw(st.lists(st.integers(0, len(whole) - 1), min_size=1, max_size=4)):
            whole[place] = data.draw(st.integers(0, 255))
        content = bytes(whole)
    else:
        content = data.draw(st.binary(max_size=200))
    path = tmp_path / f"model{suffix}"
    path.write_bytes(content)
    found = tensors_or_line(path)
    if isinstance(found, str):
        assert "\n" not in found
    else:
        assert all(isinstance(tensor, Tensor) for tensor in found.values())


def tensors_or_line(path: Path) -> Tensors | str:
    try:
        return read_tensors(path)
    except UserError as error:
        return str(error)


def without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name}


def changed(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, name: change(tensors[name])}


FAULTS: list[tuple[Callable[[Tensors], Tensors], str]] = [
    (without("temb.dense.0.weight"), "temb.dense.0.weight is missing (our time_embed.0.weight)"),
    (without("mid.attn_1.q.bias"), "mid.attn_1.q.bias is missing (our mid.attention.query.bias)"),
    (
        lambda tensors: without("norm_out.bias")(without("conv_in.weight")(tensors)),
        "conv_in.weight is missing (our stem.weight)",
    ),
    (
        changed("down.2.block.0.nin_shortcut.weight", lambda w: w.transpose(0, 1)),
        "down.2.block.0.nin_shortcut.weight is [32, 64, 1, 1], the recipe's network wants [64, 32, 1, 1] "
        "(our down.2.blocks.0.shortcut.weight [64, 32, 1, 1])",
    ),
    (
        changed("mid.attn_1.v.weight", lambda w: w[:, :, 0, 0]),
        "mid.attn_1.v.weight is [64, 64], the recipe's network wants [64, 64, 1, 1] "
        "(our mid.attention.value.weight [64, 64])",
    ),
    (
        lambda tensors: {**tensors, "discriminator.weight": torch.zeros(2)},
        "discriminator.weight [2] is unexpected, the recipe's network has no such tensor",
    ),
    (changed("conv_out.bias", lambda w: w.to(torch.int64)), "conv_out.bias holds torch.int64 torch.strided"),
    (changed("conv_out.bias", lambda w: w.to_sparse()), "conv_out.bias holds torch.float32 torch.sparse_coo"),
    (changed("conv_out.bias", lambda w: w * torch.nan), "conv_out.bias holds numbers that are not finite"),
]


@pytest.mark.parametrize(("fault", "message"), FAULTS, ids=[message[:40] for _, message in FAULTS])
def test_the_first_wrong_tensor_is_named(
    tmp_path: Path, fault: Callable[[Tensors], Tensors], message: str
) -> None:
    torch.save(fault(good()), tmp_path / "model.ckpt")
    line = refused(tmp_path / "model.ckpt")
    assert line.startswith(f"{tmp_path / 'model.ckpt'}: {message}")
    if "not finite" not in message:
        assert line.endswith(
            "as far as the other tensors tell the recipe's keys are right, so the file is damaged"
        )


def test_the_first_wrong_variable_is_named_as_it_stands_in_the_file(tmp_path: Path) -> None:
    variables = {f"model/{name}": tensor for name, tensor in good("tensorflow").items()}
    variables["model/mid/block_1/conv1/W"] = variables["model/mid/block_1/conv1/W"].permute(3, 2, 0, 1)
    as_npz(str(tmp_path / "model.npz"), variables)
    wanted = "model/mid/block_1/conv1/W is [64, 64, 3, 3], the recipe's network wants [3, 3, 64, 64]"
    assert wanted in refused(tmp_path / "model.npz")
    del variables["model/temb/dense0/W"]
    as_npz(str(tmp_path / "lacking.npz"), variables)
    assert "model/temb/dense0/W is missing (our time_embed.0.weight)" in refused(tmp_path / "lacking.npz")


def test_averages_are_checked_too(tmp_path: Path) -> None:
    variables = {f"model/{name}": tensor for name, tensor in good("tensorflow").items()}
    averages = {f"{name}/ExponentialMovingAverage": tensor for name, tensor in variables.items()}
    del averages["model/conv_out/b/ExponentialMovingAverage"]
    as_npz(str(tmp_path / "model.npz"), variables | averages)
    assert "model.npz (averages): model/conv_out/b is missing (our head.conv.bias)" in refused(
        tmp_path / "model.npz"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": {"a": torch.zeros(1)}}, "'model' is no tensor (dict); save one part alone: model"),
        ({"step": 3}, "'step' is no tensor (int)"),
        ({}, "holds no state dict (dict)"),
        ([torch.zeros(1)], "holds no state dict (list)"),
        (torch.zeros(1), "holds no state dict (Tensor)"),
        ({"some.layer": torch.zeros(1)}, "weights of no known code base (diffusers, pesser"),
    ],
)  # fmt: skip
def test_torch_files_of_something_else(tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "model.pt")
    assert message in refused(tmp_path / "model.pt")


def test_archives_of_something_else(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "model.npz", "w") as archive:
        archive.writestr("readme.txt", "no array")
    assert "readme.txt is no array of numbers" in refused(tmp_path / "model.npz")
    np.savez(tmp_path / "text.npz", names=np.array(["a", "b"]))
    assert "names is no array of numbers" in refused(tmp_path / "text.npz")


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("google/ddpm-cifar10-32", "no such file or folder; it must be local: download it first"),
        ("s3://bucket/model.pt", "no such file or folder; it must be local"),
        ("missing.pt", "no such file or folder; check the path"),
    ],
)
def test_places_that_are_not_there(tmp_path: Path, place: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        import_weights(place, paper_recipe(), Run(str(tmp_path / "run")), ImportOptions())


def test_files_of_no_known_kind(tmp_path: Path) -> None:
    (tmp_path / "model.h5").write_bytes(b"\x89HDF")
    known = ".pt, .pth, .bin, .ckpt, .safetensors, .npz"
    assert refused(tmp_path / "model.h5").endswith(f"no known kind of weights file; known: {known}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"freq_shift": ', "config.json: not valid JSON"),
        (b"[1]", "config.json: not a JSON object"),
        (b'{"block_out_channels": "many"}', "config.json: block_out_channels: Input should be a valid tuple"),
        (b"\xff\xfe\x00", "config.json: not valid JSON"),
        (b"[" * 100_000, "config.json: not valid JSON"),
    ],
)
def test_configurations_of_something_else(tmp_path: Path, content: bytes, message: str) -> None:
    export_diffusers(random_run(tmp_path / "before"), tmp_path / "theirs")
    (tmp_path / "theirs" / "unet" / "config.json").write_bytes(content)
    assert message in refused(tmp_path / "theirs")


def test_folders_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "no diffusers folder: it holds neither" in refused(tmp_path / "empty")
    export_diffusers(random_run(tmp_path / "before"), tmp_path / "theirs")
    (tmp_path / "theirs" / "unet" / "config.json").unlink()
    assert "config.json: cannot be read" in refused(tmp_path / "theirs")


def test_weights_of_diffusers_without_their_folder(tmp_path: Path) -> None:
    torch.save(diffusers_unet(PAPER).state_dict(), tmp_path / "model.bin")
    assert "come as a folder with config.json; give the folder" in refused(tmp_path / "model.bin")
