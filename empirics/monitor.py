"""Anyone's decoder: watch it in training, ask which architecture it is, hold it against the prediction.

What a probed step records, and what it takes for that, is in `empirics.stability`.
"""

from empirics.comparison import Check, check
from empirics.measured import Measured, describe
from empirics.stability import StabilityMonitor
from empirics.stability_record import StabilityRecord, series

__all__ = ["Check", "Measured", "StabilityMonitor", "StabilityRecord", "check", "describe", "series"]
