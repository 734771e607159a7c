"""Which shards DATA names, and what is in them: with an index, without one, and where something is wrong."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

from tlkit.data.decode import UnreadableImage, decode
from tlkit.data.folders import is_image, read_samples
from tlkit.data.new_images import read_images
from tlkit.errors import TlkitError
from tlkit.shards.folder import Shards, common_place
from tlkit.shards.reading import shards_at
from tlkit.shards.table import FILE, Names, Rows, read_table, write_table

from .conftest import png, sample, write_tar


def told(label: str, done: int, total: int) -> None:
    """A progress that nobody reads."""


def at(data: Path | str) -> Shards | None:
    return shards_at(Path(data), is_image, told)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards without an index, of four and two images of two classes."""
    here = tmp_path / "shards"
    here.mkdir()
    write_tar(here / "pets-0.tar", [file for number in range(4) for file in sample(f"{number}", number % 2)])
    write_tar(here / "pets-1.tar", [file for number in range(4, 6) for file in sample(f"{number}", number % 2)])
    return here


def indexed(folder: Path) -> Path:
    shards = at(folder)
    assert shards is not None
    write_table(folder / FILE, shards.table)
    return folder


# Which


@pytest.mark.parametrize("index", [False, True])
@pytest.mark.parametrize("form", ["", "pets-{0..1}.tar", "pets-{0,1}.tar"])
def test_ways_to_name_shards(folder: Path, form: str, index: bool) -> None:
    if index:
        indexed(folder)
    samples = read_samples(folder / form)
    assert list(samples.paths) == [f"pets-{number // 4}.tar/{number}.png" for number in range(6)]
    assert samples.labels.tolist() == [0, 1] * 3 and samples.classes == ("0", "1")
    assert samples.shards().tolist() == [0, 0, 0, 0, 1, 1]
    assert str(samples.root) == f"{folder}/"


def test_a_single_shard_and_an_index(folder: Path) -> None:
    indexed(folder)
    assert len(read_samples(folder / "pets-1.tar")) == 2
    assert len(read_samples(folder / FILE)) == 6


def test_the_order_is_that_in_which_they_are_named(folder: Path) -> None:
    indexed(folder)
    assert read_samples(folder / "pets-{1,0}.tar").paths[0] == "pets-1.tar/4.png"


def test_at_a_url(served: Any, folder: Path) -> None:
    for path in folder.iterdir():
        (served.folder / path.name).write_bytes(path.read_bytes())
    samples = read_samples(Path(f"{served.url}/pets-{{0..1}}.tar"))
    assert list(samples.paths) == list(read_samples(folder).paths)
    assert str(samples.root) == f"{served.url}/"
    assert served.asked["pets-0.tar"] == 1
    assert len(read_samples(Path(f"{served.url}/pets-{{0..1}}.tar"))) == 6
    assert served.asked["pets-0.tar"] == 1, "what was found in it is kept"


@pytest.mark.parametrize("form", ["", "/", f"/{FILE}", "/pets-{0..1}.tar"])
def test_at_a_url_with_an_index_no_shard_is_fetched(served: Any, folder: Path, form: str) -> None:
    for path in indexed(folder).iterdir():
        (served.folder / path.name).write_bytes(path.read_bytes())
    assert len(read_samples(Path(f"{served.url}{form}"))) == 6
    assert served.asked["pets-0.tar"] == 0


def test_other_data_is_none_of_ours(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "photos" / "cat").mkdir(parents=True)
    (tmp_path / "photos" / "backup.tar").write_bytes(b"")
    assert at(tmp_path / "photos") is None, "class folders beside a tar file"
    (folder / "a.png").write_bytes(png())
    assert at(folder) is None, "photos beside a tar file"
    (tmp_path / "some.csv").write_text("path,label\n")
    for name in ("some.csv", "nothing", ".", "x" * 300):
        assert at(tmp_path / name) is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pets-{0..3}.tar", "pets-2.tar: 2 of 4 shards are missing; check the path"),
        ("dogs-{0..3}.tar", "dogs-0.tar: 4 of 4 shards are missing; check the path"),
        ("pets-{0..1.tar", "a brace is not closed; write 'name-{000000..000099}.tar'"),
        ("pets-{0,0}.tar", "a shard is named twice; name each once"),
        ("pets.tar.gz", "compressed shards cannot be read in parts; unpack them to .tar"),
    ],
)
def test_what_cannot_be(folder: Path, name: str, message: str) -> None:
    with pytest.raises(TlkitError) as caught:
        at(folder / name)
    assert str(caught.value).endswith(message)


def test_a_shard_that_is_another_than_when_its_index_was_written(folder: Path) -> None:
    indexed(folder)
    write_tar(folder / "pets-1.tar", sample("7", 0) * 9)
    with pytest.raises(TlkitError, match=r"index\.parquet: pets-1\.tar has \d+ bytes, \d+ when its index was written"):
        at(folder)
    (folder / FILE).unlink()
    assert len(read_samples(folder)) == 5, "the last of several of one name counts as one sample"


def test_no_index_there(served: Any, tmp_path: Path) -> None:
    with pytest.raises(TlkitError, match=r"not an index of shards; name the shards: 'name-\{000\.\.099\}\.tar'"):
        at(f"{served.url}/nothing")


# What is in them


def test_where_labels_come_from(tmp_path: Path) -> None:
    """A name in words wins over a number; nothing beside the image leaves the folder that it lies in."""
    files = [
        *sample("a/1", 7, {"label": "cat", "split": "train", "group": "x"}),
        *sample("a/2", "dog", {"split": "valid"}),
        *sample("owl/3", None, {"split": "test", "class": 5, "else": [1]}),
        *sample("owl/4", None, {"split": "test"}),
    ]
    samples = read_samples(write_tar(tmp_path / "all.tar", files))
    assert [samples.classes[label] for label in samples.labels] == ["cat", "dog", "5", "owl"]
    assert samples.splits.tolist() == ["train", "val", "test", "test"]
    assert samples.groups.tolist() == ["x", "all.tar/a/2.png", "all.tar/owl/3.png", "all.tar/owl/4.png"]


def test_splits_by_the_names_of_shards(tmp_path: Path) -> None:
    for name in ("imagenet-train-00.tar", "imagenet-train-01.tar", "imagenet-validation-00.tar"):
        write_tar(tmp_path / name, sample(f"{name[-6]}", 0))
    samples = read_samples(tmp_path)
    assert samples.splits.tolist() == ["train", "train", "val"]
    assert read_samples(tmp_path / "imagenet-validation-00.tar").splits.tolist() == [""], "of no whole"


def test_what_webdataset_writes(tmp_path: Path) -> None:
    with webdataset.ShardWriter(f"{tmp_path}/wds-%04d.tar", maxcount=3, verbose=0) as writer:
        for number in range(7):
            image = Image.fromarray(np.full((8, 8, 3), number * 30, np.uint8))
            writer.write({"__key__": f"sample{number:03d}", "png": image, "cls": number % 3, "json": {"n": number}})
    samples = read_samples(tmp_path / "wds-{0000..0002}.tar")
    assert samples.labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    pixels = [decode(samples.root / path).getpixel((0, 0))[0] for path in samples.paths]
    assert pixels == [number * 30 for number in range(7)]


def test_images_without_labels(tmp_path: Path) -> None:
    write_tar(tmp_path / "new.tar", [("1.png", png()), ("2.PNG", png()), ("notes.txt", b"")])
    assert list(read_images(tmp_path).paths) == ["new.tar/1.png", "new.tar/2.PNG"]
    with pytest.raises(TlkitError, match=r"images without labels; put name.cls or name.json beside each name.jpg"):
        read_samples(tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "no images"),
        ([("a.txt", b"x")], "no images"),
        ([*sample("1", 0), *sample("2")], r"1 of 2 images have no label \(first x.tar/2.png\)"),
        ([*sample("1", 0, {"split": "train"}), *sample("2", 1)], r"1 of 2 images have no split \(first x.tar/2.png\)"),
    ],
)
def test_what_is_not_enough(tmp_path: Path, files: Any, message: str) -> None:
    with pytest.raises(TlkitError, match=message):
        read_samples(write_tar(tmp_path / "x.tar", files))


def test_shards_without_images_are_told_of(folder: Path) -> None:
    write_tar(folder / "pets-2.tar", [])
    assert read_samples(folder).remarks() == [f"1 files in {folder}/ were ignored (1 shards without images)"]


# Reading images


def test_a_broken_place_is_an_image_that_cannot_be_read(folder: Path) -> None:
    shard = folder / "pets-0.tar"
    content = bytearray(shard.read_bytes())
    place = content.index(b"2.png")
    content[place : place + 20] = b"x" * 20
    shard.write_bytes(content)
    samples = read_samples(folder)
    assert len(samples) == 6 and samples.paths[2].startswith("pets-0.tar/broken place at byte ")
    assert samples.labels[2] == samples.labels[1]
    with pytest.raises(UnreadableImage, match="a broken place in the shard"):
        decode(samples.root / samples.paths[2])
    assert decode(samples.root / samples.paths[3]).size == (8, 8)


def test_a_shard_that_ends_too_early(folder: Path) -> None:
    shard = folder / "pets-1.tar"
    shard.write_bytes(shard.read_bytes()[:540])
    samples = read_samples(folder)
    assert len(samples) == 5
    with pytest.raises(UnreadableImage, match="a broken place in the shard"):
        decode(samples.root / samples.paths[4])


def test_one_that_is_cut_after_its_index_was_written(folder: Path) -> None:
    samples = read_samples(indexed(folder))
    (folder / "pets-1.tar").write_bytes((folder / "pets-1.tar").read_bytes()[:540])
    with pytest.raises(UnreadableImage, match="its shard ends too early"):
        decode(samples.root / samples.paths[4])


def test_one_that_has_gone(folder: Path) -> None:
    samples = read_samples(folder)
    (folder / "pets-1.tar").unlink()
    with pytest.raises(UnreadableImage, match="no such file"):
        decode(samples.root / samples.paths[4])
    with pytest.raises(UnreadableImage, match="no such file"):
        decode(samples.root / "pets-0.tar/nothing.png")


def test_a_copy_that_goes_in_between_is_fetched_again(served: Any, folder: Path) -> None:
    (served.folder / "a.tar").write_bytes((folder / "pets-0.tar").read_bytes())
    samples = read_samples(Path(f"{served.url}/a.tar"))
    assert decode(samples.root / samples.paths[0]).size == (8, 8)
    for copy in Path(os.environ["TLKIT_CACHE"]).rglob("*.tar"):
        copy.unlink()
    assert decode(samples.root / samples.paths[1]).size == (8, 8)
    assert served.asked["a.tar"] == 2


# The table


def test_names_take_few_bytes_and_read_as_a_list(folder: Path) -> None:
    names = read_samples(folder).paths
    assert isinstance(names, Names)
    plain = list(names)
    assert [names[place] for place in range(len(names))] == plain and names[-1] == plain[-1]
    assert list(names[1:5:2]) == plain[1:5:2] and list(names.take(np.array([3, 0]))) == [plain[3], plain[0]]
    with pytest.raises(IndexError):
        names[6]
    row_of = Rows(names)
    assert [row_of(path) for path in plain] == list(range(6)) and row_of("pets-0.tar/x.png") is None


def test_names_that_are_no_text(tmp_path: Path) -> None:
    name = b"caf\xe9".decode(errors="surrogateescape")
    samples = read_samples(write_tar(tmp_path / "x.tar", [*sample(name, 0), *sample("ü", 1)]))
    assert list(samples.paths) == [f"x.tar/{name}.png", "x.tar/ü.png"]
    assert decode(samples.root / samples.paths[0]).size == (8, 8)


def test_a_table_comes_back_as_it_was(folder: Path) -> None:
    shards = at(indexed(folder))
    assert shards is not None
    again = read_table(folder / FILE)
    assert again is not None and again.sizes == shards.table.sizes and again.classes == shards.table.classes
    for name in ("offsets", "lengths", "labels", "splits", "groups", "digests"):
        assert np.array_equal(getattr(again, name), getattr(shards.table, name)), name
    assert list(again.names) == list(shards.table.names)


@pytest.mark.parametrize(
    ("locations", "place"),
    [
        (["/a/b/1.tar", "/a/b/2.tar"], "/a/b/"),
        (["a/train/1.tar", "a/val/1.tar"], "a/"),
        (["1.tar", "2.tar"], ""),
        (["http://host/x/1.tar"], "http://host/x/"),
    ],
)
def test_what_holds_all(locations: list[str], place: str) -> None:
    assert common_place(locations) == place
