"""Both benchmarks end to end on the small network, their floor and their profile."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import sampling, train_step
from benchmarks.floor import FLOOR, convolutions, floors, forward, forward_backward
from benchmarks.harness import OURS, Label, Layout, Mode, Precision
from benchmarks.network import SMALL, Batch, our_network
from benchmarks.options import Options, parser, read
from benchmarks.peers.diffusers_unet import DIFFUSERS
from benchmarks.peers.openai_unet import OPENAI
from benchmarks.profiling import OPTIMIZER, in_optimizer, kind_of, profile_kinds
from benchmarks.report import bf16_in_hardware
from benchmarks.sampling import Task
from benchmarks.session import run
from trainer.unet import UNet

TINY_RUN = ["--small", "--batch", "1", "--repeats", "1", "--modes", "eager", "--bf16-modes", "eager"]


def options(*arguments: str) -> Options:
    return read(parser("train_step", "", batch=8).parse_args([*TINY_RUN, *arguments]))


def test_train_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "train.json"
    train_step.main([*TINY_RUN, "--precision", "bf16", "--peers", "diffusers,openai", "--json", str(file)])
    content = json.loads(file.read_bytes())
    assert content["schema"] == "benchmark/1"
    assert content["network"] == "small"
    measured = {timing["label"]["contender"] for timing in content["timings"]}
    assert measured == {OURS, FLOOR, "diffusers", "openai"}
    assert {timing["label"]["precision"] for timing in content["timings"]} == {"bf16"}
    assert [check["peer"] for check in content["checks"]] == ["diffusers", "openai"]
    assert content["missing"] == []
    names = [bar["name"] for bar in content["bars"]]
    assert names == [
        "small-train-eager-bf16-b1-diffusers",
        "small-train-best-bf16-b1-diffusers",
        "small-train-never-slower-diffusers",
        "small-train-never-slower-openai",
    ]
    lines = capsys.readouterr().out.splitlines()[-len(names) :]
    assert [line.split()[:2] for line in lines] == [["bar", name] for name in names]
    assert all(line.endswith(" short") for line in lines)  # one repeat decides nothing
    profile = content["profiles"]["ours bf16 eager b1"]
    assert {"convolution", "normalisation", OPTIMIZER, "dropout"} <= {share["kind"] for share in profile}


def test_sampling(capsys: pytest.CaptureFixture[str]) -> None:
    result = sampling.main([*TINY_RUN, "--steps", "2", "--peers", "diffusers", "--no-profile"])
    assert result.settings["steps"] == 2
    assert {t.label.contender for t in result.timings} == {
        OURS,
        FLOOR,
        "diffusers",
        sampling.SHIPPED,
    }
    assert [bar.name for bar in result.bars] == [
        "small-sampling-fp32-b1-diffusers",
        "small-sampling-bf16-b1-diffusers",
        "small-sampling-b1-diffusers-pipeline",
    ]
    assert result.profiles == {}
    out = capsys.readouterr().out
    assert out.count("images of diffusers") == 5  # two layouts in two precisions, and the pipeline
    assert all(bar.value is not None for bar in result.bars)


def test_other_images_are_refused() -> None:
    task = Task(options(), Precision.FP32, steps=2)
    reference = task.ours(our_network(SMALL), torch.float32)
    label = Label(contender="p", precision=Precision.FP32, mode=Mode.EAGER, batch=1)
    task.compare(label, reference.clone(), reference)
    with pytest.raises(ValueError, match="p fp32 eager b1 makes other images"):
        task.compare(label, reference + 0.01, reference)
    unrelated = task.ours(our_network(replace(SMALL, norm_groups=16)), torch.float32)
    with pytest.raises(ValueError, match="makes other images"):
        replace(task, precision=Precision.BF16).compare(label, unrelated, reference)


def test_a_missing_peer_is_short(capsys: pytest.CaptureFixture[str]) -> None:
    missing = replace(DIFFUSERS, distribution="no-such-distribution")
    chosen = replace(options("--precision", "fp32", "--no-profile"), peers=(missing,))
    result = run(
        "train_step",
        chosen,
        partial(train_step.contenders, chosen),
        lambda timings: train_step.bars(timings, chosen),
    )
    assert result.missing == ["diffusers"]
    assert result.checks == []
    assert {timing.label.contender for timing in result.timings} == {OURS, FLOOR}
    assert len(result.bars) == 3
    assert all(bar.value is None and not bar.ok for bar in result.bars)
    out = capsys.readouterr().out
    assert "diffusers is not installed: its bars are short" in out
    assert out.splitlines()[-1] == "bar small-train-never-slower-diffusers nan 1 short"


def test_a_step_trains_and_averages() -> None:
    for averaging in (train_step.our_average, train_step.foreach_average):
        network = our_network(SMALL)
        before = network.stem.weight.detach().clone()
        trainee = train_step.trainee(network, Batch.draw(SMALL, 2), Precision.FP32, averaging)
        trainee.step(network)
        assert not torch.equal(network.stem.weight, before)
        assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.parametrize("averaging", [train_step.our_average, train_step.foreach_average])
def test_both_averages_are_the_papers(averaging: train_step.Averaging) -> None:
    parameter = torch.zeros(1000)
    average = averaging([parameter], 128)
    parameter.fill_(1.0)
    average.update()
    torch.testing.assert_close(average.tensors[0], torch.full((1000,), 1e-4), rtol=1e-3, atol=0)


def test_the_floor_holds_every_convolution() -> None:
    model = our_network(SMALL)
    recorded = convolutions(model, Batch.draw(SMALL, 2), Layout.CHANNELS_LAST)
    assert len(recorded) == sum(isinstance(module, nn.Conv2d) for module in model.modules())
    assert not recorded[0].x.requires_grad  # nobody asks for the image's gradient
    for number, convolution in enumerate(recorded):
        assert convolution.x.requires_grad == (number > 0)
        assert convolution.grad.shape == convolution.output().shape


@pytest.mark.parametrize("precision", Precision)
def test_the_floors_work(precision: Precision) -> None:
    batch = Batch.draw(SMALL, 2)
    contenders = [
        *floors(SMALL, batch, precision, forward, calls=2),
        *floors(SMALL, batch, precision, forward_backward, calls=1),
    ]
    for contender in contenders:
        contender.run()
    assert {contender.label.contender for contender in contenders} == {FLOOR}
    assert [contender.label.layout for contender in contenders] == [*Layout, *Layout]


@pytest.mark.parametrize(
    ("operator", "kind"),
    [
        ("aten::mkldnn_convolution", "convolution"),
        ("aten::convolution_backward", "convolution"),
        ("aten::native_group_norm_backward", "normalisation"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("aten::addmm", "matmul"),
        ("aten::copy_", "copies and conversions"),
        ("aten::cat", "copies and conversions"),
        ("aten::silu_backward", "swish"),
        ("aten::native_dropout", "dropout"),
        ("aten::upsample_nearest2d", "resampling and padding"),
        ("aten::add_", "additions and products"),
        ("autograd::engine::evaluate_function: AddBackward0", "other"),
    ],
)
def test_kinds_of_operators(operator: str, kind: str) -> None:
    assert kind_of(operator) == kind


def test_profile_counts_the_update_apart() -> None:
    x = torch.randn(64, 64)

    def step() -> None:
        x @ x
        with in_optimizer():
            x @ x

    shares = {share.kind: share for share in profile_kinds(step, calls=2)}
    assert {"matmul", OPTIMIZER} <= set(shares)
    assert sum(share.share for share in shares.values()) == pytest.approx(1.0)


def test_what_serves_a_convolution_is_counted_as_convolution() -> None:
    torch.manual_seed(0)
    ours = UNet(replace(SMALL, base_channels=128)).get_submodule("down.0.blocks.0.conv1")
    x = torch.randn(1, 128, 16, 16)

    def train(layer: nn.Module) -> None:
        # Without oneDNN torch's convolutions are products of matrices.
        with torch.backends.mkldnn.flags(enabled=False):
            torch.autograd.backward(layer(x).sum())

    def sample(layer: nn.Module) -> None:
        with torch.inference_mode(), torch.backends.mkldnn.flags(enabled=False):
            layer(x)

    for layer in (ours, nn.Conv2d(128, 128, 3)):
        for work in (train, sample):
            kinds = {share.kind for share in profile_kinds(partial(work, layer), calls=1)}
            assert "convolution" in kinds
            assert "matmul" not in kinds


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--peers", "nobody"], "'nobody' is none of diffusers, openai, lucidrains"),
        (["--repeats", "0"], "'0' is not a number of at least 1"),
        (["--precision", "fp16"], "'fp16' is none of fp32, bf16"),
        (["--modes", "eager,fast"], "'fast' is none of eager, compiled, blocks"),
    ],
)
def test_wrong_options(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        options(*arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_emulated_bf16_is_measured_for_bars_only() -> None:
    foreign = replace(OPENAI, name="foreign", twin=None)
    chosen = replace(options(), peers=(DIFFUSERS, foreign))
    assert chosen.taking_part(Precision.FP32) == [DIFFUSERS, foreign]
    assert chosen.taking_part(Precision.BF16) == ([DIFFUSERS, foreign] if bf16_in_hardware() else [DIFFUSERS])


def test_options_by_precision() -> None:
    chosen = options("--modes", "eager,compiled,blocks", "--bf16-batch", "3", "--compiled", "ours")
    assert chosen.batch == {Precision.FP32: 1, Precision.BF16: 3}
    assert chosen.modes_of(OURS, Precision.FP32) == (Mode.EAGER, Mode.COMPILED, Mode.BLOCKS)
    assert chosen.modes_of("diffusers", Precision.FP32) == (Mode.EAGER,)
    everyone = replace(chosen, compiled=(OURS, "diffusers"))
    assert everyone.modes_of("diffusers", Precision.FP32) == (Mode.EAGER, Mode.COMPILED)
    assert everyone.modes_of(OURS, Precision.BF16) == (Mode.EAGER,)
