"""TLA: adversarially robust image classifiers, trained on a cluster and served from a model registry."""

__version__ = "0.1.0"
