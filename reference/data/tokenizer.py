"""A WordPiece tokenizer for a data set's captions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")

_CHUNK = 10_000


def train_tokenizer(captions: Sequence[str], *, vocab_size: int = 8192) -> PreTrainedTokenizerFast:
    """Learn a lower-case WordPiece vocabulary, as BERT's, from captions.

    Deterministic. ``save_pretrained(folder)`` and ``PreTrainedTokenizerFast.from_pretrained``
    store and restore it.

    >>> tokenizer = train_tokenizer(["a red shirt", "a blue shirt"])
    >>> tokenizer.tokenize("A RED shirt")
    ['a', 'red', 'shirt']
    """
    core = _bert_style(models.WordPiece(unk_token="[UNK]"))
    # The library numbers continuations (##a) in the order of a randomly seeded hash map, and these
    # numbers break ties between merges. Naming them in advance makes the vocabulary reproducible.
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=[*SPECIAL_TOKENS, *_continuations(core, captions)],
        show_progress=False,
    )
    core.train_from_iterator(captions, trainer)
    core = _bert_style(models.WordPiece(core.get_vocab(), unk_token="[UNK]"))
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


def _bert_style(model: models.WordPiece) -> Tokenizer:
    core = Tokenizer(model)
    core.normalizer = normalizers.BertNormalizer(lowercase=True)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    return core


def _continuations(core: Tokenizer, captions: Sequence[str]) -> list[str]:
    """The one-letter pieces that go on with a word, sorted."""
    texts = (core.normalizer.normalize_str(caption) for caption in captions)
    words = {word for text in texts for word, _ in core.pre_tokenizer.pre_tokenize_str(text)}
    return [f"##{letter}" for letter in sorted({letter for word in words for letter in word[1:]})]


def longest(tokenizer: PreTrainedTokenizerFast, captions: Sequence[str]) -> int:
    """Tokens of the longest caption, special ones included."""
    return max(map(len, tokenizer(sorted(set(captions)))["input_ids"]))


def tokenize(
    tokenizer: PreTrainedTokenizerFast, captions: Sequence[str], length: int
) -> tuple[Tensor, Tensor]:
    """Captions, cut or padded to `length` tokens, as (input_ids, word_ids), both int64 [N, length].

    ``word_ids`` numbers the words of each caption from 0; special tokens and padding have -1.
    """
    parts = [
        _tokenize(tokenizer, list(captions[start : start + _CHUNK]), length)
        for start in range(0, len(captions), _CHUNK)
    ]
    ids, words = zip(*parts, strict=True)
    return torch.cat(ids), torch.cat(words)


def _tokenize(
    tokenizer: PreTrainedTokenizerFast, captions: list[str], length: int
) -> tuple[Tensor, Tensor]:
    batch = tokenizer(captions, padding="max_length", truncation=True, max_length=length)
    words = [
        [-1 if word is None else word for word in batch.word_ids(i)] for i in range(len(captions))
    ]
    return torch.tensor(batch["input_ids"]), torch.tensor(words)
