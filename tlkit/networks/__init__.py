"""Networks: built from timm, cut into stages, loaded with weights."""
