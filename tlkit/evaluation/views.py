"""Test-time views by name; a new view is one function and one entry here."""

from __future__ import annotations

from tlkit.data.transforms import View, center

VIEWS: dict[str, View] = {"center": center}
