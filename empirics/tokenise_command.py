"""`python -m empirics tokenise`: a text to shards that a training maps into memory."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NoReturn

from tqdm import tqdm

from empirics.run import stop_signals
from empirics.shards import SHARD_TOKENS, kept, longest_window, tokenise
from theory.__main__ import whole
from theory.architecture import preset
from theory.words import counted


def add_command(commands: Any) -> argparse.ArgumentParser:
    """Add `tokenise` to the commands of a parser."""
    command = commands.add_parser(
        "tokenise",
        help="a text to memory-mapped shards, for train --data DIR",
        description="Write a text's tokens to a folder that `train --data DIR` maps into memory: for texts larger than "
        "memory, or to tokenise once. The text is streamed. A killed run goes on after its last whole shard; Ctrl-C or "
        "SIGTERM ends it with status 130. A finished one is checked, and a damaged shard made again. Documents are "
        "whole, each followed by the end-of-document token that the manifest names; the last 5 % (at most ten million "
        "characters) are held out.",
    )
    command.add_argument(
        "text", metavar="TEXT",
        help="sympy, a .txt, .jsonl, .json or .parquet file (all but the last may end in .gz), a folder of them, a "
        "glob, or hf:NAME[:CONFIG[:SPLIT]], a data set on the Hugging Face Hub or in a local folder (extra hf)",
    )  # fmt: skip
    command.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder of the shards; new, or its own")
    command.add_argument(
        "--tokenizer", default="bpe", metavar="NAME",
        help="bpe (default; trained on the text's first two million characters), bytes, gpt2, or the path of a "
        "tokenizer.json, of a vocab.json with merges.txt beside it, or of a folder with either",
    )  # fmt: skip
    command.add_argument(
        "--vocab", type=whole, metavar="N", help="ids of bpe (default 50257); another tokenizer with more is refused"
    )
    command.add_argument("--limit", type=size_in_bytes, metavar="BYTES", help="bytes of text (default all)")
    command.add_argument(
        "--shard-tokens", type=whole, default=SHARD_TOKENS, metavar="N",
        help=f"tokens of a shard, at least (default {SHARD_TOKENS}), which is what a kill can cost; one may have more, "
        "as some millions of characters are tokenised at a time",
    )  # fmt: skip
    command.add_argument("--json", action="store_true", help="print the manifest")
    command.set_defaults(run=_run)
    return command


def size_in_bytes(text: str) -> int:
    """A positive number of bytes for argparse; texts are larger than other counts."""
    if not text.isdecimal() or not 1 <= int(text) < 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of bytes; write for example 1000000")
    return int(text)


def _stop() -> NoReturn:
    raise KeyboardInterrupt


def _run(arguments: argparse.Namespace) -> int:
    try:
        with stop_signals(_stop):  # at once: a shard is written whole or not at all
            manifest = _tokenised(arguments)
    except KeyboardInterrupt:
        shards, tokens = kept(arguments.out)
        saved = f"saved {counted(shards, 'shard')}, {counted(tokens, 'token')}, in {arguments.out}"
        raise KeyboardInterrupt(f"stopped and {saved}" if shards else "stopped before the first shard") from None
    if (window := longest_window(manifest)) < (usual := preset("tiny").context):
        heldout = manifest["tokens"] - manifest["train_tokens"]
        fits = f"train with --seq-len {window} at most, or" if window > 0 else "it can be read and not trained on;"
        print(
            f"note: {counted(heldout, 'token is', 'tokens are')} held out, and a preset's windows have {usual} and "
            f"more: {fits} tokenise a longer text",
            file=sys.stderr,
        )
    if arguments.json:
        print(json.dumps(manifest, indent=2))
        return 0
    end = manifest["tokenizer"]["end_of_document"]
    print(
        f"{manifest['description']}: {counted(manifest['tokens'], 'token')} in "
        f"{counted(len(manifest['shards']), 'shard')} "
        f"({manifest['dtype'].replace('<u2', 'uint16').replace('<u4', 'uint32')}), "
        f"{manifest['tokens'] - manifest['train_tokens']} held out\n"
        f"tokenizer: {manifest['tokenizer']['vocab_size']} ids; a document ends with {end['token']} ({end['id']})\n"
        f"train with --data {arguments.out}"
    )
    return 0


def _tokenised(arguments: argparse.Namespace) -> dict[str, Any]:
    # Not drawn at once: what is refused stays one line.
    with tqdm(total=arguments.limit, desc="text", unit="B", unit_scale=True, delay=0.1) as bar:

        def on_group(size: int, tokens: int) -> None:
            if bar.n == 0:
                bar.initial = size  # the rate is of this process's text
            bar.set_postfix_str(f"{tokens / 1e6:.1f} M tokens", refresh=False)
            bar.update(size - bar.n)

        manifest = tokenise(
            arguments.text, arguments.out, tokenizer=arguments.tokenizer, vocab_size=arguments.vocab,
            limit=arguments.limit, shard_tokens=arguments.shard_tokens, on_group=on_group,
        )  # fmt: skip
        bar.update(manifest["bytes"] - bar.n)
    return manifest
