"""Images in tar files, here or elsewhere: what is in them, how they are reached, how they are written."""
