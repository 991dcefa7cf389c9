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

NAMES = {
    "token_perplexity": "a token",
    "word_perplexity": "a word",
    "accuracy": "last words right",
    "bits_per_byte": "bits a byte",
}


def add_command(commands: Any) -> argparse.ArgumentParser:
    """Add `perplexity` to the commands of a parser."""
    command = commands.add_parser(
        "perplexity",
        help="perplexity of a model on WikiText, LAMBADA or any text",
        description="Perplexity of a model on a text. wikitext: all lines are one text, de-tokenised; a word is what "
        "spaces separate in the file as distributed, or a line end (245569 in the test set). lambada: JSON lines of "
        "text; the last word of each, given what is before it; right if every token of it is the most likely. text: "
        "documents, each on its own. Every text begins with the start token, which is not scored.",
    )
    command.add_argument(
        "model", type=Path, metavar="MODEL",
        help="folder that train --keep-checkpoint left (OUT/models/RUN), or a checkpoint of transformers with "
        "config.json, safetensors and tokenizer (extra hf); no code of it runs",
    )  # fmt: skip
    command.add_argument(
        "--data", required=True, metavar="TEXT",
        help="a file, a folder or a glob of files, or hf:NAME[:CONFIG[:SPLIT]] (the test split unless named), for "
        "example hf:Salesforce/wikitext:wikitext-103-raw-v1 or hf:EleutherAI/lambada_openai",
    )  # fmt: skip
    command.add_argument("--format", choices=FORMATS, default="text", help="default text")
    command.add_argument(
        "--context", type=whole, metavar="T",
        help="tokens of a window (default: the length that the model was trained at, or its number of positions)",
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
    model = load_language_model(arguments.model, device=check_device(arguments.device))
    told = perplexity(
        model, arguments.data, format=arguments.format, context=arguments.context, stride=arguments.stride,
        batch=arguments.batch, progress=True,
    )  # fmt: skip
    told = {"model": str(arguments.model)} | told
    if arguments.json:
        emit(json.dumps(plain(told), indent=2, allow_nan=False), arguments.out)
        return 0
    counts = ", ".join(f"{told[name]} {name}" for name in ("tokens", "words", "examples", "bytes") if name in told)
    stride = f", stride {told['stride']}" if "stride" in told else ""
    lines = [f"{arguments.data} as {arguments.format}: {counts}; context {told['context']}{stride}"]
    for name, meaning in NAMES.items():
        if name in told:
            kind = "perplexity " if name.endswith("perplexity") else ""
            lines.append(f"{kind}{meaning}: {told[name]:.4g}")
    if told.get("unknown_words"):
        lines.append(f"{told['unknown_words']} words are <unk>, scored as text; the raw files have none")
    emit("\n".join(lines), arguments.out)
    return 0
