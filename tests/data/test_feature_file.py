"""Features on their way into a file: kept, cut back to what is whole, never mixed, written in parts."""

from __future__ import annotations

import json
import os
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
from safetensors import safe_open

from tlkit.data import feature_file
from tlkit.data.feature_file import WRITERS, Columns, Picked, refuse_unwritable
from tlkit.data.feature_log import IDENTITY, ROWS, VALUES
from tlkit.data.loading import BadFile
from tlkit.data.unfinished_features import LOG, Unfinished, working_folder
from tlkit.errors import TlkitError

WHO = {"model": "some", "preprocessing": {"size": 64, "mean": [0.1, 0.2]}, "stage": "pooled"}
ENDINGS = ("npz", "parquet", "safetensors")
unix = pytest.mark.skipif(sys.platform == "win32", reason="files are locked on Unix")


def made(rows: list[int], shape: tuple[int, ...] = (3,)) -> np.ndarray:
    """Features (B, ...) that tell which row they are of."""
    size = int(np.prod(shape))
    return (np.array(rows)[:, None] * 1000 + np.arange(size)).reshape(len(rows), *shape).astype(np.float32)


def named(count: int) -> Columns:
    return Columns(
        [f"{row:03d}.png" for row in range(count)],
        ["ab"[row % 2] for row in range(count)],
        [("train", "val")[row % 3 == 0] for row in range(count)],
    )


def read(path: Path) -> tuple[np.ndarray, list[str], list[str], list[str], dict[str, Any]]:
    """Features, path, label, split and identity, by nothing but the formats' own libraries."""
    match path.suffix:
        case ".npz":
            with np.load(path, allow_pickle=False) as found:
                assert set(found.files) == {"features", "path", "label", "split", "identity"}
                texts = (found[name].tolist() for name in ("path", "label", "split"))
                return found["features"], *texts, json.loads(str(found["identity"]))
        case ".parquet":
            with path.open("rb") as file:
                table = pyarrow.parquet.read_table(file)
            assert table.schema.names == ["path", "label", "split", "features"]
            identity = json.loads(table.schema.metadata[b"tlkit"])
            values = table["features"].combine_chunks().values.to_numpy()
            texts = (table[name].to_pylist() for name in ("path", "label", "split"))
            return values.reshape(table.num_rows, *identity.pop("shape")), *texts, identity
        case _:
            with safe_open(path, "numpy") as found:
                assert set(found.keys()) == {"features", "label"}
                told = {name: json.loads(text) for name, text in found.metadata().items()}
                labels = [told["classes"][label] for label in found.get_tensor("label")]
                return found.get_tensor("features"), told["path"], labels, told["split"], told["identity"]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "features.npz"


@pytest.fixture
def begun(out: Path) -> Path:
    """The folder of ten images in three batches and one unreadable file, two images still missing."""
    with Unfinished(working_folder(out), WHO, PATHS) as unfinished:
        unfinished.add([0, 1, 2, 3], made([0, 1, 2, 3]), {})
        unfinished.add([4, 6, 7], made([4, 6, 7]), {5: BadFile("005.png", "the file is empty")})
        unfinished.add([8], made([8]), {})
    return working_folder(out)


PATHS = [f"{row:03}.png" for row in range(5000)]


def left(unfinished: Unfinished, count: int) -> list[int]:
    """Which of the first images have no features yet."""
    return [row for row in unfinished.missing().tolist() if row < count]


def there(unfinished: Unfinished) -> list[int]:
    """Which of the first ten images have features."""
    return sorted(set(range(10)) - set(left(unfinished, 10)))


def again(folder: Path) -> Unfinished:
    with Unfinished(folder, WHO, PATHS) as unfinished:
        return unfinished


# What is written


@pytest.mark.parametrize("shape", [(3,), (2, 3, 4), (1,)], ids=str)
@pytest.mark.parametrize("ending", ENDINGS)
def test_rows_come_out_in_order_with_what_belongs_to_them(tmp_path: Path, ending: str, shape: tuple[int, ...]) -> None:
    """Whatever order they came in, and over a stop; one could never be read."""
    out, columns = tmp_path / f"f.{ending}", named(7)
    with Unfinished(working_folder(out), WHO, PATHS) as unfinished:
        unfinished.add([4, 5], made([4, 5], shape), {6: BadFile("006.png", "empty")})
    with Unfinished(working_folder(out), WHO, PATHS) as unfinished:
        assert left(unfinished, 7) == [0, 1, 2, 3, 6]
        unfinished.add([2, 0, 3], made([2, 0, 3], shape), {})
        unfinished.add([], np.empty(0, np.float32), {1: BadFile("001.png", "empty")})
        unfinished.add([1], made([1], shape), {})
        unfinished.write(out, columns)
    features, path, label, split, identity = read(out)
    assert features.dtype == np.float32
    assert np.array_equal(features, made([0, 1, 2, 3, 4, 5], shape))
    assert (path, label, split) == (list(columns.path[:6]), list(columns.label[:6]), list(columns.split[:6]))
    assert identity == WHO
    assert [left.name for left in tmp_path.iterdir()] == [out.name]


@pytest.mark.parametrize("ending", ENDINGS)
def test_one_image(tmp_path: Path, ending: str) -> None:
    out = tmp_path / f"f.{ending}"
    with Unfinished(working_folder(out), WHO, PATHS) as unfinished:
        unfinished.add([0], made([0]), {})
        unfinished.write(out, named(1))
    features, path, *_ = read(out)
    assert features.shape == (1, 3) and path == ["000.png"]


@pytest.mark.parametrize("ending", ENDINGS)
def test_names_that_are_no_text(tmp_path: Path, ending: str) -> None:
    """In Parquet what is not Unicode is spelled out, elsewhere it comes back as it was."""
    names = ["ü 日本.png", "new\nline.png", 'quote".png', "back\\slash.png", "byte\udcff.png", "nothing"]
    out = tmp_path / f"f.{ending}"
    with Unfinished(working_folder(out), WHO, PATHS) as unfinished:
        unfinished.add(list(range(6)), made(list(range(6))), {})
        unfinished.write(out, Columns(names, ["sq\udcffuare"] * 6, [""] * 6))
    _, path, label, split, _ = read(out)
    spelled = ending == "parquet"
    assert path == [name.replace("\udcff", "\\udcff") if spelled else name for name in names]
    assert label == [r"sq\udcffuare" if spelled else "sq\udcffuare"] * 6
    assert split == [""] * 6


@pytest.mark.parametrize("at_once", [5, 1, 0.5], ids=["5 rows", "a row", "half a row"])
@pytest.mark.parametrize("ending", ENDINGS)
def test_it_is_written_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str, at_once: float) -> None:
    out, sizes, write = tmp_path / f"f.{ending}", [], WRITERS[f".{ending}"]
    monkeypatch.setattr(feature_file, "CHUNK", int(at_once * 12))

    def seen(chunk: np.ndarray) -> np.ndarray:
        sizes.append(len(chunk))
        return chunk

    monkeypatch.setitem(WRITERS, out.suffix, lambda path, chunks, *rest: write(path, map(seen, chunks), *rest))
    with Unfinished(working_folder(out), WHO, PATHS) as unfinished:
        for rows in ([3, 4, 5, 6, 7, 8, 9, 10, 11], [0, 1, 2]):
            unfinished.add(rows, made(rows), {})
        unfinished.write(out, named(12))
    assert sizes == ([5, 5, 2] if at_once == 5 else [1] * 12)
    features, path, *_ = read(out)
    assert np.array_equal(features, made(list(range(12)))) and path == list(named(12).path)
    if ending == "parquet":
        assert pyarrow.parquet.ParquetFile(out).num_row_groups == len(sizes), "each part leaves the memory"


@pytest.mark.parametrize("ending", ENDINGS)
def test_memory_does_not_grow_with_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str) -> None:
    out, size = tmp_path / f"f.{ending}", 32 * 2**20
    monkeypatch.setattr(feature_file, "CHUNK", 2**20)
    columns = named(512)
    with Unfinished(working_folder(out), WHO, PATHS) as unfinished:
        for first in range(0, 512, 64):
            values = np.full((64, size // 512 // 4), first, dtype=np.float32)
            unfinished.add(list(range(first, first + 64)), values, {})
        del values
        tracemalloc.start()
        try:
            unfinished.write(out, columns)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert out.stat().st_size > (0 if ending == "parquet" else size)
    assert peak < 6 * 2**20


@pytest.mark.parametrize("ending", ENDINGS)
def test_many_rows(tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names, too, are written in parts: as they would be at once."""
    whole, parts = tmp_path / f"whole.{ending}", tmp_path / f"parts.{ending}"
    beside = Columns([f"ü\udcff {row % 7}.png" for row in range(50)], ['lab"el'] * 50, [""] * 50)
    for out in (whole, parts):
        with Unfinished(working_folder(out), WHO, PATHS) as unfinished:
            unfinished.add(range(50), made(list(range(50))), {})
            unfinished.write(out, beside)
        monkeypatch.setattr(feature_file, "AT_ONCE", 7)
    assert whole.read_bytes() == parts.read_bytes()


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_file_that_cannot_be_written_whole_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str, contents: Callable[[Path], dict[str, Any]]
) -> None:
    out, write = tmp_path / f"f.{ending}", WRITERS[f".{ending}"]

    def breaking(chunks: Any) -> Any:
        yield next(chunks)
        raise OSError(28, "No space left on device")

    with Unfinished(working_folder(out), WHO, PATHS) as unfinished:
        unfinished.add([0, 1, 2], made([0, 1, 2]), {})
        before = contents(tmp_path)
        with monkeypatch.context() as patched, pytest.raises(OSError, match="No space"):
            patched.setattr(feature_file, "CHUNK", 12)
            patched.setitem(WRITERS, out.suffix, lambda path, chunks, *rest: write(path, breaking(chunks), *rest))
            unfinished.write(out, named(3))
    assert contents(tmp_path) == before
    with Unfinished(working_folder(out), WHO, PATHS) as unfinished:
        assert not len(left(unfinished, 3))
        unfinished.write(out, named(3))
    assert np.array_equal(read(out)[0], made([0, 1, 2]))


# What is taken up again


def test_all_of_it_is_there_again(begun: Path) -> None:
    unfinished = again(begun)
    assert there(unfinished) == [0, 1, 2, 3, 4, 6, 7, 8] and unfinished.shape == (3,) and unfinished.count == 8
    assert unfinished.bad == {5: BadFile("005.png", "the file is empty")}
    assert left(unfinished, 10) == [5, 9]


def test_nothing_read_yet_but_bad_files(out: Path) -> None:
    """No shape is known then."""
    with Unfinished(working_folder(out), WHO, PATHS) as unfinished:
        unfinished.add([], np.empty(0, np.float32), {0: BadFile("byte\udcff\n.png", "empty")})
    with Unfinished(working_folder(out), WHO, PATHS) as unfinished:
        assert (unfinished.count, unfinished.shape) == (0, ())
        assert unfinished.bad == {0: BadFile("byte\udcff\n.png", "empty")}
        unfinished.add([0, 1], made([0, 1]), {})
        unfinished.write(out, named(2))
    assert np.array_equal(read(out)[0], made([0, 1]))


@pytest.mark.parametrize("file", [VALUES, ROWS])
def test_a_stop_at_any_byte_leaves_whole_batches(begun: Path, out: Path, file: str) -> None:
    """Cut anywhere: what is left is a beginning of the batches, and goes on to the same file."""
    log = begun / f"{LOG}0"
    kept = {name: (log / name).read_bytes() for name in (VALUES, ROWS, IDENTITY)}
    beginnings = [[], [0, 1, 2, 3], [0, 1, 2, 3, 4, 6, 7], [0, 1, 2, 3, 4, 6, 7, 8]]
    found = set()
    for size in range(len(kept[file])):
        for name, data in kept.items():
            (log / name).write_bytes(data[:size] if name == file else data)
        unfinished = again(begun)
        only_the_line_end_lacks = file == ROWS and size == len(kept[ROWS]) - 1
        assert there(unfinished) in beginnings[: 4 if only_the_line_end_lacks else 3], f"{size} bytes"
        assert (log / VALUES).stat().st_size == 12 * unfinished.count
        found.add(unfinished.count)
    assert found >= {0, 4, 7}
    for size in (0, 1, len(kept[file]) // 2, len(kept[file]) - 2, len(kept[file]) - 1):
        log.mkdir(parents=True, exist_ok=True)
        for name, data in kept.items():
            (log / name).write_bytes(data[:size] if name == file else data)
        with Unfinished(begun, WHO, PATHS) as unfinished:
            rows = left(unfinished, 10)
            unfinished.add(rows, made(rows), {})
        with Unfinished(begun, WHO, PATHS) as unfinished:  # and is whole for one more stop
            unfinished.add(rows := left(unfinished, 10), made(rows), {})
            unfinished.write(out, named(10))
        assert np.array_equal(read(out)[0], made(list(range(10)))), f"{size} bytes"
        out.unlink()


@pytest.mark.parametrize("file", [VALUES, ROWS])
@pytest.mark.parametrize("tail", [b"\0" * 50, b"\xff\xfe{", b"\n\n"], ids=["zeros", "no text", "empty lines"])
def test_what_stands_after_the_last_batch_is_cut_off(begun: Path, out: Path, file: str, tail: bytes) -> None:
    """What a file system may leave after a power failure."""
    with (begun / f"{LOG}0" / file).open("ab") as handle:
        handle.write(tail)
    with Unfinished(begun, WHO, PATHS) as unfinished:
        assert there(unfinished) == [0, 1, 2, 3, 4, 6, 7, 8]
        unfinished.add([9, 5], made([9, 5]), {})
    with Unfinished(begun, WHO, PATHS) as unfinished:
        assert not len(left(unfinished, 10))
        unfinished.write(out, named(10))
    assert np.array_equal(read(out)[0], made(list(range(10))))


@pytest.mark.parametrize("lost", [VALUES, ROWS])
def test_a_lost_file_is_as_if_nothing_had_been_done(begun: Path, out: Path, lost: str) -> None:
    (begun / f"{LOG}0" / lost).unlink()
    with Unfinished(begun, WHO, PATHS) as unfinished:
        assert left(unfinished, 10) == list(range(10))
        unfinished.add(list(range(10)), made(list(range(10))), {})
        unfinished.write(out, named(10))
    assert np.array_equal(read(out)[0], made(list(range(10))))


def test_a_line_that_lacks_its_end_is_ended(begun: Path, out: Path) -> None:
    """Else the next line, of a whole batch, would be a part of it, and both be lost in one more stop."""
    rows = begun / f"{LOG}0" / ROWS
    os.truncate(rows, rows.stat().st_size - 1)
    with Unfinished(begun, WHO, PATHS) as unfinished:
        unfinished.add([9, 5], made([9, 5]), {})
    assert there(again(begun)) == list(range(10))


def test_images_that_are_listed_several_times(out: Path) -> None:
    """Each time counts, in the order of the list; one that is gone takes no place."""
    with Unfinished(working_folder(out), WHO, ["a", "b", "a", "c", "a"]) as unfinished:
        unfinished.add([0, 1, 2], made([0, 1, 2]), {})
    with Unfinished(working_folder(out), WHO, ["a", "c", "a", "a"]) as unfinished:
        assert unfinished.missing().tolist() == [1, 3]
        unfinished.add([1, 3], made([11, 13]), {})
        unfinished.write(out, Columns(["a", "c", "a", "a"], [""] * 4, [""] * 4))
    assert np.array_equal(read(out)[0], made([0, 11, 2, 13]))


# Several logs


def of(number: int, several: int, folder: Path) -> Unfinished:
    """As one of several processes has it, but for what they tell each other."""
    return Unfinished(folder, WHO, PATHS, number, several)


@pytest.mark.parametrize("ending", ENDINGS)
def test_what_several_processes_have_done_is_one(tmp_path: Path, ending: str) -> None:
    """In a stretch of the file there may be rows of all of them."""
    out = tmp_path / f"f.{ending}"
    with of(0, 3, working_folder(out)) as unfinished:
        unfinished.add([3, 0], made([3, 0]), {7: BadFile("007.png", "empty")})
    with of(2, 3, working_folder(out)) as unfinished:
        assert left(unfinished, 5) == [1, 2, 4]
        unfinished.add([4], made([4]), {})
        unfinished.add([1, 8], made([1, 8]), {})
    with of(1, 2, working_folder(out)) as unfinished:
        assert left(unfinished, 9) == [2, 5, 6, 7] and unfinished.bad == {7: BadFile("007.png", "empty")}
        unfinished.add([6, 5], made([6, 5]), {})
    assert sorted(path.name for path in working_folder(out).iterdir()) == [f"{LOG}{number}" for number in range(3)]
    with Unfinished(working_folder(out), WHO, PATHS) as unfinished:
        assert unfinished.missing(2, 8).tolist() == [2, 7] and unfinished.count == 7
        unfinished.add([2, 7], made([2, 7]), {})
        unfinished.write(out, named(9))
    features, path, *_ = read(out)
    assert np.array_equal(features, made(list(range(9)))) and path == list(named(9).path)
    assert [left.name for left in tmp_path.iterdir()] == [out.name]


@pytest.mark.parametrize("file", [VALUES, ROWS])
def test_the_torn_log_of_a_process_there_is_no_more(out: Path, file: str) -> None:
    with of(1, 2, working_folder(out)) as unfinished:
        unfinished.add([1, 2], made([1, 2]), {})
        unfinished.add([3], made([3]), {})
    log = working_folder(out) / f"{LOG}1"
    os.truncate(log / file, (log / file).stat().st_size - 2)
    with Unfinished(working_folder(out), WHO, PATHS) as unfinished:
        assert left(unfinished, 4) == [0, 3]
        assert (log / VALUES).stat().st_size == 24
        unfinished.add([3, 0], made([3, 0]), {})
        unfinished.write(out, named(4))
    assert np.array_equal(read(out)[0], made(list(range(4))))


def test_logs_of_another_identity(out: Path, contents: Callable[[Path], Any]) -> None:
    """Also that of a process there is no more."""
    with of(1, 2, working_folder(out)) as unfinished:
        unfinished.add([1], made([1]), {})
    before = contents(working_folder(out))
    for number, several in ((0, 1), (1, 2)):
        with (
            pytest.raises(TlkitError, match="features begun with another model: some, not another"),
            Unfinished(working_folder(out), WHO | {"model": "another"}, PATHS, number, several),
        ):
            pass
        assert contents(working_folder(out)) == before


@unix
def test_the_log_of_a_process_that_has_outlived_its_job(out: Path, contents: Callable[[Path], Any]) -> None:
    with of(1, 2, working_folder(out)) as unfinished:
        unfinished.add([1], made([1]), {})
        before = contents(working_folder(out))
        with pytest.raises(TlkitError, match="another process is writing these features"), again(working_folder(out)):
            pass
        assert contents(working_folder(out)) == before


def test_a_mistake_before_any_work_leaves_nothing(out: Path) -> None:
    for worked in ((), (1,), (0, 1)):
        for number in (1, 0):
            with pytest.raises(KeyboardInterrupt), of(number, 2, working_folder(out)) as unfinished:
                if number in worked:
                    unfinished.add([number], made([number]), {})
                raise KeyboardInterrupt
        assert working_folder(out).exists() == bool(worked)
    assert left(again(working_folder(out)), 2) == []


def test_features_that_are_not_there_any_more(begun: Path, out: Path) -> None:
    """As where a network's file system has not brought them yet."""
    with Unfinished(begun, WHO, PATHS) as unfinished:
        os.truncate(begun / f"{LOG}0" / VALUES, 40)
        with pytest.raises(TlkitError, match=r"features.f32: lacks features that another process has written") as told:
            unfinished.write(out, named(10))
    assert "give --out on a disk that all share" in str(told.value) and not out.exists()


def test_texts_are_picked_without_a_list() -> None:
    picked = Picked("abcd", np.array([3, 0, 0, 2]))
    assert (list(picked), len(picked), picked[1], picked[-1]) == (["d", "a", "a", "c"], 4, "a", "c")
    assert list(picked[1:3]) == ["a", "a"] and list(Picked(picked, np.array([3, 0]))) == ["c", "d"]


# What is refused


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (WHO | {"model": "another"}, "another model: some, not another"),
        (WHO | {"stage": "stage1"}, "another stage: pooled, not stage1"),
        (WHO | {"preprocessing": {"size": 32, "mean": [0.1, 0.2]}}, "another preprocessing: "),
        (WHO | {"new": 1}, "another new: null, not 1"),
        ({"model": "some", "stage": "pooled"}, "another preprocessing: "),
        (WHO | {"model": "another", "stage": "stage1"}, "another model: "),
    ],
    ids=["model", "stage", "preprocessing", "one more", "one less", "the first that differs"],
)
def test_another_identity(begun: Path, contents: Callable[[Path], Any], other: dict[str, Any], told: str) -> None:
    before = contents(begun)
    with pytest.raises(TlkitError, match="features begun with") as caught, Unfinished(begun, other, PATHS):
        pass
    assert told in str(caught.value) and str(begun) in str(caught.value) and "choose another --out" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert contents(begun) == before


def test_tuples_and_lists_are_one_identity(out: Path) -> None:
    for values in ((1.0, 2.0), [1.0, 2.0]):
        with Unfinished(working_folder(out), {"mean": values}, PATHS):
            pass


@unix
def test_one_writer_at_a_time(begun: Path, contents: Callable[[Path], Any]) -> None:
    with Unfinished(begun, WHO, PATHS) as first:
        before = contents(begun)
        with (
            pytest.raises(TlkitError, match="another process is writing these features"),
            Unfinished(begun, WHO, PATHS),
        ):
            pass
        assert contents(begun) == before
        first.add([9], made([9]), {})
    assert left(again(begun), 10) == [5]


def test_what_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(WRITERS) == {".npz", ".parquet", ".safetensors"}
    for name in ("f.npz", "f.NPZ", "f.Parquet", "f.safetensors"):
        refuse_unwritable(tmp_path / name)
    for name, what in (
        ("f.csv", "cannot write '.csv' files; use .parquet, .npz, .safetensors"),
        ("f", "cannot write '' files"),
        (".npz", "cannot write '' files"),
        ("none/f.npz", "there is no such folder"),
    ):
        with pytest.raises(TlkitError) as caught:
            refuse_unwritable(tmp_path / name)
        assert what in str(caught.value)
    (tmp_path / "file").touch()
    with pytest.raises(TlkitError, match="there is no such folder"):
        refuse_unwritable(tmp_path / "file" / "f.npz")
    monkeypatch.setattr(feature_file.os, "access", lambda *_: False)
    with pytest.raises(TlkitError, match="nothing may be written there"):
        refuse_unwritable(tmp_path / "f.npz")


# Not so yet


def test_features_whose_identity_is_lost_are_not_used(begun: Path, out: Path) -> None:
    """Nobody knows what they are of: as where a kill interrupts the removal of the folder."""
    (begun / f"{LOG}0" / IDENTITY).unlink()
    with Unfinished(begun, WHO | {"model": "another"}, PATHS) as unfinished:
        rows = left(unfinished, 10)
        unfinished.add(rows, -made(rows), {})
        unfinished.write(out, named(10))
    assert np.array_equal(read(out)[0], -made(list(range(10))))


@pytest.mark.skipif(sys.platform != "linux", reason="names are bytes on Linux")
@pytest.mark.parametrize(
    "ending",
    [
        "npz",
        "parquet",
        "safetensors",
    ],
)
def test_a_folder_whose_name_is_no_text(tmp_path: Path, ending: str) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/byte\xff"))
    folder.mkdir()
    out = folder / f"f.{ending}"
    with Unfinished(working_folder(out), WHO, PATHS) as unfinished:
        unfinished.add([0], made([0]), {})
        unfinished.write(out, named(1))
    assert out.is_file()
