"""Answers from trained weights, in a program of one's own or for folders of images: classes, maps, objects, features.

It builds on tasks and weights, and knows nothing of training.
"""

from __future__ import annotations

from swinv2_train.inference.loaded import LoadedModel, load
from swinv2_train.tasks.answers import ClassMap, DetectedObjects, Prediction

__all__ = ["ClassMap", "DetectedObjects", "LoadedModel", "Prediction", "load"]
