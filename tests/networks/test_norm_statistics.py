"""Batch norm's statistics from images alone: against closed forms, and nothing else of the network moves."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from tlkit import compute, config
from tlkit.data.loading import ViewDataset
from tlkit.data.transforms import View, normalise
from tlkit.errors import TlkitError
from tlkit.networks.frozen_pass import How
from tlkit.networks.norm_statistics import Estimated, _Gathered, estimate_from, estimate_statistics
from tlkit.preprocessing import Preprocessing

PREPROCESSING = Preprocessing(
    size=16, crop=1.0, crop_mode="center", interpolation="bilinear", mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.25)
)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: Any) -> list[Path]:
    """Thirteen noisy images of 16 px, the last six brighter."""
    folder, random = Path(tmp_path_factory.mktemp("photos")), np.random.default_rng(0)
    paths = []
    for number in range(13):
        low = 0 if number < 7 else 120
        path = folder / f"{number:02d}.png"
        Image.fromarray(random.integers(low, 256, (16, 16, 3), dtype=np.uint8)).save(path)
        paths.append(path)
    return paths


def estimate(
    network: nn.Module, paths: list[Path], batch_size: int | None = None, precision: Any = "fp32"
) -> Estimated:
    dataset = ViewDataset(Path(), [str(path) for path in paths], PREPROCESSING, View())
    accelerator = compute.accelerator(config.Compute(device="cpu", precision=precision))
    return estimate_statistics(network, dataset, How(accelerator, batch_size, workers=0))


def pixels(paths: list[Path]) -> torch.Tensor:
    """The images as the network sees them, (N, 3, 16, 16) in float64."""
    arrays = torch.stack([torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) for path in paths])
    return normalise(arrays, PREPROCESSING).double()


class Tiny(nn.Module):
    """Batch norm of the images themselves, then of a convolution of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.conv, self.second = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.drop(self.second(self.conv(self.first(images)))).mean((2, 3))


@pytest.mark.parametrize("batch_size", [2, 3, 5, 6, 13, 64])
def test_the_first_layers_statistics_are_those_of_all_pixels(photos: list[Path], batch_size: int) -> None:
    """However the images are cut into batches, and although the batches' own means differ."""
    torch.manual_seed(0)
    network = Tiny()
    found = estimate(network, photos, batch_size)
    seen = pixels(photos).transpose(0, 1).flatten(1)
    torch.testing.assert_close(network.first.running_mean, seen.mean(1).float(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(network.first.running_var, seen.var(1, correction=1).float(), atol=1e-5, rtol=1e-5)
    assert found.images == 13
    assert found.bad == []


def test_later_layers_see_batches_normalised_by_themselves(photos: list[Path]) -> None:
    torch.manual_seed(0)
    network = Tiny()
    untouched = copy.deepcopy(network)
    estimate(network, photos, batch_size=6)
    inputs = []
    for part in (pixels(photos[:6]), pixels(photos[6:12]), pixels(photos[12:])):
        mean, variance = part.mean((0, 2, 3), keepdim=True), part.var((0, 2, 3), keepdim=True, correction=0)
        normed = (part - mean) / (variance + untouched.first.eps).sqrt()
        inputs.append(untouched.conv.double()(normed).transpose(0, 1).flatten(1))
    # 13 images in sixes would leave one alone: the batches are of five
    assert len(inputs[-1][0]) == 14 * 14
    network = copy.deepcopy(untouched).float()
    estimate(network, photos[:12], batch_size=6)
    seen = torch.cat(inputs[:2], dim=1)
    torch.testing.assert_close(network.second.running_mean, seen.mean(1).float(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(network.second.running_var, seen.var(1, correction=1).float(), atol=1e-5, rtol=1e-4)


def test_parts_are_joined_as_if_they_were_one() -> None:
    random = torch.Generator().manual_seed(0)
    values = torch.randn(1001, 2, 3, 3, generator=random, dtype=torch.float64) * 3 + 50
    gathered = _Gathered()
    for part in values.split([1, 500, 7, 493]):
        gathered.add(part)
    flat = values.transpose(0, 1).flatten(1)
    assert gathered.count == flat.shape[1]
    torch.testing.assert_close(gathered.mean, flat.mean(1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gathered.squares / gathered.count, flat.var(1, correction=0), rtol=1e-5, atol=1e-5)


def test_the_order_of_images_does_not_matter_to_the_first_layer(photos: list[Path]) -> None:
    one, other = Tiny(), Tiny()
    estimate(one, photos, batch_size=4)
    estimate(other, photos[::-1], batch_size=4)
    torch.testing.assert_close(one.first.running_mean, other.first.running_mean)
    torch.testing.assert_close(one.first.running_var, other.first.running_var)


@pytest.mark.parametrize("name", ["test_resnet", "resnet18", "lenet", "tf_efficientnet_lite0"])
def test_nothing_but_the_running_statistics_moves(name: str, photos: list[Path]) -> None:
    """Weights, counters, modes and settings stay; what moved is said by name. Dropout is off on the way."""
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=3, drop_rate=0.5).train()
    before = copy.deepcopy(network.state_dict())
    settings = {n: (m.training, m.track_running_stats) for n, m in network.named_modules() if _is_norm(m)}
    found = estimate(network, photos[:6], batch_size=6)
    moved = {key for key, value in network.state_dict().items() if not torch.equal(value, before[key])}
    assert moved == {f"{norm}.{leaf}" for norm in found.shifts for leaf in ("running_mean", "running_var")}
    assert set(found.shifts) == set(settings)
    after = {n: (m.training, m.track_running_stats) for n, m in network.named_modules() if _is_norm(m)}
    assert {n: track for n, (_, track) in after.items()} == {n: track for n, (_, track) in settings.items()}
    again = copy.deepcopy(network.state_dict())
    network.load_state_dict(before)
    estimate(network, photos[:6], batch_size=6)
    for key, value in network.state_dict().items():
        torch.testing.assert_close(value, again[key], rtol=0, atol=0)


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.BatchNorm2d)


def test_how_far_means_moved_is_told_in_standard_deviations(photos: list[Path]) -> None:
    network = Tiny()
    network.first.running_mean.fill_(1.0)
    network.first.running_var.fill_(4.0)
    found = estimate(network, photos, batch_size=13)
    mean = pixels(photos).mean((0, 2, 3))
    assert found.shifts["first"] == pytest.approx(float((mean - 1).abs().mean() / (4 + 1e-5) ** 0.5), abs=1e-5)


def test_bad_files_are_told_and_left_out(photos: list[Path], tmp_path: Path) -> None:
    (broken := tmp_path / "broken.png").write_bytes(b"no image")
    network, without = Tiny(), Tiny()
    found = estimate(network, [*photos[:6], broken], batch_size=7)
    estimate(without, photos[:6], batch_size=7)
    assert found.images == 6
    assert [file.path for file in found.bad] == [str(broken)]
    assert torch.equal(network.first.running_mean, without.first.running_mean)


def test_a_network_without_batch_norm_is_refused(photos: list[Path]) -> None:
    with pytest.raises(TlkitError, match="no batch norm"):
        estimate(timm.create_model("test_vit", img_size=16), photos)


def test_a_lone_number_in_each_channel_is_refused_and_nothing_moves(photos: list[Path]) -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.norm(images.mean((2, 3), keepdim=True)).flatten(1)

    network = Pooled()
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(TlkitError, match="give more images"):
        estimate(network, photos[:1])
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert network.norm.track_running_stats
    assert not network.norm._forward_pre_hooks


def test_through_the_command_line(
    tlkit: Callable[..., Any], trained: Path, shapes: Path, photos: list[Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    told = tlkit("update-bn", trained, photos[0].parent, "--out", run, "--json", "--device", "cpu").json
    assert told["images"] == 13
    assert told["run"] == str(run)
    assert max(told["shifts"].values()) > 0
    old, new = (_state(folder) for folder in (trained, run))
    assert {key for key in old if not torch.equal(old[key], new[key])} <= {
        key for key in old if key.endswith(("running_mean", "running_var"))
    }
    assert any(not torch.equal(old[key], new[key]) for key in old)
    assert tlkit("evaluate", run, shapes, "--json").json["metrics"]["images"] > 0
    again = tlkit("update-bn", "--recipe", run / "recipe.yaml", trained, photos[0].parent, "--out", tmp_path / "2")
    assert again.code == 0
    assert (tmp_path / "2" / "model.safetensors").read_bytes() == (run / "model.safetensors").read_bytes()
    assert tlkit("update-bn", trained, photos[0].parent, "--out", run).error.startswith(f"{run}: exists already")
    plan = tlkit("update-bn", trained, photos[0].parent, "--plan", "--json", "--out", tmp_path / "3")
    assert plan.json["plan"] == {"images": 13}
    assert not (tmp_path / "3").exists()


def _state(run: Path) -> dict[str, torch.Tensor]:
    import safetensors.torch

    return safetensors.torch.load_file(run / "model.safetensors")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "nowhere: no such file or folder"),
        ([], "Missing argument"),
    ],
)
def test_wrong_input_is_one_line(tlkit: Callable[..., Any], trained: Path, arguments: list[str], said: str) -> None:
    assert said in tlkit("update-bn", trained, *arguments).error


def test_a_folder_without_images_and_only_bad_ones(tlkit: Callable[..., Any], trained: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "no images" in tlkit("update-bn", trained, tmp_path / "empty").error
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_bytes(b"x")
    done = tlkit("update-bn", trained, tmp_path / "bad", "--out", tmp_path / "run")
    assert done.code == 1
    assert not (tmp_path / "run").exists()


def test_statistics_of_batches_are_those_of_all_of_them_together() -> None:
    """Batches of unlike size and mean; one alone, which has no variance, is passed over."""
    random = torch.Generator().manual_seed(0)
    values = torch.randn(23, 4, generator=random) * 3 + torch.arange(23.0)[:, None]
    network = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2))
    weights = copy.deepcopy(network[1].state_dict())
    estimate_from(network, lambda: [values[:5], values[5:22], values[22:]])
    norm: Any = network[0]
    assert torch.allclose(norm.running_mean, values[:22].mean(0), atol=1e-5)
    assert torch.allclose(norm.running_var, values[:22].var(0), rtol=1e-5)
    assert all(weights[name].equal(tensor) for name, tensor in network[1].state_dict().items())
    assert not network.training
