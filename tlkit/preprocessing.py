"""How an image becomes a network's input: stored with the weights, never guessed."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from tlkit.errors import TlkitError


@dataclass(frozen=True)
class Preprocessing:
    """What is done to an upright 8-bit image before the network sees it.

    Args:
        size: Side of the square network input, in pixels.
        crop: ``size`` divided by the side that the image is resized to; 1 keeps all of it.
        crop_mode: ``center`` resizes the shorter side and cuts the centre out, ``squash`` resizes both sides alike
            (the picture is distorted), ``border`` resizes the longer side and pads to a square.
        interpolation: ``nearest``, ``bilinear``, ``bicubic`` or ``lanczos``; always antialiased when shrinking.
        mean: Of each channel, in [0, 1].
        std: Of each channel, in [0, 1].
        colour_mode: ``RGB``, or ``L`` for one grey channel.
    """

    size: int
    crop: float
    crop_mode: str
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    colour_mode: str = "RGB"

    def __post_init__(self) -> None:
        channels = len(self.colour_mode)
        if not len(self.mean) == len(self.std) == channels:
            raise TlkitError(
                f"{len(self.mean)} means and {len(self.std)} standard deviations for {channels} channels",
                where="preprocessing",
                remedy="give one of each for each channel",
            )

    @property
    def resized_side(self) -> int:
        """The side in pixels that the image is resized to before the crop (rounded down, as timm does)."""
        return math.floor(self.size / self.crop)

    @classmethod
    def from_timm(cls, config: dict[str, Any]) -> Preprocessing:
        """Read timm's data configuration (``timm.data.resolve_model_data_config``).

        Raises:
            TlkitError: The network takes neither colour nor grey images, or they are not square.
        """
        channels, height, width = config["input_size"]
        if channels not in (1, 3) or height != width:
            raise TlkitError(
                f"the network takes inputs of {channels} x {height} x {width}",
                remedy="choose a network for square images with 1 or 3 channels",
            )
        return cls(
            size=height,
            crop=float(config["crop_pct"]),
            crop_mode=config.get("crop_mode") or "center",
            interpolation=config["interpolation"] if config["interpolation"] in RESAMPLING else "bicubic",
            mean=tuple(map(float, config["mean"])),
            std=tuple(map(float, config["std"])),
            colour_mode="RGB" if channels == 3 else "L",
        )

    def to_timm(self) -> dict[str, Any]:
        """The same in timm's names, for a ``pretrained_cfg``."""
        return {
            "input_size": [len(self.mean), self.size, self.size],
            "crop_pct": self.crop,
            "crop_mode": self.crop_mode,
            "interpolation": self.interpolation,
            "mean": list(self.mean),
            "std": list(self.std),
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {"mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Preprocessing:
        """The inverse of `to_dict`.

        Raises:
            TlkitError: Values are missing, or unknown.
        """
        try:
            return cls(**values | {"mean": tuple(values["mean"]), "std": tuple(values["std"])})
        except (KeyError, TypeError) as error:
            remedy = "write the run again, or use the version of tlkit that wrote it"
            raise TlkitError(f"the stored preprocessing cannot be read ({error})", remedy=remedy) from error

    def with_overrides(
        self,
        *,
        size: int | None = None,
        crop: float | None = None,
        crop_mode: str | None = None,
        interpolation: str | None = None,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
    ) -> Preprocessing:
        """A copy in which whatever is given replaces what is stored."""
        given = {
            "size": size,
            "crop": crop,
            "crop_mode": crop_mode,
            "interpolation": interpolation,
            "mean": mean,
            "std": std,
        }
        return replace(self, **{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]


RESAMPLING = ("nearest", "bilinear", "bicubic", "lanczos")
