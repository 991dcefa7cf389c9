"""Where every statement comes from: one table of references, cited in data by key and place."""

from __future__ import annotations

from dataclasses import dataclass

REFERENCES: dict[str, str] = {
    "takase2025spike": "Takase, Kiyono, Kobayashi, Suzuki. Spike No More: Stabilizing the Pre-training of Large "
    "Language Models. COLM 2025, arXiv 2312.16903.",
    "xiong2020layernorm": "Xiong et al. On Layer Normalization in the Transformer Architecture. ICML 2020.",
    "davidson2001local": "Davidson, Szarek. Local operator theory, random matrices and Banach spaces. "
    "Handbook of the Geometry of Banach Spaces, 2001.",
    "johnstone2001largest": "Johnstone. On the distribution of the largest eigenvalue in principal components "
    "analysis. Annals of Statistics, 2001.",
    "cho2009kernel": "Cho, Saul. Kernel methods for deep learning. NeurIPS 2009.",
    "pennington2017resurrecting": "Pennington, Schoenholz, Ganguli. Resurrecting the sigmoid in deep learning "
    "through dynamical isometry. NeurIPS 2017.",
    "popoviciu1935": "Popoviciu. Sur les equations algebriques ayant toutes leurs racines reelles. 1935.",
    "hardy1920": "Hardy. Note on a theorem of Hilbert. Mathematische Zeitschrift, 1920.",
    "laurent2000adaptive": "Laurent, Massart. Adaptive estimation of a quadratic functional by model selection. "
    "Annals of Statistics, 2000.",
    "spikecheck": "Derived in this project; the statement's own text has the argument.",
    "convention": "A convention of this project, not a result.",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A reference and the place in it.

    >>> str(Source(key="takase2025spike", label="eq. (15)"))
    'takase2025spike, eq. (15)'
    """

    key: str
    label: str = ""

    def __post_init__(self) -> None:
        if self.key not in REFERENCES:
            raise ValueError(f"unknown reference {self.key!r}; add it to theory.sources.REFERENCES")

    def __str__(self) -> str:
        return f"{self.key}, {self.label}" if self.label else self.key
