"""Objectives: one file each."""

from interlace.objectives.answers import AnswerQuestions
from interlace.objectives.base import Batch, Objective, Pass, Scored, Views, build_objective
from interlace.objectives.binding import Binding
from interlace.objectives.itc import ITC
from interlace.objectives.itc_momentum import MomentumITC
from interlace.objectives.itc_sigmoid import SigmoidITC
from interlace.objectives.itm import ITM
from interlace.objectives.mlm import MLM
from interlace.objectives.modality_masking import MAM, ModalityDropout
from interlace.objectives.mvm import MRC, MRCKL, MRFR, MVRC
from interlace.objectives.reconstruct import Recon
from interlace.objectives.vqa import VQA
from interlace.objectives.wra import WPA, WRA

__all__ = ["ITC", "ITM", "MAM", "MLM", "MRC", "MRCKL", "MRFR", "MVRC", "VQA", "WPA", "WRA", "AnswerQuestions", "Batch",
           "Binding", "ModalityDropout", "MomentumITC", "Objective", "Pass", "Recon", "Scored", "SigmoidITC", "Views",
           "build_objective"]  # fmt: skip
