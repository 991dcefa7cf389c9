"""Theory of gradient growth in transformers at initialisation. Imports neither torch nor sympy by itself."""

from theory.architecture import EMBEDDINGS, INITS, METHODS, PRESETS, Architecture, Init, method, preset
from theory.growth import Growth, gradient_growth, growth_closed_form
from theory.hf_config import Config, UnknownArchitecture, parse_config, read_config
from theory.quantities import QUANTITIES, Quantity, quantity
from theory.sources import REFERENCES, Source
from theory.statements import Kind, Statement, catalogue, find, register, residual

__all__ = [
    "EMBEDDINGS",
    "INITS",
    "METHODS",
    "PRESETS",
    "QUANTITIES",
    "REFERENCES",
    "Architecture",
    "Config",
    "Growth",
    "Init",
    "Kind",
    "Quantity",
    "Source",
    "Statement",
    "UnknownArchitecture",
    "catalogue",
    "find",
    "gradient_growth",
    "growth_closed_form",
    "method",
    "parse_config",
    "preset",
    "quantity",
    "read_config",
    "register",
    "residual",
]
