"""What the tests of the audit share: a look at an image that lies in no file."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from PIL import Image

from tlkit.audit.looks import Look, look
from tlkit.data.decode import Stored


@pytest.fixture(scope="session")
def look_of() -> Callable[..., Look]:
    """``look_of(image, digest)``: as if it had been read from a PNG."""

    def looked(image: Image.Image, digest: str | None = None) -> Look:
        return look(image.convert("L"), Stored("PNG", image.mode, *image.size), digest)

    return looked
