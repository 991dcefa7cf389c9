r"""Perplexity of a language model on a text, on WikiText and on LAMBADA: what is counted, and by which convention.

With p(t_i | t_<i) the model's probability of a token, the loss of a text is -sum_i log p(t_i | t_<i) nats, a sum over
all of its tokens: the first one follows the token that a document begins with, which is not scored itself. A perplexity
is exp of the loss over a count, and the count is what differs between publications:

| name | count |
|---|---|
| `token_perplexity` | the model's own tokens: not comparable between tokenizers |
| `word_perplexity` of WikiText | words and line ends of the file as distributed, whatever the model's tokens are |
| `word_perplexity` of LAMBADA | last words: one an example |

A text longer than the context is read through windows, every token scored once: the first window scores all of its
tokens, each later one ends `stride` tokens further, is filled with as much context as fits, and scores what is new. At
`stride` = context the windows are disjoint; a smaller stride costs more and gives every token more context.

Sources: the windows are those of the LM Evaluation Harness (`loglikelihood_rolling`) at stride = context; the count of
WikiText is that of Merity et al. 2016 (245569 in the test set) and, but for the last line, of Megatron-LM, and is taken
to be the "canonical unit" of Radford et al. 2019 (GPT-2), while the harness leaves the line ends out; LAMBADA is
Paperno et al. 2016, in the form of OpenAI's `lambada_test.jsonl`.

Shapes: B sequences, T tokens, V ids.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from empirics.kept import is_checkpoint, load_model, model_folder, run_of
from empirics.networks import checkpoint
from empirics.texts import WHOLE_FILES, Documents, rows_of
from empirics.tokenizer import Tokenizer, has_tokenizer, load_tokenizer, read_tokenizer

Format = Literal["wikitext", "lambada", "text"]
FORMATS: tuple[Format, ...] = get_args(Format)

# WikiText is split at punctuation. What undoes it, in this order, a line at a time; as GPT-2's authors did with
# de-tokenizers of their own, and Megatron-LM and the harness with much the same rules. Not invertible everywhere.
JOINED: tuple[tuple[str, str], ...] = (
    (r" @([-,.])@ ", r"\1"),  # 19 @-@ year, 1 @,@ 000, 3 @.@ 5
    (r" ([,.:;!?])(?= |$)", r"\1"),
    (r"([(\[{]) ?([^()\[\]{}]*?) ?([)\]}])", r"\1\2\3"),
    (r'" ([^"]*?) "', r'"\1"'),
    (r"(?<=\S) '(s|re|ve|ll|d|m|t)\b", r"'\1"),
    (r"s ' ", "s' "),
    (r"= (?==)", "="),  # headings: = = Title = =
    (r" (\u00b0) ", r"\1"),
    (r"^ | $", ""),
)
UNKNOWN = "<unk>"  # of the files that are not `raw`


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LanguageModel:
    """What is needed to score a text.

    Attributes:
        logits: token ids (B, T) to the logits (B, T, V) of the next ones, each a function of the ids up to its place.
        start_id: the token that a document begins with.
        vocab_size: ids that `logits` takes.
        context: tokens that `logits` is given unless more are asked for: for a network of this package the length it
            was trained at, for another one its number of positions.
        positions: the most tokens that it takes; None for any number.
        end_of_document: the token at which its attention stops; None if it sees the documents before.
    """

    logits: Callable[[Tensor], Tensor]
    tokenizer: Tokenizer
    start_id: int
    vocab_size: int
    context: int
    positions: int | None = None
    end_of_document: int | None = None
    device: str = "cpu"


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """Inputs are ids[begin:end], targets ids[begin + 1:end + 1], of which the last `scored` count."""

    begin: int
    end: int
    scored: int


def load_language_model(folder: Path, *, tokenizer: str | None = None, device: str = "cpu") -> LanguageModel:
    """A model that `train` left, or one of transformers in safetensors; float32. No code of it runs.

    Args:
        folder: as `empirics.kept.model_folder` takes it, or with a config.json.
        tokenizer: as `load_tokenizer` takes it; the folder's own unless given.

    Raises:
        ValueError: the folder has no model or no tokenizer, or its weights are not safetensors.
    """
    if (ours := model_folder(folder)) is not None:
        return _own(ours, tokenizer, device)
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} holds no model; name the folder of a run that train --keep-checkpoint left, or one of "
            "transformers with config.json, safetensors and the tokenizer"
        )
    return _foreign(folder, _tokenizer(tokenizer, folder), device)


def _own(folder: Path, asked: str | None, device: str) -> LanguageModel:
    model = load_model(folder).to(device).eval()  # first: what is damaged of its tokenizer is damage to the model
    a, tokenizer = model.architecture, _tokenizer(asked, folder)
    return LanguageModel(
        logits=model,
        tokenizer=tokenizer,
        start_id=tokenizer.end_id,
        vocab_size=a.vocab_size,
        context=run_of(folder).get("seq_len", a.context),
        positions=a.context if a.positions == "learned" else None,
        end_of_document=model.end_of_document,
        device=device,
    )


def _foreign(folder: Path, tokenizer: Tokenizer, device: str) -> LanguageModel:
    found = checkpoint(folder, attention="sdpa")
    model, config = found.make(0).to(device), found.settings.get_text_config()
    start = config.bos_token_id if isinstance(config.bos_token_id, int) else config.eos_token_id
    return LanguageModel(
        logits=lambda ids: model(input_ids=ids, use_cache=False).logits,
        tokenizer=tokenizer,
        start_id=start if isinstance(start, int) else tokenizer.end_id,
        vocab_size=config.vocab_size,
        context=found.context,
        positions=found.positions,
        device=device,
    )


def _tokenizer(asked: str | None, folder: Path) -> Tokenizer:
    if asked is not None:
        tokenizer = load_tokenizer(asked)
        if has_tokenizer(folder) and not _is_own(tokenizer, folder):
            print(f"note: --tokenizer {asked} is not the tokenizer that {folder} has of its own", file=sys.stderr)
        return tokenizer
    if not has_tokenizer(folder):
        # The default tokenizer has no name that could be given.
        finish = "the run is not finished: finish it with --keep-checkpoint, or " if is_checkpoint(folder) else ""
        raise ValueError(
            f"{folder} has no tokenizer; {finish}name the one that the model was trained with: --tokenizer bytes, "
            "gpt2, or the path of a tokenizer.json"
        )
    return read_tokenizer(folder)


def _is_own(tokenizer: Tokenizer, folder: Path) -> bool:
    try:
        own = read_tokenizer(folder)
    except ValueError:  # which is a reason to name another
        return False
    return (own.file, own.end_of_document) == (tokenizer.file, tokenizer.end_of_document)


def windows(tokens: int, context: int, stride: int) -> Iterator[Window]:
    """Windows over `tokens` targets, each scored once.

    >>> [(w.begin, w.end, w.scored) for w in windows(10, 4, 3)]
    [(0, 4, 4), (3, 7, 3), (6, 10, 3)]

    Raises:
        ValueError: context or stride is below 1, or the stride above the context.
    """
    if not 1 <= stride <= context:
        raise ValueError(f"stride={stride} is out of range; use 1 to the context, {context}")
    end = 0
    while end < tokens:
        after = min(end + (stride if end else context), tokens)
        yield Window(begin=max(0, after - context), end=after, scored=after - end)
        end = after


@torch.no_grad()
def score(
    model: LanguageModel, sequences: Sequence[tuple[NDArray[np.int64], int]], *, batch: int, progress: bool = False
) -> list[tuple[float, bool]]:
    """The loss of the last tokens of each sequence, and whether each of them was the model's first choice.

    Args:
        sequences: ids, of which the last `scored` are scored, each given all before it.
        batch: sequences at a time; shorter ones are filled up behind their end, which no causal model sees.

    Returns:
        nats, summed in float64 over the scored tokens, and the choice, in the order of `sequences`.

    Raises:
        ValueError: an id is none of the model's.
    """
    if (largest := max((int(ids.max()) for ids, _ in sequences), default=0)) >= model.vocab_size:
        raise ValueError(f"the model has {model.vocab_size} ids and the tokenizer gives {largest}; use the model's own")
    results: list[tuple[float, bool]] = [(0.0, True)] * len(sequences)
    order = sorted(range(len(sequences)), key=lambda n: -len(sequences[n][0]))  # equal lengths together, longest first
    for first in tqdm(range(0, len(order), batch), desc="windows", unit="batch", disable=not progress):
        chosen = order[first : first + batch]
        ids = torch.zeros(len(chosen), len(sequences[chosen[0]][0]), dtype=torch.int64)
        for row, n in zip(ids, chosen, strict=True):
            row[: len(sequences[n][0])] = torch.from_numpy(sequences[n][0])
        ids = ids.to(model.device)
        logits = model.logits(ids[:, :-1])
        for row, n in enumerate(chosen):
            sequence, scored = sequences[n]
            last = slice(len(sequence) - 1 - scored, len(sequence) - 1)
            own, targets = logits[row, last], ids[row, 1:][last]
            own = own if own.dtype == torch.float64 else own.float()
            losses = torch.nn.functional.cross_entropy(own, targets, reduction="none").double()
            results[n] = float(losses.sum()), bool((own.argmax(-1) == targets).all())
    return results


def text_loss(
    model: LanguageModel, texts: Iterable[str], *, context: int, stride: int, batch: int, progress: bool = False
) -> tuple[float, int]:
    """Loss (nats) of texts, each on its own, and the number of their tokens."""
    sequences: list[tuple[NDArray[np.int64], int]] = []
    for text in texts:
        ids = _with_start(model, model.tokenizer.encode([text])[0])
        for window in windows(len(ids) - 1, context, stride):
            sequences.append((ids[window.begin : window.end + 1], window.scored))
    total = math.fsum(loss for loss, _ in score(model, sequences, batch=batch, progress=progress))
    return total, sum(scored for _, scored in sequences)


def detokenise(line: str) -> str:
    """A line of WikiText as it was written.

    >>> detokenise(' The 19 @-@ year @-@ old ( Smith \\'s son ) paid 1 @,@ 000 , " twice " . ')
    'The 19-year-old (Smith\\'s son) paid 1,000, "twice".'
    """
    for pattern, replacement in JOINED:
        line = re.sub(pattern, replacement, line)
    return line


def last_word(text: str) -> tuple[str, str]:
    """A LAMBADA example as context and last word, the space before the word going with it.

    >>> last_word("he opened the door")
    ('he opened the', ' door')
    """
    context, space, word = text.strip().rpartition(" ")
    return context, space + word


def perplexity(
    model: LanguageModel,
    data: str,
    *,
    format: Format,
    context: int | None = None,
    stride: int | None = None,
    batch: int = 4,
    progress: bool = False,
) -> dict[str, Any]:
    """The perplexity of a text, with every number that it is made of.

    Args:
        data: a text as `empirics.texts.Documents` takes it; of a data set of the Hub, the test split unless named.
        format: what the text is, and so what is counted;
            `text`: documents, each on its own, tokens and bytes;
            `wikitext`: the file as distributed, or the data set's lines; all lines are one text, de-tokenised a line
                at a time and each followed by a line end. Words are what spaces separate in the file as it is, and
                line ends count as words. `<unk>`, in files that are not `raw`, is predicted like any other text;
            `lambada`: lines of JSON, or rows of a table, with an example as `text` each. The target is the last word
                with the space before it: the tokens of the whole beyond as many as the rest has on its own. It is right
                if each of its tokens is the most likely one. An example begins with the start token, as documents do.
        context, stride: as above; by default the model's context, and windows that do not overlap.

    Returns:
        JSON-ready: `read_as`, `nats`, `tokens`, `token_perplexity`, and by format `bits_per_byte`, or `words`,
        `word_perplexity`, `unknown_words`, or `examples`, `word_perplexity`, `accuracy`. `trained_context` is there
        where the context is longer than that, `end_of_document` where the model's attention stops at that token.

    Raises:
        ValueError: the text is missing, empty or of another format; context or stride is out of range.
    """
    if format not in FORMATS:
        raise ValueError(f"unknown format {format!r}; use one of {', '.join(FORMATS)}")
    context = context or model.context
    if model.positions is not None and context > model.positions:
        raise ValueError(f"context={context} exceeds the model's {model.positions} positions; use at most as many")
    stride = stride or context
    if not 1 <= stride <= context:
        raise ValueError(f"stride={stride} is out of range; use 1 to the context, {context}")
    if data.startswith("hf:"):
        data += "" if data.count(":") > 2 else ":" * (3 - data.count(":")) + "test"
    sizes: dict[str, Any] = {"context": context, "stride": stride, "batch": batch, "progress": progress}
    settings: dict[str, Any] = {"format": format, "data": data, "read_as": Documents(data).formats, "context": context}
    if context > model.context:
        settings["trained_context"] = model.context
    if model.end_of_document is not None:
        settings["end_of_document"] = model.end_of_document
    if format == "lambada":
        return settings | _lambada(model, data, context=context, batch=batch, progress=progress)
    if format == "wikitext":
        return settings | {"stride": stride} | _wikitext(model, data, sizes)
    texts = list(Documents(data))
    nats, tokens = text_loss(model, texts, **sizes)
    n_bytes = sum(len(text.encode()) for text in texts)
    return settings | {
        "stride": stride, "nats": nats, "tokens": tokens, "token_perplexity": _exp(nats / tokens),
        "bytes": n_bytes, "bits_per_byte": nats / math.log(2) / n_bytes,
    }  # fmt: skip


def _wikitext(model: LanguageModel, data: str, sizes: dict[str, Any]) -> dict[str, Any]:
    # A row of a data set is a line, and a file is one row of many.
    lines = [line for row in rows_of(data) for line in row.removesuffix("\n").split("\n")]
    words = len(lines) + sum(len(line.split()) for line in lines)
    if words == len(lines):
        raise ValueError(f"{data} holds no text; use wiki.test.raw or hf:Salesforce/wikitext:wikitext-103-raw-v1")
    nats, tokens = text_loss(model, ["".join(detokenise(line) + "\n" for line in lines)], **sizes)
    return {
        "nats": nats, "tokens": tokens, "token_perplexity": _exp(nats / tokens), "words": words,
        "word_perplexity": _exp(nats / words), "unknown_words": sum(line.split().count(UNKNOWN) for line in lines),
    }  # fmt: skip


def _lambada(model: LanguageModel, data: str, *, context: int, batch: int, progress: bool) -> dict[str, Any]:
    sequences: list[tuple[NDArray[np.int64], int]] = []
    documents = Documents(data)
    if WHOLE_FILES in documents.formats:  # of each the very last word alone would be scored
        raise ValueError(
            f'{data} does not say where examples end; write one {{"text": "..."}} a line into a .jsonl file, '
            "or use .parquet or hf:EleutherAI/lambada_openai"
        )
    for text in documents:
        before, word = last_word(text)
        # A context that is too long loses its beginning; at least one token is left to predict the word from.
        whole, rest = model.tokenizer.encode([before + word, before])
        scored = len(whole) - len(rest)
        if not 1 <= scored <= context:
            raise ValueError(
                f"the last word of {text[-40:]!r} has {scored} tokens; use a text of whole sentences and a --context "
                "that is longer than a word"
            )
        sequences.append((_with_start(model, whole)[-context - 1 :], scored))
    scores = score(model, sequences, batch=batch, progress=progress)
    nats, tokens = math.fsum(loss for loss, _ in scores), sum(scored for _, scored in sequences)
    return {
        "nats": nats, "tokens": tokens, "token_perplexity": _exp(nats / tokens), "examples": len(scores),
        "word_perplexity": _exp(nats / len(scores)), "accuracy": sum(right for _, right in scores) / len(scores),
    }  # fmt: skip


def _with_start(model: LanguageModel, ids: NDArray[np.int32]) -> NDArray[np.int64]:
    return np.concatenate([np.array([model.start_id]), ids]).astype(np.int64)


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf  # beyond it a float has no room
