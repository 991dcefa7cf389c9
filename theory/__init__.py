"""Theory of gradient growth in transformers at initialisation. Imports neither torch nor sympy by itself."""

from theory.architecture import EMBEDDINGS, INITS, METHODS, PRESETS, Architecture, Init, method, preset
from theory.growth import Growth, gradient_growth, growth_closed_form
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
    "Growth",
    "Init",
    "Kind",
    "Quantity",
    "Source",
    "Statement",
    "catalogue",
    "find",
    "gradient_growth",
    "growth_closed_form",
    "method",
    "preset",
    "quantity",
    "register",
    "residual",
]
