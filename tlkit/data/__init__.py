"""Image folders and manifests, splits, decoding, what is done to an image, loaders."""
