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
    "haagerup2000brown": "Haagerup, Larsen. Brown's spectral distribution measure for R-diagonal elements in finite "
    "von Neumann algebras. Journal of Functional Analysis, 2000.",
    "haagerup2005application": "Haagerup, Thorbjornsen. A new application of random matrices: Ext(C*_red(F_2)) is not "
    "a group. Annals of Mathematics, 2005.",
    "benaych2012singular": "Benaych-Georges, Nadakuditi. The singular values and vectors of low rank perturbations of "
    "large rectangular random matrices. Journal of Multivariate Analysis, 2012.",
    "helton2007operator": "Helton, Rashidi Far, Speicher. Operator-valued semicircular elements: solving a quadratic "
    "matrix equation with positivity constraints. International Mathematics Research Notices, 2007.",
    "cho2009kernel": "Cho, Saul. Kernel methods for deep learning. NeurIPS 2009.",
    "williams1997infinite": "Williams. Computing with infinite networks. NeurIPS 1996.",
    "tsuchida2021avoiding": "Tsuchida, Pearce, van der Heide, Roosta, Gallagher. Avoiding kernel fixed points: "
    "Computing with ELU and GELU infinite networks. AAAI 2021, arXiv 2002.08517.",
    "kedia2024stable": "Kedia, Zaidi, Khyalia, Jung, Goka, Lee. Transformers get stable: An end-to-end signal "
    "propagation theory for language models. ICML 2024, arXiv 2403.09635.",
    "stefanski1991normal": "Stefanski. A normal scale mixture representation of the logistic distribution. "
    "Statistics and Probability Letters, 1991.",
    "ferrari2005determinantal": "Ferrari, Spohn. A determinantal formula for the GOE Tracy-Widom distribution. "
    "Journal of Physics A, 2005.",
    "bornemann2010numerical": "Bornemann. On the numerical evaluation of distributions in random matrix theory: "
    "A review. Markov Processes and Related Fields, 2010.",
    "marchenko1967distribution": "Marchenko, Pastur. Distribution of eigenvalues for some sets of random matrices. "
    "Mathematics of the USSR-Sbornik, 1967.",
    "penson2011product": "Penson, Zyczkowski. Product of Ginibre matrices: Fuss-Catalan and Raney distributions. "
    "Physical Review E, 2011.",
    "nguyen2019transformers": "Nguyen, Salazar. Transformers without tears: Improving the normalization of "
    "self-attention. IWSLT 2019, arXiv 1910.05895.",
    "bigscience2021lessons": "BigScience workshop. Lessons learned: training of the 104B model (tr8-104B-wide). 2021.",
    "jax2018": "Bradbury et al. JAX: composable transformations of Python and NumPy programs. 2018; module "
    "jax.nn.initializers.",
    "pennington2017resurrecting": "Pennington, Schoenholz, Ganguli. Resurrecting the sigmoid in deep learning "
    "through dynamical isometry. NeurIPS 2017.",
    "popoviciu1935": "Popoviciu. Sur les equations algebriques ayant toutes leurs racines reelles. 1935.",
    "hardy1920": "Hardy. Note on a theorem of Hilbert. Mathematische Zeitschrift, 1920.",
    "laurent2000adaptive": "Laurent, Massart. Adaptive estimation of a quadratic functional by model selection. "
    "Annals of Statistics, 2000.",
    "price1958theorem": "Price. A useful theorem for nonlinear devices having Gaussian inputs. "
    "IRE Transactions on Information Theory, 1958.",
    "chernoff1952measure": "Chernoff. A measure of asymptotic efficiency for tests of a hypothesis based on the sum "
    "of observations. Annals of Mathematical Statistics, 1952.",
    "horn2012matrix": "Horn, Johnson. Matrix Analysis. 2nd edition, Cambridge University Press, 2012.",
    "wang2022deepnet": "Wang et al. DeepNet: Scaling Transformers to 1,000 Layers. arXiv 2203.00555.",
    "sun2025curse": "Sun et al. The Curse of Depth in Large Language Models. arXiv 2502.05795.",
    "henry2020qknorm": "Henry et al. Query-Key Normalization for Transformers. Findings of EMNLP 2020.",
    "press2022alibi": "Press, Smith, Lewis. Train Short, Test Long: Attention with Linear Biases Enables Input Length "
    "Extrapolation. ICLR 2022.",
    "gemma2024gemma2": "Gemma Team. Gemma 2: Improving Open Language Models at a Practical Size. arXiv 2408.00118.",
    "beltagy2020longformer": "Beltagy, Peters, Cohan. Longformer: The Long-Document Transformer. arXiv 2004.05150.",
    "shazeer2020glu": "Shazeer. GLU Variants Improve Transformer. arXiv 2002.05202.",
    "zeng2023glm": "Zeng et al. GLM-130B: An Open Bilingual Pre-trained Model. ICLR 2023.",
    "olmocore": "Allen Institute for AI. OLMo-core; module olmo_core.optim.skip_step_optimizer. 2024.",
    "llmfoundry": "MosaicML. LLM Foundry; module llmfoundry.callbacks.kill_loss_spike_callback. 2024.",
    "megatronlm": "NVIDIA. Megatron-LM; module megatron.core.rerun_state_machine and pretrain_gpt. 2024.",
    "davies1993outliers": "Davies, Gather. The identification of multiple outliers. Journal of the American "
    "Statistical Association 88(423), 1993.",
    "zhai2023entropy": "Zhai, Likhomanenko, Littwin, Busbridge, Ramapuram, Zhang, Gu, Susskind. Stabilizing "
    "Transformer Training by Preventing Attention Entropy Collapse. ICML 2023, arXiv 2303.06296.",
    "wortsman2023proxies": "Wortsman et al. Small-scale proxies for large-scale Transformer training instabilities. "
    "arXiv 2309.14322.",
    "lilliefors1967normality": "Lilliefors. On the Kolmogorov-Smirnov test for normality with mean and variance "
    "unknown. Journal of the American Statistical Association, 1967.",
    "rudelson2007sampling": "Rudelson, Vershynin. Sampling from large matrices: An approach through geometric "
    "functional analysis. Journal of the ACM, 2007.",
    "roy2007effective": "Roy, Vetterli. The effective rank: A measure of effective dimensionality. EUSIPCO 2007.",
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
