"""Unsupervised domain adaptation: from labelled images of one domain to unlabelled ones of another."""
