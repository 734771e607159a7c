"""The page of an audit: what it says first, what it leaves out, that everything is escaped, and that it fits."""

from __future__ import annotations

import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tlkit.reports import audit, copies, findings
from tlkit.reports.audit import AuditPage, render_audit, write_audit

EVIL = "<img src=x onerror=document.title='pwned'>"
HOSTILE = (EVIL, '" onload="alert(1)', "</style></title><script>alert(1)</script>", "{{ 7 * 7 }}", "a\nb\0c", "🐜")
KEYS = ("duplicates", "corrupt", "structure", "imbalance", "blank", "blurred", "odd_aspect", "small", "wrong_suffix")


def group(*paths: str, exact: bool = True, splits: bool = False, classes: bool = False) -> dict[str, Any]:
    """Duplicates as check-data tells them."""
    told = {"kind": "exact", "found_by": "content"} if exact else {"kind": "near", "found_by": "hash"}
    return {"paths": list(paths), "across_splits": splits, "across_classes": classes, **told}


def summary(word: str = "train/ants/1.jpg", **more: Any) -> dict[str, Any]:
    """Some of every kind; the word stands wherever a name or a reason may."""
    suspect = {"path": word, "label": word, "suggested": word, "probability": 0.02, "suggested_probability": 0.97}
    sized = {"path": word, "width": 1, "height": 10_000}
    return {
        **{"command": "check-data", "version": word, "seconds": 12.3, "data": word, "images": 2533, "readable": 2530},
        "splits": {"train": 2000, "val": 530},
        "corrupt": [{"path": word, "reason": word}],
        "duplicates": [group(f"train/{word}/1.jpg", f"val/{word}/2.jpg", splits=True)],
        "classes": [{"class": word, "images": 3, "train": 2, "val": 1}, {"class": "b", "images": 30, "train": 30}],
        "imbalance": [word],
        "label_suspects": [suspect],
        **{"labels_judged": 2530, "deep": True, "model": word, "weights": word},
        **{"blank": [{"path": word}], "blurred": [{"path": word, "sharpness": 0.01}]},
        **{"odd_aspect": [sized], "small": [sized], "wrong_suffix": [{"path": word, "format": word}]},
        **{"formats": {word: 3}, "modes": {word: 3, "L": 2}, "ignored": {word: 3}, "heic_left_out": 2},
        "sizes": {"width": {"min": 1, "median": 256.0, "max": 10_000}, "height": {"min": 9, "median": 9.0, "max": 9}},
        "structure": [{"what": word, "remedy": word}],
        "manifest": {"path": word, "kept": 2500, "dropped": 33},
        **more,
    }


def page(told: dict[str, Any], root: Path = Path("/nowhere")) -> str:
    return render_audit(AuditPage("check-data ants", told, root))


def words(html: str) -> str:
    return " ".join(re.sub(r"<[^>]+>", " ", re.sub(r"<style>.*?</style>", " ", html, flags=re.DOTALL)).split())


class Outline(HTMLParser):
    """Every start tag with the names of its attributes, ids, and where links lead."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, list[str]]] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, [name for name, _ in attrs]))
        self.ids += [value or "" for name, value in attrs if name == "id"]
        self.links += [value or "" for name, value in attrs if name == "href"]


@pytest.mark.parametrize(
    ("findings", "headline"),
    [
        ({"across_splits": 3, "blurred": 2, "label_suspects": 40}, "3 images stand in more than one split"),
        ({"across_splits": 1, "corrupt": 9}, "1 image stands in more than one split"),
        ({"structure": 1, "corrupt": 1}, "1 thing is wrong with the folders"),
        ({"blurred": 2, "corrupt": 1}, "1 file cannot be read"),
        ({"exact_duplicates": 1234}, "1,234 images are there more than once"),
        ({"imbalance": 1}, "1 class has far fewer images than the largest"),
        ({"label_suspects": 40, "blurred": 2}, "40 labels may be wrong"),
        ({"blurred": 2, "blank": 0}, "2 images are blurred"),
        ({"blurred": 0}, "Nothing was found that should worry you"),
        ({}, "Nothing was looked for"),
    ],
)
def test_what_matters_most_is_said_first(findings: dict[str, int], headline: str) -> None:
    assert f'<p class="lead">{headline}</p>' in page({"findings": findings})


@pytest.mark.parametrize("kind", findings.KINDS, ids=lambda kind: kind.key)
def test_each_kind_is_counted_and_its_link_has_a_target(kind: findings.Kind) -> None:
    found = Outline(page({"findings": {kind.key: 2}, "classes": [{"class": "a", "images": 1}]}))
    assert len(found.links) >= 2
    assert {link.removeprefix("#") for link in found.links} <= set(found.ids)
    assert "{" not in findings.worded(kind.name, 1) + findings.worded(kind.says, 2)


def test_links_lead_to_sections_of_their_own() -> None:
    found = Outline(page(summary()))
    assert len(found.ids) == len(set(found.ids))
    assert {link.removeprefix("#") for link in found.links} <= set(found.ids)
    assert len(found.links) == len(set(found.links)) + 1  # of rare classes and of all classes


def test_numbers_follow_from_the_lists_where_they_are_not_stated() -> None:
    near = group("a/1.jpg", "b/1.jpg", exact=False, classes=True)
    told = summary(duplicates=[near, group("a/2.jpg", "a/3.jpg")], splits={})
    found = findings.counts(told)
    assert (found["exact_duplicates"], found["near_duplicates"], found["across_classes"]) == (1, 1, 1)
    assert found["blurred"] == found["label_suspects"] == 1
    assert "across_splits" not in found  # there are none
    assert "blurred" not in findings.counts({**told, "findings": {"corrupt": 1}})  # ignored on demand
    assert findings.counts(summary(label_suspects=None)).get("label_suspects") is None


def test_nothing_found() -> None:
    told = summary(**{key: [] for key in KEYS}, label_suspects=[], readable=2533)
    html = page(told)
    text = words(html)
    assert "Nothing was found that should worry you 2,533 images in 2 classes were looked at. Looked for" in text
    assert "images in more than one split, faults of the folders, images in more than one class, unreadable" in text
    assert "odd shapes and small images." in text
    assert "No label stood out among 2,530 that were judged." in text
    assert "<figure" not in html and "What was found" not in html


def test_says_what_suspects_are_and_how_to_look_for_them() -> None:
    text = words(page(summary()))
    assert "These are candidates to look at, not errors" in text
    assert "fitted for each image without that image (out of fold)" in text
    assert "labelled train/ants/1.jpg 2.0 % → looks like train/ants/1.jpg 97.0 %" in text
    text = words(page(summary(label_suspects=None)))
    assert "Wrong labels were not looked for: --deep does" in text and "candidates" not in text
    assert "Labels to look at" not in words(page({"images": 3}))


@pytest.mark.parametrize("key", list(summary()))
def test_what_is_absent_is_left_out(key: str) -> None:
    full = summary()
    for told in ({name: value for name, value in full.items() if name != key}, {key: full[key]}, {**full, key: None}):
        found = Outline(page(told))
        assert {link.removeprefix("#") for link in found.links} <= set(found.ids)


def test_entries_may_lack_everything() -> None:
    told = summary(
        duplicates=[{}], classes=[{}], label_suspects=[{}], **{key: [{}] for key in KEYS[1:] if key != KEYS[3]}
    )
    assert "No picture" in page(told)
    assert "There are no images" in page({"images": 0})


def test_groups_across_splits_stand_first_then_those_across_classes() -> None:
    groups = [
        group("train/a/1.jpg", "train/a/2.jpg"),
        group("train/a/3.jpg", "train/b/3.jpg", classes=True, exact=False),
        group("valid/a/4.jpg", "train/a/4.jpg", splits=True),
        group("val/b/5.jpg", "train/a/5.jpg", "test/a/5.jpg", splits=True, classes=True),
    ]
    classes = [{"class": "a"}, {"class": "b"}]
    html = page({"duplicates": groups, "splits": {"train": 3, "val": 2}, "classes": classes})
    said = re.findall(r"<h[34][^>]*>(?:<bdi>)?([^<]*)", html)
    assert said == [
        *(
            "In more than one split",
            "Exact copies in train and val",
            "Exact copies in train, val and test, labelled b and a",
        ),
        *("In more than one class", "Near copies labelled a and b", "Others", "Exact copies"),
    ]
    assert re.findall(r'class="differs">(\w+)<', html) == ["valid", "train", "val", *"b", "train", *"a", "test", *"aab"]
    assert "found by the content of the files" in html and "found by how they look" in html
    assert copies.tiers({"duplicates": groups})[0].groups[0].what == "Exact copies in more than one split"


def test_at_most_so_many_are_shown_and_the_rest_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[Path] = []
    monkeypatch.setattr(audit, "thumbnails", lambda files, room: decoded.extend(files) or [None] * len(files))
    paths = [f"train/a/{k}.jpg" for k in range(20_000)]
    entries = [{"path": path, "reason": "empty", "what": path} for path in paths]
    kinds = dict.fromkeys((key for key in KEYS if key not in ("duplicates", "imbalance")), entries)
    groups = [group(*paths[k : k + 30]) for k in range(5000)]
    classes = [{"class": f"class {k}", "images": k} for k in range(10_000)]
    html = page({**kinds, "duplicates": groups, "label_suspects": entries, "classes": classes})
    text = words(html)
    assert text.count("40 of 20,000 images are shown. The object that --json prints has them all.") == 4
    assert text.count("200 of 20,000 files are shown.") == 2 and "200 of 20,000 faults are shown." in text
    assert "120 of 20,000 suspects are shown." in text and "60 of 5,000 groups are shown." in text
    assert text.count("and 18 more, which the object of --json has") == 60
    assert "9,950 between them are left out" in text and "… 9,950 classes …" in text
    assert "class 9999 9,999 class 9998" in text and text.rindex("class 0 0") > text.rindex("class 24 24")
    assert html.count("<figure") == 60 * 12 + 120 + 4 * 40
    assert len(decoded) < html.count("<figure") and len(html) < 1_000_000


def test_pictures_have_limited_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for k in range(4):
        Image.new("RGB", (300, 200), (k, 0, 0)).save(tmp_path / f"{k}.jpg")
    (tmp_path / "3.jpg").write_bytes(b"")
    told = {"blank": [{"path": f"{k}.jpg"} for k in (0, 3, 1, 2)], "blurred": [{"path": "0.jpg"}, {"path": "gone.jpg"}]}
    html = page(told, tmp_path)
    shown = re.findall(r'<img src="data:image/jpeg;base64,([^"]+)" alt="([^"]+)"', html)
    assert [name for _, name in shown] == ["0.jpg", "1.jpg", "2.jpg", "0.jpg"]
    assert html.count("No picture: the file cannot be read") == 2
    monkeypatch.setattr(audit, "PICTURE_CHARACTERS", 3 * (len(shown[0][0]) + 23))  # 0.jpg stands there twice
    html = page(told, tmp_path)
    assert html.count("<img") == 3 and html.count("the page has no room for more") == 2


@pytest.mark.parametrize("word", HOSTILE)
def test_all_text_is_escaped(word: str) -> None:
    made, harmless = (Outline(render_audit(AuditPage(one, summary(one), Path("/nowhere")))).tags for one in (word, "x"))
    parts = ("bdi", "wbr")  # of a path, whose folders are as many as a name has slashes
    assert [tag for tag in made if tag[0] not in parts] == [tag for tag in harmless if tag[0] not in parts]


def test_undecodable_and_long_names(tmp_path: Path) -> None:
    names = ["train/a/\udcff.jpg", "train/" + "long" * 500 + "/1.jpg"]
    write_audit(tmp_path / "page.html", AuditPage("\udcff", summary(names[0], blank=[{"path": names[1]}]), tmp_path))
    html = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert r"train/a/\udcff.jpg" in html
    assert "train/longlon…" in html and "long" * 100 not in html


def test_runs_and_fetches_nothing() -> None:
    html = page(summary())
    assert "<script" not in html and "script-src" not in html and "default-src 'none'" in html
    assert not re.search(r"https?://|\burl\(|@import|<link|<iframe", html)


def test_balance_in_words() -> None:
    def said(*images: int) -> str:
        found = audit.classes({"classes": [{"class": str(k), "images": n} for k, n in enumerate(images)]})
        assert found is not None
        return str(found["balance"])

    assert said(5, 20) == "The largest class has 4 times as many images as the smallest."
    assert said(5, 5) == "All 2 classes have as many images."
    assert said(5, 0) == "Some classes have no images."
    assert said(5) == "There is a single class: nothing to tell apart."


def test_fits_a_phone_and_the_paper(browser: Callable[[], Any], tmp_path: Path) -> None:
    Image.new("RGB", (1, 1000), "tan").save(tmp_path / "1.png")
    told = summary(EVIL + "x" * 120)
    told["duplicates"] += [group(*["1.png"] * 15, f"{EVIL}/{'y' * 200}", classes=True)]
    told["odd_aspect"] = [{"path": "1.png"}, {"path": "\u202egpj.exe"}]
    write_audit(tmp_path / "page.html", AuditPage(EVIL, told, tmp_path))
    tab = browser()
    right = "Math.max(...[...document.querySelectorAll('main *')].filter(e => !e.closest('.wide') && !e.closest('svg'))"
    right += ".map(e => e.getBoundingClientRect().right))"
    for width, media in ((390, ""), (1280, ""), (720, "print")):
        tab.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        tab.call("Emulation.setEmulatedMedia", media=media)
        tab.open(tmp_path / "page.html")
        assert tab.value("document.documentElement.scrollWidth") <= width
        assert tab.value(right) <= width + 1
        assert tab.value("[...document.images].every(image => image.naturalHeight === 160)")
        assert tab.value("document.title").startswith("<img src=x")
        assert not tab.complaints
