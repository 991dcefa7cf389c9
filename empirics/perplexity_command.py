"""`python -m empirics perplexity`: a kept model, or one of transformers, on a text."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from empirics.command_line import check_device
from empirics.perplexity import FORMATS, load_language_model, perplexity
from theory.__main__ import emit, whole
from theory.records import plain
from theory.words import counted

COUNTS = {"examples": "example", "words": "word", "tokens": "token", "bytes": "byte"}


def add_command(commands: Any) -> argparse.ArgumentParser:
    """Add `perplexity` to the commands of a parser."""
    command = commands.add_parser(
        "perplexity",
        help="perplexity of a model on WikiText, LAMBADA or any text",
        description="Perplexity of a model on a text. wikitext: all lines are one text, de-tokenised; a word is what "
        "spaces separate in the file as distributed, or a line end (245569 in the test set). lambada: an example a "
        "line of JSON or a row of a table, under the key text; its last word, given what is before it; right if every "
        "token of it is the most likely. text: documents, each on its own. Every text begins with the start token, "
        "which is not scored.",
    )
    command.add_argument(
        "model", type=Path, metavar="MODEL",
        help="folder of a run of train --keep-checkpoint, or a checkpoint of transformers with config.json, "
        "safetensors and tokenizer (extra hf); no code of it runs",
    )  # fmt: skip
    command.add_argument(
        "--tokenizer", metavar="NAME",
        help="bytes, gpt2, or the path of a tokenizer.json or of its folder (default the model's own)",
    )  # fmt: skip
    command.add_argument(
        "--data", required=True, metavar="TEXT",
        help="a file, a folder or a glob of files, or hf:NAME[:CONFIG[:SPLIT]] (the test split unless named), for "
        "example hf:Salesforce/wikitext:wikitext-103-raw-v1 or hf:EleutherAI/lambada_openai",
    )  # fmt: skip
    command.add_argument(
        "--format", choices=FORMATS, default="text", help="what the text is, and so what is counted (default text)"
    )
    command.add_argument(
        "--context", type=whole, metavar="T",
        help="tokens of a window (default: the length that the model was trained at, or its number of positions); "
        "more are a test of how it extrapolates, and refused where positions are learned",
    )  # fmt: skip
    command.add_argument(
        "--stride", type=whole, metavar="S",
        help="tokens from window to window, for wikitext and text (default: the context, so that none is read twice)",
    )  # fmt: skip
    command.add_argument("--batch", type=whole, default=4, metavar="B", help="windows at a time (default 4)")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.add_argument("--out", metavar="FILE", help="write to a file instead of standard output")
    command.set_defaults(run=_run)
    return command


def _run(arguments: argparse.Namespace) -> int:
    device = check_device(arguments.device)
    model = load_language_model(arguments.model, tokenizer=arguments.tokenizer, device=device)
    told = perplexity(
        model, arguments.data, format=arguments.format, context=arguments.context, stride=arguments.stride,
        batch=arguments.batch, progress=True,
    )  # fmt: skip
    told = {"model": str(arguments.model)} | told
    if arguments.json:
        emit(json.dumps(plain(told), indent=2, allow_nan=False), arguments.out)
    else:
        emit("\n".join(_lines(told)), arguments.out)
    return 0


def _lines(told: dict[str, Any]) -> list[str]:
    """The answer to read: what was read, each perplexity with its unit, and what to know of it."""
    last = told["format"] == "lambada"
    counts = ", ".join(counted(told[name], one) for name, one in COUNTS.items() if name in told)
    stride = f", stride {told['stride']}" if "stride" in told else ""
    lines = [
        f"{told['data']} as {told['format']}, {' and '.join(told['read_as'])}: {counts}; "
        f"context {told['context']}{stride}"
    ]
    if "accuracy" in told:
        right = f"{round(told['accuracy'] * told['examples'])} of {told['examples']}"
        lines.append(f"last words right: {told['accuracy']:.2%} ({right}; right if every token is the most likely)")
    if "word_perplexity" in told:
        lines.append(f"perplexity a {'last word' if last else 'word'}: {told['word_perplexity']:.4g}")
    lines.append(f"perplexity a token{' of the last words' if last else ''}: {told['token_perplexity']:.4g}")
    if "bits_per_byte" in told:
        lines.append(f"bits a byte: {told['bits_per_byte']:.4g}")
    if told.get("unknown_words"):
        words = counted(told["unknown_words"], "word is", "words are")
        lines.append(f"note: {words} <unk>, scored as text; the raw files have none")
    if "trained_context" in told:
        lines.append(
            f"note: the model was trained at {counted(told['trained_context'], 'token')} and is asked for "
            f"{told['context']} at once: what it says of the rest is extrapolation"
        )
    if "end_of_document" in told:
        lines.append(
            "note: the model was trained with --mask-documents, and its attention stops at token "
            f"{told['end_of_document']}, the end of a document"
        )
    return lines
