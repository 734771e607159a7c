"""Which images the report page pictures, how small they are made, and where a heat map comes to lie."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tlkit.reports import pictures
from tlkit.reports.outcome import Outcome
from tlkit.reports.pictures import Picture

PREPROCESSING = {
    **{"size": 224, "crop": 0.875, "crop_mode": "center", "interpolation": "bicubic"},
    **{"mean": [0.5], "std": [0.5], "colour_mode": "L"},
}
ALL = [(truth, guess) for truth in range(3) for guess in range(3)]


def outcome(truth: Sequence[int], predicted: Sequence[int], confidence: Sequence[float]) -> Outcome:
    return Outcome(np.array(truth), np.array(predicted), np.array(confidence), 3)


def rows(found: Sequence[Picture]) -> list[int]:
    return [one.row for one in found]


def test_worst_mistakes_then_some_of_each_cell() -> None:
    wrong, right = 30, 5
    made = outcome(
        [0] * wrong + [2] * right, [1] * wrong + [2] * right, [*np.linspace(0.9, 0.4, 30), 0.5, 0.6, 0.7, 0.8, 0.9]
    )
    found = pictures.choose(made, ALL)
    assert rows(found)[:24] == list(range(24)) and all(one.worst for one in found[:24])
    assert [(one.row, one.cell, one.worst) for one in found[24:]] == [(30, "2-2", False), (34, "2-2", False)]
    assert rows(pictures.choose(made, [])) == list(range(24))


def test_each_cell_gets_its_first_before_any_gets_its_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "MISTAKES_SHOWN", 0)
    made = outcome([0] * 6 + [1] * 2 + [2], [1] * 6 + [0] * 2 + [2], [0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.6, 0.7, 1.0])
    assert rows(pictures.choose(made, ALL)) == [5, 7, 8, 4, 6, 3, 2]
    monkeypatch.setattr(pictures, "PICTURED", 3)
    assert rows(pictures.choose(made, ALL)) == [5, 7, 8]


def test_no_images_no_pictures() -> None:
    assert pictures.choose(outcome([], [], []), ALL) == []


def test_pictures_beyond_the_budget_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.effect_noise((300, 300), 90).save(tmp_path / "1.png")
    small = pictures.thumbnail(tmp_path / "1.png", *pictures.SMALL)
    assert small is not None and max(small.width, small.height) == 160
    monkeypatch.setattr(pictures, "MISTAKES_SHOWN", 1)
    monkeypatch.setattr(pictures, "PICTURE_CHARACTERS", 3 * len(small.uri))
    made = outcome([0] * 4, [1] * 4, [0.9, 0.8, 0.7, 0.6])
    found = pictures.gallery(made, ALL, [tmp_path / "1.png"] * 4, None, None)
    assert 1 <= len(found) < 4 and found[0].worst


def test_heat_is_asked_for_once_and_only_where_it_can_be_laid(tmp_path: Path) -> None:
    Image.new("RGB", (300, 200)).save(tmp_path / "1.jpg")
    files, asked = [tmp_path / "1.jpg", tmp_path / "gone.jpg", tmp_path / "1.jpg", tmp_path / "1.jpg"], []

    def heat(chosen: Sequence[int]) -> list[np.ndarray | None]:
        asked.append(list(chosen))
        return [np.ones((7, 9)), None]

    made = outcome([0, 0, 0, 1], [1, 1, 1, 1], [0.9, 0.8, 0.7, 0.9])
    first, gone, third, right = pictures.gallery(made, ALL, files, heat, PREPROCESSING)
    assert asked == [[0, 2]]
    assert first.overlay is not None
    assert gone.overlay is third.overlay is right.overlay is None and gone.thumbnail is None
    over = first.overlay
    assert (over.left, over.top, over.width, over.height) == pytest.approx((20.83, 6.25, 58.33, 87.5), abs=0.01)
    assert first.thumbnail is not None and first.thumbnail.box == pytest.approx((0, 16.67, 100, 66.67), abs=0.01)
    asked.clear()
    for recorded in (None, {}, {"size": "?"}, PREPROCESSING | {"crop": 0.0}, PREPROCESSING | {"size": [224, 224]}):
        found = pictures.gallery(made, ALL, files, heat, recorded)
        assert not any(one.overlay for one in found) and not asked


def test_heat_map_is_a_tiny_picture_clear_where_nothing_was_looked_at() -> None:
    heat = np.array([[0.0, 0.5, 1.0], [np.nan, 2.0, -1.0]])
    uri = pictures.heat_uri(heat)
    assert len(uri) < 300
    with Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/png;base64,")))) as image:
        pixels = np.asarray(image)
    assert pixels.shape == (2, 3, 4)
    alpha = pixels[..., 3]
    assert alpha[0, 0] == alpha[1, 0] == alpha[1, 2] == 0 and alpha[0, 0] < alpha[0, 1] < alpha[0, 2] == alpha[1, 1]
    assert pixels[0, 1, 1] > pixels[0, 2, 1]  # the warmer, the redder
