"""Files that torchvision's networks were saved to: read by name, they give torchvision's own numbers."""

from __future__ import annotations

import gc
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from tlkit.config import Preprocess
from tlkit.errors import TlkitError
from tlkit.networks.build import build


def cases(quick: str, slow: str = "") -> list[Any]:
    """Names, with the marks that they need."""
    return [
        pytest.param(name, marks=[pytest.mark.slow] * (name in slow.split()))
        for name in (*quick.split(), *slow.split())
    ]


NAMES = cases(
    "alexnet_torchvision vgg11 resnet18 resnet34 resnet50 resnext50_32x4d densenet121",
    "vgg11_bn vgg13 vgg16 vgg19 vgg13_bn vgg16_bn vgg19_bn resnet101 resnet152 resnext101_32x8d resnext101_64x4d "
    "densenet161 densenet169 densenet201 wide_resnet50_2",
)


def theirs(name: str, **arguments: Any) -> nn.Module:
    """torchvision's network of that name, with random weights and running statistics, so that each number counts."""
    random = torch.Generator().manual_seed(5)
    with torch.device("meta"):
        network = getattr(torchvision.models, name.removesuffix("_torchvision"))(weights=None, **arguments)
    network = network.to_empty(device="cpu").eval()
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                fan = module.weight[0].numel()
                module.weight.normal_(std=(2 / fan) ** 0.5, generator=random)
                if module.bias is not None:
                    module.bias.normal_(std=0.1, generator=random)
            elif isinstance(module, nn.BatchNorm2d):
                # shortcuts add up; other networks must not fade
                low = 0.4 if name.startswith("res") else 1.0
                module.weight.uniform_(low, low + 0.5, generator=random)
                module.bias.normal_(std=0.2, generator=random)
                module.running_mean.normal_(std=0.2, generator=random)
                module.running_var.uniform_(0.7, 1.5, generator=random)
                module.num_batches_tracked.fill_(100)
    return network


def images(size: int | tuple[int, int]) -> Tensor:
    height, width = (size, size) if isinstance(size, int) else size
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(6))


def logits(network: nn.Module, size: int | tuple[int, int]) -> Tensor:
    with torch.inference_mode():
        found = network.eval()(images(size))
    assert isinstance(found, Tensor)
    return found


def assert_alike(found: Tensor, expected: Tensor) -> None:
    """Up to a thousandth of the difference between two images, which is no rounding error itself."""
    difference = float((expected[0] - expected[1]).abs().max())
    assert expected.isfinite().all() and difference > 0.01 * float(expected.std())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3 * difference)


def sizes_of(name: str) -> tuple[int | tuple[int, int], ...]:
    """Up to 224 px torchvision's and timm's VGG stretch maps alike; above, timm's slides the layers over them."""
    if name.startswith("alexnet"):
        return (224, 96, (300, 180))
    return (224, 64) if name == "vgg11_bn" else (64, (64, 96))


@pytest.mark.parametrize("name", NAMES)
def test_the_same_logits(tmp_path: Path, name: str) -> None:
    network, file = theirs(name), tmp_path / "weights.pth"
    torch.save(network.state_dict(), file)
    expected = {size: logits(network, size) for size in sizes_of(name)}
    parameters = sum(parameter.numel() for parameter in network.parameters())
    del network
    gc.collect()
    loaded = build(name, str(file))
    file.unlink()
    assert loaded.remarks == [f"the 1000 outputs of {file} are taken for ImageNet's classes"]
    assert (loaded.name, loaded.weights, len(loaded.classes or ())) == (name, str(file), 1000)
    assert sum(parameter.numel() for parameter in loaded.network.parameters()) == parameters
    for size, logit in expected.items():
        assert_alike(logits(loaded.network, size), logit)


@pytest.mark.slow
def test_larger_images_are_another_matter_for_vgg(tmp_path: Path) -> None:
    """What `sizes_of` says: the comparison above can fail."""
    network, file = theirs("vgg11", num_classes=10), tmp_path / "weights.pth"
    torch.save(network.state_dict(), file)
    expected, loaded = logits(network, 256), build("vgg11", str(file))
    file.unlink()
    found = logits(loaded.network, 256)
    assert float((found - expected).abs().max()) > 0.01 * float(expected.std())
    assert_alike(logits(loaded.network, 96), logits(network, 96))


@pytest.mark.parametrize("name", cases("resnet18 densenet121", "vgg11_bn"))
def test_each_statistic_counts(tmp_path: Path, name: str) -> None:
    """One running variance changed shows in the logits: the networks compared are not constant."""
    network, file = theirs(name, num_classes=4), tmp_path / "weights.pth"
    torch.save(network.state_dict(), file)
    loaded = build(name, str(file)).network
    file.unlink()
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    ours = [module for module in loaded.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) == len(ours)
    for one, two in zip(norms, ours, strict=True):
        assert torch.equal(one.running_var, two.running_var) and torch.equal(one.running_mean, two.running_mean)
        assert one.eps == two.eps and one.momentum == two.momentum
    expected = logits(network, 64)
    assert_alike(logits(loaded, 64), expected)
    norms[len(norms) // 2].running_var.mul_(4)
    assert float((logits(network, 64) - expected).abs().max()) > 1e-3 * float(expected.std())


# Files of other forms


def with_old_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As in the files that torchvision itself published for DenseNet: ``norm.1``, ``conv.2``."""
    return {re.sub(r"(denselayer\d+\.(?:norm|conv))(\d)\.", r"\1.\2.", name): value for name, value in state.items()}


@pytest.mark.parametrize("name", cases("densenet121", "densenet161"))
def test_old_names_of_densenets_files(tmp_path: Path, name: str) -> None:
    network, file = theirs(name), tmp_path / "weights.pth"
    old = with_old_names(network.state_dict())
    assert "features.denseblock1.denselayer1.norm.1.running_mean" in old
    assert "features.denseblock2.denselayer12.conv.2.weight" in old
    assert not any(re.search(r"denselayer\d+\.(norm|conv)\d", key) for key in old)
    torch.save(old, file)
    assert_alike(logits(build(name, str(file)).network, 64), logits(network, 64))
    file.unlink()


@pytest.mark.parametrize("name", cases("alexnet_torchvision resnet18 densenet121", "vgg11"))
def test_another_number_of_classes(tmp_path: Path, name: str) -> None:
    network, file = theirs(name, num_classes=7), tmp_path / "weights.pth"
    torch.save(network.state_dict(), file)
    loaded = build(name, str(file))
    file.unlink()
    assert loaded.remarks == [f"head re-made for the 7 classes of {file}, instead of 1000"]
    assert loaded.classes is None and loaded.network.num_classes == 7
    assert_alike(logits(loaded.network, 64), logits(network, 64))


@pytest.mark.parametrize("name", ["resnet18", "densenet121"])
def test_a_file_without_a_head(tmp_path: Path, name: str) -> None:
    network, file = theirs(name), tmp_path / "weights.pth"
    head = ("fc.", "classifier.")
    torch.save({key: value for key, value in network.state_dict().items() if not key.startswith(head)}, file)
    torch.manual_seed(0)
    loaded = build(name, str(file))
    (remark,) = loaded.remarks
    assert remark.startswith(f"head differs from {file}: 2 missing (") and loaded.classes is None
    with torch.inference_mode():
        ours: Any = loaded.network
        maps = ours.forward_features(images(64))
        expected = network.features(images(64)) if name == "densenet121" else before_pooling(network, images(64))
    assert_alike(maps.relu(), expected.relu())


def before_pooling(network: Any, x: Tensor) -> Tensor:
    x = network.maxpool(network.relu(network.bn1(network.conv1(x))))
    return network.layer4(network.layer3(network.layer2(network.layer1(x))))


@pytest.mark.parametrize("wrapped", ["state_dict", "model"])
def test_a_checkpoint_of_a_training_program(tmp_path: Path, wrapped: str) -> None:
    """As torchvision's reference training writes it, also from several processes."""
    network, file = theirs("resnet18", num_classes=3), tmp_path / "checkpoint.pth"
    state = {f"module.{key}": value for key, value in network.state_dict().items()}
    torch.save({wrapped: state, "epoch": 89}, file)
    assert_alike(logits(build("resnet18", str(file)).network, 64), logits(network, 64))


def test_timm_reads_alexnets_file_as_well(tmp_path: Path) -> None:
    """The way of the public weights: `timm.create_model` with ``pretrained``."""
    network, file = theirs("alexnet_torchvision"), tmp_path / "weights.pth"
    torch.save(network.state_dict(), file)
    overlay = {"file": str(file)}
    timms = timm.create_model("alexnet_torchvision", pretrained=True, pretrained_cfg_overlay=overlay)
    expected = logits(network, 128)
    assert_alike(logits(timms, 128), expected)
    fewer = timm.create_model("alexnet_torchvision", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=3)
    grey = timm.create_model("alexnet_torchvision", pretrained=True, pretrained_cfg_overlay=overlay, in_chans=1)
    file.unlink()
    assert fewer.head.weight.shape == (3, 4096)
    assert torch.equal(fewer.pre_logits.fc7.weight, network.classifier[4].weight)  # type: ignore[index, union-attr]
    assert torch.allclose(grey.features.conv1.weight, network.features[0].weight.sum(1, keepdim=True), atol=1e-6)  # type: ignore[index, union-attr]


def test_at_a_size_that_is_asked_for(tmp_path: Path) -> None:
    network, file = theirs("resnet18"), tmp_path / "weights.pth"
    torch.save(network.state_dict(), file)
    loaded = build("resnet18", str(file), Preprocess(image_size=96))
    assert loaded.preprocessing.size == 96
    assert_alike(logits(loaded.network, 96), logits(network, 96))


# Files of another family


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small files (the fully connected layers with values that are all the same) of several families. Read only."""
    folder, found = tmp_path_factory.mktemp("files"), {}
    for name in ("alexnet", "vgg11", "vgg11_bn", "resnet18", "resnet34", "densenet121"):
        with torch.device("meta"):
            shapes = getattr(torchvision.models, name)(weights=None).state_dict()
        found[name] = folder / f"{name}.pth"
        # an expanded tensor is stored as the one number that it is made from
        torch.save(
            {key: torch.zeros((), dtype=value.dtype).expand(value.shape) for key, value in shapes.items()}, found[name]
        )
    return found


WRONG = [
    ("resnet18", "resnet34"),
    ("resnet34", "resnet18"),
    ("resnet18", "alexnet"),
    ("resnet18", "vgg11"),
    ("resnet50", "resnet18"),
    ("densenet121", "resnet18"),
    ("densenet169", "densenet121"),
    ("resnet18", "densenet121"),
    ("vgg13", "vgg11"),
    ("vgg11", "resnet18"),
    ("vgg11", "alexnet"),
    ("vgg11_bn", "vgg11"),
    ("vgg11", "vgg11_bn"),
    ("alexnet_torchvision", "vgg11"),
    ("alexnet_torchvision", "vgg11_bn"),
    ("alexnet_torchvision", "resnet18"),
    ("alexnet_torchvision", "densenet121"),
    ("alexnet", "alexnet"),
    ("alexnet_2gpu", "alexnet"),
    ("lenet", "alexnet"),
]


@pytest.mark.parametrize(("model", "of"), WRONG)
def test_a_file_of_another_network(files: dict[str, Path], model: str, of: str) -> None:
    with pytest.raises(TlkitError) as caught:
        build(model, str(files[of]))
    line = str(caught.value)
    assert line.startswith(f"{files[of]}: these weights do not fit the network: ") and "\n" not in line
    assert line.endswith("; give the --model that they were trained with")
    assert re.search(r"\d+ (missing|unexpected|of another shape) \(", line) and len(line) < 900


@pytest.mark.parametrize("name", cases("alexnet vgg11 vgg11_bn resnet18 resnet34 densenet121"))
def test_the_files_of_these_networks_are_read(files: dict[str, Path], name: str) -> None:
    """As a check of the fixture: what is refused above is not refused for how it is stored."""
    assert files[name].stat().st_size < 1_000_000
    ours = "alexnet_torchvision" if name == "alexnet" else name
    assert build(ours, str(files[name])).weights == str(files[name])
