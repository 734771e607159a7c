"""The pass that everything shares: each image once, in order, whatever it stands beside and whoever decodes it."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn

from tlkit import compute, config
from tlkit.data import loading
from tlkit.data.loading import BadFile, ViewDataset
from tlkit.data.transforms import View, normalise
from tlkit.networks import quick
from tlkit.networks.forward import BATCH_SIZES, features_of, logits_of
from tlkit.networks.frozen_pass import FrozenPass, How
from tlkit.preprocessing import Preprocessing

SIDE = 32
PREPROCESSING = Preprocessing(
    size=SIDE, crop=1, crop_mode="squash", interpolation="bilinear", mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4)
)


class Made:
    """Random images in V views; row r shows picture ``shown[r]``, and some rows cannot be read."""

    def __init__(
        self, shown: Any, views: int = 1, bad: Any = (), fails: int | None = None, preprocessing: Any = PREPROCESSING
    ) -> None:
        self.shown, self.views, self.bad, self.fails = list(shown), views, set(bad), fails
        self.preprocessing = preprocessing
        self.threads: set[int] = set()

    def __len__(self) -> int:
        return len(self.shown)

    def picture(self, row: int) -> Tensor:
        random = torch.Generator().manual_seed(self.shown[row])
        return torch.randint(256, (self.views, 3, SIDE, SIDE), generator=random, dtype=torch.uint8)

    def __getitem__(self, row: int) -> tuple[int, Tensor | BadFile]:
        self.threads.add(threading.get_ident())
        if row == self.fails:
            raise ZeroDivisionError
        return row, BadFile(f"{row}.jpg", "broken") if row in self.bad else self.picture(row)


class Small(nn.Module):
    """A convolution, its batch norm, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.fc = nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.Linear(8, 5)
        self.norm.running_mean.normal_()  # type: ignore[union-attr, operator]

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.norm(self.conv(images)).relu().mean((2, 3)))

    def get_classifier(self) -> nn.Module:
        return self.fc


def whole(network: nn.Module, images: Tensor) -> Tensor:
    return network(images)


def how(batch_size: int | None = 4, workers: int | None = None, precision: Any = "fp32", **options: Any) -> How:
    accelerator = compute.accelerator(config.Compute(device="cpu", precision=precision))
    options.setdefault("say", lambda _: None)
    return How(accelerator, batch_size, workers, **options)


def passed(made: FrozenPass) -> tuple[list[int], Any, dict[int, str]]:
    """Rows, results (N, V, ...) and bad files of the whole pass."""
    rows: list[int] = []
    results, bad = [], {}
    for in_batch, found, unread in made:
        rows += in_batch.tolist()
        bad |= {row: file.path for row, file in unread}
        if len(in_batch):
            assert len(found if isinstance(found, Tensor) else found[0]) == len(in_batch)
            results.append(found)
    if results and isinstance(results[0], tuple):
        return rows, tuple(map(torch.cat, zip(*results, strict=True))), bad
    return rows, torch.cat(results) if results else None, bad


def by_hand(network: nn.Module, dataset: Made) -> Tensor:
    """Image by image, without any batches: (N, V, K)."""
    with torch.inference_mode():
        return torch.stack(
            [
                network.eval()(normalise(dataset.picture(row), dataset.preprocessing))
                for row in range(len(dataset))
                if row not in dataset.bad
            ]
        )


@pytest.fixture(params=["plain", "folded"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Either form, although there are few images."""
    monkeypatch.setattr(quick, "FOLDED_FROM", 1 if request.param == "folded" else 10**9)
    return request.param


@pytest.fixture
def folded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quick, "FOLDED_FROM", 1)


# What comes out


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize(
    ("count", "batch_size", "workers"),
    [
        *((count, 4, workers) for count in (1, 4, 11) for workers in (None, 0)),
        *((11, size, None) for size in (1, 16)),
        (17, None, None),
        (40, 2, None),
        (40, 8, 2),
    ],
)
def test_each_image_once_in_order(
    count: int, batch_size: int | None, views: int, workers: int | None, form: str
) -> None:
    """The last batch may be a part of one, and threads decode several at once."""
    network, dataset = Small(), Made(range(count), views)
    made = FrozenPass(network, dataset, whole, how(batch_size, workers))
    rows, found, bad = passed(made)
    assert made.form is not None and made.form.name == form
    assert rows == list(range(count)) and bad == {}
    assert found.shape == (count, views, 5)
    torch.testing.assert_close(found, by_hand(network, dataset), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("workers", [None, 0])
@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("bad", [{0}, {2, 3, 9}, {0, 1, 2, 3}, {4, 5, 6, 7}, {8, 9, 10}, set(range(11))], ids=str)
def test_bad_files_are_told_and_move_nothing(bad: set[int], views: int, workers: int | None, form: str) -> None:
    network, dataset = Small(), Made(range(11), views, bad)
    rows, found, told = passed(FrozenPass(network, dataset, whole, how(4, workers)))
    assert rows == [row for row in range(11) if row not in bad]
    assert told == {row: f"{row}.jpg" for row in bad}
    if rows:
        torch.testing.assert_close(found, by_hand(network, dataset), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("workers", [None, 0])
def test_an_empty_dataset_gives_nothing(workers: int | None, form: str) -> None:
    told: list[tuple[Any, ...]] = []
    options = how(4, workers, progress=lambda *now: told.append(now))
    assert list(FrozenPass(Small(), Made([]), whole, options, label="nothing")) == []
    assert told == [("nothing", 0, 0)]


@pytest.mark.parametrize("views", [1, 2])
def test_tuples_stay_tuples_and_maps_keep_their_axes(views: int, form: str) -> None:
    def both(network: Any, images: Tensor) -> tuple[Tensor, Tensor]:
        return network.norm(network.conv(images)), network(images)

    network, dataset = Small(), Made(range(7), views, {1})
    rows, (maps, logits), _ = passed(FrozenPass(network, dataset, both, how(3)))
    assert rows == [0, 2, 3, 4, 5, 6]
    assert maps.shape == (6, views, 8, 15, 15)
    with torch.inference_mode():
        expected = [network.norm(network.conv(normalise(dataset.picture(row), dataset.preprocessing))) for row in rows]
    torch.testing.assert_close(maps, torch.stack(expected), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits, by_hand(network, dataset), rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("folded")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("compute_", [logits_of, features_of], ids=["logits", "features"])
@pytest.mark.parametrize("name", ["test_resnet", "tf_efficientnet_lite0"])
def test_an_images_numbers_do_not_depend_on_its_batch(name: str, compute_: Any, precision: str) -> None:
    """Bit for bit: rotated, cut, beside images that cannot be read, and alone in the last batch."""
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=10)
    shown = list(range(21))

    def numbers(order: list[int], **options: Any) -> dict[int, bytes]:
        dataset = Made(order, **options)
        made = FrozenPass(network, dataset, compute_, how(8, precision=precision))
        rows, found, _ = passed(made)
        assert made.form is not None and made.form.name == "folded"
        return {order[row]: values.numpy().tobytes() for row, values in zip(rows, found, strict=True)}

    wanted = numbers(shown)
    assert len(set(wanted.values())) == 21
    assert numbers(shown[5:] + shown[:5]) == wanted
    assert numbers(shown[::-1]) == wanted
    assert numbers(shown[3:20]) == {key: wanted[key] for key in shown[3:20]}, "the last of 17 alone"
    assert numbers(shown, bad={0, 1, 2, 9}) == {key: wanted[key] for key in shown if key not in {0, 1, 2, 9}}


@pytest.mark.parametrize("folded_from", [1, 10**9])
def test_a_pass_can_be_made_again(folded_from: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quick, "FOLDED_FROM", folded_from)
    made = FrozenPass(Small(), Made(range(9)), whole, how())
    first, form = passed(made), made.form
    second = passed(made)
    assert made.form is form
    assert torch.equal(first[1], second[1])


# Which form


@pytest.mark.parametrize("images", [255, 256])
def test_images_in_all_decide(images: int) -> None:
    made = FrozenPass(Small(), Made([0] * images), whole, how(64))
    passed(made)
    assert made.form is not None and made.form.name == ("plain" if images < 256 else "folded")


def test_views_count_as_images() -> None:
    made = FrozenPass(Small(), Made([0] * 128, views=2), whole, how(64))
    passed(made)
    assert made.form is not None and made.form.name == "folded"


def test_what_is_left_of_a_work_is_computed_as_the_whole_of_it() -> None:
    """Bit for bit what it would have been, had it not been stopped."""
    network, shown = Small(), list(range(300))
    _, wanted, _ = passed(FrozenPass(network, Made(shown), whole, how(16)))
    rest = FrozenPass(network, Made(shown[-5:]), whole, how(16), whole=300)
    _, found, _ = passed(rest)
    assert rest.form is not None and rest.form.name == "folded"
    assert torch.equal(found, wanted[-5:])
    alone = FrozenPass(network, Made(shown[-5:]), whole, how(16))
    passed(alone)
    assert alone.form is not None and alone.form.name == "plain"


@pytest.mark.usefixtures("folded")
def test_the_form_is_tried_on_the_first_images_that_can_be_read() -> None:
    seen: list[int] = []

    def count(network: nn.Module, images: Tensor) -> Tensor:
        seen.append(len(images))
        return network(images)

    made = FrozenPass(Small(), Made(range(12), bad={0, 1, 2, 3, 5, 6, 7}), count, how(4))
    passed(made)
    assert made.form is not None and made.form.name == "folded"
    assert set(seen) == {1, 4}, "full batches, and one image to see what is to be folded"
    assert seen[-1] == 4


@pytest.mark.parametrize("folded_from", [1, 10**9])
def test_plain_runs_on_the_very_network(folded_from: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quick, "FOLDED_FROM", folded_from)
    network, seen = Small().train(), []

    def compute_(given: nn.Module, images: Tensor) -> Tensor:
        seen.append((given is network, len(images), given.training, torch.is_grad_enabled()))
        return given(images)

    made = FrozenPass(network, Made(range(10)), compute_, how(compile="always"), plain=True)
    passed(made)
    assert made.form is not None and made.form.name == "plain"
    assert seen == [(True, size, False, False) for size in (4, 4, 2)], "each image once, nothing tried, nothing filled"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_network_is_left_as_it_was(form: str, precision: str) -> None:
    network = Small().train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    passed(FrozenPass(network, Made(range(9)), whole, how(precision=precision)))
    after = network.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) and after[name].dtype == before[name].dtype for name in before)
    assert isinstance(network.norm, nn.BatchNorm2d)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in network.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_results_are_computed_in_the_precision_asked_for(form: str, precision: str) -> None:
    network, dataset = Small(), Made(range(9))
    _, found, _ = passed(FrozenPass(network, dataset, whole, how(precision=precision)))
    assert found.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    expected = by_hand(network, dataset)
    error = float((found.float() - expected).norm() / expected.norm())
    assert error < 1e-5 if precision == "fp32" else 1e-5 < error < 0.03


def test_images_in_one_pass_are_what_suits_the_device() -> None:
    assert how(None).size == BATCH_SIZES["cpu"] == 16
    assert how(3).size == 3


@pytest.mark.usefixtures("folded")
def test_where_folding_is_wrong_that_is_said_and_the_numbers_are_right() -> None:
    class Twice(Small):
        def forward(self, images: Tensor) -> Tensor:
            between = self.conv(images)
            return self.fc((self.norm(between) + between).mean((2, 3)))

    said: list[str] = []
    network, dataset = Twice(), Made(range(9))
    _, found, _ = passed(FrozenPass(network, dataset, whole, how(say=said.append)))
    torch.testing.assert_close(found, by_hand(network, dataset), rtol=1e-4, atol=1e-4)
    assert len(said) == 1 and said[0].startswith("runs as it is")


def test_compiling_takes_no_time_where_nothing_is_compiled() -> None:
    made = FrozenPass(Small(), Made(range(9)), whole, how())
    assert made.compile_seconds == 0
    passed(made)
    assert made.compile_seconds == 0


def test_what_compiling_took_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda run, **_: run)
    network, dataset = Small(), Made(range(10), views=2)
    made = FrozenPass(network, dataset, whole, how(compile="always"))
    _, found, _ = passed(made)
    assert made.form is not None and made.form.name == "compiled"
    assert made.compile_seconds == made.form.seconds > 0
    torch.testing.assert_close(found, by_hand(network, dataset), rtol=1e-4, atol=1e-4)


# Progress


@pytest.mark.parametrize("workers", [None, 0])
@pytest.mark.parametrize("bad", [set(), {0, 1, 2, 3}, {10}], ids=str)
def test_progress_counts_images_read_or_not(bad: set[int], workers: int | None) -> None:
    told: list[tuple[str, int, int]] = []
    options = how(4, workers, progress=lambda *now: told.append(now))
    passed(FrozenPass(Small(), Made(range(11), 2, bad), whole, options, label="things"))
    assert told == [("things", done, 11) for done in (0, 4, 8, 11)]


def test_progress_is_told_before_a_batch_is_handed_over() -> None:
    told: list[int] = []
    batches = iter(FrozenPass(Small(), Made(range(8)), whole, how(progress=lambda _, done, __: told.append(done))))
    assert told == []
    next(batches)
    assert told == [0, 4]


# Threads


def decoders() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("decoder")]


@pytest.fixture(autouse=True)
def no_threads_stay(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(loading, "cores", lambda: 3)
    monkeypatch.setattr(loading, "ThreadPoolExecutor", partial(ThreadPoolExecutor, thread_name_prefix="decoder"))
    yield
    gc.collect()
    assert decoders() == [], "threads of the pass are there after it"


def test_several_threads_decode_while_nothing_is_computed() -> None:
    dataset, busy = Made(range(40)), []

    def compute_(network: nn.Module, images: Tensor) -> Tensor:
        before = len(dataset.threads)
        busy.append(len(decoders()))
        assert before == len(dataset.threads)
        return network(images)

    passed(FrozenPass(Small(), dataset, compute_, how(), plain=True))
    assert set(busy) == {3}
    assert threading.get_ident() not in dataset.threads
    assert decoders() == []


def test_threads_end_where_the_pass_is_left_early() -> None:
    batches = iter(FrozenPass(Small(), Made(range(40)), whole, how()))
    next(batches)
    assert decoders()
    batches.close()  # type: ignore[attr-defined]
    assert decoders() == []


@pytest.mark.parametrize("row", [0, 5, 39])
@pytest.mark.parametrize("workers", [None, 0])
def test_an_error_of_ours_in_decoding_is_raised(row: int, workers: int | None) -> None:
    """It is no bad file."""
    with pytest.raises(ZeroDivisionError):
        passed(FrozenPass(Small(), Made(range(40), fails=row), whole, how(4, workers)))
    assert decoders() == []


@pytest.mark.parametrize("where", ["compute", "progress", "loop"])
def test_threads_end_where_something_fails(where: str) -> None:
    def fail(*_: Any) -> Any:
        raise KeyError(where)

    def late(_: str, done: int, __: int) -> None:
        if done:
            fail()

    try:
        options = how(progress=late) if where == "progress" else how()
        for _ in FrozenPass(Small(), Made(range(40)), fail if where == "compute" else whole, options, plain=True):
            fail()
    except KeyError as error:
        assert error.args == (where,)
    else:
        raise AssertionError("nothing failed")
    gc.collect()
    assert decoders() == []


# Files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    for number in range(10):
        Image.fromarray(random.integers(0, 256, (40, 36, 3), dtype=np.uint8)).save(tmp_path / f"{number}.png")
    (tmp_path / "3.png").write_bytes((tmp_path / "3.png").read_bytes()[:300])
    (tmp_path / "7.png").write_bytes(b"")
    return tmp_path


@pytest.mark.parametrize("view", [View(), View(mirrored=True)])
@pytest.mark.parametrize("workers", [None, 0, 1])
def test_files_that_cannot_be_decoded_are_told_with_their_reason(
    view: Any, workers: int | None, folder: Path, form: str
) -> None:
    names = [f"{number}.png" for number in range(10)]
    network = Small()
    dataset = ViewDataset(folder, names, PREPROCESSING, view)
    batches = list(FrozenPass(network, dataset, whole, how(4, workers)))
    assert [rows.tolist() for rows, _, _ in batches] == [[0, 1, 2], [4, 5, 6], [8, 9]]
    bad = [pair for *_, unread in batches for pair in unread]
    assert [(row, file.path) for row, file in bad] == [(3, "3.png"), (7, "7.png")]
    assert bad[1][1].reason == "the file is empty" and bad[0][1].reason
    with torch.inference_mode():
        for rows, found, _ in batches:
            for row, values in zip(rows.tolist(), found, strict=True):
                _, views = dataset[row]
                assert isinstance(views, Tensor)
                expected = network(normalise(views, PREPROCESSING))
                torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-4)


# What is known to be wrong


def test_compiled_once_where_there_are_fewer_images_than_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler is given one shape: with another, it compiles anew, for as long again."""
    shapes = set()

    def compile(run: Any, **_: Any) -> Any:
        def compiled(images: Tensor) -> Any:
            shapes.add(tuple(images.shape))
            return run(images)

        return compiled

    monkeypatch.setattr(torch, "compile", compile)
    made = FrozenPass(Small(), Made(range(5)), whole, how(16, compile="always"))
    passed(made)
    assert made.form is not None and made.form.name == "compiled"
    assert len(shapes) == 1
