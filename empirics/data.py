"""Text to tokens to batches: the public names of the data, none of which needs torch.

`texts` reads documents, `tokenizer` makes ids of them, `shards` keeps ids on disk, `corpus` splits them, `batches`
deals them out.
"""

from empirics.batches import ORDERS, Batch, Order, batch, heldout_batches, random_tokens, require_length
from empirics.corpus import TOKENS_FORMAT, Corpus, load_corpus
from empirics.shards import is_shards, tokenise
from empirics.texts import Documents, TextSource, load_text
from empirics.tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "ORDERS",
    "TOKENS_FORMAT",
    "Batch",
    "Corpus",
    "Documents",
    "Order",
    "TextSource",
    "Tokenizer",
    "batch",
    "heldout_batches",
    "is_shards",
    "load_corpus",
    "load_text",
    "load_tokenizer",
    "random_tokens",
    "require_length",
    "tokenise",
]
