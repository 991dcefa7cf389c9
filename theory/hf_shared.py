"""What the decoder classes of transformers have in common: sizes, rotary positions, windows, defaults by key."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from theory.architecture import Activation, Architecture, Positions, head_width
from theory.hf_reader import LARGEST_LIST, Reader, UnknownArchitecture
from theory.initialisation import flat

PLAIN = ("default", "dynamic")
KINDS = (*PLAIN, "linear", "llama3")  # of rotary frequencies
CLIP = 6.0  # standard deviations: a normal entry is beyond them with probability 2e-9


class Sizes(NamedTuple):
    """What a config must say."""

    d_model: int
    n_layers: int
    n_heads: int

    @staticmethod
    def read(
        reader: Reader,
        width: str = "hidden_size",
        layers: str = "num_hidden_layers",
        heads: str = "num_attention_heads",
    ) -> Sizes:
        return Sizes(reader.integer(width), reader.integer(layers), reader.integer(heads))


class Scaling(NamedTuple):
    """How rotary frequencies are slowed, as in `Architecture`."""

    stretch: float = 1.0
    original: int = 0
    low: float = 1.0
    high: float = 4.0

    def of(self, architecture: Architecture) -> Architecture:
        return replace(
            architecture,
            rope_stretch=self.stretch,
            rope_original=self.original,
            rope_low=self.low,
            rope_high=self.high,
        )


class Rope(NamedTuple):
    """Share of a head that turns, the base of its frequencies, and how they are slowed."""

    fraction: float = 1.0
    base: float = 10_000.0
    scaling: Scaling = Scaling()


class Windows(NamedTuple):
    """How far the layers see, as in `Architecture`."""

    window: int = 0
    global_every: int = 0
    global_first: bool = False

    def of(self, architecture: Architecture) -> Architecture:
        return replace(architecture, window=self.window, global_every=self.global_every, global_first=self.global_first)


class Period(NamedTuple):
    """Special layers are the last of every k, or the first; k = 0 for none."""

    every: int
    first: bool


# --- whole classes --------------------------------------------------------------------------------------------------


def dense(
    reader: Reader,
    name: str,
    sizes: Sizes,
    *,
    d_ffn: int,
    vocab_size: int,
    context: int,
    activation: Activation,
    eps: float,
    positions: Positions = "rope",
    rope: Rope | None = None,
    tied: bool = True,
    spread: float | None = None,
) -> Architecture:
    """LayerNorm before each sub-layer, one key and value a head, biases, a feed-forward without gate.

    `vocab_size` and `tied` are the class's defaults, the rest has been read.
    """
    rope = rope or Rope()
    architecture = Architecture(
        name=name,
        d_model=sizes.d_model,
        n_layers=sizes.n_layers,
        n_heads=sizes.n_heads,
        n_kv_heads=sizes.n_heads,
        d_head=head_width(sizes.d_model, sizes.n_heads),
        d_ffn=d_ffn,
        vocab_size=reader.integer("vocab_size", vocab_size),
        context=context,
        activation=activation,
        eps=eps,
        positions=positions,
        rope_fraction=rope.fraction,
        rope_base=rope.base,
        biases=True,
        tied=reader.flag("tie_word_embeddings", tied),
        init=flat(reader.spread() if spread is None else spread, name=name),
    )
    return rope.scaling.of(architecture)


def gated(
    reader: Reader,
    name: str,
    *,
    d_ffn: int,
    vocab_size: int,
    context: int,
    n_kv_heads: int | None = None,
    d_head: int | None = None,
    tied: bool = False,
    pad: int | None = None,
    activation: Activation | None = None,
    eps: float | None = None,
    rope: Rope | None = None,
    spread: float | None = None,
    hidden: str = "intermediate_size",
) -> Architecture:
    """RMSNorm before each sub-layer, grouped keys and values, no bias, a gated feed-forward: LLaMA's line.

    The sizes, `tied` and `pad` (the padding token) are the class's defaults; what follows has been read where it
    is given, and is read as LLaMA reads it otherwise; `hidden` is the key of the feed-forward's width.
    """
    sizes = Sizes.read(reader)
    d_model, n_layers, n_heads = sizes
    rope = read_rope(reader) if rope is None else rope
    vocabulary = reader.integer("vocab_size", vocab_size)
    if n_kv_heads is None:
        groups = reader.integer("num_key_value_heads", n_heads, quiet=True)
    else:
        groups = reader.integer("num_key_value_heads", n_kv_heads, null=n_heads)
    if d_head is None:
        width = reader.integer("head_dim", quiet=True) if reader.has("head_dim") else head_width(d_model, n_heads)
    else:
        width = reader.integer("head_dim", d_head)
    architecture = Architecture(
        name=name,
        d_model=d_model,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=groups,
        d_head=width,
        d_ffn=reader.integer(hidden, d_ffn),
        vocab_size=vocabulary,
        context=reader.integer("max_position_embeddings", context),
        activation=reader.activation("hidden_act", "silu") if activation is None else activation,
        gated=True,
        norm="rmsnorm",
        eps=reader.number("rms_norm_eps", 1e-6) if eps is None else eps,
        rope_fraction=rope.fraction,
        rope_base=rope.base,
        tied=reader.flag("tie_word_embeddings", tied),
        padding_row=reader.padding_row(pad, vocabulary),
        init=flat(reader.spread() if spread is None else spread, name=name),
    )
    return rope.scaling.of(architecture)


def either(reader: Reader, *keys: str) -> bool:
    """Whether one of these flags, off by default, is on."""
    flags = [reader.flag(key, False) for key in keys]  # a list, so that each is looked at
    return any(flags)


def require_unclipped(reader: Reader, architecture: Architecture) -> None:
    """`clip_qkv` cuts queries, keys and values; at the start it does nothing if it is far above their spread."""
    clip = reader.optional_number("clip_qkv", None, quiet=True)
    if clip is None:
        return
    stds = architecture.stds
    reach = clip / (architecture.d_model**0.5 * max(stds.query, stds.key, stds.value))
    if reach < CLIP:
        raise UnknownArchitecture(
            f"clip_qkv is {clip:g}, {reach:.2g} standard deviations; predictions cover {CLIP:g} or more"
        )
    reader.note(f"clip_qkv = {clip:g} is {reach:.3g} standard deviations away and cuts nothing at the start")


# --- rotary positions -----------------------------------------------------------------------------------------------


def read_rope(
    reader: Reader,
    *,
    base: float = 10_000.0,
    fraction: float | None = None,
    keys: tuple[str, str] = ("rope_theta", "partial_rotary_factor"),
) -> Rope:
    """Rotary positions with the class's defaults; a fraction of None: the class turns all of a head.

    Raises:
        UnknownArchitecture: the frequencies are rescaled.
    """
    table = reader.table("rope_scaling", "rope_parameters")
    turning = 1.0
    if fraction is None:
        table.ignored("partial_rotary_factor", 1.0)
        reader.ignored("partial_rotary_factor", 1.0)
    else:
        place, key = (table, "partial_rotary_factor") if table.has("partial_rotary_factor") else (reader, keys[1])
        turning = place.number(key, fraction)
        if turning > 1:
            raise ValueError(f"{place.place}{key}={turning:g} is above 1; use the share of a head that turns, 0 to 1")
    return Rope(turning, rope_base(reader, table, keys[0], base), read_scaling(table))


def rope_base(reader: Reader, table: Reader, key: str, default: float) -> float:
    """The base in a table of rotary parameters, or else by `key` in the config."""
    if table.has("rope_theta"):
        return table.number("rope_theta", default, positive=True)
    return reader.number(key, default, positive=True)


def read_scaling(table: Reader) -> Scaling:
    """How the class slows the rotary frequencies.

    Raises:
        UnknownArchitecture: in a way that predictions do not cover.
    """
    kind = table.data.get("rope_type", table.data.get("type", "default"))
    if not isinstance(kind, str):
        raise ValueError(f"{table.place}rope_type={kind!r} is not a name; use one of {', '.join(KINDS)}")
    if kind not in KINDS:
        raise UnknownArchitecture(f"{table.place}rope_type is {kind!r}; predictions cover {', '.join(KINDS)}")
    if kind == "dynamic":
        table.note(f"{table.place}rope_type = dynamic changes nothing up to max_position_embeddings")
    if kind in PLAIN:
        return Scaling()
    if not table.has("factor"):
        raise ValueError(f"{table.place}factor is missing and rope_type {kind!r} has no default; add it, for example 8")
    stretch = table.number("factor", 1.0, positive=True)
    if kind == "linear":
        return Scaling(stretch)
    for key in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"):
        if not table.has(key):
            raise ValueError(f"{table.place}{key} is missing and rope_type {kind!r} has no default; add it")
    low, high = (table.number(f"{name}_freq_factor", 1.0, positive=True) for name in ("low", "high"))
    if low >= high:
        raise ValueError(
            f"{table.place}high_freq_factor={high:g} is not above low_freq_factor={low:g}; use for example 4"
        )
    return Scaling(stretch, table.integer("original_max_position_embeddings", 8192), low, high)


def read_nope(reader: Reader, n_layers: int, default: int) -> int:
    """k, where every k-th layer is without rotary positions; 0 for none, 1 for all."""
    turns = reader.per_layer("no_rope_layers", n_layers, longer=True)
    if turns is None:
        every = reader.integer("no_rope_layer_interval", default)
        return every if every <= n_layers else 0
    for entry in turns:
        if entry not in (0, 1):
            raise ValueError(f"no_rope_layers holds {entry!r}; use 1 for rotary positions and 0 for none")
    if not any(turns):
        return 1
    found = period([not entry for entry in turns])
    if found is None or found.first:
        raise UnknownArchitecture("no_rope_layers follows no period; predictions cover every k-th layer without")
    return found.every


# --- windows --------------------------------------------------------------------------------------------------------


def read_layer_types(reader: Reader, n_layers: int, window: int, *, every: int | None) -> Windows:
    """Which layers see a window: all but every k-th by default, none for None."""
    kinds = reader.per_layer("layer_types", n_layers)
    if kinds is None:
        if every is None or window == 0:
            return Windows()
        reader.note(f"layer_types = a window in {every - 1} of {every} layers (the class's default)")
        return Windows(window, every if every <= n_layers else 0)
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise UnknownArchitecture(f"layer_types holds {kind!r}; predictions cover full and sliding attention")
    return windows([kind == "full_attention" for kind in kinds], window, "layer_types")


def read_neo_windows(reader: Reader, n_layers: int) -> Windows:
    """GPT-Neo's: `attention_layers` names each layer, or `attention_types` repeats a list of names."""
    window = reader.integer("window_size", 256)
    kinds = reader.per_layer("attention_layers", n_layers)
    kinds = _expand(reader, n_layers) if kinds is None else kinds
    for kind in kinds:
        if kind not in ("global", "local"):
            raise ValueError(f"attention_types holds {kind!r}; use global and local")
    return windows([kind == "global" for kind in kinds], window, "attention_types")


def windows(whole: Sequence[bool], window: int, key: str) -> Windows:
    """The layers that see everything, as a period."""
    if all(whole):
        return Windows()
    if window == 0:
        raise ValueError(f"{key} names layers with a window and there is none; use full attention or give a window")
    found = period(whole)
    if found is None:
        raise UnknownArchitecture(f"{key} follows no period; predictions cover full attention in every k-th layer")
    return Windows(window, found.every, found.first)


def period(special: Sequence[bool]) -> Period | None:
    """Which layers are special, as a period; None if they follow none (or if every layer is).

    >>> period([False, False, True, False, False, True, False])
    Period(every=3, first=False)
    """
    if not any(special):
        return Period(0, False)
    first = special[0]
    every = next((k for k in range(1, len(special)) if special[k]), len(special)) if first else special.index(True) + 1
    repeats = all(it == ((k if first else k + 1) % every == 0) for k, it in enumerate(special))
    return Period(every, first) if repeats and every > 1 else None


def _expand(reader: Reader, n_layers: int) -> list[Any]:
    """`attention_types`: pairs of a list of names and how often it is repeated."""
    key, remedy = "attention_types", 'write it as [[["global", "local"], 6]] for 12 layers'
    value: Any = reader.data.get(key)
    if value is None:
        reader.note(f"{key} = [[[global, local], 12]] (the class's default)")
        value = [[["global", "local"], 12]]
    count = 0
    if not isinstance(value, list):
        raise ValueError(f"{key}={value!r} is not a list; {remedy}")
    pairs: list[Any] = value
    for pair in pairs:
        match pair:
            case [list() as names, int() as times] if not isinstance(times, bool):
                count += len(names) * times
            case _:
                raise ValueError(f"{key} holds {pair!r}; {remedy}")
    if count != n_layers or count > LARGEST_LIST:
        raise ValueError(f"{key} names {count} layers for num_layers={n_layers}; {remedy}")
    return [name for names, times in pairs for _ in range(times) for name in names]
