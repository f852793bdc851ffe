"""Objectives: one file each."""

from interlace.objectives.answers import AnswerQuestions
from interlace.objectives.base import Batch, Objective, Pass, Scored, Views, build_objective
from interlace.objectives.binding import Binding
from interlace.objectives.itc import ITC
from interlace.objectives.itc_momentum import MomentumITC
from interlace.objectives.itc_sigmoid import SigmoidITC
from interlace.objectives.itm import ITM
from interlace.objectives.lm import LM
from interlace.objectives.mlm import MLM
from interlace.objectives.modality_masking import MAM, ModalityDropout
from interlace.objectives.mpp import MPP
from interlace.objectives.mvm import MRC, MRCKL, MRFR, MVRC
from interlace.objectives.prefix_lm import PrefixLM
from interlace.objectives.reconstruct import Recon
from interlace.objectives.region_labels import RegionLabels
from interlace.objectives.vqa import VQA
from interlace.objectives.vqa_writes import GenerativeVQA
from interlace.objectives.wra import WPA, WRA

__all__ = ["ITC", "ITM", "LM", "MAM", "MLM", "MPP", "MRC", "MRCKL", "MRFR", "MVRC", "VQA", "WPA", "WRA",
           "AnswerQuestions", "Batch", "Binding", "GenerativeVQA", "ModalityDropout", "MomentumITC", "Objective",
           "Pass", "PrefixLM", "Recon", "RegionLabels", "Scored", "SigmoidITC", "Views", "build_objective"]  # fmt: skip
