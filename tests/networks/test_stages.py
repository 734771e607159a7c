"""The stage partition of many timm networks, built on the meta device, against what their forward pass really does."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import chain, pairwise
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from tlkit.networks.stages import Stage, find_stages, stages

SEED_FAMILIES = (
    *(f"vgg{depth}{norm}" for depth in (11, 13, 16, 19) for norm in ("", "_bn")),
    *(f"resnet{depth}" for depth in (18, 34, 50, 101, 152)),
    "resnext50_32x4d",
    "resnext101_32x8d",
    *(f"densenet{depth}" for depth in (121, 161, 169, 201)),
)
COMMON_FAMILIES = (
    "tf_efficientnet_lite0 efficientnet_b0 mobilenetv2_100 mobilenetv3_small_100 mnasnet_100 ghostnet_050 rexnet_100 "
    "convnext_atto convnextv2_atto inception_next_atto regnetx_002 regnety_002 nfnet_l0 resnetv2_50 res2net50_14w_8s "
    "skresnet18 resnest14d legacy_senet154 tresnet_m cspresnet50 ese_vovnet19b_slim dpn68 dla34 hrnet_w18_small "
    "inception_v3 inception_v4 inception_resnet_v2 xception41 legacy_xception repvgg_a0 selecsls42 "
    "vit_tiny_patch16_224 deit_tiny_patch16_224 deit_tiny_distilled_patch16_224 beit_base_patch16_224 "
    "eva02_tiny_patch14_336 vit_relpos_base_patch16_224 swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 "
    "mixer_s32_224 poolformer_s12 pit_ti_224 cait_xxs24_224 levit_128s convit_tiny volo_d1_224 xcit_nano_12_p16_224 "
    "twins_svt_small twins_pcpvt_small mvitv2_tiny crossvit_tiny_240 coat_lite_tiny coat_tiny pvt_v2_b0 nest_tiny "
    "mobilevit_xxs edgenext_xx_small coatnet_nano_rw_224 maxvit_rmlp_pico_rw_256 efficientformer_l1 efficientvit_b0 "
    "efficientvit_m0 efficientvim_m1 fastvit_t8 hgnet_tiny tiny_vit_5m_224 davit_tiny focalnet_tiny_srf visformer_tiny "
    "hiera_tiny_224 repvit_m0_9 starnet_s1 csatv2 test_vit2"
)
SLOW_FAMILIES = "nasnetalarge pnasnet5large gemma4_vit_167m mobilenetv5_300m convmixer_768_32 sequencer2d_s"

SIDE_BY_SIDE = {
    "coat_lite_tiny": "patch embeddings and position encodings of all scales are defined, and so cut, before the first",
    "coat_tiny": "the same, and its parallel blocks run all scales at once",
    "efficientvim_m1": "each stage has a norm and a classifier of its own, which is the neck's and the head's",
}
"""Networks in which modules of a later stage run before those of an earlier one."""

USED_LATE = {
    "cait_xxs24_224": {"cls_token"},  # joins the patches after the last block
    "xcit_nano_12_p16_224": {"cls_token"},
    "convit_tiny": {"cls_token"},
    "volo_d1_224": {"cls_token", "pos_embed"},
    "visformer_tiny": {"pos_embed2", "pos_embed3"},
    "efficientvim_m1": {"weights"},  # of its classifiers
    "gemma4_vit_167m": {"pooler.std_bias", "pooler.std_scale"},
    "coat_lite_tiny": {"cls_token", "patch_embed", "cpe", "crpe"},
    "coat_tiny": {"cls_token", "patch_embed", "cpe", "crpe", "serial_blocks"},
}
"""Beginnings of the names of parameters that come into play after the stage that holds them."""


def meta_network(name: str) -> Any:
    with torch.device("meta"):
        return timm.create_model(name).eval()


@pytest.fixture(scope="module", params=[*SEED_FAMILIES, *COMMON_FAMILIES.split()])
def network(request: pytest.FixtureRequest) -> Any:
    return meta_network(request.param)


def test_is_an_ordered_partition(network: Any) -> None:
    check_partition(network, stages(network))


def check_partition(network: Any, cut: tuple[Stage, ...]) -> None:
    names = [stage.name for stage in cut]
    numbered = [f"stage{number}" for number in range(1, len([name for name in names if name.startswith("stage")]) + 1)]
    assert names == [name for name in ("stem", *numbered, "neck", "head") if name in names]
    assert len(numbered) >= 2
    assert names[0] == "stem"
    assert ("head" in names) == (network.num_classes > 0)

    own = [name for name, _ in network.named_parameters()]
    assert sorted(chain(*(stage.parameters for stage in cut))) == sorted(own), "each parameter in exactly one stage"
    for stage in cut:
        assert stage.parameters
        assert list(stage.parameters) == [name for name in own if name in set(stage.parameters)]
        assert (stage.output != "") == stage.name.startswith("stage")
    modules = [name for name, _ in network.named_modules()]
    assert sorted(chain(*(stage.modules for stage in cut))) == sorted(modules), "each module in exactly one stage"
    for stage, later in pairwise(cut):  # nothing inside of what makes a feature map is of a later stage
        assert not stage.output or not any(name.startswith(f"{stage.output}.") for name in later.modules)
    for stage in cut:  # a layer has the mode of the stage that its parameters belong to, above all a batch norm
        holders = {name.rpartition(".")[0] for name in stage.parameters}
        layers = {name for name in holders if not any(network.get_submodule(name).children())}
        norms = {name for name in holders if isinstance(network.get_submodule(name), nn.modules.batchnorm._NormBase)}
        assert layers | norms <= set(stage.modules)
    if network.num_classes > 0:
        assert "" in cut[-1].modules
        assert set(cut[-1].parameters) == classifier_parameters(network)


def classifier_parameters(network: Any) -> set[str]:
    found = network.get_classifier()
    parts = list(found) if isinstance(found, tuple | list) else [found]
    if hasattr(network, "aux_head"):  # VOLO's classifier of patches
        parts.append(network.aux_head)
    tensors = {id(parameter) for part in parts for parameter in part.parameters()}
    return {name for name, parameter in network.named_parameters() if id(parameter) in tensors}


def test_is_the_order_of_execution(network: Any) -> None:
    check_order(network, stages(network))


def check_order(network: Any, cut: tuple[Stage, ...]) -> None:
    """All modules with parameters of a stage run before those of the next, and feature maps depend on nothing later."""
    name = network.pretrained_cfg["architecture"]
    number_of = {parameter: number for number, stage in enumerate(cut) for parameter in stage.parameters}
    called: list[tuple[int, str]] = []
    finished: list[nn.Module] = []
    maps: dict[int, list[Any]] = {}
    for module_name, module in network.named_modules():
        own = [f"{module_name}.{key}" for key, _ in module.named_parameters(recurse=False)] if module_name else []
        if own:
            number = number_of[own[0]]
            assert {number_of[key] for key in own} == {number}
            module.register_forward_pre_hook(lambda *_, call=(number, module_name): called.append(call))
        module.register_forward_hook(lambda module, *_: finished.append(module))
    for number, stage in enumerate(cut):
        if stage.output:
            module = network.get_submodule(stage.output)
            module.register_forward_hook(lambda _, __, out, number=number: maps.setdefault(number, []).append(out))
    network(torch.zeros(2, *network.pretrained_cfg["input_size"], device="meta"))

    if name not in SIDE_BY_SIDE:
        numbers = [number for number, _ in called]
        assert numbers == sorted(numbers), called
    if cut[-1].name == "head":  # dropout belongs to it exactly where nothing with tensors comes between
        head = {network.get_submodule(module_name) for module_name in cut[-1].modules}
        body = [index for index, module in enumerate(finished) if module not in head and has_tensors(module)]
        for index, module in enumerate(finished):
            if type(module) is nn.Dropout:
                assert (module in head) == (index > max(body))
    assert [cut[number].name for number in sorted(maps)] == [stage.name for stage in cut if stage.output]
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    for number, outputs in maps.items():
        used = {names[leaf] for leaf in leaves(outputs)}
        assert {key for key in used if number_of[key] > number} == set()
        late = {key for key in set(number_of) - used if number_of[key] <= number}
        assert late == {key for key in late if key.startswith(tuple(USED_LATE.get(name, ())))}, cut[number].name


def has_tensors(module: nn.Module) -> bool:
    return any(True for _ in chain(module.parameters(recurse=False), module.buffers(recurse=False)))


def leaves(outputs: Any) -> set[int]:
    """Ids of the parameters that ``outputs`` were computed from, out of the graph that autograd recorded."""
    waiting = [tensor.grad_fn for tensor in tensors(outputs)]
    seen, found = set(), set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        waiting += [parent for parent, _ in node.next_functions]
    return found


def tensors(outputs: Any) -> Iterator[Tensor]:
    if isinstance(outputs, Tensor):
        yield outputs
    elif isinstance(outputs, list | tuple | dict):
        for item in outputs.values() if isinstance(outputs, dict) else outputs:
            yield from tensors(item)


def sizes(network: nn.Module) -> list[tuple[str, int]]:
    return [
        (stage.name, sum(network.get_parameter(name).numel() for name in stage.parameters)) for stage in stages(network)
    ]


def conv(inputs: int, outputs: int, kernel: int, bias: bool = True) -> int:
    return outputs * (inputs * kernel**2 + bias)


def resnet50_sizes() -> list[tuple[str, int]]:
    """He et al. 2015, table 1; convolutions without bias, each with a batch norm."""
    found, inputs = [("stem", conv(3, 64, 7, False) + 2 * 64)], 64
    for number, (width, blocks) in enumerate([(64, 3), (128, 4), (256, 6), (512, 3)], start=1):
        total = conv(inputs, 4 * width, 1, False) + 2 * 4 * width  # the shortcut of the first block
        for _ in range(blocks):
            total += conv(inputs, width, 1, False) + conv(width, width, 3, False) + conv(width, 4 * width, 1, False)
            total += 2 * (width + width + 4 * width)
            inputs = 4 * width
        found.append((f"stage{number}", total))
    return [*found, ("head", 1000 * (2048 + 1))]


def vgg16_sizes() -> list[tuple[str, int]]:
    """Simonyan and Zisserman 2014, column D: the two hidden layers before the classifier are the neck."""
    found, inputs = [], 3
    for name, width, layers in [
        ("stem", 64, 2),
        ("stage1", 128, 2),
        *((f"stage{2 + k}", (256, 512, 512)[k], 3) for k in range(3)),
    ]:
        total = 0
        for _ in range(layers):
            total += conv(inputs, width, 3)
            inputs = width
        found.append((name, total))
    return [*found, ("neck", conv(512, 4096, 7) + conv(4096, 4096, 1)), ("head", conv(4096, 1000, 1))]


def densenet121_sizes() -> list[tuple[str, int]]:
    """Huang et al. 2016, table 1, growth rate 32: a transition belongs to the stage that it leads to."""
    found, width = [("stem", conv(3, 64, 7, False) + 2 * 64)], 64
    for number, layers in enumerate([6, 12, 24, 16], start=1):
        total = 0
        if number > 1:
            total += 2 * width + conv(width, width // 2, 1, False)
            width //= 2
        for _ in range(layers):
            total += 2 * width + conv(width, 128, 1, False) + 2 * 128 + conv(128, 32, 3, False)
            width += 32
        found.append((f"stage{number}", total + (2 * width if number == 4 else 0)))  # the last norm
    return [*found, ("head", 1000 * (1024 + 1))]


def vit_tiny_sizes() -> list[tuple[str, int]]:
    """Touvron et al. 2020: width 192, depth 12, patches of 16 px, 196 of them and the class token."""
    width = 192
    block = conv(width, 3 * width, 1) + conv(width, width, 1) + 2 * 2 * width  # attention, two norms
    block += conv(width, 4 * width, 1) + conv(4 * width, width, 1)
    stem = conv(3, width, 16) + width + 197 * width
    return [("stem", stem), *((f"stage{k}", block) for k in range(1, 13)), ("neck", 2 * width), ("head", 1000 * 193)]


def lite0_sizes() -> list[tuple[str, int]]:
    """Tan and Le 2019, table 1, without squeeze and excitation, stem and head as wide as B0's."""
    found, inputs = [("stem", conv(3, 32, 3, False) + 2 * 32)], 32
    table = [(1, 16, 1, 3), (6, 24, 2, 3), (6, 40, 2, 5), (6, 80, 3, 3), (6, 112, 3, 5), (6, 192, 4, 5), (6, 320, 1, 3)]
    total = 0
    for number, (expansion, width, blocks, kernel) in enumerate(table):
        for _ in range(blocks):
            hidden = expansion * inputs
            total += conv(inputs, hidden, 1, False) + 2 * hidden if expansion > 1 else 0
            total += hidden * kernel**2 + 2 * hidden + conv(hidden, width, 1, False) + 2 * width
            inputs = width
        if number in (0, 1, 2, 4, 6):  # the last rows before the next stride
            found.append((f"stage{len(found)}", total))
            total = 0
    return [*found, ("neck", conv(320, 1280, 1, False) + 2 * 1280), ("head", 1000 * 1281)]


@pytest.mark.parametrize(
    "name, closed_form, golden",
    [
        ("resnet50", resnet50_sizes(), 25_557_032),
        ("vgg16", vgg16_sizes(), 138_357_544),
        ("densenet121", densenet121_sizes(), 7_978_856),
        ("vit_tiny_patch16_224", vit_tiny_sizes(), 5_717_416),
        ("tf_efficientnet_lite0", lite0_sizes(), 4_652_008),
    ],
)
def test_sizes(name: str, closed_form: list[tuple[str, int]], golden: int) -> None:
    assert sizes(meta_network(name)) == closed_form
    assert sum(size for _, size in closed_form) == golden


def test_sizes_in_figures() -> None:
    assert sizes(meta_network("resnet50")) == [
        ("stem", 9_536),
        ("stage1", 215_808),
        ("stage2", 1_219_584),
        ("stage3", 7_098_368),
        ("stage4", 14_964_736),
        ("head", 2_049_000),
    ]


@pytest.mark.parametrize(
    "name, outputs",
    [
        ("resnet18", ["layer1", "layer2", "layer3", "layer4"]),
        ("vgg11", ["features.4", "features.9", "features.14", "features.19"]),
        ("densenet121", [f"features.{name}" for name in ("denseblock1", "denseblock2", "denseblock3", "norm5")]),
        ("convnext_atto", [f"stages.{number}" for number in range(4)]),
        ("legacy_xception", ["block2", "block3", "block12", "act4"]),  # timm's are inside of blocks
        ("twins_svt_small", ["blocks.0.1", "blocks.1.1", "blocks.2.9", "blocks.3.3"]),  # timm's are no modules
        ("gemma4_vit_167m", [f"encoder.blocks.{number}" for number in range(16)]),
    ],
)
def test_feature_maps(name: str, outputs: list[str]) -> None:
    assert [stage.output for stage in stages(meta_network(name)) if stage.output] == outputs


@pytest.mark.parametrize(
    "name, inside, stage",
    [
        ("vgg16", "pre_logits.drop", "neck"),  # between the hidden layers, not directly before the classifier
        ("vgg16", "head.drop", "head"),
        ("densenet121", "features", "stage4"),  # reaches over the stages to the last
        ("convnext_atto", "head.norm", "neck"),
        ("convnext_atto", "head.drop", "head"),
        ("convnext_atto", "head", "head"),
        ("vit_tiny_patch16_224", "blocks.3.attn", "stage4"),  # has dropout of its own, written as a function
        ("vit_tiny_patch16_224", "head_drop", "head"),
        ("resnet18", "global_pool", "head"),
        ("resnet18", "", "head"),  # whose mode is that of the dropout before its classifier
        ("resnet18", "maxpool", "stage1"),
        ("resnet18", "layer4.1.act2", "stage4"),
        ("resnet18", "layer4", "stage4"),
        ("densenet121", "features.norm5.act", "stage4"),
        ("mobilenetv2_100", "bn2.act", "neck"),
        ("densenet121", "features.denseblock2.denselayer1", "stage2"),
        ("deit_tiny_distilled_patch16_224", "head_dist", "head"),
        ("levit_128s", "head.bn", "head"),  # made anew with the classifier
        ("volo_d1_224", "aux_head", "head"),
        ("twins_svt_small", "patch_embeds.0", "stem"),
        ("twins_svt_small", "pos_block.0", "stage1"),
        ("twins_svt_small", "patch_embeds.1", "stage2"),
    ],
)
def test_stage_of_a_module(name: str, inside: str, stage: str) -> None:
    network = meta_network(name)
    network.get_submodule(inside)
    assert [found.name for found in stages(network) if inside in found.modules] == [stage]


def test_head_of_another_size() -> None:
    network = timm.create_model("test_resnet")
    before = sizes(network)
    network.reset_classifier(7)
    assert sizes(network) == [*before[:-1], ("head", 7 * (network.head_hidden_size + 1))]


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext"])
def test_no_classes_no_head(name: str) -> None:
    network = timm.create_model(name)
    before = sizes(network)
    network.reset_classifier(0)
    assert sizes(network) == before[:-1]
    check_partition(network, stages(network))
    assert "" in stages(network)[-1].modules


class Sketch(nn.Module):
    """A network with a stage of a single pooling layer, and dropout outside of the blocks; one block is used twice."""

    feature_info: tuple[dict[str, str], ...] = ({"module": "one"}, {"module": "pool"}, {"module": "two"})

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.one = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
        self.drop = nn.Dropout()
        self.pool = nn.MaxPool2d(2)
        self.two = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), self.one)
        self.last = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout())
        self.fc = nn.Linear(4, 2)

    def get_classifier(self) -> nn.Module:
        return self.fc

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.last(self.two(self.pool(self.drop(self.one(self.stem(images)))))))


def test_what_has_no_parameters_goes_with_what_follows() -> None:
    cut = {stage.name: stage for stage in stages(Sketch())}
    assert list(cut) == ["stem", "stage1", "stage2", "head"]
    assert {"drop", "pool"} <= set(cut["stage2"].modules)
    assert cut["stage2"].output == "two"
    assert {"", "last", "last.2", "fc"} == set(cut["head"].modules) - {"last.0", "last.1"}
    assert cut["stage1"].parameters == ("one.0.weight", "one.0.bias", "one.1.weight", "one.1.bias")


def test_find_stages() -> None:
    network = timm.create_model("test_resnet")
    assert [stage.name for stage in find_stages(network, {"head", "stem"})] == ["stem", "head"]
    assert find_stages(network, ()) == ()


NOT_CLASSIFIERS = (
    "deepseek_vit_412m_enc gemma4_vit_167m_enc gemma4_vit_570m_enc mobilenetv5_300m_enc qwen3_vit_306m_enc "
    "qwen3_vit_416m_enc qwen3_vit_88m_enc"
)
"""timm's encoders of language models, which cannot be given a classifier."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", sorted(random.Random(20).sample(sorted({*timm.list_models()} - {*NOT_CLASSIFIERS.split()}), 100))
)
def test_any_timm_network(name: str) -> None:
    network = meta_network(name)
    check_partition(network, stages(network))


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW_FAMILIES.split())
def test_order_of_execution_in_larger_networks(name: str) -> None:
    network = meta_network(name)
    check_order(network, stages(network))


@pytest.mark.slow
@pytest.mark.parametrize("name", NOT_CLASSIFIERS.split())
def test_encoders_have_no_classifier(name: str) -> None:
    assert not hasattr(meta_network(name), "get_classifier")
