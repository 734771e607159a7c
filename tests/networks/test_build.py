"""Networks through a run folder and back, ours and timm's way; every size and preprocessing; what cannot be built."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from timm.data import resolve_model_data_config

from tlkit import __version__
from tlkit.config import Preprocess
from tlkit.errors import TlkitError
from tlkit.networks.build import Loaded, architecture, build, save_network, weight_bytes
from tlkit.networks.freezing import freeze
from tlkit.preprocessing import Preprocessing

CLASSES = (
    "chien",
    "кошка",
    "猫 und Hund",
    'a "quoted", name',
    "caf\udce9",
)  # the last is not Unicode, as a folder can be
FAMILIES = (
    "test_resnet test_efficientnet test_vit test_vit2 test_convnext test_byobnet test_mambaout levit_128s coat_tiny "
    "deit_tiny_distilled_patch16_224 densenet121 tf_efficientnet_lite0"
)
LARGER_FAMILIES = "swin_tiny_patch4_window7_224 inception_v3 vgg11 convnextv2_atto eva02_tiny_patch14_336 volo_d1_224"
"""From all kinds: with tensors under two names (CoaT), two classifiers (DeiT), buffers alone (Swin), other crops."""


def slow(*names: str) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.slow) for name in names]


def trained(name: str, preprocess: Preprocess | None = None, classes: tuple[str, ...] = CLASSES) -> Loaded:
    """As a run leaves a network: another head, other values in every tensor."""
    torch.manual_seed(1)
    loaded = build(name, "random", preprocess)
    loaded.network.reset_classifier(len(classes))
    with torch.no_grad():
        for tensor in loaded.network.parameters():
            tensor.add_(torch.randn_like(tensor) * 0.01)
        for key, buffer in loaded.network.named_buffers():
            if key.endswith(("running_mean", "running_var")):
                buffer.add_(torch.rand_like(buffer) * 0.1)
    return replace(loaded, classes=classes)


def logits(network: Any, size: int, channels: int = 3) -> torch.Tensor:
    images = torch.linspace(-1, 1, 2 * channels * size * size).view(2, channels, size, size)
    with torch.inference_mode():
        return network.eval()(images)


def line_of(caught: pytest.ExceptionInfo[TlkitError]) -> str:
    line = str(caught.value)
    assert "\n" not in line
    return line


# A run folder and back


@pytest.mark.parametrize("name", [*FAMILIES.split(), *slow(*LARGER_FAMILIES.split())])
def test_round_trip(tmp_path: Path, name: str) -> None:
    loaded = trained(name)
    save_network(tmp_path, loaded)
    size = loaded.preprocessing.size
    expected = logits(loaded.network, size)
    assert expected.shape == (2, len(CLASSES))

    again = build(str(tmp_path), "default")
    assert (again.name, again.classes, again.weights) == (name, CLASSES, f"run {tmp_path}")
    assert again.preprocessing == loaded.preprocessing
    assert again.remarks == [] and not again.network.training
    assert torch.equal(logits(again.network, size), expected)

    timms = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert torch.equal(logits(timms, size), expected)
    assert Preprocessing.from_timm(resolve_model_data_config(timms)) == loaded.preprocessing
    assert timms.pretrained_cfg["label_names"] == list(CLASSES)
    assert timms.num_classes == len(CLASSES)

    by_weights = build(name, str(tmp_path))
    assert torch.equal(logits(by_weights.network, size), expected)
    assert (by_weights.classes, by_weights.preprocessing) == (CLASSES, loaded.preprocessing)

    by_file = build(name, str(tmp_path / "model.safetensors"))
    assert torch.equal(logits(by_file.network, size), expected)
    assert by_file.remarks == [
        f"head re-made for the {len(CLASSES)} classes of {tmp_path / 'model.safetensors'}, instead of 1000"
    ]


def test_files_of_a_run(tmp_path: Path) -> None:
    loaded = trained("test_resnet")
    save_network(tmp_path, loaded)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    stored = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert stored["architecture"] == architecture(tmp_path) == "test_resnet"
    assert stored["num_classes"] == len(CLASSES)
    assert stored["label_names"] == list(CLASSES)
    assert stored["tlkit"] == {
        "version": __version__,
        "preprocessing": loaded.preprocessing.to_dict(),
        "classes": list(CLASSES),
    }
    state = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert state.keys() == loaded.network.state_dict().keys()
    assert sum(tensor.numel() * tensor.element_size() for tensor in state.values()) == weight_bytes(loaded.network)
    assert weight_bytes(loaded.network) <= (tmp_path / "model.safetensors").stat().st_size


def test_same_network_same_bytes(tmp_path: Path) -> None:
    """Neither layout nor freezing shows in the file."""
    contents = []
    for number in range(3):
        loaded = trained("test_resnet")
        if number == 1:
            loaded.network.to(memory_format=torch.channels_last)
        if number == 2:
            freeze(loaded.network, ["stem", "stage1"])
        folder = tmp_path / str(number)
        folder.mkdir()
        save_network(folder, loaded)
        contents.append([(folder / name).read_bytes() for name in ("model.safetensors", "config.json")])
    assert contents[0] == contents[1] == contents[2]


def test_run_of_a_run(tmp_path: Path) -> None:
    """A run that started from a run: no trace of the first one's classes."""
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    save_network(first, trained("test_vit"))
    loaded = build(str(first), "default")
    loaded.network.reset_classifier(2)
    save_network(second, replace(loaded, classes=("a", "b")))
    again = build(str(second), "default")
    assert (again.name, again.classes, again.network.num_classes) == ("test_vit", ("a", "b"), 2)
    assert "кошка" not in (second / "config.json").read_text() and "chien" not in (second / "config.json").read_text()


def test_untrained_network_of_a_run(tmp_path: Path) -> None:
    loaded = trained("test_resnet")
    save_network(tmp_path, loaded)
    fresh = build(str(tmp_path), "random")
    assert fresh.weights == "random"
    assert fresh.classes == CLASSES and fresh.preprocessing == loaded.preprocessing
    assert not torch.equal(logits(fresh.network, 160), logits(loaded.network, 160))


def test_weights_with_a_run(tmp_path: Path) -> None:
    save_network(tmp_path, trained("test_resnet"))
    assert build(str(tmp_path), str(tmp_path)).weights == f"run {tmp_path}"
    with pytest.raises(
        TlkitError, match=r"--weights: a run brings its own weights; leave it out, or give --model a name"
    ):
        build(str(tmp_path), "other.safetensors")


def test_run_of_another_architecture(tmp_path: Path) -> None:
    save_network(tmp_path, trained("test_resnet"))
    with pytest.raises(TlkitError) as caught:
        build("test_vit.r160_in1k", str(tmp_path))
    expected = f"{tmp_path}: this run holds a test_resnet, not a test_vit.r160_in1k; give --model {tmp_path}"
    assert line_of(caught) == expected
    assert build("test_resnet.r160_in1k", str(tmp_path)).name == "test_resnet"


def test_folder_that_timm_wrote(tmp_path: Path) -> None:
    network = timm.create_model("test_resnet", num_classes=2)
    timm.models.save_for_hf(network, tmp_path, model_config={"label_names": ["a", "b"]}, safe_serialization=True)
    loaded = build(str(tmp_path), "default")
    assert loaded.classes == ("a", "b")
    assert loaded.preprocessing == build("test_resnet", "random").preprocessing
    assert torch.equal(logits(loaded.network, 160), logits(network, 160))


@pytest.mark.parametrize("name", ["inception_resnet_v2", "nasnetalarge"])
@pytest.mark.slow
def test_label_offset(tmp_path: Path, name: str) -> None:
    """Some public weights have a class of background, which is cut off on loading and never again."""
    save_network(tmp_path, loaded := trained(name))
    size = loaded.preprocessing.size
    assert torch.equal(logits(build(str(tmp_path), "default").network, size), logits(loaded.network, size))


# Preprocessing and image size


OTHER = Preprocess(crop=0.8, crop_mode="border", interpolation="lanczos", mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))


@pytest.mark.parametrize(
    "name, preprocess",
    [
        ("test_resnet", OTHER),
        ("test_resnet", replace(OTHER, image_size=96)),
        ("test_resnet", Preprocess(crop=1.0, crop_mode="squash")),
        ("test_vit", replace(OTHER, image_size=96)),
        ("test_efficientnet", Preprocess(image_size=64, interpolation="nearest")),
        ("tf_efficientnet_lite0", Preprocess(mean=(0, 0, 0), std=(1, 1, 1))),
        ("resnet18.fb_swsl_ig1b_ft_in1k", replace(OTHER, image_size=96)),  # test time settings of its own
    ],
)
def test_preprocessing_goes_with_the_weights(tmp_path: Path, name: str, preprocess: Preprocess) -> None:
    loaded = trained(name, preprocess)
    for key, value in vars(preprocess).items():
        found = getattr(loaded.preprocessing, "size" if key == "image_size" else key)
        usual = getattr(build(name, "random").preprocessing, "size" if key == "image_size" else key)
        assert found == (usual if value is None else value)
    save_network(tmp_path, loaded)
    size = loaded.preprocessing.size
    again, timms = build(str(tmp_path), "default"), timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert again.preprocessing == loaded.preprocessing
    for use_test_size in (False, True):
        config = resolve_model_data_config(timms, use_test_size=use_test_size)
        assert Preprocessing.from_timm(config) == loaded.preprocessing
    assert torch.equal(logits(again.network, size), logits(loaded.network, size))
    assert torch.equal(logits(timms, size), logits(loaded.network, size))


def test_overrides_of_a_run(tmp_path: Path) -> None:
    loaded = trained("test_resnet", OTHER)
    save_network(tmp_path, loaded)
    again = build(str(tmp_path), "default", Preprocess(image_size=96, crop=0.9))
    assert again.preprocessing == replace(loaded.preprocessing, size=96, crop=0.9)


@pytest.mark.parametrize(
    "name", ["test_vit", "deit_tiny_distilled_patch16_224", *slow("swin_tiny_patch4_window7_224", "mvitv2_tiny")]
)
def test_fixed_size_network_at_another_size(tmp_path: Path, name: str) -> None:
    """From random, a file, a run, and the run of another size, position embeddings as timm interpolates them."""
    native = trained(name)
    usual = native.preprocessing.size
    assert timm.models.get_pretrained_cfg(name).fixed_input_size
    folder, smaller = tmp_path / "native", tmp_path / "smaller"
    folder.mkdir()
    smaller.mkdir()
    save_network(folder, native)
    timms = timm.create_model(f"local-dir:{folder}", pretrained=True, img_size=96)
    expected = logits(timms, 96)

    from_run = build(str(folder), "default", Preprocess(image_size=96))
    from_file = build(name, str(folder / "model.safetensors"), Preprocess(image_size=96))
    assert from_run.preprocessing.size == from_file.preprocessing.size == 96
    for loaded in (from_run, from_file):
        assert torch.equal(logits(loaded.network, 96), expected)
        assert "state_dict" not in loaded.network.pretrained_cfg

    save_network(smaller, from_file)
    again = build(str(smaller), "default")
    assert again.preprocessing.size == 96
    assert torch.equal(logits(again.network, 96), logits(from_file.network, 96))
    own_size = build(name, str(smaller / "model.safetensors"), Preprocess(image_size=96))
    assert torch.equal(logits(own_size.network, 96), logits(from_file.network, 96))
    assert logits(build(str(smaller), "default", Preprocess(image_size=usual)).network, usual).shape == (
        2,
        len(CLASSES),
    )


@pytest.mark.parametrize(
    "name, size, reason",
    [
        ("inception_v3", 32, "the network does not take images of 32 px ("),
        ("maxvit_rmlp_pico_rw_256", 200, "the network does not take images of 200 px (height (50) must be divisible"),
        ("levit_128s", 100, "the network does not take images of 100 px ("),
        ("xcit_nano_12_p16_224", 100, "cannot be built (`patch_size` should divide image dimensions evenly)"),
    ],
)
def test_size_that_a_network_does_not_take(name: str, size: int, reason: str) -> None:
    with pytest.raises(TlkitError) as caught:
        build(name, "random", Preprocess(image_size=size))
    assert reason in line_of(caught)
    assert "size" in line_of(caught).split("; ")[-1]


def test_size_that_the_network_of_a_run_does_not_take(tmp_path: Path) -> None:
    save_network(tmp_path, trained("densenet121"))
    with pytest.raises(TlkitError, match=r"--image-size: the network does not take images of 16 px \(Given input size"):
        build(str(tmp_path), "default", Preprocess(image_size=16))


def test_weights_that_cannot_be_interpolated(tmp_path: Path) -> None:
    save_network(tmp_path, trained("levit_128s"))
    with pytest.raises(TlkitError) as caught:
        build(str(tmp_path), "default", Preprocess(image_size=192))
    assert (
        "the weights cannot be loaded for images of 192 px (Error(s) in loading state_dict for LevitDistilled: size m"
        in (line_of(caught))
    )
    assert line_of(caught).endswith("; leave out --image-size")
    with pytest.raises(TlkitError, match="the weights cannot be loaded for images of 192 px"):
        build("levit_128s", str(tmp_path / "model.safetensors"), Preprocess(image_size=192))


@pytest.mark.parametrize(
    "name", ["test_resnet", "test_vit", "inception_v3", "tf_efficientnet_lite0", "resnet50.a1_in1k"]
)
def test_default_preprocessing_is_timms(name: str) -> None:
    loaded = build(name, "random")
    config = timm.models.get_pretrained_cfg(name)
    found = loaded.preprocessing
    assert (found.size, found.crop, found.mean, found.std) == (
        config.input_size[-1],
        config.crop_pct,
        config.mean,
        config.std,
    )
    assert loaded.classes is None, "nobody knows what the outputs of random weights mean"


def test_random_weights_follow_the_seed() -> None:
    def weights(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return build("test_resnet", "random").network.fc.weight

    assert torch.equal(weights(3), weights(3))
    assert not torch.equal(weights(3), weights(4))


# What cannot be built


@pytest.mark.parametrize(
    "model, expected",
    [
        ("resnet8", "resnet8: unknown model; did you mean 'resnet"),
        ("vit_tiny_patch16", "unknown model; did you mean 'vit_tiny_patch16_384' or 'vit_tiny_patch16_224'"),
        ("qwertzuiop", "qwertzuiop: unknown model; it is neither a timm name nor a run's folder"),
        ("resnet18.a1_in2k", "resnet18.a1_in2k: there are no weights of that tag; did you mean 'resnet18.a1_in1k'"),
        ("test_vit4.zzz", "test_vit4.zzz: there are no weights of that tag; "),
        ("/no/such/folder", "/no/such/folder: unknown model; it is neither"),
        ("local-dir:/no/such/folder", "unknown model; it is neither"),
    ],
)
@pytest.mark.parametrize("weights", ["random", "default"])
def test_unknown_model(model: str, weights: str, expected: str) -> None:
    with pytest.raises(TlkitError) as caught:
        build(model, weights)
    assert expected in line_of(caught)


def test_unfinished_run(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").touch()
    with pytest.raises(TlkitError) as caught:
        build(str(tmp_path), "default")
    assert line_of(caught) == f"{tmp_path}: this folder is not a finished run; give a timm name, or a run's folder"


def test_folder_of_a_networks_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of images or notes that happens to be called so is not in the way."""
    (tmp_path / "test_resnet").mkdir()
    monkeypatch.chdir(tmp_path)
    assert build("test_resnet", "random").name == "test_resnet"


@pytest.mark.slow
def test_network_without_a_classifier() -> None:
    with pytest.raises(TlkitError, match="qwen3_vit_88m_enc: has no classifier; choose a classification network"):
        build("qwen3_vit_88m_enc", "random")


BROKEN = {
    "no JSON": ("config.json", "{", "config.json: cannot be read"),
    "no object": ("config.json", "[1, 2]", "config.json: "),
    "an empty object": ("config.json", "{}", "config.json: does not describe a timm network"),
    "of another library": ("config.json", '{"architectures": ["BertModel"]}', "does not describe a timm network"),
    "no text": ("config.json", b"\xff\xfe\x00\x01", "config.json: cannot be read"),
    "no pretrained_cfg": ("config.json", '{"architecture": "test_resnet"}', "does not describe a timm network"),
    "an unknown network": (
        "config.json",
        '{"architecture": "resnet_of_mine", "pretrained_cfg": {}}',
        "the run's network cannot be loaded (Unknown model (resnet_of_mine))",
    ),
    "truncated weights": (
        "model.safetensors",
        b"\x90\x00",
        "the run's network cannot be loaded (Error while deserializing",
    ),
    "empty weights": ("model.safetensors", b"", "the run's network cannot be loaded ("),
    "weights that are text": ("model.safetensors", "hello, world, hello", "the run's network cannot be loaded ("),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_run(tmp_path: Path, kind: str) -> None:
    name, content, expected = BROKEN[kind]
    save_network(tmp_path, trained("test_resnet"))
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(TlkitError) as caught:
        build(str(tmp_path), "default")
    assert expected in line_of(caught)
    assert str(tmp_path) in line_of(caught)
    if name == "config.json" and "unknown" not in kind:
        with pytest.raises(TlkitError):
            build("test_resnet", str(tmp_path))
        with pytest.raises(TlkitError):
            architecture(tmp_path)


def test_run_cut_short(tmp_path: Path) -> None:
    save_network(tmp_path, trained("test_resnet"))
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(TlkitError, match="the run's network cannot be loaded"):
        build(str(tmp_path), "default")


def test_weights_of_another_network_in_a_run(tmp_path: Path) -> None:
    save_network(tmp_path, trained("test_resnet"))
    safetensors.torch.save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(TlkitError, match=r"the run's network cannot be loaded \(Error\(s\) in loading state_dict"):
        build(str(tmp_path), "default")


@pytest.mark.parametrize(
    "change",
    [lambda ours: ours.pop("preprocessing") and None, lambda ours: ours["preprocessing"].pop("mean")],
)
def test_preprocessing_left_out(tmp_path: Path, change: Any) -> None:
    """The whole block missing means that timm wrote the folder; a part of it is a mistake."""
    save_network(tmp_path, loaded := trained("test_resnet", OTHER))
    stored = json.loads((tmp_path / "config.json").read_text())
    whole = change(stored["tlkit"]) is None
    (tmp_path / "config.json").write_text(json.dumps(stored))
    if whole:
        assert build(str(tmp_path), "default").preprocessing == loaded.preprocessing
    else:
        with pytest.raises(TlkitError, match="preprocessing"):
            build(str(tmp_path), "default")


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="the administrator may read and write everything")
def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(TlkitError):
        save_network(tmp_path, trained("test_resnet"))
