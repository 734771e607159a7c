"""Networks: built from timm, cut into stages, loaded with weights."""

from tlkit.networks import alexnet, variants

__all__ = ["alexnet", "variants"]  # so that timm knows ours wherever a network is built or read
