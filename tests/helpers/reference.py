"""What an `Architecture` says, computed plainly in float64 with the weights of a real class.

The forward pass reads the `Architecture` alone; the weights come from the built class under one set of names. If
the two agree on the logits, the class is what the `Architecture` says: norms, their places, positions, windows,
scales, soft-caps, multipliers and all.
"""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor, nn

from theory.architecture import Architecture
from theory.initialisation import Stds

# --- weights under one set of names ---------------------------------------------------------------------------------

# Ending of a parameter's name -> the matrices that it holds, stacked along its outputs.
MATRICES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"(wte|embed_in|embed_tokens|word_embeddings)", ("embedding",)),
    (r"(wpe|embed_positions)", ("position",)),
    (r"lm_head", ("head",)),
    (r"(c_attn|query_key_value|Wqkv|qkv_proj)", ("query", "key", "value")),
    (r"q_proj", ("query",)),
    (r"k_proj", ("key",)),
    (r"v_proj", ("value",)),
    (r"(attn\.c_proj|out_proj|o_proj|\.dense)", ("output",)),
    (r"(c_fc|fc_in|fc1|dense_h_to_4h|ffn\.up_proj|gate_proj)", ("ffn_in",)),
    (r"gate_up_proj", ("ffn_in", "ffn_gate")),
    (r"mlp\.gate", ("router",)),
    (r"up_proj", ("ffn_gate",)),
    (r"(mlp\.c_proj|fc_out|fc2|dense_4h_to_h|down_proj)", ("ffn_out",)),
)


def matrices_in(name: str) -> tuple[str, ...]:
    """Fields of `Stds` that a parameter of this name holds; none for a gain or bias."""
    return next((fields for ending, fields in MATRICES if re.search(rf"{ending}(\.weight)?$", name)), ())


def layer_of(name: str) -> int:
    """The layer in a parameter's name; 0 for a table."""
    found = re.search(r"\.(\d+)\.", name)
    return int(found[1]) if found else 0


def weights(model: nn.Module, architecture: Architecture) -> list[dict[str, Tensor]]:
    """A dictionary a layer, as (outputs, inputs) in float64; the tables are in the first one's."""
    layers: list[dict[str, Tensor]] = [{} for _ in range(architecture.n_layers)]
    kind = architecture.name
    for name, parameter in model.named_parameters():
        fields = matrices_in(name)
        if not fields:
            continue
        matrix = parameter.detach().double()
        if kind == "gpt2" and ".h." in name:
            matrix = matrix.T  # its linear layers store (inputs, outputs)
        layers[layer_of(name)] |= dict(zip(fields, _split(matrix, fields, architecture), strict=True))
    if kind == "opt":
        layers[0]["position"] = layers[0]["position"][2:]
    if kind in ("gptj", "cohere"):  # neighbours turn together there: bring them half a width apart
        for layer in layers:
            for field in ("query", "key"):
                layer[field] = _apart(layer[field], architecture)
    return layers


def _split(matrix: Tensor, fields: tuple[str, ...], a: Architecture) -> tuple[Tensor, ...]:
    if len(fields) < 3:
        return matrix.chunk(len(fields), dim=-2)  # an expert's matrices are stacked along the first axis
    if a.name in ("gpt_neox", "bloom", "falcon"):  # groups of: the queries of a key head, the key, the value
        grouped = matrix.view(a.n_kv_heads, a.n_heads // a.n_kv_heads + 2, a.d_head, a.d_model)
        return tuple(part.flatten(0, 2) for part in (grouped[:, :-2], grouped[:, [-2]], grouped[:, [-1]]))
    return matrix.split([a.n_heads * a.d_head, a.n_kv_heads * a.d_head, a.n_kv_heads * a.d_head])


def _apart(matrix: Tensor, a: Architecture) -> Tensor:
    turning = torch.arange(a.rope_width)
    order = torch.cat([turning[::2], turning[1::2], torch.arange(a.rope_width, a.d_head)])
    return matrix.view(-1, a.d_head, a.d_model)[:, order].flatten(0, 1)


# --- the forward pass -----------------------------------------------------------------------------------------------


def logits(a: Architecture, layers: list[dict[str, Tensor]], tokens_BT: Tensor) -> Tensor:
    """(B, T, vocab) logits of what `a` describes. Biases are 0 and gains 1, as at initialisation."""
    tables = layers[0]
    x = tables["embedding"][tokens_BT] * a.embedding_multiplier
    if a.positions == "learned":
        x = x + tables["position"][: x.shape[1]]
    if a.embedding_norm:
        x = normalised(a, x)
    for n, w in enumerate(layers):
        for branches in a.updates:
            x = update(a, n, w, x, branches)
    if a.final_norm:
        x = normalised(a, x)
    z = x @ (tables["embedding"] if a.tied else tables["head"]).T * a.logit_multiplier
    return a.logit_softcap * torch.tanh(z / a.logit_softcap) if a.logit_softcap else z


def update(a: Architecture, n: int, w: dict[str, Tensor], x: Tensor, branches: tuple[str, ...]) -> Tensor:
    """The residual stream after the sub-layers that read it together."""
    before, after = a.block in ("pre-ln", "peri-ln"), a.block in ("peri-ln", "branch-ln")
    out = a.shortcut_multiplier * x
    for branch in branches:
        u = normalised(a, x) if before else x
        y = attention(a, n, w, u) if branch == "attention" else feedforward(a, w, u)
        out = out + a.residual_multiplier * (normalised(a, y) if after else y)
    return normalised(a, out) if a.block == "post-ln" else out


def normalised(a: Architecture, x: Tensor) -> Tensor:
    if a.norm == "layernorm":
        x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + a.eps).sqrt()


def feedforward(a: Architecture, w: dict[str, Tensor], u: Tensor) -> Tensor:
    act = {
        "identity": lambda z: z,
        "relu": torch.relu,
        "relu-squared": lambda z: torch.relu(z).square(),
        "gelu": lambda z: z * (1 + torch.erf(z / math.sqrt(2))) / 2,
        "gelu-tanh": lambda z: z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))) / 2,
        "silu": lambda z: z * torch.sigmoid(z),
    }[a.activation]
    u = u.unsqueeze(-3) if a.n_experts else u  # (B, 1, T, D) with the experts' (E, M, D)
    hidden = act(u @ w["ffn_in"].mT)
    out = (hidden * (u @ w["ffn_gate"].mT) if a.gated else hidden) @ w["ffn_out"].mT
    return out if not a.n_experts else (out * gates(a, w, u.squeeze(-3)).mT.unsqueeze(-1)).sum(-3)


def gates(a: Architecture, w: dict[str, Tensor], u: Tensor) -> Tensor:
    """(B, T, E) weights of the experts, most of them 0."""
    p = (u @ w["router"].T).softmax(-1)
    smallest = p.topk(a.experts_per_token).values[..., -1:]
    p = torch.where(p >= smallest, p, 0.0)
    return p / p.sum(-1, keepdim=True) if a.gates_renormalised else p


def attention(a: Architecture, n: int, w: dict[str, Tensor], u_BTD: Tensor) -> Tensor:
    T = u_BTD.shape[1]
    q, k, v = (heads(a, w[field], u_BTD, turned=field != "value") for field in ("query", "key", "value"))
    base = a.rope_base_at(n)
    if base is not None:
        slowed = not (a.window_rope_base and a.window_at(n))
        q, k = rotated(a, base, q, slowed), rotated(a, base, k, slowed)
    k, v = (t.repeat_interleave(a.n_heads // a.n_kv_heads, dim=1) for t in (k, v))
    z = q @ k.mT * a.logit_scale
    if a.attention_softcap:
        z = a.attention_softcap * torch.tanh(z / a.attention_softcap)
    distance = torch.arange(T)[:, None] - torch.arange(T)
    if a.positions == "alibi":
        z = z - slopes(a.n_heads)[:, None, None] * distance
    window = a.window_at(n) or T
    p = z.masked_fill((distance < 0) | (distance >= window), -math.inf).softmax(-1)
    return (p @ v).transpose(1, 2).flatten(2) @ w["output"].T


def heads(a: Architecture, matrix: Tensor, u: Tensor, *, turned: bool) -> Tensor:
    """(B, heads, T, d_head), normalised if these are queries or keys and the class does so."""
    flat = u @ matrix.T
    if turned and a.qk_norm == "full":
        flat = normalised(a, flat)
    split = flat.unflatten(-1, (-1, a.d_head)).transpose(1, 2)
    return normalised(a, split) if turned and a.qk_norm == "head" else split


def rotated(a: Architecture, base: float, x: Tensor, slowed: bool) -> Tensor:
    """The first `rope_width` coordinates turned, each with the one half of that width away."""
    half = a.rope_width // 2
    frequency = base ** (-torch.arange(half, dtype=x.dtype) / half)
    if slowed and a.rope_original:
        wavelength = 2 * math.pi / frequency
        smooth = (a.rope_original / wavelength - a.rope_low) / (a.rope_high - a.rope_low)
        between = (1 - smooth) * frequency / a.rope_stretch + smooth * frequency
        long, short = wavelength > a.rope_original / a.rope_low, wavelength < a.rope_original / a.rope_high
        frequency = torch.where(long, frequency / a.rope_stretch, torch.where(short, frequency, between))
    elif slowed:
        frequency = frequency / a.rope_stretch
    angle = torch.arange(x.shape[-2], dtype=x.dtype)[:, None] * frequency
    first, second, rest = x.split([half, half, a.d_head - 2 * half], dim=-1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def slopes(n_heads: int) -> Tensor:
    """ALiBi's, Press et al. 2022: 2^(-8 i/n) for n a power of 2; else every other one of twice as many fills up."""
    n = 2 ** int(math.log2(n_heads))
    own = [2 ** (-8 * i / n) for i in range(1, n + 1)]
    more = [2 ** (-4 * i / n) for i in range(1, 2 * n + 1, 2)]
    return torch.tensor((own + more)[:n_heads], dtype=torch.float64)


def std_of(stds: Stds, name: str) -> float:
    """The one standard deviation of a parameter that may hold several matrices."""
    values = {getattr(stds, field) for field in matrices_in(name)}
    assert len(values) == 1, (name, values)
    return values.pop()
