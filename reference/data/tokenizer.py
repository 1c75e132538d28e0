"""A WordPiece tokenizer for a data set's captions."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def train_tokenizer(captions: Iterable[str], *, vocab_size: int = 8192) -> PreTrainedTokenizerFast:
    """Learn a lower-case WordPiece vocabulary, as BERT's, from captions.

    Deterministic. ``save_pretrained(folder)`` and ``PreTrainedTokenizerFast.from_pretrained``
    store and restore it.

    >>> tokenizer = train_tokenizer(["a red shirt", "a blue shirt"])
    >>> tokenizer.tokenize("A RED shirt")
    ['a', 'red', 'shirt']
    """
    core = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer(lowercase=True)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIAL_TOKENS), show_progress=False
    )
    core.train_from_iterator(captions, trainer)
    ends = [(token, core.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    core.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


def longest(tokenizer: PreTrainedTokenizerFast, captions: list[str]) -> int:
    """Tokens of the longest caption, special ones included."""
    return max(map(len, tokenizer(sorted(set(captions)))["input_ids"]))


def tokenize(
    tokenizer: PreTrainedTokenizerFast, captions: list[str], length: int
) -> tuple[Tensor, Tensor]:
    """Captions, cut or padded to `length` tokens, as (input_ids, word_ids), both int64 [N, length].

    ``word_ids`` numbers the words of each caption from 0; special tokens and padding have -1.
    """
    batch = tokenizer(captions, padding="max_length", truncation=True, max_length=length)
    words = [
        [-1 if word is None else word for word in batch.word_ids(i)] for i in range(len(captions))
    ]
    return torch.tensor(batch["input_ids"]), torch.tensor(words)
