"""Captions written and filtered by the models that learnt from them. CapFilt: BLIP (arXiv:2201.12086), section 4."""

from interlace.bootstrap.bootstrap import Report, bootstrap
from interlace.bootstrap.corrupt import corrupt
from interlace.bootstrap.models import Finetune
from interlace.bootstrap.threshold import Decision

__all__ = ["Decision", "Finetune", "Report", "bootstrap", "corrupt"]
