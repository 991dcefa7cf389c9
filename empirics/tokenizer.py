"""Text to token ids: bytes, a BPE trained on the text, GPT-2's, or anyone's tokenizer file.

Every one is a file of the `tokenizers` library, so that what a model was trained with can lie beside it and
transformers reads it. A document is followed by the end-of-document token, as GPT-2's training did; text that spells
that token does not produce it.

| tokenizer | ids of text | end of a document |
|---|---|---|
| `bytes` | a byte plus one: 1 .. 256 | 257 |
| `bpe` | 2 .. vocab_size - 1, the bytes first | 1 |
| `gpt2` | 0 .. 50255, as published | 50256 |
| a file | as it says | its `eos_token`, else `<|endoftext|>`, `</s>`, `<eos>` or `<|end_of_text|>` |

`bytes` and `bpe` never produce id 0, because some model classes zero or ignore one row of the token table, the padding
row. Nothing here needs torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from empirics.hub import hub
from theory.records import write_bytes

END_OF_DOCUMENT = "<|endoftext|>"
ENDS = (END_OF_DOCUMENT, "</s>", "<eos>", "<|end_of_text|>")  # of GPT-2, LLaMA, Gemma, LLaMA 3
PADDING = "<pad>"
SMALLEST_VOCAB = 258  # every byte, the end of a document, and the unused id 0.
TRAINED_ON = 2_000_000  # characters: a BPE is trained on at most this prefix of the training split.
PIECE = 1 << 16  # characters encoded at a time, so that one long document is spread over the cores too.
AT_ONCE = 64  # pieces; bounds the memory of one call.
FILE, CONFIG = "tokenizer.json", "tokenizer_config.json"
GPT2, GPT2_VOCAB = "openai-community/gpt2", 50257
# Where GPT-2's pattern always begins anew: at a space or line end behind something else.
BREAK = re.compile(r"(?<=\S)(?=[ \n])")


class Tokenizer:
    """Documents to ids.

    Args:
        file: JSON of the `tokenizers` library.
        end_of_document: the token that follows a document, by its name.

    Raises:
        ValueError: the JSON is no tokenizer's, or does not know the token.
    """

    def __init__(self, file: str, end_of_document: str = END_OF_DOCUMENT) -> None:
        import tokenizers

        try:
            self._tokenizer: Any = tokenizers.Tokenizer.from_str(file)
        except Exception as error:  # The library raises nothing more special.
            raise ValueError(f"this is no file of the tokenizers library ({error})") from error
        self._tokenizer.encode_special_tokens = True  # Otherwise a text that spells <pad> would produce its id.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        if end_of_document not in vocabulary:
            raise ValueError(
                f"the vocabulary has no {end_of_document!r} to end a document with; name one as eos_token in {CONFIG}"
            )
        self.file, self.end_of_document = file, end_of_document
        self.end_id: int = vocabulary[end_of_document]
        self.vocab_size: int = max(vocabulary.values()) + 1
        parts = json.loads(file)
        split = parts.get("pre_tokenizer") or {}
        ordinary = all(token["special"] for token in parts.get("added_tokens", ()))
        # Anyone else's pattern may look across a break, so such documents are encoded in one piece.
        self._breaks = split.get("type") == "ByteLevel" and parts.get("normalizer") is None and ordinary

    def encode(self, documents: Sequence[str]) -> list[NDArray[np.int32]]:
        """The ids of each document, without its end."""
        pieces = [list(_pieces(document)) if self._breaks else [document] for document in documents]
        flat = [piece for parts in pieces for piece in parts]
        ids: list[NDArray[np.int32]] = []
        for first in range(0, len(flat), AT_ONCE):
            encoded = self._tokenizer.encode_batch_fast(flat[first : first + AT_ONCE], add_special_tokens=False)
            ids += [np.array(encoding.ids, np.int32) for encoding in encoded]
        ends = np.cumsum([len(parts) for parts in pieces]).tolist()
        none = np.empty(0, np.int32)
        return [np.concatenate([none, *ids[a:b]]) for a, b in zip([0, *ends], ends, strict=False)]

    def decode(self, ids: Sequence[int] | NDArray[Any]) -> str:
        """The text of ids; bytes that are not UTF-8 become replacement characters."""
        return self._tokenizer.decode([int(n) for n in ids], skip_special_tokens=False)

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`, which transformers reads too."""
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": self.end_of_document}
        write_bytes(folder / FILE, self.file.encode())
        write_bytes(folder / CONFIG, json.dumps(config).encode() + b"\n")


def byte_tokenizer() -> Tokenizer:
    """A byte is its own number plus one.

    >>> tokenizer = byte_tokenizer()
    >>> tokenizer.encode(["hi"])[0].tolist(), tokenizer.end_id, tokenizer.vocab_size
    ([105, 106], 257, 258)
    """
    from tokenizers import models

    # Bytes that print stand for themselves in the library's files; the others are 256, 257, ... in order.
    alphabet = _byte_level().alphabet()
    printable = {ord(character) for character in alphabet if ord(character) < 256}
    others = [byte for byte in range(256) if byte not in printable]
    characters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
    vocabulary = {PADDING: 0, END_OF_DOCUMENT: 257} | {character: byte + 1 for byte, character in characters.items()}
    return _assembled(models.BPE(vocab=vocabulary, merges=[]), (PADDING, END_OF_DOCUMENT))


def train_bpe(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of at most `vocab_size` ids, trained on the first two million characters.

    It does not depend on the number of threads, because the library breaks ties between equally frequent pairs by
    their ids.
    """
    from tokenizers import models, trainers

    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[PADDING, END_OF_DOCUMENT],  # Special tokens come first: ids 0 and 1.
        initial_alphabet=_byte_level().alphabet(),
        show_progress=False,
    )
    bpe = _library(models.BPE())
    bpe.train_from_iterator(_prefix(documents, TRAINED_ON), trainer=trainer)
    return Tokenizer(bpe.to_str())


def make_tokenizer(spec: str, training_documents: Iterable[str], vocab_size: int | None) -> Tokenizer:
    """The tokenizer `bpe`, trained on these documents, or one of `load_tokenizer`.

    Args:
        vocab_size: largest number of ids; None for as many as the tokenizer has, and 50257 for `bpe`.

    Raises:
        ValueError: as `load_tokenizer`; the vocabulary is too small for the tokenizer.
    """
    if vocab_size is None:
        vocab_size = GPT2_VOCAB if spec == "bpe" else 2**31 - 1
    require_vocabulary(vocab_size)
    if spec == "bpe":
        return train_bpe(training_documents, vocab_size)
    made = load_tokenizer(spec)
    require_room(made, vocab_size, f"the tokenizer {spec}")
    return made


def require_vocabulary(vocab_size: int) -> None:
    """Refuse a vocabulary that cannot hold every byte.

    Raises:
        ValueError: it cannot.
    """
    if not SMALLEST_VOCAB <= vocab_size < 2**31:
        raise ValueError(
            f"vocab_size={vocab_size} is out of range; use at least {SMALLEST_VOCAB} (256 bytes, the end of a document "
            "and an unused id 0)"
        )


def require_room(tokenizer: Tokenizer, vocab_size: int, name: str, *, other: str = "another tokenizer") -> None:
    """Refuse an architecture whose vocabulary is too small.

    Args:
        other: what there is to do beside a larger vocabulary.

    Raises:
        ValueError: it is.
    """
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"{name} has {tokenizer.vocab_size} ids and the vocabulary {vocab_size}; use a config.json with "
            f"vocab_size {tokenizer.vocab_size} or more, or {other}"
        )


def load_tokenizer(spec: str) -> Tokenizer:
    """A tokenizer that needs no text: bytes, GPT-2's, or the one at a path; no code of anyone's runs.

    Args:
        spec: `bytes`;
            `gpt2`: from the local cache of the Hugging Face Hub, else fetched from there;
            a path, as in `read_tokenizer`.

    Raises:
        ValueError: it is not there, cannot be fetched or cannot be read; the message names the remedy.
    """
    if spec == "bytes":
        return byte_tokenizer()
    path = _gpt2() if spec == "gpt2" else Path(spec).expanduser()
    if not has_tokenizer(path):
        raise ValueError(
            f"there is no tokenizer {spec!r}; use bytes, gpt2, the path of a {FILE}, of a vocab.json with merges.txt "
            "beside it or of a folder with one of them, or, where there is a text to train it on, bpe"
        )
    return read_tokenizer(path)


def has_tokenizer(path: Path) -> bool:
    """Whether `read_tokenizer` finds a file there."""
    return _file(path).is_file()


def _file(path: Path) -> Path:
    if path.is_dir():
        return next((path / name for name in (FILE, "vocab.json") if (path / name).is_file()), path / FILE)
    return path


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a file or a folder.

    Args:
        path: a tokenizer.json or vocab.json (with merges.txt beside it), or a folder with either; the end of a
            document is the `eos_token` of a tokenizer_config.json beside it, where there is one.

    Raises:
        ValueError: it cannot be read; the message names the remedy.
    """
    path = _file(path)
    try:
        if path.name.endswith("vocab.json"):
            return _from_vocabulary(path, path.with_name(path.name.replace("vocab.json", "merges.txt")))
        file = path.read_text(encoding="utf-8")
        return Tokenizer(file, _end_of(path.with_name(CONFIG), file))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:  # JSON of another shape
        reason = " ".join(str(error).split())
        raise ValueError(f"cannot read the tokenizer {path} ({reason}); use a {FILE}, or bpe or bytes") from error


def _gpt2() -> Path:
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    found = try_to_load_from_cache(GPT2, FILE)
    if isinstance(found, str):
        return Path(found)
    try:
        with hub():
            return Path(hf_hub_download(GPT2, FILE))
    except Exception as error:  # The client raises the errors of several network libraries.
        raise ValueError(
            f"GPT-2's tokenizer is not in the local cache and cannot be fetched ({type(error).__name__}); put its "
            f"{FILE}, or vocab.json and merges.txt, into a folder and name the folder in place of gpt2"
        ) from error


def _end_of(config: Path, file: str) -> str:
    if config.is_file():
        token = json.loads(config.read_text(encoding="utf-8")).get("eos_token")
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            return token
    parts = json.loads(file)
    vocabulary = parts["model"]["vocab"]
    # A unigram model lists pairs of a token and its score.
    known = set(vocabulary) if isinstance(vocabulary, dict) else {token for token, _ in vocabulary}
    known |= {token["content"] for token in parts.get("added_tokens", ())}
    return next((end for end in ENDS if end in known), END_OF_DOCUMENT)


def _from_vocabulary(vocabulary: Path, merges: Path) -> Tokenizer:
    from tokenizers import models

    if not merges.is_file():
        raise ValueError(f"{merges.name} is missing beside it")
    try:
        return _assembled(models.BPE.from_file(str(vocabulary), str(merges)), (END_OF_DOCUMENT,))
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(str(error)) from error


def _byte_level() -> Any:
    from tokenizers import pre_tokenizers

    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _library(model: Any) -> Any:
    """GPT-2's byte-level pattern around a model."""
    import tokenizers

    whole: Any = tokenizers.Tokenizer(model)
    whole.pre_tokenizer, whole.decoder = _byte_level(), tokenizers.decoders.ByteLevel()
    return whole


def _assembled(model: Any, special: Sequence[str]) -> Tokenizer:
    whole = _library(model)
    if missing := [token for token in special if whole.token_to_id(token) is None]:
        raise ValueError(f"its vocabulary has no {missing[0]!r} to end a document with")
    whole.add_special_tokens(list(special))
    return Tokenizer(whole.to_str())


def _prefix(documents: Iterable[str], characters: int) -> Iterator[str]:
    for document in documents:
        yield from _pieces(document[:characters])
        characters -= len(document)
        if characters <= 0:
            return


def _pieces(text: str) -> Iterator[str]:
    """Parts of at least PIECE characters but for the last, between which GPT-2's pattern breaks anyway."""
    first = 0
    while found := BREAK.search(text, first + PIECE):
        yield text[first : found.start()]
        first = found.start()
    yield text[first:]
