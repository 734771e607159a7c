"""Networks: built from timm, cut into stages, loaded with weights."""

from tlkit.networks import variants

__all__ = ["variants"]  # so that timm knows ours wherever a network is built or read
