"""Pipelines: commands as steps of a file that refer to each other's results."""
