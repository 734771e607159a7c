"""The quickest form of a frozen network: it gives what the plain network gives, or it is not taken."""

from __future__ import annotations

import contextlib
import copy
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models.vgg import cfgs, make_layers

from tlkit.networks.forward import channels_last, features_of, logits_of
from tlkit.networks.quick import FOLDED_FROM, TIMES, TOLERANCE, Form, apart, compiles, fold_batch_norm, quickest

FP32 = contextlib.nullcontext


def bf16() -> Any:
    return torch.autocast("cpu", dtype=torch.bfloat16)


def randomised(network: nn.Module) -> Any:
    """In evaluation mode, with batch norms that do something: as made, they are all but the identity."""
    torch.manual_seed(1)
    for module in network.modules():
        if isinstance(module, _BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_(std=0.3)
            module.running_var.uniform_(0.3, 3)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.3)
    return network.eval()


def made(name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    return randomised(timm.create_model(name, **options))


def images_of(count: int, side: int = 32) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(2))


def whole(network: nn.Module, images: Tensor) -> Tensor:
    return network(images)


def state_of(network: nn.Module) -> tuple[dict[str, Tensor], list[tuple[Any, ...]]]:
    """All tensors, and for each module what a pass could leave behind."""
    modules = [
        (name, type(module), module.training, len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in network.named_modules()
    ]
    return copy.deepcopy(network.state_dict()), modules


def assert_untouched(network: nn.Module, before: tuple[dict[str, Tensor], list[tuple[Any, ...]]]) -> None:
    tensors, modules = state_of(network)
    assert modules == before[1]
    assert tensors.keys() == before[0].keys()
    for name, tensor in before[0].items():
        assert torch.equal(tensors[name], tensor) and tensors[name].dtype == tensor.dtype, name


# Folding


# Side of the images, and how many batch norms follow a convolution; counted by hand from the architecture
FAMILIES = {
    "resnet18": (32, 20),  # 1 + 8 blocks of 2 + 3 shortcuts
    "resnet26d": (32, 31),  # 3 + 8 blocks of 3 + 4 shortcuts
    "vgg11_bn": (32, 8),  # torchvision's layers, without the classifier's 124 million weights
    "densenet121": (32, 59),  # the stem and the second of each of 58 layers: the first is given what was concatenated
    "resnetv2_50": (32, 32),  # two in each of 16 blocks; the others normalise sums. timm's BatchNormAct2d
    "test_byobnet": (32, 14),
    "tf_efficientnet_lite0": (32, 49),  # 2 + 1 x 2 + 15 x 3
    "mobilenetv3_small_050": (32, 34),  # 1 + 1 x 2 + 10 x 3 + 1
    "regnetx_002": (32, 44),  # 1 + 13 blocks of 3 + 4 shortcuts; grouped convolutions
    "ghostnet_050": (32, 80),
    "res2net50_14w_8s": (32, 149),  # 1 + 16 blocks of 9 + 4 shortcuts; parts of a tensor are normalised
    "mixnet_s": (32, 15),  # several convolutions' outputs are normalised as one
    "hgnetv2_b0": (32, 42),
    "levit_128s": (224, 4),  # the stem's; the others follow linear layers
    "test_convnext": (32, 0),  # no batch norm
    "test_vit": (160, 0),
    "test_nfnet": (32, 0),  # weight-standardised convolutions without norm
    "lenet": (32, 2),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_folding_changes_no_number(name: str) -> None:
    """In float64, where the order of additions shows in the last digits only."""
    side, pairs = FAMILIES[name]
    network = (made(name) if name != "vgg11_bn" else randomised(make_layers(cfgs["A"], batch_norm=True))).double()
    norms = sum(isinstance(module, _BatchNorm) for module in network.modules())
    images = images_of(2, side).double()
    with torch.no_grad():
        expected = network(images)
        assert fold_batch_norm(network, images[:1]) == pairs
        found = network(images)
    assert apart(found, expected) < 1e-13
    assert not any(hooks for module in state_of(network)[1] for hooks in module[3:])
    assert sum(isinstance(module, _BatchNorm) for module in network.modules()) == norms - pairs


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
def test_folded_weights_are_those_of_the_formula(affine: bool, bias: bool, groups: int) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=groups, bias=bias), nn.BatchNorm2d(6, eps=0.01, affine=affine)
    )
    convolution, norm = randomised(network)
    g, t = (np.ones(6), np.zeros(6)) if not affine else (norm.weight.detach().numpy(), norm.bias.detach().numpy())
    s = g / np.sqrt(norm.running_var.numpy() + 0.01)
    weight = convolution.weight.detach().numpy() * s[:, None, None, None]
    b = convolution.bias.detach().numpy() if bias else np.zeros(6)
    shift = (b - norm.running_mean.numpy()) * s + t
    with torch.no_grad():
        assert fold_batch_norm(network, torch.zeros(1, 4, 5, 5)) == 1
    np.testing.assert_allclose(network[0].weight.numpy(), weight, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(network[0].bias.numpy(), shift, rtol=1e-5, atol=1e-6)
    assert not network[0].weight.requires_grad and not network[0].bias.requires_grad


@pytest.mark.parametrize("name", ["resnet18", "tf_efficientnet_lite0"])
def test_folding_keeps_the_layout_of_weights(name: str) -> None:
    network = channels_last(made(name))
    with torch.no_grad():
        fold_batch_norm(network, images_of(1))
    kernels = [module.weight for module in network.modules() if isinstance(module, nn.Conv2d)]
    assert all(kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels)


class Shared(nn.Module):
    """One convolution that is used twice, one batch norm that is used twice, and a pair that stands alone."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.after, self.other = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.one, self.two, self.norm = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.alone, self.alone_norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.dead, self.dead_norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)  # never called

    def forward(self, images: Tensor) -> Tensor:
        x = self.other(self.twice(self.after(self.twice(images))))
        x = self.norm(self.two(self.norm(self.one(x))))
        return self.alone_norm(self.alone(x))


def test_what_is_used_twice_is_left_alone() -> None:
    network = randomised(Shared()).double()
    untouched, images = copy.deepcopy(network), images_of(2, 8).double()
    with torch.no_grad():
        assert fold_batch_norm(network, images[:1]) == 1
        torch.testing.assert_close(network(images), untouched(images), rtol=1e-12, atol=1e-12)
    assert [name for name, module in network.named_modules() if isinstance(module, _BatchNorm)] == [
        "after",
        "other",
        "norm",
        "dead_norm",
    ]


class Tied(nn.Module):
    """Two convolutions of one weight, each with a batch norm of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 3, 1, bias=False), nn.Conv2d(3, 3, 1, bias=False)
        self.two.weight = self.one.weight
        self.first, self.second = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, images: Tensor) -> Tensor:
        return self.second(self.two(self.first(self.one(images))))


def test_a_weight_that_two_layers_share_is_folded_for_each() -> None:
    network = randomised(Tied()).double()
    untouched, images = copy.deepcopy(network), images_of(2, 4).double()
    with torch.no_grad():
        assert fold_batch_norm(network, images[:1]) == 2
        torch.testing.assert_close(network(images), untouched(images), rtol=1e-12, atol=1e-12)


def test_a_batch_norm_without_running_statistics_is_left_alone() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)).eval()
    assert fold_batch_norm(network, images_of(1, 4)) == 0


def test_no_hook_stays_where_the_network_fails() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Linear(1, 1)).eval()
    with pytest.raises(RuntimeError):
        fold_batch_norm(network, images_of(1, 4))
    assert not any(hooks for module in state_of(network)[1] for hooks in module[3:])
    assert isinstance(network[1], nn.BatchNorm2d)


# The form that is taken


class Small(nn.Module):
    """A convolution, its batch norm, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.fc = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Linear(8, 5)
        randomised(self)

    def middle(self, images: Tensor) -> Tensor:
        return self.norm(self.conv(images))

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.middle(images).relu().mean((2, 3)))

    def get_classifier(self) -> nn.Module:
        return self.fc


class Chosen:
    """What `quickest` chose and what it said."""

    def __init__(self, network: nn.Module, compute: Any = whole, **options: Any) -> None:
        self.said: list[str] = []
        given: dict[str, Any] = {"count": FOLDED_FROM, "autocast": FP32, "compile": "never", **options}
        images = given.pop("images", None)
        self.form: Form = quickest(
            network, compute, images_of(8) if images is None else images, **given, say=self.said.append
        )
        self.autocast = given["autocast"]

    def __call__(self, images: Tensor) -> Any:
        with self.form.context(), self.autocast():
            return self.form.run(images)


@pytest.mark.parametrize("compile", ["auto", "never"])
@pytest.mark.parametrize(("count", "name"), [(1, "plain"), (255, "plain"), (256, "folded"), (9999, "folded")])
def test_a_few_images_do_not_pay_for_folding(
    count: int, name: str, compile: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", None)
    network, seen = Small(), []

    def compute(given: nn.Module, images: Tensor) -> Tensor:
        seen.append(given)
        return given(images)

    chosen = Chosen(network, compute, count=count, compile=compile)
    assert chosen.form.name == name
    assert chosen.said == []
    assert chosen.form.seconds == 0
    if name == "plain":
        assert seen == [], "nothing is computed to find that out"
    chosen(images_of(2))
    assert (seen[-1] is network) == (name == "plain")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("name", "compute"),
    [
        ("test_resnet", features_of),
        ("resnet18", logits_of),
        ("resnetv2_50", logits_of),
        ("tf_efficientnet_lite0", features_of),
        ("mobilenetv3_small_050", logits_of),
        ("regnetx_002", logits_of),
    ],
)
def test_the_folded_form_gives_what_the_plain_network_gives(name: str, compute: Any, precision: str) -> None:
    network = channels_last(made(name, num_classes=10))
    before = state_of(network)
    autocast = {"fp32": FP32, "bf16": bf16}[precision]
    images = images_of(16).contiguous(memory_format=torch.channels_last)
    chosen = Chosen(network, compute, autocast=autocast, images=images)
    assert (chosen.form.name, chosen.said) == ("folded", [])
    found = chosen(images)
    assert_untouched(network, before)
    assert found.dtype == torch.float32
    with torch.inference_mode():
        exact = compute(network, images)
        with autocast():
            plain = compute(network, images)
    error = apart(found[:8], exact[:8])
    assert error <= max(TOLERANCE, TIMES * apart(plain[:8], exact[:8]))
    assert apart(found[8:], exact[8:]) <= max(TOLERANCE, 2 * apart(plain[8:], exact[8:])), "on images not tried"
    if precision == "bf16":
        assert error > 1e-4, "computed in bf16 indeed"


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("test_nfnet", "fp32"),
        ("test_nfnet", "bf16"),
        ("nf_regnet_b0", "fp32"),
        ("nf_regnet_b0", "bf16"),
        ("resnetv2_50x1_bit", "fp32"),
        ("test_convnext", "bf16"),
        ("test_vit", "bf16"),
    ],
)
def test_networks_without_batch_norm_stay_what_they_are(name: str, precision: str) -> None:
    """Among them those that standardise the weights of their convolutions: ScaledStdConv2d, StdConv2d."""
    network = made(name, num_classes=10)
    autocast = {"fp32": FP32, "bf16": bf16}[precision]
    images = images_of(8, 160 if name == "test_vit" else 64)
    found = Chosen(network, logits_of, autocast=autocast, images=images)(images)
    with torch.inference_mode():
        exact = logits_of(network, images)
        with autocast():
            plain = logits_of(network, images)
    if precision == "fp32":
        torch.testing.assert_close(found, exact, rtol=0, atol=0)
    else:
        assert apart(found, exact) <= max(TOLERANCE, TIMES * apart(plain, exact))


class Standardised(Small):
    """A weight-standardised convolution in front of a batch norm: a factor in its weight is lost."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = timm.layers.StdConv2d(3, 8, 3)


class Twice(Small):
    """What the batch norm is given is also used elsewhere."""

    def middle(self, images: Tensor) -> Tensor:
        between = self.conv(images)
        return self.norm(between) + between


class Reads(Small):
    """The batch norm's weight is used elsewhere."""

    def middle(self, images: Tensor) -> Tensor:
        return super().middle(images) * self.norm.weight.view(-1, 1, 1)


class InPlace(Small):
    """What the batch norm is given is the convolution's output, but no longer what that was."""

    def middle(self, images: Tensor) -> Tensor:
        return self.norm(self.conv(images).relu_())


class Unfinished(Small):
    """Looks at its own parts."""

    def middle(self, images: Tensor) -> Tensor:
        if not isinstance(self.norm, nn.BatchNorm2d):
            raise ValueError("what is this?")
        return super().middle(images)


@pytest.mark.parametrize("precision", [FP32, bf16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("network", "why"),
    [
        (Standardised, "its outputs differ by "),
        (Twice, "its outputs differ by "),
        (InPlace, "its outputs differ by "),
        (Reads, "'Sequential' object has no attribute 'weight'"),
        (Unfinished, "what is this?"),
    ],
)
def test_where_folding_is_wrong_the_plain_network_is_taken(
    network: Callable[[], Small], why: str, precision: Any
) -> None:
    given = network()
    before = state_of(given)
    chosen = Chosen(given, autocast=precision)
    assert chosen.form.name == "plain"
    (said,) = chosen.said
    assert said.startswith(f"runs as it is, not with its batch norm folded: {why}")
    found, images = chosen(images_of(4)), images_of(4)
    with torch.inference_mode(), precision():
        torch.testing.assert_close(found, given(images), rtol=0, atol=0)
    assert_untouched(given, before)


def test_a_family_whose_shortcuts_go_around_the_norm_stays_plain() -> None:
    """MaxViT's stem: a convolution's output is both normalised and added."""
    network = made("test_maxvit")
    chosen = Chosen(network, logits_of, images=images_of(2, 160))
    assert chosen.form.name == "plain"
    assert "are allowed" in chosen.said[0]


def test_tuples_are_compared_and_given_as_tuples() -> None:
    def both(network: Any, images: Tensor) -> tuple[Tensor, Tensor]:
        maps = network.middle(images)
        return maps, network.fc(maps.relu().mean((2, 3)))

    network = Small()
    chosen = Chosen(network, both)
    found = chosen(images_of(3))
    assert chosen.form.name == "folded"
    assert isinstance(found, tuple)
    with torch.inference_mode():
        torch.testing.assert_close(found, both(network, images_of(3)), rtol=1e-4, atol=1e-4)
    wrong = Chosen(network, lambda given, images: (given(images), given(images) * (1 + (given is not network))))
    assert wrong.form.name == "plain"


def test_only_the_classifier_keeps_its_weights_in_float32() -> None:
    kinds: list[tuple[torch.dtype, torch.dtype]] = []

    def compute(network: Any, images: Tensor) -> Tensor:
        kinds.append((network.conv1.weight.dtype, network.fc.weight.dtype))
        return logits_of(network, images)

    network = made("resnet18", num_classes=10)
    chosen = Chosen(network, compute, autocast=bf16)
    assert chosen.form.name == "folded"
    assert chosen(images_of(2)).dtype == torch.float32
    assert kinds[-1] == (torch.bfloat16, torch.float32)
    assert kinds[0] == (torch.float32, torch.float32), "the network itself"
    Chosen(network, compute)
    assert kinds[-1] == (torch.float32, torch.float32), "nothing is cast in float32"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("rows", [slice(None), slice(3, 4)], ids=["all", "one"])
@pytest.mark.parametrize("precision", [FP32, bf16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("whose", ["folded", "both"])
def test_what_is_not_finite_is_not_taken(value: float, rows: slice, precision: Any, whose: str) -> None:
    network = Small()

    def compute(given: nn.Module, images: Tensor) -> Tensor:
        found = given(images).clone()
        if given is not network or whose == "both":
            found[rows] = value
        return found

    chosen = Chosen(network, compute, autocast=precision)
    assert chosen.form.name == "plain"
    assert len(chosen.said) == 1


@pytest.mark.parametrize("shape", [(8, 1), (1, 5), (8, 3), (4, 5)], ids=str)
def test_another_shape_is_not_taken(shape: tuple[int, int]) -> None:
    """Although the numbers are those that are wanted, and some shapes would be broadcast."""
    network = Small()
    chosen = Chosen(network, lambda given, images: torch.ones(8, 5) if given is network else torch.ones(shape))
    assert chosen.form.name == "plain"
    assert Chosen(network, lambda given, images: torch.ones(8, 5)).form.name == "folded"


def test_distance_is_a_part_of_the_norm() -> None:
    wanted = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    assert apart([wanted * 1.01], [wanted]) == pytest.approx(0.01, rel=1e-4)
    assert apart([wanted + torch.tensor([[0.0, 0.5], [0.0, 0.0]])], [wanted]) == pytest.approx(0.1)
    assert apart([wanted], [wanted]) == apart([torch.zeros(2, 2)], [torch.zeros(2, 2)]) == 0


# Compiling


@pytest.mark.parametrize(
    ("device", "count", "expected"),
    [("cpu", 9_999, False), ("cpu", 10_000, True), ("cuda", 10**6, False), ("mps", 10**6, False)],
)
def test_compiling_pays_for_many_images_on_a_cpu(device: str, count: int, expected: bool) -> None:
    assert compiles(torch.device(device), "auto", count) == expected
    assert compiles(torch.device(device), "always", 1)
    assert not compiles(torch.device(device), "never", count)


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Any], Any]], None]:
    """Stands for `torch.compile`."""

    def stand(compile: Callable[[Any], Any]) -> None:
        monkeypatch.setattr(torch, "compile", lambda run, **_: compile(run))

    return stand


@pytest.mark.parametrize(("compile", "count"), [("always", 1), ("always", 10_000), ("auto", 10_000)])
def test_when_it_compiles(compile: str, count: int, compiler: Any) -> None:
    compiler(lambda run: run)
    chosen = Chosen(Small(), count=count, compile=compile)
    assert chosen.form.name == "compiled"
    assert chosen.form.seconds > 0
    assert chosen.said == ["compiling the network: takes 10 to 60 s", f"compiled in {chosen.form.seconds:.0f} s"]


@pytest.mark.parametrize("network", [Small, Twice])
def test_without_a_compiler_the_form_before_it_is_taken(network: Any, compiler: Any) -> None:
    def missing(run: Any) -> Any:
        raise RuntimeError("no compiler\nat all")

    compiler(missing)
    given = network()
    before = state_of(given)
    chosen = Chosen(given, count=1, compile="always")
    assert chosen.form.name == ("folded" if network is Small else "plain")
    assert chosen.said[-1] == "runs uncompiled: RuntimeError: no compiler"
    with torch.inference_mode():
        torch.testing.assert_close(chosen(images_of(3)), given(images_of(3)), rtol=1e-4, atol=1e-4)
    assert_untouched(given, before)


@pytest.mark.parametrize(
    "change",
    [lambda found: found * 1.5, lambda found: found * float("nan"), lambda found: found[:, :1]],
    ids=["wrong", "nan", "shape"],
)
@pytest.mark.parametrize("precision", [FP32, bf16], ids=["fp32", "bf16"])
def test_a_compiler_that_errs_is_not_believed(change: Any, precision: Any, compiler: Any) -> None:
    compiler(lambda run: lambda images: change(run(images)))
    chosen = Chosen(Small(), compile="always", autocast=precision)
    assert chosen.form.name == "folded"
    assert chosen.said[-1].startswith("runs uncompiled: its outputs differ by ")


APART = """
import contextlib, sys, torch
from torch import nn
from tlkit.networks.quick import quickest

class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)

    def forward(self, images):
        return self.fc(self.norm(self.conv(images)).relu().mean((2, 3)))

    def get_classifier(self):
        return self.fc

torch.manual_seed(0)
network, images = Small().eval(), torch.randn(4, 3, 8, 8)
form = quickest(network, lambda given, batch: given(batch), images, count=int(sys.argv[2]), compile=sys.argv[1],
                autocast=contextlib.nullcontext)
with form.context():
    error = (form.run(images) - network(images)).abs().max()
print(form.name, bool(error < 1e-4), "torch._inductor.compile_fx" in sys.modules)
"""


def run_apart(compile: str, count: int, folder: Path, **environment: str) -> list[str]:
    """In a process that has compiled nothing, with nothing cached."""
    environment |= {"TORCHINDUCTOR_CACHE_DIR": str(folder / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", APART, compile, str(count)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_few_images_never_load_the_compiler(tmp_path: Path) -> None:
    """It takes seconds to import. (torchvision imports a part of it, whatever is done.)"""
    assert run_apart("auto", 9_999, tmp_path) == ["folded True False"]


@pytest.mark.slow
def test_a_missing_compiler_is_named(tmp_path: Path) -> None:
    lines = run_apart("always", 1, tmp_path, CXX=str(tmp_path / "no-such-c++"))
    assert lines[-1] == "folded True True"
    assert lines[1].startswith("runs uncompiled: ")
    assert "compiler" in lines[1].lower()


@pytest.fixture
def fresh() -> Iterator[None]:
    """The compiler remembers nothing of other tests."""
    import torch._dynamo

    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("network", [Small, Twice], ids=["folded", "plain"])
def test_the_compiled_form_gives_what_the_plain_network_gives(network: Any, precision: str) -> None:
    given = network()
    before = state_of(given)
    autocast = {"fp32": FP32, "bf16": bf16}[precision]
    chosen = Chosen(given, compile="always", autocast=autocast)
    if chosen.said[-1].startswith("runs uncompiled") and "compiler" in chosen.said[-1].lower():
        pytest.skip("no compiler here")
    assert chosen.form.name == "compiled"
    assert chosen.said[-2:] == ["compiling the network: takes 10 to 60 s", f"compiled in {chosen.form.seconds:.0f} s"]
    others = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    found = chosen(others)
    assert_untouched(given, before)
    with torch.inference_mode():
        exact = given(others)
        with autocast():
            plain = given(others)
    assert apart(found, exact) <= max(TOLERANCE, 2 * apart(plain, exact))


# What is known to be wrong


class ByName(Small):
    """Gives the batch norm its input by name."""

    def middle(self, images: Tensor) -> Tensor:
        return self.norm(input=self.conv(images))


class Asserts(Small):
    """Asserts what it is made of."""

    def middle(self, images: Tensor) -> Tensor:
        assert isinstance(self.norm, nn.BatchNorm2d)
        return super().middle(images)


class Uncopied(Small):
    """Holds a tensor that torch cannot copy."""

    def __init__(self) -> None:
        super().__init__()
        self.scaled = self.fc.weight * 2


@pytest.mark.parametrize("network", [ByName, Asserts, Uncopied])
def test_whatever_goes_wrong_in_folding_the_plain_network_is_there(network: Callable[[], Small]) -> None:
    chosen = Chosen(network())
    assert chosen.form.name in ("plain", "folded")


def test_one_number_an_image_can_be_asked_for() -> None:
    chosen = Chosen(Small(), lambda network, images: network(images)[:, 0])
    assert chosen(images_of(3)).shape == (3,)


def test_an_overflow_in_16_bits_does_not_make_everything_right() -> None:
    network = Small()

    def compute(given: nn.Module, images: Tensor) -> Tensor:
        if given is not network:
            return torch.zeros(len(images), 5)
        return given(images) * (float("inf") if torch.is_autocast_enabled("cpu") else 1)

    assert Chosen(network, compute, autocast=bf16).form.name == "plain"


def test_a_small_part_of_a_tuple_is_not_hidden_by_a_large_one() -> None:
    network = Small()
    chosen = Chosen(network, lambda given, images: (given(images) * 1e6, given(images) * (-1, 1)[given is network]))
    assert chosen.form.name == "plain"


@pytest.mark.parametrize("kind", [nn.Sequential, nn.ModuleList])
def test_a_classifier_of_several_layers_stays_in_float32_too(kind: Any) -> None:
    kinds: list[torch.dtype] = []

    def compute(given: Any, images: Tensor) -> Tensor:
        kinds.append(given.fc[0].weight.dtype)
        return given.fc[0](given.middle(images).relu().mean((2, 3)))

    network = Small()
    network.fc = kind([network.fc]) if kind is nn.ModuleList else kind(network.fc)  # type: ignore[assignment]
    assert Chosen(network, compute, autocast=bf16).form.name == "folded"
    assert kinds[-1] == torch.float32


@pytest.mark.slow
@pytest.mark.usefixtures("fresh")
def test_the_tenth_network_of_a_process_is_compiled_too() -> None:
    """Or it is not called so. (timm.optim, where it is imported, lifts that limit.)"""
    import torch._dynamo
    from torch._dynamo.utils import counters

    counters.clear()
    with torch._dynamo.config.patch(recompile_limit=8):
        forms = [Chosen(Small(), compile="always").form for _ in range(10)]
    compiled = sum(form.name == "compiled" for form in forms)
    if not compiled:
        pytest.skip("no compiler here")
    assert counters["stats"]["unique_graphs"] == compiled
