"""A network cut in two: the part after the cut gives what the whole gives, bit for bit, or the cut is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

import tlkit.networks.build  # noqa: F401 - registers the networks that timm lacks
from tlkit.networks.freezing import freeze
from tlkit.networks.splitting import CannotSplit, Split, outputs_at, split_at
from tlkit.networks.stages import Stage, stages

QUICK: dict[str, int] = {
    "resnet18": 32,
    "mobilenetv3_small_050": 32,
    "deit_tiny_distilled_patch16_224": 32,
    "lenet": 32,
    **dict.fromkeys(("test_resnet", "test_vit", "test_vit2", "test_efficientnet", "test_convnext"), 64),
    **dict.fromkeys(("test_nfnet", "test_mambaout", "test_byobnet"), 64),
}
SLOW: dict[str, int] = {
    "alexnet": 96,
    "vgg11": 32,
    "densenet121": 32,
    "tf_efficientnet_lite0": 32,
    "convnext_atto": 32,
    "regnety_002": 32,
    "vit_tiny_patch16_224": 32,
    "vgg11_bn": 32,
    "resnext50_32x4d": 32,
    "resnetv2_50": 32,
    "efficientnet_b0": 32,
    "mobilenetv2_100": 32,
    "mobilenetv3_large_100": 32,
    "inception_v3": 75,
    "swin_tiny_patch4_window7_224": 56,
    "dla34": 32,
    "test_vit4": 64,
}
"""Networks that can be cut, and the side of an image that is enough for them."""

SIZED = ("vit", "deit", "swin", "test_vit", "xcit")  # families that are made for one size of images


def made(name: str, size: int, classes: int = 5) -> Any:
    """Untrained; its statistics and its classifier, zeros in some families, are drawn at random."""
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=classes, **({"img_size": size} if name.startswith(SIZED) else {}))
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)  # type: ignore[union-attr, operator]
            module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr, operator]
    classifiers = network.get_classifier()
    for layer in classifiers if isinstance(classifiers, tuple | list) else [classifiers]:
        nn.init.normal_(layer.weight, std=0.1)
    return network.eval()


def pictures(count: int, size: int, seed: int) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def with_output(network: nn.Module) -> list[Stage]:
    found = [stage for stage in stages(network) if stage.output]
    assert found
    return found


def is_plain(network: nn.Module) -> bool:
    """Nothing was left on any module."""
    return not any(
        "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks for module in network.modules()
    )


@pytest.fixture(scope="module", params=[*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def family(request: pytest.FixtureRequest) -> tuple[Any, int]:
    """A network and the side of its images. Left as it was."""
    size = {**QUICK, **SLOW}[request.param]
    return made(request.param, size), size


# Networks of all families


def test_the_second_part_gives_the_whole_networks_logits(family: tuple[Any, int]) -> None:
    """For images that the cut was not tried on, and for other numbers of them, at the end of every stage."""
    network, size = family
    for stage in with_output(network):
        split = split_at(network, stage.output, pictures(2, size, seed=1))
        assert split.boundary == stage.output and split.shape == (3, size, size)
        for count in (1, 3):
            images = pictures(count, size, seed=2)
            with torch.no_grad():
                expected = network(images)
                (given,) = outputs_at(network, [stage.output], images)
                kept = given.clone()
                with split.spliced(network, given) as dummy:
                    assert dummy.shape == images.shape
                    found = network(dummy)
            assert torch.equal(found, expected), stage.name
            assert expected.std() > 0, "and it is no constant"
            assert given.shape == kept.shape
        assert is_plain(network)


def test_the_second_part_reads_nothing_before_the_cut(family: tuple[Any, int]) -> None:
    """nan in the place of all maps and of all weights before it leaves no trace."""
    network, size = family
    images = pictures(2, size, seed=2)
    cut = with_output(network)
    for stage in {cut[0], cut[-1]}:
        split = split_at(network, stage.output, images[:1])
        with torch.no_grad():
            expected = network(images)
            (given,) = outputs_at(network, [stage.output], images)
            spoilt = copy.deepcopy(network)
            for name in (*split.before, split.boundary):
                for parameter in spoilt.get_submodule(name).parameters():
                    parameter.fill_(torch.nan)
            assert spoilt(images).isnan().all()
            with split.spliced(spoilt, given, poisoned=True) as dummy:
                assert dummy.isnan().all()
                assert torch.equal(spoilt(dummy), expected)


def test_gradients_are_those_of_the_whole_network_with_its_first_stages_frozen(family: tuple[Any, int]) -> None:
    """In training mode: dropout draws the same, batch norm of the later stages sees the same."""
    network, size = copy.deepcopy(family[0]), family[1]
    images, labels = pictures(3, size, seed=3), torch.tensor([0, 1, 4])
    names = [stage.name for stage in stages(network)]
    cut = with_output(network)
    kept = copy.deepcopy(network.state_dict())
    for stage in cut if len(cut) <= 5 else cut[:: len(cut) // 3]:
        frozen = names[: names.index(stage.name) + 1]
        freeze(network, frozen)
        split = split_at(network.eval(), stage.output, pictures(2, size, seed=1))

        def learnt(run: Callable[[], Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
            """Gradients, and what the pass leaves in the buffers."""
            network.load_state_dict(kept)
            network.train()
            network.zero_grad()
            torch.manual_seed(5)
            nn.functional.cross_entropy(run(), labels).backward()
            gradients = {
                name: parameter.grad.clone()
                for name, parameter in network.named_parameters()
                if parameter.grad is not None
            }
            return gradients, copy.deepcopy(network.state_dict())

        def spliced(split: Split = split, stage: Stage = stage) -> Tensor:
            with torch.no_grad():
                (given,) = outputs_at(network, [stage.output], images)
            torch.manual_seed(5)
            with split.spliced(network, given) as dummy:
                return network(dummy)

        expected, state = learnt(lambda: network(images))
        found, other = learnt(spliced)
        later = {name for one in stages(network) if one.name not in frozen for name in one.parameters}
        assert expected and expected.keys() <= later
        assert found.keys() == expected.keys()
        assert [name for name in expected if not torch.equal(found[name], expected[name])] == [], stage.name
        assert [name for name in state if not torch.equal(state[name], other[name])] == [], stage.name


def test_the_networks_copies_are_cut_at_the_same_place(family: tuple[Any, int]) -> None:
    """The average of the weights is one; also while the network itself is cut."""
    network, size = family
    stage = with_output(network)[-1]
    split = split_at(network, stage.output, pictures(2, size, seed=1))
    images = pictures(2, size, seed=4)
    average = ModelEmaV3(network).module
    with torch.no_grad():
        for parameter in list(average.parameters())[-2:]:
            parameter.add_(0.1)
        expected, other = network(images), average(images)
        assert not torch.equal(expected, other)
        (given,) = outputs_at(network, [stage.output], images)
        with split.spliced(network, given) as dummy:
            with split.spliced(average, given[:1]) as inner:
                first = average(inner)
            copied = average(images)
            assert torch.equal(network(dummy), expected)
    torch.testing.assert_close(first, other[:1], rtol=1e-5, atol=1e-5)
    assert torch.equal(copied, other)
    assert is_plain(network) and is_plain(average)


def test_the_outputs_of_all_stages_in_one_pass_are_those_of_each_alone(family: tuple[Any, int]) -> None:
    network, size = family
    images = pictures(2, size, seed=5)
    names = [stage.output for stage in with_output(network)]
    with torch.no_grad():
        together = outputs_at(network, names, images)
        for name, found in zip(names, together, strict=True):
            assert torch.equal(found, outputs_at(network, [name], images)[0]), name
    assert is_plain(network)


# Networks that cannot be cut


REFUSED: dict[str, tuple[int, str]] = {
    "hrnet_w18_small": (32, "puts out more than one map"),
    "xcit_nano_12_p16_224": (32, "patch_embed, before it, puts out something else than a map for each image"),
    "twins_svt_small": (32, "patch_embeds.0, before it, puts out something else than a map for each image"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_networks_that_pass_more_than_a_map_are_refused(name: str) -> None:
    size, reason = REFUSED[name]
    network = made(name, size)
    for stage in with_output(network)[:2]:
        with pytest.raises(CannotSplit, match=reason):
            split_at(network, stage.output, pictures(2, size, seed=1))
        assert is_plain(network)


class Chain(nn.Module):
    """Three convolutions ``a``, ``b``, ``c`` and a classifier; ``how`` says what is odd about it."""

    def __init__(self, how: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = (nn.Conv2d(channels, 4, 3, padding=1) for channels in (3, 4, 4))
        self.scale = nn.Parameter(torch.zeros(()))
        self.act, self.fc, self.how, self.calls = nn.LeakyReLU(inplace=how == "in place"), nn.Linear(4, 2), how, 0
        if how == "tuples":
            self.b = Pair()  # type: ignore[assignment]
        if how == "tuples before":
            self.a = Pair(3)  # type: ignore[assignment]
        if how == "a list before":
            self.extra = Pair(3)

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        early = self.a(images)
        early = early[0] if isinstance(early, tuple) else early
        if self.how == "a list before":
            self.extra(images)
        if self.how == "shared layer":
            early = self.act(early)
        boundary = self.b(early)
        if self.how == "runs twice":
            boundary = self.b(boundary)
        if isinstance(boundary, tuple):
            boundary = sum(boundary)
        if self.how in ("in place", "shared layer"):
            boundary = self.act(boundary)
        late = self.c(boundary)
        match self.how:
            case "long skip":
                late = late + early
            case "long skip, scaled by zero":
                late = late + self.scale * early
            case "skip of the images":
                late = late + images.mean(1, keepdim=True)
            case "a number of the images":
                late = late * images.std()
            case "a mask of the images":
                late = late * (images[:, :1] > 0)
            case "stops at nan" if images.isnan().any():
                raise ZeroDivisionError("a look at\nthe pixels")
        return self.fc(late.mean((2, 3)))


class Pair(nn.Module):
    """Two maps."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 4, 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.conv(images), self.conv(images) + 1


ODD: dict[str, str] = {
    "long skip": "what comes after depends on more than that",
    "long skip, scaled by zero": "what comes after depends on more than that",
    "skip of the images": "what comes after depends on more than that",
    "a number of the images": "what comes after depends on more than that",
    "a mask of the images": "what comes after depends on more than that",
    "runs twice": "b is called 2 times",
    "tuples": "b puts out more than one map",
    "tuples before": "a, before it, puts out something else than a map for each image",
    "a list before": "extra, before it, puts out something else than a map for each image",
    "shared layer": "act is called 2 times",
    "stops at nan": "ZeroDivisionError: a look at",
}


@pytest.mark.parametrize("how", ODD)
def test_made_networks_are_refused_with_the_reason(how: str) -> None:
    network = Chain(how).eval()
    images = pictures(2, 8, seed=1)
    expected = network(images)
    with pytest.raises(CannotSplit) as caught:
        split_at(network, "b", images)
    assert str(caught.value).startswith(ODD[how])
    assert "\n" not in str(caught.value)
    assert is_plain(network)
    assert torch.equal(network(images), expected)


def test_a_module_that_is_never_called_is_told() -> None:
    network = Chain().eval()
    network.idle = nn.Conv2d(3, 3, 1)
    with pytest.raises(CannotSplit, match="idle is called 0 times"):
        split_at(network, "idle", pictures(2, 8, seed=1))
    with pytest.raises(CannotSplit, match="idle is never called"):
        outputs_at(network, ["b", "idle"], pictures(2, 8, seed=1))
    assert is_plain(network)


def test_a_chain_is_cut_anywhere() -> None:
    network = Chain().eval()
    images = pictures(3, 8, seed=1)
    for boundary, before in (("a", set()), ("b", {"a"}), ("c", {"a", "b"})):
        split = split_at(network, boundary, images[:1])
        assert set(split.before) == before
        (given,) = outputs_at(network, [boundary], images)
        with split.spliced(network, given) as dummy:
            assert torch.equal(network(dummy), network.fc(_after(network, boundary, given).mean((2, 3))))


def _after(network: Any, boundary: str, given: Tensor) -> Tensor:
    for name in "abc"["abc".index(boundary) + 1 :]:
        given = getattr(network, name)(given)
    return given


# What is left behind


@pytest.mark.parametrize("kind", [ZeroDivisionError, KeyboardInterrupt])
def test_an_exception_leaves_the_network_as_it_was(kind: type[BaseException]) -> None:
    network = made("test_resnet", 32)
    images = pictures(2, 32, seed=1)
    stage = with_output(network)[1]
    split = split_at(network, stage.output, images)
    with torch.no_grad():
        expected = network(images)
        (given,) = outputs_at(network, [stage.output], images)
    with pytest.raises(kind), split.spliced(network, given):
        assert not is_plain(network)
        raise kind
    assert is_plain(network)

    def fails(*_: Any) -> None:
        raise kind

    last = with_output(network)[-1].output
    handle = network.get_submodule(last).register_forward_hook(fails)
    with pytest.raises(kind), torch.no_grad():
        outputs_at(network, [with_output(network)[0].output, f"{last}.0"], images) and network(images)
    handle.remove()
    assert is_plain(network)
    with torch.no_grad():
        assert torch.equal(network(images), expected)


def test_hooks_are_gone_after_a_pass_that_fails() -> None:
    network = Chain().eval()
    with pytest.raises(RuntimeError):
        outputs_at(network, ["b"], torch.zeros(2, 5, 8, 8))
    with pytest.raises(RuntimeError):
        split_at(network, "b", torch.zeros(2, 5, 8, 8))
    assert is_plain(network)


def test_the_network_is_left_in_evaluation_mode_with_its_weights() -> None:
    network = made("test_resnet", 32)
    before = copy.deepcopy(network.state_dict())
    split_at(network, with_output(network)[0].output, pictures(2, 32, seed=1))
    assert not any(module.training for module in network.modules())
    after = network.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


# Outputs


def test_outputs_come_in_the_order_asked_for() -> None:
    network = Chain().eval()
    images = pictures(2, 8, seed=1)
    with torch.no_grad():
        a = network.a(images)
        b = network.b(a)
        c = network.c(b)
        for names in (["a", "b", "c"], ["c", "a", "b"], ["b"], ["b", "a", "b"]):
            found = outputs_at(network, names, images)
            assert all(torch.equal(one, {"a": a, "b": b, "c": c}[name]) for name, one in zip(names, found, strict=True))


def test_what_comes_after_the_last_output_is_never_called() -> None:
    network = Chain().eval()
    called: list[str] = []
    for name, module in network.named_children():
        module.register_forward_pre_hook(lambda *_, name=name: called.append(name))
    outputs_at(network, ["b", "a"], pictures(2, 8, seed=1))
    assert called == ["a", "b"]


def test_a_layer_that_works_in_place_does_not_change_an_earlier_output() -> None:
    """``act`` overwrites what ``b`` puts out."""
    network = Chain("in place").eval()
    images = pictures(2, 8, seed=1)
    with torch.no_grad():
        expected = network.b(network.a(images))
        assert torch.equal(outputs_at(network, ["b"], images)[0], expected)
        assert torch.equal(outputs_at(network, ["b", "c"], images)[0], expected)


def test_a_layer_that_works_in_place_may_follow_the_cut() -> None:
    network = Chain("in place").eval()
    images = pictures(2, 8, seed=2)
    split = split_at(network, "b", pictures(2, 8, seed=1))
    with torch.no_grad():
        expected = network(images)
        (given,) = outputs_at(network, ["b"], images)
        with split.spliced(network, given) as dummy:
            assert torch.equal(network(dummy), expected)


@pytest.mark.parametrize("how", ["tuples", "one row"])
def test_outputs_that_are_no_maps_are_refused(how: str) -> None:
    network: Any = Chain("tuples" if how == "tuples" else "").eval()
    if how == "one row":
        network.b = nn.Sequential(network.b, nn.Flatten(0, 1))
    with pytest.raises(CannotSplit, match="b puts out more than one map"):
        outputs_at(network, ["b"], pictures(2, 8, seed=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast(dtype: torch.dtype) -> None:
    network = made("test_resnet", 32)
    stage = with_output(network)[2]
    split = split_at(network, stage.output, pictures(2, 32, seed=1))
    images = pictures(3, 32, seed=2)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        expected = network(images)
        (given,) = outputs_at(network, [stage.output], images)
        assert given.dtype == dtype
        with split.spliced(network, given) as dummy:
            assert torch.equal(network(dummy), expected)
