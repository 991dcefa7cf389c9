r"""The transformer, read top to bottom: every variant that `theory.Architecture` can describe.

Shapes: B batch, T tokens, D d_model, M d_ffn, H query heads, G key/value heads, E head width, V vocabulary.

    x_0    = treat(E[tokens])        treat: multiplier, positions, norm, gradient factor
    x     <- update(x)               attention, then feed-forward, in N layers; both at once if parallel
    logits = cap(m W_head norm(x))   m the logit multiplier; cap(z) = c tanh(z/c); norm if `final_norm`

With n the normalisation (in layer 1, 2, ... times 1/sqrt(layer) if `norm_depth_scaling`; queries' and keys' are not),
a the shortcut and r the residual multiplier:

    block       branch(x)            update(x)
    pre-ln      r f(n(x))            a x + branch(x)
    peri-ln     r n'(f(n(x)))        a x + branch(x)
    branch-ln   r n(f(x))            a x + branch(x)
    post-ln     r f(x)               n(a x + branch(x))
    parallel    as pre-ln            a x + attention_branch(x) + feedforward_branch(x)

    attention   W_O P V, P = softmax(cap(s Q K') - slope * distance), zero outside the window
    feedforward W_2 F(W_1 u)         gated: W_2 (F(W_1 u) * W_3 u)
    experts     sum_e g_e f_e(u)     g softmax of the k largest of W_r u (among them, or among all); f_e feedforwards

Initialisation: biases 0, gains 1, every matrix as below; N layers, n = 0, 1, ... a layer. The rules are those of
`theory.initialisation`: small sqrt(2/(5D)), xavier sqrt(2/(fan_in + fan_out)), kaiming sqrt(2/fan_in), fan-in
1/sqrt(fan_in), width 1/sqrt(D), torch 1/sqrt(3 fan_in), inverse 1/fan_in. A normal cut at c standard deviations has a
lower true one, which `Architecture.layer_stds` gives. `torch` draws weights as nn.Linear and nn.Embedding do by
themselves; biases, for which nn.Linear does the same, are 0 here too. An init of one's own may have a rule each for
W_Q W_K, W_V and W_O W_2, and a gain on W_V W_O W_1 W_2 W_3.

    init         E, positions  W_Q W_K W_V W_1 W_3  W_O W_2                W_head   drawn   (W_r as W_1)
    paper        small         small                small / sqrt(2N)       small    normal
    xavier       small         xavier               xavier                 small    normal
    small        small         small                small                  small    normal
    kaiming      small         kaiming              kaiming                small    normal
    fan-in       0.02          fan-in               fan-in                 fan-in   normal
    width        width         width                width                  width    normal
    gpt2         0.02          0.02                 0.02 / sqrt(2N)        0.02     normal
    flat         0.02          0.02                 0.02                   0.02     normal
    megatron     0.006         0.006                0.006 / sqrt(2N)       0.006    normal
    mitchell     width         width                fan-in / sqrt(2(n+1))  width    cut at 3
    truncated    0.02          0.02                 0.02                   0.02     cut at 2
    torch        1             torch                torch                  torch    uniform, E and positions normal
    mup          1             fan-in               fan-in                 inverse  normal
    zero-output  small         small                0                      small    normal
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from empirics.head_loss import HeadLoss
from theory.architecture import Architecture
from theory.initialisation import Law

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda z: z,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu-tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
    "relu-squared": lambda z: F.relu(z).square(),
}
ROPE_BASE = SINUSOIDAL_BASE = 10_000.0
Function = Callable[[Tensor], Tensor]
Kernel = Literal["fused", "plain"]
Keep = Callable[[Tensor], object]
ALL = slice(None)
PLAIN_TOKENS = 512  # the longest sequence at which plain attention is the faster one, where it is at all


class _ScaleGradient(torch.autograd.Function):
    """g*x + (1-g)*stopgrad(x), with the forward pass exactly x: rounding cannot tell the methods apart."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.factor, None


def times(x: Tensor, factor: float) -> Tensor:
    """factor * x, without a product where the factor is 1."""
    return x if factor == 1.0 else x * factor


def softcap(z: Tensor, cap: float) -> Tensor:
    """c tanh(z/c), which stays within +-c; z itself for c = 0."""
    return cap * torch.tanh(z / cap) if cap else z


class RMSNorm(nn.RMSNorm):
    """Reads its input in its gain's precision: for bfloat16 and a float32 gain torch has no fused one, and warns."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


def make_norm(architecture: Architecture, width: int | None = None) -> nn.Module:
    """LayerNorm or RMSNorm with a gain (and LayerNorm's bias where the architecture has biases), D wide unless told."""
    width = architecture.d_model if width is None else width
    if architecture.norm == "layernorm":
        return nn.LayerNorm(width, eps=architecture.eps, bias=architecture.biases)
    return RMSNorm(width, eps=architecture.eps)


# --- positions --------------------------------------------------------------------------------------------------


def rotary_table(
    length: int,
    width: int,
    device: torch.device,
    dtype: torch.dtype,
    base: float = ROPE_BASE,
    slowing: tuple[float, ...] = (),
) -> tuple[Tensor, Tensor]:
    """Cosines and sines (T, width) of rotary positions, the two halves paired; angles in float32 unless float64.

    slowing: a factor on the frequency of each of the width/2 pairs; empty for none.
    """
    exact = torch.promote_types(dtype, torch.float32)
    frequency = base ** (-torch.arange(0, width, 2, device=device, dtype=exact) / width)
    if slowing:
        frequency = frequency * torch.tensor(slowing, device=device, dtype=exact)
    angle = torch.outer(torch.arange(length, device=device, dtype=exact), frequency)
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotate each pair (x_i, x_{i + W/2}) of the last axis' first W coordinates by its angle, W the table's width."""
    width = cosine.shape[-1]
    turning, still = x[..., :width], x[..., width:]
    first, second = turning.chunk(2, dim=-1)
    turned = turning * cosine + torch.cat([-second, first], dim=-1) * sine
    if not still.shape[-1]:
        return turned
    # The table may have more axes than x: one vector turned by several angles.
    return torch.cat([turned, still.expand(*turned.shape[:-1], -1)], dim=-1)


def sinusoidal_table(length: int, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(T, width): sines in the even coordinates, cosines in the odd, of t / 10000^(2i/width) in the i-th pair.

    Source: Vaswani et al. 2017, section 3.5.
    """
    exact = torch.promote_types(dtype, torch.float32)
    frequency = SINUSOIDAL_BASE ** (-torch.arange(0, width, 2, device=device, dtype=exact) / width)
    angle = torch.outer(torch.arange(length, device=device, dtype=exact), frequency)
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)[:, :width].to(dtype)


def alibi_slopes(n_heads: int) -> list[float]:
    """What a head takes off its logits a token of distance: 2^(-8/n), 2^(-16/n), ... for n a power of two.

    For another count: the slopes of the power of two below it, then every other one of the power of two above.
    Source: Press, Smith and Lewis 2022 (ALiBi), and the authors' code for the last point.
    """
    below = 2 ** (n_heads.bit_length() - 1)
    slopes = [2.0 ** (-8 * (h + 1) / below) for h in range(below)]
    return slopes + [2.0 ** (-4 * (2 * h + 1) / below) for h in range(n_heads - below)]


def faster_attention(device: str, dtype: torch.dtype, n_tokens: int) -> Kernel:
    """The faster way to attend on a type of device: fused, but for short sequences in bfloat16 on a CPU.

    It is a table and not a measurement at each start, so that a run that is resumed, or made again, has the same bits.
    `benchmarks/training.py` measures what it says: on a CPU the fused kernel's backward pass in bfloat16 takes 2 to 4
    times as long as softmax between two products until 512 tokens, and less from 2048 on. In bfloat16 the plain form
    rounds the logits, which the fused one keeps in float32.
    """
    short = n_tokens <= PLAIN_TOKENS
    return "plain" if device == "cpu" and dtype == torch.bfloat16 and short else "fused"


# --- sub-layers -------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Causal attention of what it reads, in layer 0, 1, ...; `heads` stops before the output matrix.

    `kernel` is the way to attend; None for `faster_attention`. Given the number of each token's document, (B, T), no
    token looks at another document.
    """

    kernel: Kernel | None = None

    def __init__(self, architecture: Architecture, layer: int = 0) -> None:
        super().__init__()
        a = architecture
        self.n_heads, self.n_kv_heads, self.d_head = a.n_heads, a.n_kv_heads, a.d_head
        base = a.rope_base_at(layer)
        self.rope = base is not None and a.rope_width > 0
        self.rope_width, self.rope_base, self.rope_slowing = a.rope_width, base or ROPE_BASE, a.rope_slowing(layer)
        self.alibi = a.positions == "alibi"
        self.window = a.window_at(layer)
        self.scale, self.softcap = a.logit_scale, a.attention_softcap
        self.query = nn.Linear(a.d_model, a.n_heads * a.d_head, bias=a.biases)
        self.key = nn.Linear(a.d_model, a.n_kv_heads * a.d_head, bias=a.biases)
        self.value = nn.Linear(a.d_model, a.n_kv_heads * a.d_head, bias=a.biases)
        self.output = nn.Linear(a.n_heads * a.d_head, a.d_model, bias=a.biases)
        self.qk_norm = a.qk_norm
        if a.qk_norm != "none":
            whole = a.qk_norm == "full"
            self.query_norm = make_norm(a, a.d_head * (a.n_heads if whole else 1))
            self.key_norm = make_norm(a, a.d_head * (a.n_kv_heads if whole else 1))

    def queries_keys_values(self, u_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, H, T, E) and keys (B, G, T, E), normalised and rotated if the architecture does; and values."""
        u_ND = u_BTD.flatten(0, 1)  # once, and not in every product and in its backward pass
        query, key, value = self.query(u_ND), self.key(u_ND), self.value(u_ND)
        if self.qk_norm == "full":
            query, key = self.query_norm(query), self.key_norm(key)
        query, key, value = (self._split(x, u_BTD.shape[1]) for x in (query, key, value))
        if self.qk_norm == "head":
            query, key = self.query_norm(query), self.key_norm(key)
        if self.rope:
            cosine, sine = self.rotary_table(u_BTD.shape[1], u_BTD.device, query.dtype)
            query, key = rotate(query, cosine, sine), rotate(key, cosine, sine)
        return query, key, value

    def _split(self, x_ND: Tensor, length: int) -> Tensor:
        """Sequence by sequence and head by head, (B, H, T, E)."""
        return x_ND.view(-1, length, x_ND.shape[-1] // self.d_head, self.d_head).transpose(1, 2)

    def rotary_table(self, length: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines (T, W) of what turns of each head."""
        return rotary_table(length, self.rope_width, device, dtype, self.rope_base, self.rope_slowing)

    def seen(self, length: int, device: torch.device, rows: slice = ALL, documents_BT: Tensor | None = None) -> Tensor:
        """(T, T), whether token t looks at token j: not at the future, and at no more than its window.

        Given documents it is (B, 1, T, T): nor at another document.

        rows: which t alone.
        """
        position = torch.arange(length, device=device)
        seen = position <= position[rows, None]
        if self.window:
            seen = seen & (position > position[rows, None] - self.window)
        if documents_BT is not None:
            seen = seen & (documents_BT[:, None, rows, None] == documents_BT[:, None, None, :])
        return seen

    def distance_bias(self, length: int, like: Tensor, rows: slice = ALL) -> Tensor:
        """(H, T, T), what ALiBi adds to the logits of a token and one before it; of the `rows` alone."""
        position = torch.arange(length, device=like.device)
        slopes = torch.tensor(alibi_slopes(self.n_heads), device=like.device, dtype=torch.float64)
        return (slopes[:, None, None] * (position - position[rows, None])).to(like.dtype)

    def heads(self, u_BTD: Tensor, documents_BT: Tensor | None = None) -> Tensor:
        """Concatenated head outputs, (B, T, H*E)."""
        return self.mix(*self.queries_keys_values(u_BTD), documents_BT)

    def mix(self, query: Tensor, key: Tensor, value: Tensor, documents_BT: Tensor | None = None) -> Tensor:
        """`heads` of given queries (B, H, T, E), keys and values (B, G, T, E)."""
        if self.kernel_at(value.device.type, value.dtype, value.shape[-2]) == "plain":
            mixed = self.softmax(query, key, documents_BT)[1] @ self._each_head(value)
        else:
            mask, grouped = self._mask(query, documents_BT), self.n_kv_heads != self.n_heads
            mixed = F.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, is_causal=mask is None, scale=self.scale, enable_gqa=grouped
            )
        return mixed.transpose(1, 2).flatten(2)

    def kernel_at(self, device: str, dtype: torch.dtype, n_tokens: int) -> Kernel:
        """The way to attend to values of that dtype on that type of device."""
        if self.softcap or not self.scale:  # no fused kernel has the one, and with the other they give NaN
            return "plain"
        return self.kernel or faster_attention(device, dtype, n_tokens)

    def probabilities(self, u_BTD: Tensor, documents_BT: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits but for the mask, soft-capped and with ALiBi's bias, and their softmax, each (B, H, T, T)."""
        query, key, _ = self.queries_keys_values(u_BTD)
        return self.softmax(query, key, documents_BT)

    def forward(self, u_BTD: Tensor, documents_BT: Tensor | None = None) -> Tensor:
        """W_O P V of each token, (B, T, D)."""
        return self.output(self.heads(u_BTD, documents_BT))

    def _mask(self, query: Tensor, documents_BT: Tensor | None) -> Tensor | None:
        """The fused kernel's: None for causal and no more, else True where a token looks, or what is added."""
        length = query.shape[-2]
        if self.alibi:
            bias = self.distance_bias(length, query) + self._hiding(query, documents_BT)
            return bias.view(-1, *bias.shape[-3:])  # with three axes torch has no fused kernel on a CPU
        causal = documents_BT is None and not 0 < self.window < length
        return None if causal else self._seen_by(query, documents_BT)

    def softmax(self, query: Tensor, key: Tensor, documents_BT: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`probabilities` of given queries (B, H, T, E) and keys (B, G, T, E)."""
        logits = self.logits(query, key)
        return logits, (logits + self._hiding(logits, documents_BT)).softmax(-1)  # a sum is faster than a fill

    def logits(self, query: Tensor, key: Tensor, rows: slice = ALL) -> Tensor:
        """Logits but for the mask of the queries (B, H, t, E) of `rows` and of keys (B, G, T, E), (B, H, t, T)."""
        # Scaled before the product: a pass over T numbers for one over T^2.
        logits = softcap((query * self.scale) @ self._each_head(key).mT, self.softcap)
        return logits + self.distance_bias(key.shape[-2], logits, rows) if self.alibi else logits

    def _hiding(self, like: Tensor, documents_BT: Tensor | None) -> Tensor:
        """What hides tokens from each other when it is added to the logits: 0 or -infinity, of the shape of `seen`."""
        seen = self._seen_by(like, documents_BT)
        return torch.zeros(seen.shape, device=like.device, dtype=like.dtype).masked_fill(~seen, -math.inf)

    def _seen_by(self, like: Tensor, documents_BT: Tensor | None) -> Tensor:
        """`seen` for queries or logits, (B, H, T, .)."""
        shape = like.shape[0], like.shape[-2]
        # Those of one sequence would fit any batch.
        assert documents_BT is None or documents_BT.shape == shape, "the documents are another batch's"
        return self.seen(shape[1], like.device, documents_BT=documents_BT)

    def _each_head(self, x_BGTE: Tensor) -> Tensor:
        """A group's key or value for each of its heads, (B, H, T, E)."""
        share = self.n_heads // self.n_kv_heads
        return x_BGTE.repeat_interleave(share, dim=1) if share > 1 else x_BGTE


class FeedForward(nn.Module):
    """W_2 F(W_1 u), or W_2 (F(W_1 u) * W_3 u) with a gate."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        a = architecture
        self.activation = ACTIVATIONS[a.activation]
        self.enter = nn.Linear(a.d_model, a.d_ffn, bias=a.biases)
        self.gate = nn.Linear(a.d_model, a.d_ffn, bias=a.biases) if a.gated else None
        self.leave = nn.Linear(a.d_ffn, a.d_model, bias=a.biases)

    def forward(self, u_BTD: Tensor) -> Tensor:
        """Token by token, (B, T, D)."""
        u_ND = u_BTD.reshape(-1, u_BTD.shape[-1])  # once, and not in every product and in its backward pass
        hidden_NM = self.activation(self.enter(u_ND))
        if self.gate is not None:
            hidden_NM = hidden_NM * self.gate(u_ND)
        return self.leave(hidden_NM).view_as(u_BTD)


class Experts(nn.Module):
    """Feed-forwards behind a router, a token going to those of its largest logits; no token is dropped."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        a = architecture
        self.chosen, self.renormalised = a.experts_per_token, a.gates_renormalised
        self.router = nn.Linear(a.d_model, a.n_experts, bias=False)
        self.experts = nn.ModuleList(FeedForward(a) for _ in range(a.n_experts))

    @property
    def each(self) -> list[FeedForward]:
        """The experts, by their type."""
        return [expert for expert in self.experts if isinstance(expert, FeedForward)]

    def gates(self, u_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Weights (N, k) of the chosen experts, in float32 or wider, and which they are, (N, k)."""
        logits = self.router(u_ND)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        top, index = logits.topk(self.chosen)
        total = (top if self.renormalised else logits).logsumexp(-1, keepdim=True)
        return (top - total).exp(), index

    def forward(self, u_BTD: Tensor) -> Tensor:
        """The sum of the chosen experts' outputs by their gates, (..., D) like what it reads."""
        u_ND = u_BTD.flatten(0, -2)
        gates, index = self.gates(u_ND)
        total = torch.zeros_like(u_ND)
        for e, expert in enumerate(self.each):
            token, place = torch.where(index == e)
            weighted = gates[token, place, None] * expert(u_ND[token])
            total = total.index_add(0, token, weighted.to(total.dtype))
        return total.view_as(u_BTD)


# --- the network ------------------------------------------------------------------------------------------------


class Layer(nn.Module):
    """Layer 0, 1, ...: the `branches` of its sub-layers, and its `updates`, as in the table at the top.

    `attention_norm` and `feedforward_norm` act on what a sub-layer reads (None in post-ln and branch-ln; one for
    both if shared), `attention_out_norm` and `feedforward_out_norm` on its output, or in post-ln on the sum (None
    in pre-ln).
    """

    def __init__(self, architecture: Architecture, layer: int = 0) -> None:
        super().__init__()
        a = architecture
        self.block, self.parallel, self.shared_norm = a.block, a.parallel, a.shared_norm
        self.residual, self.shortcut = a.residual_multiplier, a.shortcut_multiplier
        self.norm_factor = a.norm_factor_at(layer)
        before, after = a.block in ("pre-ln", "peri-ln"), a.block != "pre-ln"
        self.attention_norm = make_norm(a) if before else None
        self.attention = Attention(a, layer)
        self.attention_out_norm = make_norm(a) if after else None
        self.feedforward_norm = make_norm(a) if before and not a.shared_norm else None
        self.feedforward = Experts(a) if a.n_experts else FeedForward(a)
        self.feedforward_out_norm = make_norm(a) if after else None

    def attention_input(self, x_BTD: Tensor) -> Tensor:
        """What attention reads."""
        return self._normalise(self.attention_norm, x_BTD)

    def feedforward_input(self, x_BTD: Tensor) -> Tensor:
        """What the feed-forward sub-layer reads."""
        return self._normalise(self.attention_norm if self.shared_norm else self.feedforward_norm, x_BTD)

    def attention_branch(self, x_BTD: Tensor, documents_BT: Tensor | None = None) -> Tensor:
        """What attention adds to the shortcut, its norms and the residual multiplier included."""
        return self._branch(self.attention(self.attention_input(x_BTD), documents_BT), self.attention_out_norm)

    def feedforward_branch(self, x_BTD: Tensor) -> Tensor:
        """What the feed-forward sub-layer adds to the shortcut, likewise."""
        return self._branch(self.feedforward(self.feedforward_input(x_BTD)), self.feedforward_out_norm)

    def attention_update(self, x_BTD: Tensor, documents_BT: Tensor | None = None) -> Tensor:
        """The residual stream after attention alone."""
        return self._add(x_BTD, self.attention_branch(x_BTD, documents_BT), self.attention_out_norm)

    def feedforward_update(self, x_BTD: Tensor) -> Tensor:
        """The residual stream after the feed-forward sub-layer alone."""
        return self._add(x_BTD, self.feedforward_branch(x_BTD), self.feedforward_out_norm)

    def parallel_update(self, x_BTD: Tensor, documents_BT: Tensor | None = None) -> Tensor:
        """The residual stream after both sub-layers have read x."""
        attention_BTD = self.attention_branch(x_BTD, documents_BT)
        return times(x_BTD, self.shortcut) + attention_BTD + self.feedforward_branch(x_BTD)

    @property
    def feedforwards(self) -> list[FeedForward]:
        """The feed-forward sub-layer, or each of its experts."""
        return self.feedforward.each if isinstance(self.feedforward, Experts) else [self.feedforward]

    @property
    def branches(self) -> tuple[Function, Function]:
        """x -> what attention, and what the feed-forward sub-layer, add to the shortcut."""
        return self.attention_branch, self.feedforward_branch

    @property
    def updates(self) -> tuple[Function, ...]:
        """x -> new x, in the order and number of `Architecture.updates`; the layer is their composition."""
        return self.updates_within(None)

    def updates_within(self, documents_BT: Tensor | None) -> tuple[Function, ...]:
        """`updates` with attention inside documents alone; None for all of the sequence."""
        if self.parallel:
            return (lambda x_BTD: self.parallel_update(x_BTD, documents_BT),)
        return lambda x_BTD: self.attention_update(x_BTD, documents_BT), self.feedforward_update

    def forward(self, x_BTD: Tensor, keep: Keep | None = None, documents_BT: Tensor | None = None) -> Tensor:
        """The residual stream after the layer; `keep` is given what every update leaves."""
        for update in self.updates_within(documents_BT):
            x_BTD = update(x_BTD)
            _give(keep, x_BTD)
        return x_BTD

    def _normalise(self, norm: nn.Module | None, x_BTD: Tensor) -> Tensor:
        return x_BTD if norm is None else times(norm(x_BTD), self.norm_factor)

    def _branch(self, output_BTD: Tensor, norm: nn.Module | None) -> Tensor:
        if self.block != "post-ln":
            output_BTD = self._normalise(norm, output_BTD)
        return times(output_BTD, self.residual)

    def _add(self, x_BTD: Tensor, branch_BTD: Tensor, norm: nn.Module | None) -> Tensor:
        x_BTD = times(x_BTD, self.shortcut) + branch_BTD
        return self._normalise(norm, x_BTD) if self.block == "post-ln" else x_BTD


class Transformer(nn.Module):
    """A decoder-only language model.

    Calling it gives logits (B, T, V). With `places=[]` the residual stream is appended to that list, each tensor
    keeping its gradient: at the embedding (as the first layer reads it) and after every update, post-ln's norm
    included. That is 2N+1 places, or N+1 in a parallel network. The computation is otherwise the same, bit for bit.

    `end_of_document` is the token at whose places attention stops; None for attention to all of a sequence.
    """

    end_of_document: int | None = None

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        a = architecture
        self.architecture = a
        self.tokens = nn.Embedding(a.vocab_size, a.d_model)
        self.positions = nn.Embedding(a.context, a.d_model) if a.positions == "learned" else None
        self.embedding_norm = make_norm(a) if a.embedding_norm else None
        self.layers = nn.ModuleList(Layer(a, n) for n in range(a.n_layers))
        self.norm = make_norm(a) if a.final_norm else nn.Identity()
        self.head = nn.Linear(a.d_model, a.vocab_size, bias=False)
        if a.tied:
            self.head.weight = self.tokens.weight

    def embed(self, tokens_BT: Tensor) -> Tensor:
        """The residual stream as the first layer reads it, (B, T, D): multiplier, positions, norm, gradient factor."""
        a, length = self.architecture, tokens_BT.shape[1]
        x_BTD = times(self.tokens(tokens_BT), a.embedding_multiplier)
        if self.positions is not None:
            x_BTD = x_BTD + self.positions(torch.arange(length, device=tokens_BT.device))
        elif a.positions == "sinusoidal":
            x_BTD = x_BTD + sinusoidal_table(length, a.d_model, x_BTD.device, x_BTD.dtype)
        if self.embedding_norm is not None:
            x_BTD = self.embedding_norm(x_BTD)
        if a.embedding_gradient != 1.0:
            x_BTD = _ScaleGradient.apply(x_BTD, a.embedding_gradient)
        return x_BTD

    def documents(self, tokens_BT: Tensor) -> Tensor | None:
        """The number of each token's document in its sequence, (B, T), for attention to stay inside; None for none.

        A document's end belongs to it. Positions go on counting through the sequence, which rotary ones and ALiBi,
        being relative, do not show.

        Source: Grattafiori et al. 2024 (Llama 3), section 3.2, for the mask.
        """
        if self.end_of_document is None:
            return None
        ends_BT = (tokens_BT == self.end_of_document).int()
        return ends_BT.cumsum(-1, dtype=torch.int32) - ends_BT

    def forward(
        self, tokens_BT: Tensor, places: list[Tensor] | None = None, targets_BT: Tensor | None = None
    ) -> Tensor:
        """Logits, (B, T, V), or `loss` if there are targets; `places` is added to as the class says."""
        a, x_BTD = self.architecture, self.embed(tokens_BT)
        # Not the list itself: the hooks that shard a layer give it copies of lists that hold tensors.
        keep = None if places is None else places.append
        documents_BT = self.documents(tokens_BT)
        _give(keep, x_BTD)
        for layer in self.layers:
            x_BTD = layer(x_BTD, keep, documents_BT)
        x_BTD = self.norm(x_BTD)
        if targets_BT is not None and self._in_parts(x_BTD):
            x_ND = times(x_BTD, a.logit_multiplier).flatten(0, 1)
            return HeadLoss.apply(x_ND, self.head.weight, targets_BT.flatten())
        logits_BTV = softcap(times(self.head(x_BTD), a.logit_multiplier), a.logit_softcap)
        return logits_BTV if targets_BT is None else cross_entropy(logits_BTV, targets_BT)

    def loss(self, tokens_BT: Tensor, targets_BT: Tensor, places: list[Tensor] | None = None) -> Tensor:
        """Mean cross entropy in nats a token."""
        return self(tokens_BT, places, targets_BT)

    def _in_parts(self, x_BTD: Tensor) -> bool:
        """Whether the loss is taken a few tokens at a time: on a CPU, for its gradient, nothing rounded or compiled.

        The head is not called then, so that one with hooks, or of another kind, is left to be.
        """
        kind, cap, head = x_BTD.device.type, self.architecture.logit_softcap, self.head
        hooks = (head._forward_pre_hooks, head._forward_hooks, head._backward_pre_hooks, head._backward_hooks)
        own = type(head) is nn.Linear and head.bias is None and not any(hooks)
        plain = own and not (cap or torch.is_autocast_enabled(kind) or torch.compiler.is_compiling())
        exact = x_BTD.dtype in (torch.float32, torch.float64)
        return plain and exact and kind == "cpu" and torch.is_grad_enabled()

    def attend(self, how: Kernel | Literal["auto"], *, device: str, dtype: torch.dtype, n_tokens: int) -> Kernel:
        """Have every layer attend one way, or the faster one; which one that is for sequences like these."""
        found: list[Kernel] = []
        for module in self.modules():
            if isinstance(module, Attention):
                module.kernel = None if how == "auto" else how
                found.append(module.kernel_at(device, dtype, n_tokens))
        return found[0]  # the layers differ in nothing that decides it

    @torch.no_grad()
    def initialise(self, generator: torch.Generator, assign: Callable[[Tensor, Tensor], object] = Tensor.copy_) -> None:
        """Draw every matrix as the table at the top says; the draws do not depend on the embedding treatment.

        Args:
            assign: sets a parameter to a matrix; where parameters are sharded, to this process's part of it.
        """
        a = self.architecture

        def draw(parameter: Tensor, std: float, *, table: bool = False, padding_row: bool = False) -> None:
            # One at a time, on the generator's device: the same numbers for every precision and way to shard.
            matrix = torch.empty(parameter.shape, device=generator.device)
            _draw(matrix, std, a.init.law(table=table), a.init.cutoff, generator)
            if padding_row:
                matrix[0].zero_()
            assign(parameter, matrix)

        for module in self.modules():
            if isinstance(module, nn.LayerNorm | nn.RMSNorm):
                module.reset_parameters()
            elif isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.zero_()
        draw(self.tokens.weight, a.stds.embedding, table=True, padding_row=a.padding_row)
        if self.positions is not None:
            draw(self.positions.weight, a.stds.position, table=True)
        for n, layer in enumerate(self.layers):
            assert isinstance(layer, Layer)
            attention, stds = layer.attention, a.layer_stds(n)
            table: list[tuple[nn.Linear | None, float]] = [
                (attention.query, stds.query),
                (attention.key, stds.key),
                (attention.value, stds.value),
                (attention.output, stds.output),
            ]
            if isinstance(layer.feedforward, Experts):
                table.append((layer.feedforward.router, stds.router))
            for feedforward in layer.feedforwards:
                table += [
                    (feedforward.enter, stds.ffn_in),
                    (feedforward.gate, stds.ffn_gate),
                    (feedforward.leave, stds.ffn_out),
                ]
            for linear, std in table:
                if linear is not None:
                    draw(linear.weight, std)
        if not a.tied:
            draw(self.head.weight, a.stds.head)


def cross_entropy(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Mean over tokens in nats; computed in float32, or in float64 if the logits are."""
    exact = torch.promote_types(logits_BTV.dtype, torch.float32)
    return F.cross_entropy(logits_BTV.to(exact).flatten(0, 1), targets_BT.flatten())


def build(
    architecture: Architecture,
    *,
    seed: int,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    drawn_on: str = "cpu",
) -> Transformer:
    """A model initialised from `seed`, the numbers drawn in float32.

    Drawn on the CPU they are the same for every device, at some ten seconds per 10^9 of them; drawn on a GPU, others.
    """
    with torch.device(drawn_on):
        model = Transformer(architecture)
    model.initialise(torch.Generator(drawn_on).manual_seed(seed))
    return model.to(device=device, dtype=dtype)


def _draw(matrix: Tensor, std: float, law: Law, cutoff: float, generator: torch.Generator) -> None:
    """Fill with independent numbers of mean 0 and true standard deviation `std`."""
    if law == "normal":
        matrix.normal_(0.0, std, generator=generator)
    elif law == "uniform":
        matrix.uniform_(-math.sqrt(3) * std, math.sqrt(3) * std, generator=generator)
    else:
        from scipy.stats import truncnorm  # a second to import, and wanted here alone

        nn.init.trunc_normal_(matrix, 0.0, 1.0, -cutoff, cutoff, generator=generator)
        matrix.mul_(std / float(truncnorm(-cutoff, cutoff).std()))


def _give(keep: Keep | None, x_BTD: Tensor) -> None:
    if keep is not None:
        if x_BTD.requires_grad:
            x_BTD.retain_grad()
        keep(x_BTD)
