"""Finding labelled images: every layout and manifest, and each mistake told in one line."""

from __future__ import annotations

import io
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from tlkit.data.decode import IMAGE_SUFFIXES
from tlkit.data.folders import Samples, read_samples
from tlkit.data.new_images import find_images, images_listed
from tlkit.errors import TlkitError


def tree(root: Path, *names: str) -> Path:
    """Files by name, with folders made as needed; a name that ends in a slash is an empty folder."""
    for name in names:
        path = root / name
        (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            path.write_bytes(b"not decoded here")
    return root


def rows(samples: Samples) -> list[tuple[str, str, str]]:
    """Path, class and split of each sample."""
    labels = [samples.classes[label] for label in samples.labels]
    return list(zip(samples.paths, labels, samples.splits.tolist(), strict=True))


def refusal(data: Path | str, *needles: str) -> TlkitError:
    """The error that ``data`` is refused with: one line that names what, where and remedy."""
    with pytest.raises(TlkitError) as caught:
        read_samples(Path(data))
    error = caught.value
    assert "\n" not in str(error) and error.what and error.where and error.remedy
    for needle in needles:
        assert needle in str(error)
    return error


# Folders


def test_a_folder_of_class_folders(tmp_path: Path) -> None:
    samples = read_samples(tree(tmp_path, "dog/2.png", "dog/10.jpg", "cat/a.JPG"))
    assert rows(samples) == [("cat/a.JPG", "cat", ""), ("dog/10.jpg", "dog", ""), ("dog/2.png", "dog", "")]
    assert (samples.root, samples.classes, len(samples)) == (tmp_path, ("cat", "dog"), 3)
    assert samples.labels.dtype == np.int64 and samples.remarks() == [] and not len(samples.groups)


@pytest.mark.parametrize("val", ["val", "valid", "validation", "Val", "VALIDATION"])
@pytest.mark.parametrize("train", ["train", "Train", "TRAIN"])
def test_split_folders(train: str, val: str, tmp_path: Path) -> None:
    names = [f"{train}/a/1.jpg", f"{train}/b/2.jpg", f"{val}/a/3.jpg", f"{val}/b/4.jpg", "test/a/5.jpg", "test/b/6.jpg"]
    found = rows(read_samples(tree(tmp_path, *names)))
    splits = {train: "train", val: "val", "test": "test"}
    assert sorted(found) == sorted((name, name.split("/")[1], splits[name.split("/")[0]]) for name in names)


@pytest.mark.parametrize(
    "splits", [("train",), ("train", "test"), ("train", "val"), ("val", "test"), ("test",)], ids=str
)
def test_splits_that_are_not_there(splits: tuple[str, ...], tmp_path: Path) -> None:
    tree(tmp_path, *(f"{split}/{label}/1.jpg" for split in splits for label in "ab"))
    assert {split for _, _, split in rows(read_samples(tmp_path))} == set(splits)


def test_nested_folders_belong_to_their_class(tmp_path: Path) -> None:
    samples = read_samples(tree(tmp_path, "a/x/y/1.jpg", "a/2.jpg", "b/train/3.jpg"))
    assert rows(samples) == [("a/2.jpg", "a", ""), ("a/x/y/1.jpg", "a", ""), ("b/train/3.jpg", "b", "")]


@pytest.mark.parametrize("name", ["train", "val", "test"])
def test_a_class_may_be_called_like_a_split(name: str, tmp_path: Path) -> None:
    samples = read_samples(tree(tmp_path, f"{name}/1.jpg", "bus/2.jpg", "tram/3.jpg"))
    assert samples.classes == tuple(sorted(["bus", "tram", name])) and not samples.splits.any()


def test_a_class_called_test_with_folders_in_it(tmp_path: Path) -> None:
    samples = read_samples(tree(tmp_path, "test/2020/1.jpg", "bus/2021/2.jpg", "tram/3.jpg"))
    assert samples.classes == ("bus", "test", "tram")


def test_hidden_and_other_files_are_counted(tmp_path: Path) -> None:
    tree(tmp_path, "a/1.jpg", "a/._1.jpg", "a/.DS_Store", "a/notes.TXT", "a/Thumbs.db", "a/LICENSE", "b/2.jpg")
    tree(tmp_path, "loose.jpg", "README.md", ".hidden/3.jpg", "a/.cache/4.jpg")
    samples = read_samples(tmp_path)
    assert [path for path, _, _ in rows(samples)] == ["a/1.jpg", "b/2.jpg"]
    expected = {"hidden": 2, ".txt": 1, ".db": 1, "": 1, ".md": 1, "outside class folders": 1}
    assert samples.ignored == Counter(expected)
    (remark,) = samples.remarks()
    assert remark.startswith(f"7 files in {tmp_path} were ignored (2 hidden, ") and "\n" not in remark


def test_files_beside_class_folders_of_splits_are_counted(tmp_path: Path) -> None:
    tree(tmp_path, "train/a/1.jpg", "train/stray.jpg", "train/.DS_Store", "labels.csv", "test/x.jpg", "docs/a/1.txt")
    samples = read_samples(tmp_path)  # test/ has no class folders: it says nothing about labels
    assert rows(samples) == [("train/a/1.jpg", "a", "train")]
    expected = {"outside class folders": 1, "hidden": 1, ".csv": 1, "in folder test/": 1, "in folder docs/": 1}
    assert samples.ignored == Counter(expected)


def test_an_empty_folder_beside_the_splits_is_no_remark(tmp_path: Path) -> None:
    assert read_samples(tree(tmp_path, "train/a/1.jpg", "val/", "cache/")).remarks() == []


@pytest.mark.parametrize(
    ("names", "needles"),
    [
        ([], ["no images", "folder of its own"]),
        (["1.jpg", "2.jpg"], ["2 images, but no class folders"]),
        (["a/", "b/"], ["no images"]),
        (["a/1.txt", "b/2.doc"], ["no images"]),
        (["a/._1.jpg"], ["no images"]),
        ([".a/1.jpg"], ["no images"]),
        (["train/a/", "train/b/"], ["no images", "train"]),
        (["train/a/", "val/a/1.jpg"], ["no images", "train"]),
        (["train/a/1.jpg", "val/a/1.jpg", "valid/a/1.jpg"], ["val and valid both mean val", "keep one"]),
        (["train/a/1.jpg", "Train/a/1.jpg"], ["Train and train both mean train"]),
        (["train/cat/1.jpg", "train/dog/1.jpg", "val/cat/1.jpg"], ["val lacks class folders", "dog", "val/dog"]),
        (["train/cat/1.jpg", "val/cat/1.jpg", "val/dog/1.jpg"], ["val has class folders that train has not: dog"]),
        (["train/tiger/1.jpg", "test/tigger/1.jpg"], ["test has class", "tigger", "did you mean 'tiger'"]),
        (["train/a/1.jpg", "val/A/1.jpg"], ["val has class folders", "A"]),
        (["training/a/1.jpg", "validation/a/1.jpg"], ["training/ and validation/", "no train/", "'train'"]),
        (["dev/a/1.jpg", "dev/b/1.jpg", "test/a/1.jpg", "test/b/2.jpg"], ["dev/ and test/", "no train/"]),
    ],
    ids=str,
)
def test_refused_folders(names: list[str], needles: list[str], tmp_path: Path) -> None:
    refusal(tree(tmp_path, *names), str(tmp_path), *needles)


def test_many_differing_classes_are_not_all_listed(tmp_path: Path) -> None:
    tree(tmp_path, "train/a/1.jpg", *(f"val/extra{number}/1.jpg" for number in range(50)))
    assert "and 45 more" in str(refusal(tmp_path)) and len(str(refusal(tmp_path))) < 400 + len(str(tmp_path))


@pytest.mark.parametrize("split", ["val", "test"])
def test_an_empty_class_folder_counts_as_there(split: str, tmp_path: Path) -> None:
    samples = read_samples(tree(tmp_path, "train/a/1.jpg", "train/b/1.jpg", f"{split}/a/1.jpg", f"{split}/b/"))
    assert samples.classes == ("a", "b") and len(samples) == 3


def test_labels_are_by_name_not_by_position(tmp_path: Path) -> None:
    tree(tmp_path, "train/a/1.jpg", "train/b/1.jpg", "train/c/1.jpg", "val/a/", "val/b/", "val/c/1.jpg")
    assert ("val/c/1.jpg", "c", "val") in rows(read_samples(tmp_path))


@pytest.mark.parametrize("name", ["missing", "x" * 300, "file/below"])
def test_a_folder_that_is_not_there(name: str, tmp_path: Path) -> None:
    tree(tmp_path, "file")
    refusal(tmp_path / name, "check the path")
    with pytest.raises(TlkitError, match="check the path"):
        find_images([tmp_path / name])


def test_a_folder_that_may_not_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree(tmp_path, "a/1.jpg", "b/2.jpg")
    scandir = os.scandir

    def guarded(path: Any) -> Any:
        if Path(path).name == "b":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    refusal(tmp_path, "Permission denied", str(tmp_path / "b"))  # not: a class without images
    with pytest.raises(TlkitError, match="Permission denied"):
        find_images([tmp_path])


def test_links_in_a_circle_and_upwards(tmp_path: Path) -> None:
    tree(tmp_path, "data/a/1.jpg", "data/b/2.jpg", "elsewhere/3.jpg", "elsewhere/deep/4.jpg")
    data = tmp_path / "data"
    (data / "a" / "self").symlink_to(".")
    (data / "a" / "up").symlink_to("..")
    (data / "a" / "top").symlink_to(tmp_path)
    (data / "b" / "more").symlink_to(tmp_path / "elsewhere")
    (data / "b" / "again").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "deep" / "back").symlink_to(tmp_path / "elsewhere")
    (data / "loop").symlink_to("loop")
    (data / "gone").symlink_to("nowhere")
    samples = read_samples(data)
    assert samples.classes == ("a", "b")
    expected = ["a/1.jpg", "b/2.jpg", "b/again/3.jpg", "b/again/deep/4.jpg"]
    assert sorted(samples.paths) == expected, "each image once, and none of b under a"


def test_class_folders_may_be_links(tmp_path: Path) -> None:
    tree(tmp_path, "store/x/1.jpg", "store/y/2.jpg", "data/")
    for name in "xy":
        (tmp_path / "data" / name).symlink_to(tmp_path / "store" / name)
    assert [path for path, _, _ in rows(read_samples(tmp_path / "data"))] == ["x/1.jpg", "y/2.jpg"]


def test_odd_names(tmp_path: Path) -> None:
    names = [os.fsdecode(b"caf\xe9/\xff.jpg"), "größe/🐱.jpg", "a b/c,d\n.jpg", "-x/--y.jpg"]
    samples = read_samples(tree(tmp_path, *names))
    assert sorted(samples.paths) == sorted(names)
    assert all((samples.root / path).is_file() for path in samples.paths)
    assert samples.classes == tuple(sorted(name.split("/")[0] for name in names))


def test_ten_thousand_classes(tmp_path: Path) -> None:
    for number in range(10_000):
        folder = tmp_path / f"class{number:05d}"
        folder.mkdir()
        (folder / "1.jpg").touch()
    samples = read_samples(tmp_path)
    assert len(samples.classes) == len(samples) == 10_000
    assert np.array_equal(samples.labels, np.arange(10_000))


def test_take(tmp_path: Path) -> None:
    samples = read_samples(tree(tmp_path, "a/1.jpg", "b/2.jpg", "b/3.jpg"))
    assert samples.take(samples.labels == 1).paths == ["b/2.jpg", "b/3.jpg"]
    taken = samples.take(np.array([2, 0]))
    assert taken.paths == ["b/3.jpg", "a/1.jpg"] and taken.labels.tolist() == [1, 0]
    assert taken.classes == samples.classes, "class names stay, whoever is taken"


# HEIC


def test_heic_is_read_with_the_extra(tmp_path: Path) -> None:
    pytest.importorskip("pillow_heif")
    samples = read_samples(tree(tmp_path, "a/1.heic", "a/2.HEIF", "b/3.jpg"))
    assert len(samples) == 3 and samples.heic == 0


def test_heic_without_the_extra_is_counted_and_the_remedy_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    samples = read_samples(tree(tmp_path, "a/1.heic", "a/2.jpg", "b/3.HEIC", "c/4.jpg"))
    assert (samples.paths, samples.heic, samples.classes) == (["a/2.jpg", "c/4.jpg"], 2, ("a", "b", "c"))
    assert samples.remarks() == ["2 HEIC photos were left out: pip install 'tlkit[heic]' to read them"]


def test_only_heic_without_the_extra_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    refusal(tree(tmp_path, "a/1.heic", "b/3.HEIC"), "all 2 images are HEIC", "pip install 'tlkit[heic]'")


# Manifests

TABLE = {"path": ["x/1.jpg", "/abs/2.jpg", "x/3, 4.jpg"], "label": ["cat", "dog", "cat"]}


def manifest(folder: Path, suffix: str, columns: dict[str, list[Any]]) -> Path:
    path = folder / f"images{suffix}"
    if suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
        return path
    separator = "\t" if suffix == ".tsv" else ","
    lines = [list(columns), *zip(*columns.values(), strict=True)]
    quoted = (
        separator.join(f'"{value}"' if separator in str(value) else str(value) for value in line) for line in lines
    )
    path.write_text("\n".join(quoted) + "\n", encoding="utf-8")
    return path


SUFFIXES = [".csv", ".tsv", ".parquet", ".CSV", ".Parquet"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_manifest(suffix: str, tmp_path: Path) -> None:
    if suffix == ".Parquet":
        manifest(tmp_path, ".parquet", TABLE).rename(tmp_path / f"images{suffix}")
    else:
        manifest(tmp_path, suffix, TABLE)
    samples = read_samples(tmp_path / f"images{suffix}")
    assert rows(samples) == [("x/1.jpg", "cat", ""), ("/abs/2.jpg", "dog", ""), ("x/3, 4.jpg", "cat", "")]
    assert samples.root == tmp_path and samples.root / samples.paths[1] == Path("/abs/2.jpg")


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet"])
def test_manifest_with_split_and_group(suffix: str, tmp_path: Path) -> None:
    extra = {"split": ["train", "Validation", "train"], "group": ["g", "h", "g"], "note": ["", "x", ""]}
    train_dog = {"path": ["5.jpg"], "label": ["dog"], "split": ["TRAIN"], "group": ["i"], "note": ["y"]}
    columns = {name: [*values, *train_dog[name]] for name, values in (TABLE | extra).items()}
    samples = read_samples(manifest(tmp_path, suffix, columns))
    assert samples.splits.tolist() == ["train", "val", "train", "train"]
    assert samples.groups.tolist() == ["g", "h", "g", "i"]


def test_an_image_without_a_group_stands_alone(tmp_path: Path) -> None:
    columns = {"path": ["1.jpg", "2.jpg", "3.jpg"], "label": ["a", "a", "b"], "group": ["", "g", ""]}
    assert read_samples(manifest(tmp_path, ".csv", columns)).groups.tolist() == ["1.jpg", "g", "3.jpg"]
    columns["group"] = ["", "", ""]
    assert len(read_samples(manifest(tmp_path, ".csv", columns)).groups) == 0


@pytest.mark.parametrize(
    "content",
    [
        "\ufeffpath,label\n1.jpg,a\n2.jpg,b\n",
        "path,label\r\n1.jpg,a\r\n2.jpg,b\r\n",
        "path,label\r1.jpg,a\r2.jpg,b",
        " Path , LABEL \n 1.jpg , a \n2.jpg,b\n",
        "\n\npath,label\n\n1.jpg,a\n,\n  \n2.jpg,b\n\n",
        "label,other,path,\na,?,1.jpg,\nb,?,2.jpg,\n",
        '"path","label"\n"1.jpg","a"\n"2.jpg",b\n',
    ],
    ids=["BOM", "Windows", "old Mac", "spaces", "blank lines", "other columns", "quotes"],
)
def test_dialects(content: str, tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    path.write_bytes(content.encode())
    assert rows(read_samples(path)) == [("1.jpg", "a", ""), ("2.jpg", "b", "")]


def test_parquet_values_of_other_types(tmp_path: Path) -> None:
    columns = {
        "label": pyarrow.array([3, 12]),
        "Path": pyarrow.array(["1.jpg", "2.jpg"]).dictionary_encode(),
        "picture": pyarrow.array([b"\0", b"\1"]),
        "group": pyarrow.array([None, 7]),
    }
    path = tmp_path / "m.parquet"
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    samples = read_samples(path)
    assert rows(samples) == [("1.jpg", "3", ""), ("2.jpg", "12", "")]
    assert samples.classes == ("12", "3") and samples.groups.tolist() == ["1.jpg", "7"]


@pytest.mark.parametrize(
    ("content", "needles"),
    [
        ("", ["no column 'path'", "it has: none"]),
        ("\n\n", ["no column 'path'"]),
        ("path,label\n", ["no rows", "add a line"]),
        ("path,label\n,\n", ["no rows"]),
        ("paths,label\n1,a\n", ["no column 'path'", "did you mean 'paths'"]),
        ("path,labels\n1,a\n", ["no column 'label'", "did you mean 'labels'"]),
        ("file;class\n1;a\n", ["no column 'path'", "file;class"]),
        ("1.jpg,a\n2.jpg,b\n", ["no column 'path'", "it has: 1.jpg, a"]),
        ("path,label,path\n1,a,2\n", ["two columns are called 'path'"]),
        ("path,label\n1.jpg,a\n2.jpg\n", ["line 3 has 1 values where the header has 2"]),
        ("path,label\n1.jpg,a\n\n\n2.jpg,b,c\n", ["line 5 has 3 values"]),
        ('path,label\n"1\n.jpg",a\n2.jpg\n', ["line 4 has 1 values"]),
        ("path,label\n1.jpg,\n", ["line 2 lacks a path or a label"]),
        ("path,label\n\n1.jpg,a\n ,b\n", ["line 4 lacks a path or a label"]),
        (
            "path,label,split\n1.jpg,a,train\n2.jpg,a,holdout\n",
            ["unknown split 'holdout' (line 3)", "train, val or test"],
        ),
        ("path,label,split\n1.jpg,a,train\n2.jpg,a,\n", ["some have none (line 3)"]),
        ("path,label,split\n1.jpg,a,train\n2.jpg,b,val\n", ["no row of train has: b"]),
        ('path,label\n1.jpg,"a\n2.jpg,b\n3.jpg,a\n', ["line 2 is not sound CSV", "quotes"]),
        ("path,label,split,group\n1,a,train,g\n2,a,val,g\n", ["group 'g' stand in train and in val"]),
        ("path,label\n1.jpg," + "x" * 200_000 + "\n", ["line 2 is not sound CSV"]),
    ],
    ids=lambda value: repr(value)[:60],
)
def test_refused_manifests(content: str, needles: list[str], tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    path.write_text(content, encoding="utf-8")
    refusal(path, str(path), *needles)


def test_only_val_and_test_need_no_train(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    path.write_text("path,label,split\n1.jpg,a,val\n2.jpg,b,test\n")
    assert read_samples(path).splits.tolist() == ["val", "test"]


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_a_manifest_in_another_encoding(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    path.write_bytes("path,label\nä.jpg,ö\n".encode(encoding))
    refusal(path, "not a text file in UTF-8", "save it again")


@pytest.mark.parametrize("suffix", [".txt", "", ".zip", ".json", ".csv.gz"])
def test_a_file_that_is_no_manifest(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"m{suffix}"
    path.write_text("path,label\n1.jpg,a\n")
    refusal(path, "neither a folder nor a manifest", ".csv, .tsv, .parquet")


def parquet_bytes() -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"path": ["1.jpg"] * 50, "label": ["a", "b"] * 25}), file)
    return file.getvalue()


@pytest.mark.parametrize(
    "content",
    [b"", b"PAR1", b"text", parquet_bytes()[:-20], parquet_bytes()[:50], b"\0" * 20 + parquet_bytes()[20:]],
    ids=["empty", "magic", "text", "cut", "start", "zeroed"],
)
def test_broken_parquet(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.parquet"
    path.write_bytes(content)
    refusal(path, str(path), "check the file")


def test_parquet_rows_are_counted_as_rows(tmp_path: Path) -> None:
    columns: dict[str, list[Any]] = {"path": ["1.jpg", "2.jpg"], "label": ["a", None]}
    refusal(manifest(tmp_path, ".parquet", columns), "row 2 lacks a path or a label")


def test_parquet_without_the_columns_or_with_one_twice(tmp_path: Path) -> None:
    refusal(manifest(tmp_path, ".parquet", {"image": ["1.jpg"], "label": ["a"]}), "no column 'path'", "image, label")
    twice = pyarrow.Table.from_arrays([pyarrow.array(["1"])] * 3, names=["path", "label", "label"])
    pyarrow.parquet.write_table(twice, tmp_path / "m.parquet")
    refusal(tmp_path / "m.parquet", "two columns are called 'label'")


def test_a_manifest_with_an_odd_name(tmp_path: Path) -> None:
    for suffix in (".csv", ".parquet"):
        path = manifest(tmp_path, suffix, TABLE).rename(tmp_path / os.fsdecode(b"\xff\n" + suffix.encode()))
        assert len(read_samples(path)) == 3


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_manifest_that_may_not_be_read(tmp_path: Path) -> None:
    path = manifest(tmp_path, ".csv", TABLE)
    path.chmod(0)
    refusal(path, "Permission denied")


# New images


def test_find_images(tmp_path: Path) -> None:
    tree(tmp_path, "in/b.jpg", "in/a/z.PNG", "in/a/.hidden.jpg", "in/n.txt", "in/.cache/c.jpg", "photo.dat", "x.heic")
    found, ignored = find_images([tmp_path / "photo.dat", tmp_path / "in", tmp_path / "x.heic"])
    assert [path.relative_to(tmp_path).as_posix() for path in found] == [
        "photo.dat",
        "in/b.jpg",
        "in/a/z.PNG",
        "x.heic",
    ]
    assert ignored == Counter({"hidden": 1, ".txt": 1})


def test_find_images_in_a_circle(tmp_path: Path) -> None:
    tree(tmp_path, "in/a.jpg")
    (tmp_path / "in" / "again").symlink_to(".")
    (tmp_path / "in" / "up").symlink_to("..")
    assert find_images([tmp_path / "in"])[0] == [tmp_path / "in" / "a.jpg"]


def test_find_images_refuses_what_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "dangling.jpg").symlink_to("gone")
    for name in ("missing.jpg", "dangling.jpg"):
        with pytest.raises(TlkitError, match="no such file or folder; check the path"):
            find_images([tmp_path / name])


def test_every_image_suffix_is_found(tmp_path: Path) -> None:
    found, ignored = find_images([tree(tmp_path, *(f"x{suffix}" for suffix in IMAGE_SUFFIXES))])
    assert len(found) == len(IMAGE_SUFFIXES) and not ignored


PHOTOS = (
    "p/1.jpg",
    "p/2.PNG",
    "p/.hidden.jpg",
    "p/notes.txt",
    "p/raw.dat",
    "p/a/3.jpg",
    "p/a/deep/4.jpg",
    "p/.cache/5.jpg",
    "p/b [2]/6.jpg",
    "p/b [2]/x/7.jpg",
    "p/8[9].jpg",
)
EVERYTHING = ["1.jpg", "2.PNG", "8[9].jpg", "a/3.jpg", "a/deep/4.jpg", "b [2]/6.jpg", "b [2]/x/7.jpg"]


@pytest.mark.parametrize(
    ("pattern", "matched"),
    [
        ("*.jpg", ["1.jpg", "8[9].jpg"]),
        ("?.jpg", ["1.jpg"]),
        ("[0-9].[jP]*", ["1.jpg", "2.PNG"]),
        ("*/*.jpg", ["a/3.jpg", "b [2]/6.jpg"]),
        ("**/*.jpg", ["1.jpg", "8[9].jpg", "a/3.jpg", "a/deep/4.jpg", "b [2]/6.jpg", "b [2]/x/7.jpg"]),
        ("**/deep/*", ["a/deep/4.jpg"]),
        ("a*/**/*.jpg", ["a/3.jpg", "a/deep/4.jpg"]),
        ("**", EVERYTHING),
        ("**/*", EVERYTHING),
        ("*", EVERYTHING),  # the folders that match are searched through
        ("a*", ["a/3.jpg", "a/deep/4.jpg"]),
        ("**/de*", ["a/deep/4.jpg"]),
        ("*.dat", ["raw.dat"]),  # called by its ending, it is tried
        ("**/*.dat", ["raw.dat"]),
        (".h*.jpg", [".hidden.jpg"]),
        ("**/.h*.jpg", [".hidden.jpg"]),
        ("8[9].jpg", ["8[9].jpg"]),  # there is a file of that very name
        ("b [2]", ["b [2]/6.jpg", "b [2]/x/7.jpg"]),
        ("b [2]/*.jpg", ["b [2]/6.jpg"]),
        ("b [2]/**/*.jpg", ["b [2]/6.jpg", "b [2]/x/7.jpg"]),
    ],
)
def test_patterns(pattern: str, matched: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tree(tmp_path, *PHOTOS) / "p"
    found, _ = find_images([folder / pattern])
    assert sorted(path.relative_to(folder).as_posix() for path in found) == sorted(matched)
    assert len(found) == len(set(found))
    monkeypatch.chdir(folder)
    assert sorted(path.as_posix() for path in find_images([Path(pattern)])[0]) == sorted(matched)


def test_what_a_pattern_matches_beside_images_is_counted(tmp_path: Path) -> None:
    folder = tree(tmp_path, *PHOTOS) / "p"
    assert find_images([folder / "*"])[1] == Counter({".txt": 1, ".dat": 1})
    assert find_images([folder / "**"])[1] == find_images([folder])[1] == Counter({".txt": 1, ".dat": 1, "hidden": 1})
    with pytest.raises(TlkitError, match="no images"):
        find_images([folder / "n*"])


@pytest.mark.parametrize("pattern", ["*.webp", "**/*.webp", "c*/**/*.jpg", "none/*.jpg", "none/**", "1.jpg/**", "[a"])
def test_a_pattern_that_matches_nothing(pattern: str, tmp_path: Path) -> None:
    folder = tree(tmp_path, *PHOTOS) / "p"
    with pytest.raises(TlkitError, match="nothing matches this pattern") as caught:
        find_images([folder / "1.jpg", folder / pattern])
    assert caught.value.where == str(folder / pattern)


def test_a_pattern_follows_links_but_never_in_a_circle(tmp_path: Path) -> None:
    tree(tmp_path, "in/a.jpg", "elsewhere/b.jpg")
    for number in range(3):  # followed blindly, these would be 3 ** 40 folders
        (tmp_path / "in" / f"again{number}").symlink_to(".")
    (tmp_path / "in" / "other").symlink_to("../elsewhere")
    (tmp_path / "in" / "gone.jpg").symlink_to("nowhere")
    found, _ = find_images([tmp_path / "in" / "**" / "*.jpg"])
    assert [path.relative_to(tmp_path / "in").as_posix() for path in found] == ["a.jpg", "gone.jpg", "other/b.jpg"]


def test_a_pattern_over_names_that_are_not_unicode(tmp_path: Path) -> None:
    odd = os.fsdecode(b"\xff\xe4")
    tree(tmp_path, f"{odd}/{odd}.jpg", f"{odd}/ä.jpg")
    for pattern in (f"{odd}/*.jpg", f"**/{odd}/*", f"*/**/?{odd[1]}.jpg"):
        assert tmp_path / odd / f"{odd}.jpg" in find_images([tmp_path / pattern])[0]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        (b"a.jpg\nb.jpg\n", ["a.jpg", "b.jpg"]),
        (b"a.jpg\nb.jpg", ["a.jpg", "b.jpg"]),
        (b"\n./a.jpg\n\n  \n a b.jpg \n", ["./a.jpg", " a b.jpg "]),
        (b"a.jpg\r\n\r\nb.jpg\r\n", ["a.jpg", "b.jpg"]),
        (b"a.jpg\r\nb.jpg\n", ["a.jpg\r", "b.jpg"]),
        (b"a\nb.jpg\0c.jpg\0\0", ["a\nb.jpg", "c.jpg"]),
        (b"c.jpg\0\n", ["c.jpg"]),
        (b"\xef\xbb\xbfa.jpg\n", ["a.jpg"]),
        ("ä.jpg\n".encode() + b"\xe4.jpg\n", ["ä.jpg", os.fsdecode(b"\xe4.jpg")]),
        (b"*.jpg\n[x].jpg\n-\n", ["*.jpg", "[x].jpg", "-"]),
        (b"x" * 5000 + b"\n", ["x" * 5000]),
        (b"", []),
        (b"\n \n", []),
    ],
    ids=repr,
)
def test_listed_names_are_kept_as_they_are(text: bytes, names: list[str]) -> None:
    assert images_listed(text) == (names, Counter())


def test_listed_folders_are_searched_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tree(tmp_path, "in/b.jpg", "in/a/c.jpg", "in/n.txt", "[x]/d.jpg"))
    found, ignored = images_listed(b"gone.jpg\nin/\n[x]\n./in/b.jpg\n")
    assert found == ["gone.jpg", "in/b.jpg", "in/a/c.jpg", "[x]/d.jpg", "./in/b.jpg"]
    assert ignored == Counter({".txt": 1})


# Faults that are noted, not refused


def faults(data: Path) -> tuple[Samples, list[str]]:
    """The samples all the same, and what is said of them."""
    noted: list[TlkitError] = []
    samples = read_samples(data, noted.append)
    assert all(error.remedy for error in noted)
    return samples, [str(error) for error in noted]


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["train/cat/1.jpg", "train/dog/1.jpg", "val/cat/1.jpg"], ["val lacks class folders that train has: dog"]),
        (["train/cat/1.jpg", "val/cat/1.jpg", "val/dog/1.jpg"], ["val has class folders that train has not: dog"]),
        (
            ["train/tiger/1.jpg", "val/tigger/1.jpg", "test/tiger/1.jpg"],
            ["val has class folders that train has not: tigger", "val lacks class folders that train has: tiger"],
        ),
        (["train/a/1.jpg", "val/a/1.jpg"], []),
        (["a/1.jpg", "b/2.jpg"], []),
    ],
    ids=str,
)
def test_splits_of_differing_classes_can_be_read_all_the_same(
    names: list[str], said: list[str], tmp_path: Path
) -> None:
    samples, noted = faults(tree(tmp_path, *names))
    assert sorted(path for path, _, _ in rows(samples)) == sorted(names)
    assert {label for _, label, _ in rows(samples)} == {name.split("/")[-2] for name in names}
    assert len(noted) == len(said) and all(what in line for what, line in zip(said, noted, strict=True))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("path,label,split\n1.jpg,a,train\n2.jpg,b,val\n3.jpg,c,test\n", ["labels that no row of train has: b, c"]),
        ("path,label,split,group\n1.jpg,a,train,g\n2.jpg,a,val,g\n3.jpg,a,val,h\n", ["group 'g' stand in train"]),
        (
            "path,label,split,group\n1.jpg,a,train,g\n2.jpg,a,val,g\n3.jpg,a,val,h\n4.jpg,a,test,h\n5.jpg,a,test,g\n",
            ["group 'g' stand in train and in val", "group 'h' stand in val and in test"],
        ),
        ("path,label,group\n1.jpg,a,g\n2.jpg,b,g\n", []),
    ],
)
def test_manifests_with_faults_can_be_read_all_the_same(text: str, said: list[str], tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text(text)
    samples, noted = faults(tmp_path / "m.csv")
    assert len(samples) == text.count("jpg")
    assert len(noted) == len(said) and all(what in line for what, line in zip(said, noted, strict=True))
    if said:
        refusal(tmp_path / "m.csv", said[0])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("folder", ["a/locked", "b"])
def test_a_folder_that_may_not_be_read_hides_its_images_alone(folder: str, tmp_path: Path) -> None:
    tree(tmp_path, "a/1.jpg", "a/locked/2.jpg", "b/3.jpg")
    (tmp_path / folder).chmod(0)
    try:
        samples, noted = faults(tmp_path)
    finally:
        (tmp_path / folder).chmod(0o755)
    assert len(samples) == 2 and len(noted) == 1 and str(tmp_path / folder) in noted[0]


def test_what_cannot_be_read_at_all_is_refused_all_the_same(tmp_path: Path) -> None:
    for data in (tmp_path / "gone", tree(tmp_path / "empty", "a/"), tree(tmp_path / "list", "m.csv") / "m.csv"):
        with pytest.raises(TlkitError):
            faults(data)
