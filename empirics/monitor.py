"""Anyone's decoder: watch it in training, ask which architecture it is, hold it against the prediction."""

from empirics.comparison import Check, check
from empirics.measured import Measured, describe
from empirics.stability import StabilityMonitor, StabilityRecord, series

__all__ = ["Check", "Measured", "StabilityMonitor", "StabilityRecord", "check", "describe", "series"]
