"""The frame of the report pages: their templates, and the one script that a page allows to run."""

from __future__ import annotations

import base64
import functools
import hashlib
from pathlib import Path

import jinja2
from markupsafe import Markup

from tlkit.reports import curves, words

FOLDER = Path(__file__).parent
SCRIPT = FOLDER / "gallery.js.html"  # by this name the package's data include it with the templates


@functools.cache
def template(name: str) -> jinja2.Template:
    """A template of this folder; all text that it shows is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    shown = (words.percent, words.points, words.metric, words.interval, words.duration, words.plain, words.rates)
    numbers = (words.curve, words.brief)
    environment.filters |= {function.__name__: function for function in (*shown, *numbers)}
    environment.filters |= {"short": curves.shorten, "images": lambda number: words.plural(number, "image")}
    environment.globals |= {"metric_names": words.METRICS, "in_unit": words.IN_UNIT, "frame_width": curves.WIDTH}
    return environment.get_template(name)


@functools.cache
def script() -> Markup:
    """The page's own script, which holds nothing of a run."""
    return Markup(SCRIPT.read_text(encoding="utf-8"))  # ours, so it needs no escaping


def script_source(text: str) -> str:
    """What a Content-Security-Policy calls an inline script that may run: by the hash of its text, and no other."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode('ascii')}"


def encodable(html: str) -> str:
    """The page with what UTF-8 cannot hold (an undecodable byte of a file name) spelt out as an escape."""
    return html.encode(errors="backslashreplace").decode()
