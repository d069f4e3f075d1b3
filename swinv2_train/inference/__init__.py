"""Answers from trained weights in a program of one's own: load a model, ask it for classes and features.

It builds on tasks and weights, and knows nothing of training.
"""

from __future__ import annotations

from swinv2_train.inference.loaded import LoadedModel, Prediction, load

__all__ = ["LoadedModel", "Prediction", "load"]
