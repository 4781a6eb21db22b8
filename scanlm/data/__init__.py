"""Text in, token files out: corpora, tokenizers, memory-mapped tokens, training blocks.

`prepare` is the whole pipeline: a corpus is named or found (`corpora`), optionally
cut into other splits (`slices`) and tokenised once into files that later runs map into memory
(`token_files`); training reads them as `Blocks`.
"""

from scanlm.data.blocks import Blocks, unigram_entropy
from scanlm.data.corpora import NAMES, Corpus, experiment_name, load_corpus
from scanlm.data.token_files import TokenizedCorpus, TokenSplit, default_tokenizer, prepare
from scanlm.data.tokenizers import load_tokenizer, tokenizer_hash

__all__ = [
    "NAMES",
    "Blocks",
    "Corpus",
    "TokenSplit",
    "TokenizedCorpus",
    "default_tokenizer",
    "experiment_name",
    "load_corpus",
    "load_tokenizer",
    "prepare",
    "tokenizer_hash",
    "unigram_entropy",
]
