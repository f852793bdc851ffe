"""Objectives: one file each."""

from interlace.objectives.base import Batch, Objective, Others, Scored, Views, build_objective
from interlace.objectives.itc import ITC
from interlace.objectives.itm import ITM
from interlace.objectives.vqa import VQA

__all__ = ["ITC", "ITM", "VQA", "Batch", "Objective", "Others", "Scored", "Views", "build_objective"]
