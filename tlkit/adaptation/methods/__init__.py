"""Adaptation methods: each file is one, and its name is the method's."""
