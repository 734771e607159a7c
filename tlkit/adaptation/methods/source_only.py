"""No adaptation: the network learns from the source and never sees the target. What every other method must beat."""

from tlkit.adaptation.method import Method

METHOD = Method(paper="cross-entropy on the source alone: the baseline")
