"""Freezing: what is frozen stays bit-identical through real training, whoever calls ``.train()``; the rest moves."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from tlkit.errors import TlkitError
from tlkit.networks.freezing import freeze, has_idle_parameters, train_mode, trainable_parameters
from tlkit.networks.stages import stages

NETWORKS: dict[str, dict[str, Any]] = {
    "resnet18": {"drop_rate": 0.2, "drop_path_rate": 0.5, "drop_block_rate": 0.1, "zero_init_last": False},
    "tf_efficientnet_lite0": {"drop_rate": 0.2, "drop_path_rate": 0.2},
    "densenet121": {"drop_rate": 0.2, "proj_drop_rate": 0.2},
    "convnext_atto": {"drop_rate": 0.2, "drop_path_rate": 0.2},
    "vit_tiny_patch16_224": {
        "img_size": 64,
        "drop_rate": 0.2,
        "pos_drop_rate": 0.2,
        "proj_drop_rate": 0.2,
        "attn_drop_rate": 0.2,
        "drop_path_rate": 0.2,
    },
}
"""Five families with every random part that they have, at 64 px."""


def make(name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=5, **options)


def train(network: nn.Module, steps: int = 2) -> None:
    """Steps of SGD with momentum and weight decay, over what is trainable."""
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.SGD([tensor for _, tensor in trainable_parameters(network)], 0.1, 0.9, weight_decay=0.1)
    for _ in range(steps):
        images = torch.randn(4, 3, 64, 64, generator=generator)
        loss = nn.functional.cross_entropy(network(images), torch.tensor([0, 1, 2, 3]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def state_of(network: nn.Module, names: set[str]) -> dict[str, Tensor]:
    """Parameters and buffers of the named stages, also those buffers that a state dict leaves out."""
    found = {}
    for stage in stages(network):
        if stage.name in names:
            found |= {name: network.get_parameter(name).detach().clone() for name in stage.parameters}
            for module in stage.modules:
                buffers = network.get_submodule(module).named_buffers(recurse=False)
                found |= {f"{module}.{key}": buffer.clone() for key, buffer in buffers}
    return found


def assert_equal(before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


STAGES = {"resnet18": 6, "tf_efficientnet_lite0": 8, "densenet121": 6, "convnext_atto": 7, "vit_tiny_patch16_224": 15}


def every_number_of_frozen_stages() -> list[Any]:
    """Most of the middle ones are left to the slow tests."""
    return [
        pytest.param(name, number, marks=() if number in (0, 1, count // 2, count - 1) else pytest.mark.slow)
        for name, count in STAGES.items()
        for number in range(count)
    ]


@pytest.mark.parametrize("name, number", every_number_of_frozen_stages())
def test_frozen_stages_are_bit_identical(name: str, number: int) -> None:
    network = make(name, **NETWORKS[name])
    cut = stages(network)
    assert len(cut) == STAGES[name]
    frozen, rest = {stage.name for stage in cut[:number]}, {stage.name for stage in cut[number:]}
    freeze(network, frozen)
    assert [key for key, _ in trainable_parameters(network)] == [
        key
        for key, _ in network.named_parameters()
        if key in {key for stage in cut[number:] for key in stage.parameters}
    ]
    before, moving = state_of(network, frozen), state_of(network, rest)
    assert before.keys() | moving.keys() >= network.state_dict().keys()
    train_mode(network)
    train(network)
    assert_equal(before, state_of(network, frozen))
    after = state_of(network, rest)
    assert [key for key in moving if torch.equal(moving[key], after[key])] == [], "all the rest is trained"


def all_but(network: nn.Module, name: str) -> set[str]:
    return {stage.name for stage in stages(network)} - {name}


@pytest.mark.parametrize("name", NETWORKS)
def test_frozen_stages_have_no_randomness(name: str) -> None:
    """Dropout, stochastic depth, and dropout written as a function (in attention and dense layers) are off."""
    network = make(name, **NETWORKS[name])
    images = torch.randn(2, 3, 64, 64)
    evaluated = network.eval().forward_features(images)
    freeze(network, all_but(network, "head"))
    train_mode(network)
    assert torch.equal(network.forward_features(images), evaluated)
    freeze(network, ())
    train_mode(network)
    assert not torch.equal(network.forward_features(images), network.forward_features(images))


@pytest.mark.parametrize("name", [*NETWORKS, "deit_tiny_distilled_patch16_224"])
def test_dropout_before_the_classifier_is_the_heads(name: str) -> None:
    """It acts where the head is trained, as a module or written as a function, and not where it is frozen."""
    size = {"img_size": 64} if "patch16" in name else {}
    network = make(name, drop_rate=0.5, **size)
    features = network.forward_features(torch.randn(2, 3, 64, 64)).detach()

    def is_random() -> bool:
        train_mode(network)
        return not torch.equal(
            network.forward_head(features, pre_logits=True), network.forward_head(features, pre_logits=True)
        )

    freeze(network, all_but(network, "head"))
    assert is_random()
    freeze(network, ["head"])
    assert not is_random()
    freeze(network, [])
    assert is_random()
    network.eval()
    assert torch.equal(network.forward_head(features), network.forward_head(features))


TINY: dict[str, dict[str, Any]] = {
    "test_resnet": {"drop_rate": 0.2, "drop_path_rate": 0.2},
    "test_efficientnet": {"drop_rate": 0.2, "drop_path_rate": 0.2},
    "test_vit": {"img_size": 64, "drop_rate": 0.2, "drop_path_rate": 0.2, "proj_drop_rate": 0.2, "attn_drop_rate": 0.2},
}


def called(network: nn.Module) -> nn.Module:
    return network.train()


def called_after_evaluation(network: nn.Module) -> nn.Module:
    return network.eval().train(True)


def called_on_each_module(network: nn.Module) -> nn.Module:
    for module in network.modules():
        module.train()
    return network


def held_by_another(network: nn.Module) -> nn.Module:
    nn.Sequential(nn.ModuleDict({"backbone": network})).train()
    return network


def held_by_data_parallel(network: nn.Module) -> nn.Module:
    return nn.DataParallel(network).train().module


def in_another_layout(network: nn.Module) -> nn.Module:
    return network.to(memory_format=torch.channels_last).to("cpu").train()


def copied(network: nn.Module) -> nn.Module:
    return copy.deepcopy(network).train()


def copied_twice(network: nn.Module) -> nn.Module:
    return copy.deepcopy(copy.deepcopy(network)).train()


def pickled(network: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(network)).train()


def saved_whole(network: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(network, file)
    file.seek(0)
    return torch.load(file, weights_only=False).train()


def saved_as_state_dict(network: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(network.state_dict(), file)
    file.seek(0)
    network.load_state_dict(torch.load(file, weights_only=True))
    return network.train()


WAYS = [
    called,
    called_after_evaluation,
    called_on_each_module,
    held_by_another,
    held_by_data_parallel,
    in_another_layout,
    copied,
    copied_twice,
    pickled,
    saved_whole,
    saved_as_state_dict,
]


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("way", WAYS)
def test_frozen_whoever_calls_train(name: str, way: Callable[[nn.Module], nn.Module]) -> None:
    network = make(name, **TINY[name])
    names = [stage.name for stage in stages(network)]
    frozen = {*names[:3]}
    freeze(network, frozen)
    before = state_of(network, frozen)
    network = way(network)
    train(network)
    assert_equal(before, state_of(network, frozen))
    assert all(parameter.grad is None for parameter in network.parameters() if not parameter.requires_grad)
    modes = {stage.name: {network.get_submodule(name).training for name in stage.modules} for stage in stages(network)}
    assert modes == {name: {name not in frozen} for name in names}


def test_frozen_under_distributed_data_parallel(tmp_path: Path) -> None:
    """Which broadcasts buffers before each forward pass."""
    torch.distributed.init_process_group("gloo", f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    try:
        network = make("test_resnet", **TINY["test_resnet"])
        freeze(network, ["stem", "stage1"])
        before = state_of(network, {"stem", "stage1"})
        wrapped = nn.parallel.DistributedDataParallel(network)
        train_mode(wrapped)
        train(wrapped)
        assert_equal(before, state_of(network, {"stem", "stage1"}))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("duplicate", [copied, pickled])
def test_a_copy_is_on_its_own(name: str, duplicate: Callable[[nn.Module], nn.Module]) -> None:
    network = make(name)
    freeze(network, ["stem"])
    network.eval()
    other = duplicate(network)
    assert not any(module.training for module in network.modules())
    freeze(other, [])
    other.train()
    assert all(module.training for module in other.modules())
    network.train()
    assert not any(network.get_submodule(name).training for name in stages(network)[0].modules)


@pytest.mark.parametrize("name", TINY)
def test_unfreezing_restores_training(name: str) -> None:
    network = make(name)
    network.train()
    fresh = {key: module.training for key, module in network.named_modules()}
    assert all(fresh.values())
    freeze(network, {stage.name for stage in stages(network)})
    train_mode(network)
    assert not any(module.training for module in network.modules())
    assert list(trainable_parameters(network)) == []

    freeze(network, ())
    train_mode(network)
    assert {key: module.training for key, module in network.named_modules()} == fresh
    assert [key for key, _ in trainable_parameters(network)] == [key for key, _ in network.named_parameters()]
    assert not any("train" in module.__dict__ for module in network.modules())
    before = network.state_dict()
    before = {key: tensor.clone() for key, tensor in before.items()}
    train(network)
    assert [key for key, tensor in network.state_dict().items() if torch.equal(tensor, before[key])] == []


def test_freeze_names_all_that_is_frozen() -> None:
    network = make("test_resnet")
    freeze(network, ["stem", "stage1"])
    freeze(network, ["stage2"])
    network.train()
    assert {key.split(".")[0] for key, tensor in network.named_parameters() if not tensor.requires_grad} == {"layer2"}
    assert network.bn1.training and network.layer1.training and not network.layer2.training


def test_a_middle_stage_alone() -> None:
    """The container of all blocks is in training mode, one block inside is not."""
    network = make("test_vit", **TINY["test_vit"])
    freeze(network, ["stage2"])
    before = state_of(network, {"stage2"})
    network.train()
    assert [block.training for block in network.blocks] == [True, False, *[True] * (len(network.blocks) - 2)]
    assert not any(module.training for module in network.blocks[1].modules())
    train(network)
    assert_equal(before, state_of(network, {"stage2"}))


def test_evaluation_mode_is_evaluation_mode() -> None:
    network = make("test_resnet")
    freeze(network, ["head"])
    network.train().eval()
    assert not any(module.training for module in network.modules())


@pytest.mark.parametrize("name", ["levit_128s", "tiny_vit_5m_224"])
def test_no_stale_caches(name: str) -> None:
    """These keep what they compute of their attention biases while in evaluation mode, and drop it in ``.train()``."""
    network = make(name)
    images = torch.randn(2, 3, 224, 224)
    cut = stages(network)
    with torch.no_grad():
        network.eval()(images)
    for frozen in ([stage.name for stage in cut[:2]], [stage.name for stage in cut[:-1]], []):
        freeze(network, frozen)
        train_mode(network)
        optimizer = torch.optim.SGD([tensor for _, tensor in trainable_parameters(network)], 0.1)
        network(images).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        fresh = make(name)
        fresh.load_state_dict(network.state_dict())
        with torch.no_grad():
            assert torch.equal(network.eval()(images), fresh.eval()(images))


@pytest.mark.parametrize(
    "name, remedy",
    [
        ("haed", "did you mean 'head'?"),
        ("stage9", "did you mean"),
        ("layer", "it has stem, stage1, stage2, stage3, stage4, head"),
        ("", "it has stem"),
    ],
)
def test_unknown_stage(name: str, remedy: str) -> None:
    network = make("test_resnet")
    with pytest.raises(TlkitError) as caught:
        freeze(network, ["stem", name])
    assert f"the network has no stage '{name}'" in str(caught.value)
    assert remedy in str(caught.value)
    assert all(parameter.requires_grad for parameter in network.parameters()), "nothing is changed"


# Batch norm of stages that train


def batch_norms(network: nn.Module) -> dict[str, Any]:
    return {key: module for key, module in network.named_modules() if isinstance(module, nn.BatchNorm2d)}


def stage_of(network: nn.Module, name: str) -> str:
    return next(stage.name for stage in stages(network) if name in stage.parameters)


WITH_BATCH_NORM = ["test_resnet", "test_efficientnet", "mobilenetv3_small_100", "regnetx_002"]


@pytest.mark.parametrize("norms", ["train", "stats-frozen", "frozen"])
@pytest.mark.parametrize("name", WITH_BATCH_NORM)
def test_batch_norm_of_stages_that_train(name: str, norms: str) -> None:
    """Which of scale, shift and statistics move in a training step; convolutions always do."""
    network = make(name)
    for module in batch_norms(network).values():  # as if it were trained: other statistics than those of a batch
        module.running_mean.uniform_(-0.1, 0.1, generator=torch.Generator().manual_seed(0))
    freeze(network, ["stem"], norms=norms)
    layers = batch_norms(network)
    own = {f"{key}.{kind}" for key in layers for kind in ("weight", "bias")}
    cut = {stage.name for stage in stages(network)}
    trained = {key for key, _ in trainable_parameters(network)}
    expected = {key for key, _ in network.named_parameters() if stage_of(network, key) != "stem"}
    assert own & expected, "there is some"
    assert trained == (expected - own if norms == "frozen" else expected)

    before = state_of(network, cut)
    train_mode(network)
    train(network)
    network.eval()
    train_mode(network)
    train(network, steps=1)
    after = state_of(network, cut)
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    statistics = {f"{key}.{kind}" for key in layers for kind in ("running_mean", "running_var", "num_batches_tracked")}
    assert statistics <= set(before)
    trains = {key for key in layers if stage_of(network, f"{key}.weight") != "stem"}
    moving = {key for key in statistics if key.rpartition(".")[0] in trains} if norms == "train" else set()
    assert moved & statistics == moving, "bit for bit"
    assert moved - statistics == trained


@pytest.mark.parametrize("norms", ["stats-frozen", "frozen"])
@pytest.mark.parametrize("way", WAYS)
def test_statistics_stay_whoever_calls_train(norms: str, way: Callable[[nn.Module], nn.Module]) -> None:
    network = make("test_efficientnet", **TINY["test_efficientnet"])
    freeze(network, [], norms=norms)
    before = {key: tensor.clone() for key, tensor in network.named_buffers()}
    network = way(network)
    layers = batch_norms(network)
    assert layers and not any(module.training for module in layers.values())
    inside = {key for key in dict(network.named_modules()) if any(key.startswith(f"{outer}.") for outer in layers)}
    others = {key: module for key, module in network.named_modules() if key not in layers}
    assert all(module.training for module in others.values()), "dropout and activations inside of them as well"
    assert inside <= set(others)
    train(network)
    assert_equal(before, dict(network.named_buffers()))


def test_frozen_statistics_are_what_normalises() -> None:
    """The output of a training pass is then that of evaluation, and does not depend on the batch."""
    network = make("test_resnet")
    freeze(network, [], norms="stats-frozen")
    images = torch.randn(4, 3, 64, 64)
    trained, evaluated = network.train()(images), network.eval()(images)
    assert torch.equal(trained, evaluated)
    freeze(network, [])
    assert not torch.allclose(network.train()(images), evaluated)


def test_another_choice_of_norms_undoes_the_one_before() -> None:
    network = make("test_resnet")
    for norms in ("frozen", "stats-frozen", "train"):
        freeze(network, [], norms=norms)
        network.train()
        layers = batch_norms(network).values()
        assert {module.training for module in layers} == {norms == "train"}
        assert {module.weight.requires_grad for module in layers} == {norms != "frozen"}
    assert all(module.training for module in network.modules())


@pytest.mark.parametrize("norms", ["stats-frozen", "frozen"])
def test_other_norms_are_no_batch_norm(norms: str) -> None:
    network = make("test_vit")
    freeze(network, ["stem"], norms=norms)
    network.train()
    layers = {key: module for key, module in network.named_modules() if isinstance(module, nn.LayerNorm)}
    trained = {key for key in layers if stage_of(network, f"{key}.weight") != "stem"}
    assert trained and all(layers[key].training and layers[key].weight.requires_grad for key in trained)


def test_parameters_that_nothing_uses_are_noticed() -> None:
    """Processes that learn together would wait for their gradients."""
    network, images = make("test_resnet"), torch.randn(2, 3, 64, 64)
    before = copy.deepcopy(network.state_dict())
    assert not has_idle_parameters(network, images)
    network.left_over = nn.Parameter(torch.ones(3))
    assert has_idle_parameters(network, images)
    network.left_over.requires_grad_(False)
    assert not has_idle_parameters(network, images)
    del network.left_over
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert all(tensor.grad is None for tensor in network.parameters())
