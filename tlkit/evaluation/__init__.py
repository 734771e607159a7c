"""Predictions, metrics and views."""
