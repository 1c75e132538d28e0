"""The SyncMask model, its masks and its losses."""

from __future__ import annotations

from typing import Any, get_args, get_type_hints

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.bert.modeling_bert import BertCrossAttention

import syncmask_kernels as smk
from reference.batch import Batch, crop_and_flip, make_batch, step_indices
from reference.config import MaskConfig, PretrainConfig
from reference.data import Data, load_data
from reference.masks import (
    choose_masks,
    image_effect,
    leave_one_out,
    random_masks,
    teacher_masks,
)
from reference.methods.parts import Sides, Similarities, choose_negatives, itc_loss, itm_loss
from reference.methods.syncmask import losses_of
from reference.model import ModelConfig, SyncMaskModel
from reference.model.fusion import Captured
from reference.step import Step

SIZES = {
    "image_size": 16, "patch_size": 4, "width": 24, "heads": 3, "image_layers": 2,
    "fusion_layers": 2, "projection": 8,
}  # fmt: skip
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data() -> Data:
    return load_data(items=12, image_size=16, patch_size=4)


@pytest.fixture
def batch(data: Data) -> Batch:
    return make_batch(data.train[torch.arange(10)], data.tokenizer, CPU)


@pytest.fixture
def model(data: Data) -> SyncMaskModel:
    torch.manual_seed(0)
    config = ModelConfig(**SIZES)
    model = SyncMaskModel(config, len(data.tokenizer), data.tokenizer.pad_token_id)
    for parameter in model.parameters():  # no zero biases or mask tokens: they hide mistakes
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model.eval()


def step_of(
    model: SyncMaskModel, batch: Batch, data: Data, index: int = 0, **options: Any
) -> Step[SyncMaskModel]:
    """A step whose teacher is the student itself."""
    config = PretrainConfig(**SIZES, **options)
    return Step(model, model, batch, index, data.tokenizer, config)


def encode(model: SyncMaskModel, batch: Batch) -> tuple[Tensor, Tensor]:
    return model.encode_image(batch.pixels), model.encode_text(batch.input_ids, batch.attended)


def test_batch_is_cut_to_its_longest_text(data: Data) -> None:
    rows = data.train.input_ids.ne(data.tokenizer.pad_token_id).sum(dim=1).argsort()[:3]
    batch = make_batch(data.train[rows], data.tokenizer, CPU)
    assert batch.attended[:, -1].any()
    assert batch.input_ids.shape[1] < data.train.input_ids.shape[1]
    assert torch.equal(batch.token_valid, batch.word_ids >= 0)
    assert batch.pixels.min() >= -1
    assert batch.pixels.max() <= 1
    assert torch.equal(((batch.pixels + 1) * 127.5).round().byte(), data.train[rows]["image"])


def test_every_epoch_is_another_permutation() -> None:
    epochs = [torch.cat([step_indices(13, 4, step, seed=5) for step in range(e, e + 3)])
              for e in (0, 3)]  # fmt: skip
    for epoch in epochs:
        assert len(epoch.unique()) == 12
    assert not torch.equal(*epochs)
    assert torch.equal(step_indices(13, 4, 4, seed=5), epochs[1][4:8])
    assert not torch.equal(step_indices(13, 4, 4, seed=6), epochs[1][4:8])


def test_the_whole_window_is_the_image_or_its_mirror_image() -> None:
    torch.manual_seed(0)
    pixels = torch.rand(32, 3, 8, 8)
    shown = crop_and_flip(pixels, smallest=1.0)
    same = torch.isclose(shown, pixels, atol=1e-5).flatten(1).all(dim=1)
    mirrored = torch.isclose(shown, pixels.flip(-1), atol=1e-5).flatten(1).all(dim=1)
    assert (same ^ mirrored).all()
    assert 0 < same.sum() < 32


def test_a_window_stays_inside_its_image() -> None:
    torch.manual_seed(0)
    ramp = torch.linspace(-1, 1, 16).expand(64, 3, 16, 16)
    shown = crop_and_flip(ramp, smallest=0.5)
    width = (shown[:, 0, 0, -1] - shown[:, 0, 0, 0]).abs()
    assert width.max() <= 2 + 1e-5
    assert width.min() >= 0.5 * 2 * 0.99
    assert width.max() - width.min() > 0.5


def test_fusion_reads_words_both_ways(model: SyncMaskModel, batch: Batch) -> None:
    image, text = encode(model, batch)
    changed = text.clone()
    changed[:, 3] += 1
    attended = torch.ones_like(batch.attended)
    for context in (image, None):
        before, after = (model.fuse(x, attended, context) for x in (text, changed))
        assert ((before - after).abs().amax(dim=-1) > 1e-4).all()


def test_padding_changes_nothing(model: SyncMaskModel, batch: Batch) -> None:
    image, text = encode(model, batch)
    fused = model.fuse(text, batch.attended, image)
    rebuilt = model.fuse_image(image, text, batch.attended)
    longer = batch._replace(
        input_ids=F.pad(batch.input_ids, (0, 2)), attended=F.pad(batch.attended, (0, 2))
    )
    text2 = model.encode_text(longer.input_ids, longer.attended)
    fused2 = model.fuse(text2, longer.attended, image)
    keep = batch.attended
    torch.testing.assert_close(fused2[:, :-2][keep], fused[keep])
    torch.testing.assert_close(model.fuse_image(image, text2, longer.attended), rebuilt)


def test_captured_queries_and_keys_are_those_of_the_attention(
    model: SyncMaskModel, batch: Batch
) -> None:
    image, text = encode(model, batch)
    captured = Captured.nothing()
    fused = model.fuse(text, batch.attended, image, captured)
    maps: list[Tensor] = []
    for module in model.fusion.modules():
        if isinstance(module, BertCrossAttention):
            module.register_forward_hook(lambda *call: maps.append(call[2][1]))
    model.fusion.set_attn_implementation("eager")
    torch.testing.assert_close(_eager(model, text, batch, image), fused)
    assert len(captured.cross_attention) == len(captured.self_attention) == len(maps) == 2
    for (query, key, value), probabilities in zip(captured.cross_attention, maps, strict=True):
        expected = probabilities[..., 1:].mean(dim=1)
        torch.testing.assert_close(smk.attention_map(query, key), expected)
        assert value.shape == key.shape


def _eager(model: SyncMaskModel, text: Tensor, batch: Batch, image: Tensor) -> Tensor:
    """Transformers' own attention adds its mask instead of taking a bool."""
    mask = torch.zeros(batch.attended.shape).masked_fill(~batch.attended, float("-inf"))
    return model.fusion.encoder(
        text, attention_mask=mask[:, None, None], encoder_hidden_states=image
    ).last_hidden_state


def test_masked_patches_are_hidden(model: SyncMaskModel, batch: Batch) -> None:
    patch_mask = torch.zeros(len(batch.pixels), 16, dtype=torch.bool)
    patch_mask[:, 5] = True  # second row, second column of 4 x 4 patches
    hidden = model.encode_image(batch.pixels, patch_mask)
    repainted = batch.pixels.clone()
    repainted[:, :, 4:8, 4:8] = 0.123
    assert torch.equal(model.encode_image(repainted, patch_mask), hidden)
    repainted[:, :, 4:8, 8:12] = 0.123
    assert not torch.equal(model.encode_image(repainted, patch_mask), hidden)
    nothing = model.encode_image(batch.pixels, torch.zeros_like(patch_mask))
    torch.testing.assert_close(nothing, model.encode_image(batch.pixels))
    torch.testing.assert_close(
        nothing, model.image_encoder(batch.pixels).last_hidden_state, msg="ViTModel differs"
    )


WORD_SCORES = get_args(get_type_hints(MaskConfig)["word_score"])


@pytest.mark.parametrize("word_score", WORD_SCORES)
@pytest.mark.parametrize("patch_score", ["cls", "cls_value", "mean", "value"])
def test_masks_are_whole_words_of_the_ratio(
    model: SyncMaskModel, batch: Batch, word_score: str, patch_score: str
) -> None:
    config = MaskConfig(word_score=word_score, patch_score=patch_score, token_ratio=0.3)
    image, text = encode(model, batch)
    masks = teacher_masks(model, batch, image, text, config)
    assert masks.patch_mask.sum(dim=1).tolist() == [6] * len(batch.pixels)
    assert not (masks.token_mask & ~batch.token_valid).any()
    for mask, words in zip(masks.token_mask, batch.word_ids, strict=True):
        chosen = words[mask].unique()
        assert torch.equal(mask, torch.isin(words, chosen))
        assert len(chosen) == -(-len(words[words >= 0].unique()) * 3 // 10)
    assert torch.equal(
        teacher_masks(model, batch, image, text, config).token_mask, masks.token_mask
    )
    at_random = random_masks(batch, 16, config)
    assert torch.equal(at_random.patch_mask.sum(dim=1), masks.patch_mask.sum(dim=1))
    assert masks.token_scores[batch.token_valid].std() > 0
    assert masks.patch_scores.std() > 0


@pytest.mark.parametrize("word_score", WORD_SCORES)
def test_rules_score_alike_in_bfloat16(model: SyncMaskModel, batch: Batch, word_score: str) -> None:
    config = MaskConfig(word_score=word_score)
    wanted = teacher_masks(model, batch, *encode(model, batch), config).token_scores
    with torch.autocast("cpu", torch.bfloat16):
        got = teacher_masks(model, batch, *encode(model, batch), config).token_scores
    assert got.dtype == torch.float32
    error = (got - wanted)[batch.token_valid].abs().mean()
    assert error < wanted[batch.token_valid].std() / 8


def test_a_batch_without_words_masks_none(model: SyncMaskModel, batch: Batch) -> None:
    wordless = batch._replace(token_valid=torch.zeros_like(batch.token_valid))
    for word_score in WORD_SCORES:
        config = MaskConfig(word_score=word_score)
        masks = teacher_masks(model, wordless, *encode(model, batch), config)
        assert not masks.token_mask.any()
        assert masks.patch_mask.any()


def test_rules_score_differently(model: SyncMaskModel, batch: Batch) -> None:
    image, text = encode(model, batch)

    def scores(**rules: str) -> smk.SyncMask:
        return teacher_masks(model, batch, image, text, MaskConfig(**rules))

    words = [scores(word_score=rule).token_scores for rule in WORD_SCORES]
    patches = [
        scores(patch_score=rule).patch_scores for rule in ("cls", "cls_value", "mean", "value")
    ]
    layers = [
        teacher_masks(model, batch, image, text, MaskConfig(mask_layer=layer)).patch_scores
        for layer in (0, 1)
    ]
    for some in (words, patches, layers):
        for i, one in enumerate(some):
            for other in some[:i]:
                assert not torch.allclose(one, other)


def test_noise_varies_the_choice_not_the_scores(model: SyncMaskModel, batch: Batch) -> None:
    image, text = encode(model, batch)
    quiet = teacher_masks(model, batch, image, text, MaskConfig())
    noisy = [teacher_masks(model, batch, image, text, MaskConfig(), 1.0) for _ in range(2)]
    assert torch.equal(noisy[0].token_scores, quiet.token_scores)
    assert torch.equal(noisy[0].patch_scores, quiet.patch_scores)
    for side in ("token_mask", "patch_mask"):
        first, second = (getattr(masks, side) for masks in noisy)
        assert not torch.equal(first, second)
        assert torch.equal(first.sum(dim=1), getattr(quiet, side).sum(dim=1))
    barely = teacher_masks(model, batch, image, text, MaskConfig(), 1e-6)
    assert (barely.patch_mask == quiet.patch_mask).all()


def test_image_effect_is_zero_where_images_do_not_differ(
    model: SyncMaskModel, batch: Batch
) -> None:
    def effect(batch: Batch) -> Tensor:
        image, text = encode(model, batch)
        fused = model.fuse(text, batch.attended, image)
        return image_effect(model, image.mean(dim=0, keepdim=True), text, batch.attended, fused)

    assert (effect(batch) > 1e-5).all()
    same = batch._replace(pixels=batch.pixels[:1].expand_as(batch.pixels))
    assert effect(same).abs().max() < 1e-5


def test_leave_one_out_is_what_a_word_adds_to_the_similarity(
    model: SyncMaskModel, batch: Batch
) -> None:
    def similarity(row: int, attended: Tensor) -> Tensor:
        text = model.encode_text(batch.input_ids[row : row + 1], attended.unsqueeze(0))
        image = model.encode_image(batch.pixels[row : row + 1])
        return (model.text_features(text) * model.image_features(image)).sum()

    # Two words of every caption become one.
    words = torch.where(batch.word_ids == 1, 0, batch.word_ids)
    scores = leave_one_out(model, batch._replace(word_ids=words), *encode(model, batch))
    assert scores.isfinite().all()
    for row, attended in enumerate(batch.attended):
        for word in words[row][words[row] >= 0].unique():
            pieces = words[row] == word
            less = similarity(row, attended) - similarity(row, attended & ~pieces)
            torch.testing.assert_close(
                scores[row, pieces], less.expand(int(pieces.sum())), rtol=1e-4, atol=1e-5
            )


def test_first_steps_mask_at_random(model: SyncMaskModel, batch: Batch, data: Data) -> None:
    def chosen(index: int, **options: Any) -> list[Tensor]:
        options |= {"random_mask_steps": 3, "mask_noise": 0.0}
        steps = (step_of(model, batch, data, index, **options) for _ in range(2))
        return [choose_masks(step).patch_mask for step in steps]

    assert not torch.equal(*chosen(2))
    assert torch.equal(*chosen(3))
    assert not torch.equal(*chosen(3, masks="random"))


def test_itc_treats_all_pairs_of_an_item_as_positives() -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, 4, dtype=torch.float64)
    items = torch.tensor([7, 3, 7, 5])
    image_to_text, text_to_image = (x.log_softmax(dim=1) for x in (logits, logits.T))
    expected = sum(
        -(x[0, [0, 2]].mean() + x[2, [0, 2]].mean() + x[1, 1] + x[3, 3]) / 4
        for x in (image_to_text, text_to_image)
    )
    loss = itc_loss(logits, items, items) + itc_loss(logits.T, items, items)
    torch.testing.assert_close(loss, expected)
    some = (image_to_text[1, 1] + image_to_text[2, [0, 2]].mean()) / -2
    torch.testing.assert_close(itc_loss(logits[1:3], items[1:3], items), some)


@pytest.mark.parametrize("mode", ["semi_hard", "multinomial", "hardest"])
def test_itm_never_takes_the_same_item_for_a_negative(
    model: SyncMaskModel, batch: Batch, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, text = encode(model, batch)
    labels: list[Tensor] = []
    cross_entropy = F.cross_entropy

    def spy(logits: Tensor, target: Tensor, **options: int) -> Tensor:
        labels.append(target)
        return cross_entropy(logits, target, **options)

    monkeypatch.setattr(F, "cross_entropy", spy)
    config = PretrainConfig(**SIZES, negatives=mode)
    similarity = 5 * torch.rand(10, 10)
    own = torch.arange(10)
    similarities = Similarities(similarity, similarity.T, batch.item_ids, own)
    texts, images = choose_negatives(similarities, batch.item_ids, config)
    for wrong in (texts, images):
        assert (batch.item_ids[wrong.ids] != batch.item_ids).all()
    sides = Sides(text, batch.attended, image)
    itm_loss(model.itm_head, model.fuse, sides, texts, images, 10)
    assert labels[-1].tolist() == [1] * 10 + [0] * 20
    one_item = torch.zeros_like(batch.item_ids)
    none = choose_negatives(similarities._replace(item_ids=one_item), one_item, config)
    assert itm_loss(model.itm_head, model.fuse, sides, *none, 10).isfinite()
    assert labels[-1].tolist() == [1] * 10 + [-1] * 20


def test_semi_hard_negatives_are_less_similar_than_the_pair() -> None:
    similarity = torch.tensor([[5.0, 1.0, 2.0, 9.0, 3.0]]).repeat(5, 1)
    similarity.fill_diagonal_(5.0)
    config = PretrainConfig(**SIZES, negative_quantile=0.75)
    own = torch.arange(5)
    similarities = Similarities(similarity, similarity, own, own)
    texts, _images = choose_negatives(similarities, own, config)
    assert texts.ids[0] == 4  # of 1, 2, 3 the one of rank ceil(0.75 * 3) = 3
    config = PretrainConfig(**SIZES, negative_quantile=0.5)
    texts, _images = choose_negatives(similarities, own, config)
    assert texts.ids[0] == 2


def test_mlm_learns_from_masked_words_only(model: SyncMaskModel, batch: Batch, data: Data) -> None:
    image, _text = encode(model, batch)
    masks = random_masks(batch, 16, MaskConfig())
    torch.manual_seed(0)
    masked_ids, _labels = smk.mask_tokens(
        batch.input_ids,
        masks.token_mask,
        mask_id=data.tokenizer.mask_token_id,
        vocab_size=len(data.tokenizer),
        special_ids=data.tokenizer.all_special_ids,
    )
    fused = model.fuse(model.encode_text(masked_ids, batch.attended), batch.attended, image)
    logits = model.word_transform(fused) @ model.word_embeddings.T + model.word_bias
    expected = F.cross_entropy(logits[masks.token_mask], batch.input_ids[masks.token_mask])
    torch.manual_seed(0)
    loss = losses_of(step_of(model, batch, data), masks)["mlm"]
    torch.testing.assert_close(loss, expected)


def test_mim_rebuilds_masked_pixels_only(model: SyncMaskModel, batch: Batch, data: Data) -> None:
    _image, text = encode(model, batch)
    masks = random_masks(batch, 16, MaskConfig())
    fused = model.fuse_image(
        model.encode_image(batch.pixels, masks.patch_mask), text, batch.attended
    )
    pixels = batch.pixels.reshape(10, 3, 4, 4, 4, 4).permute(0, 2, 4, 3, 5, 1).reshape(10, 16, 48)
    difference = (model.mim_head(fused[:, 1:]) - pixels).abs().mean(dim=-1)
    loss = losses_of(step_of(model, batch, data), masks)["mim"]
    torch.testing.assert_close(loss, difference[masks.patch_mask].mean())


def test_losses_reach_every_parameter(model: SyncMaskModel, batch: Batch, data: Data) -> None:
    masks = random_masks(batch, 16, MaskConfig())
    losses = losses_of(step_of(model, batch, data), masks)
    assert list(losses) == ["itc", "itm", "mlm", "mim"]
    torch.stack(list(losses.values())).sum().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None]
    assert without == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 100, "heads": 3}, "width must be a multiple of heads 3, got 100"),
        ({"patch_size": 7}, "image_size must be a multiple of patch_size 7, got 64"),
        ({"fusion_layers": 0}, "fusion_layers must be at least 1, got 0"),
        ({"mask_layer": 2}, r"mask_layer must lie in \[-2, 2\), got 2"),
        ({"token_ratio": 0.0}, r"token_ratio must lie in \(0, 1\), got 0.0"),
        ({"batch_size": 1}, "batch_size must be at least 2"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\), got 1.0"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PretrainConfig(**options)
