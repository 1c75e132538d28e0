"""What serves ALBEF on the encoders of its children: SIMLA, BLIP, GRIT-VLP and FashionSAP.

Most need the hosts; the same functions are tested on stand-ins in the tests of ALBEF.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import syncmask_kernels as smk
from syncmask_kernels.integrations.bert_attention import capture_attention
from syncmask_kernels.integrations.masked_image import masked_image
from syncmask_kernels.integrations.mlm import masked_lm_loss
from tests.accuracy import assert_as_accurate
from tests.hosts import children
from tests.hosts.albef import CLS, PAD, SEP, Size, bert_config, make_batch

SIZE, PAIRS, WORDS = Size(width=32, image=32), 6, 10
SMOOTHING = 0.1  # written in BLIP's code


class Host:
    """A module of encoders at a small size, and a batch of captions and encoded images."""

    def __init__(self, module: Any, config_file: Any, **given: Any) -> None:
        config = module.BertConfig.from_json_file(config_file)
        for name, value in given.items():
            setattr(config, name, value)
        torch.manual_seed(0)
        self.module, self.config = module, config
        text = make_batch(SIZE, PAIRS, WORDS, torch.Generator().manual_seed(1)).text
        self.ids, self.attended = text.input_ids, text.attention_mask
        self.image = torch.randn(PAIRS, 5, SIZE.width)

    def call(self, model: nn.Module, **given: Any) -> Any:
        return model(
            self.ids,
            attention_mask=self.attended,
            encoder_hidden_states=self.image,
            return_dict=True,
            **given,
        )


@pytest.fixture(params=[children.SIMLA, children.BLIP], ids=["SIMLA", "BLIP"])
def med(request, tmp_path) -> Host:
    module = children.real_med(request.param)
    return Host(module, bert_config(tmp_path, SIZE), add_cross_attention=True)


@pytest.fixture(params=[children.GRIT, children.FASHIONSAP], ids=["GRIT-VLP", "FashionSAP"])
def xbert(request, tmp_path) -> Host:
    return Host(children.real_xbert(request.param), bert_config(tmp_path, SIZE))


@pytest.fixture(params=["SIMLA's med", "SIMLA's xbert", "GRIT-VLP's xbert"])
def over_words(request, tmp_path) -> Host:
    """Encoders whose distillation is normalised over the wrong axis."""
    host = children.GRIT if "GRIT" in request.param else children.SIMLA
    load = children.real_med if "med" in request.param else children.real_xbert
    return Host(load(host), bert_config(tmp_path, SIZE), add_cross_attention=True)


def layers_of(bert: nn.Module) -> list[nn.Module]:
    stack = bert.encoder.layer
    return [layer.crossattention.self for layer in stack if hasattr(layer, "crossattention")]


def check_maps(host: Host) -> None:
    bert = host.module.BertModel(host.config, add_pooling_layer=False)
    modules = layers_of(bert)
    valid = smk.token_valid(host.ids, [PAD, CLS, SEP])
    maps = []
    for dtype in (torch.float32, torch.float64):
        bert, host.image = bert.to(dtype), host.image.to(dtype)
        for module in modules:
            module.save_attention = True
        with capture_attention(modules) as captured:
            host.call(bert)
        maps.append(captured.map())
        own = smk.head_average([module.get_attention_map() for module in modules])
        maps.append(own)
        assert torch.equal(
            captured.sync_masks(valid, patch_k=2).patch_mask,
            smk.sync_topk_mask(
                [m.get_attention_map() for m in modules], valid, patch_k=2
            ).patch_mask,
        )
    assert_as_accurate(maps[0], maps[1].detach(), maps[3].detach())
    # The teacher: without gradients the host's own way of keeping maps fails.
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="register a hook"):
            host.call(bert)
        for module in modules:
            module.save_attention = False
        with capture_attention(modules[-1:], stop=True) as captured:
            host.call(bert)
        assert captured.map().shape == (PAIRS, WORDS, 4)


def test_maps_are_those_the_encoder_saves(med: Host) -> None:
    check_maps(med)


def test_maps_are_those_the_two_part_encoder_saves(xbert: Host) -> None:
    check_maps(xbert)


def masked_labels(host: Host) -> Tensor:
    chosen = (torch.rand(host.ids.shape) < 0.3) & (host.ids != PAD)
    chosen[0, 1] = True
    return host.ids.masked_fill(~chosen, -100)


def loss_and_grads(loss: Tensor, model: nn.Module) -> list[Tensor]:
    model.zero_grad()
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def test_the_masked_word_loss_is_that_of_the_encoder(xbert: Host) -> None:
    model = xbert.module.BertForMaskedLM(xbert.config).double()
    xbert.image, labels = xbert.image.double(), masked_labels(xbert)
    own = loss_and_grads(xbert.call(model, labels=labels).loss, model)
    hidden = xbert.call(model.bert).last_hidden_state
    got = loss_and_grads(masked_lm_loss(model.cls.predictions, hidden, labels), model)
    torch.testing.assert_close(got, own, rtol=1e-9, atol=1e-12)


def test_distillation_is_normalised_over_words_there_and_over_the_vocabulary_here(
    over_words: Host,
) -> None:
    host = over_words
    model = host.module.BertForMaskedLM(host.config).double()
    teacher = host.module.BertForMaskedLM(host.config).double()
    host.image, labels = host.image.double(), masked_labels(host)
    soft = host.call(teacher).logits.detach().softmax(dim=-1)
    theirs = host.call(model, labels=labels, soft_labels=soft, alpha=0.4).loss
    hidden = host.call(model.bert).last_hidden_state
    got = masked_lm_loss(
        model.cls.predictions,
        hidden,
        labels,
        teacher=(teacher.cls.predictions, host.call(teacher.bert).last_hidden_state),
        alpha=0.4,
    )
    logits, masked = model.cls(hidden), labels != -100
    hard = F.cross_entropy(logits[masked], labels[masked])
    of_words, of_vocabulary = (
        -(logits.log_softmax(dim=dim) * soft).sum(dim=-1)[masked].mean() for dim in (1, -1)
    )
    torch.testing.assert_close(theirs, 0.6 * hard + 0.4 * of_words)
    torch.testing.assert_close(got, 0.6 * hard + 0.4 * of_vocabulary)
    assert abs(got.item() - theirs.item()) > 0.1


def test_blips_captioning_loss_skips_padding(tmp_path) -> None:
    blip = Host(
        children.real_med(children.BLIP),
        bert_config(tmp_path, SIZE),
        add_cross_attention=True,
    )
    model = blip.module.BertLMHeadModel(blip.config).double()
    blip.image, labels = blip.image.double(), blip.ids.masked_fill(blip.ids == PAD, -100)
    own = loss_and_grads(blip.call(model, labels=labels).loss, model)
    hidden = blip.call(model.bert, is_decoder=True).last_hidden_state
    loss = masked_lm_loss(
        model.cls.predictions, hidden[:, :-1], labels[:, 1:], label_smoothing=SMOOTHING
    )
    torch.testing.assert_close(loss_and_grads(loss, model), own, rtol=1e-9, atol=1e-12)
    causal = model.bert.encoder.layer[0].attention.self
    with capture_attention([causal]), pytest.raises(ValueError, match="mask keys alone"):
        blip.call(model.bert, is_decoder=True)


def test_patches_that_text_relates_to_go_into_simlas_image_mask(tmp_path) -> None:
    simla = Host(
        children.real_med(children.SIMLA),
        bert_config(tmp_path, SIZE),
        add_cross_attention=True,
    )
    bert = simla.module.BertModel(simla.config, add_pooling_layer=False)
    images = children.real_masked_images(SIZE)
    pixels = torch.randn(PAIRS, 3, SIZE.image, SIZE.image)
    with torch.no_grad(), capture_attention(layers_of(bert)[-1:], stop=True) as captured:
        simla.image = images(pixels)
        simla.call(bert)
    chosen = captured.sync_masks(smk.token_valid(simla.ids, [PAD, CLS, SEP]), patch_k=1)
    masked = images(pixels, masked_visual_token_pos=chosen.patch_mask)
    hidden = F.interpolate(chosen.patch_mask.view(PAIRS, 1, 2, 2).float(), scale_factor=16)
    assert torch.equal(images(pixels + hidden, chosen.patch_mask), masked)
    assert not torch.equal(images(pixels + 1 - hidden, chosen.patch_mask), masked)


def test_simlas_pseudo_labels_are_the_words_with_votes() -> None:
    """By the row of the page, where all heads agree: four words for five places."""
    page = (Path(__file__).parents[1] / "docs/integrations/children.md").read_text()
    (row,) = re.findall(r"`(smk\.vote_keywords\(.+?)` gives", page)
    attention = {11: torch.tensor([0.0, 5, 4, 0, 3, 2, 0, 0]).expand(1, 3, 2, 8)}
    positions = eval(row, {"smk": smk, "t2i_self_attention": attention})
    ids = torch.arange(CLS, CLS + 8).unsqueeze(0)
    targets = torch.zeros(1, 200).scatter_(1, torch.gather(ids, 1, positions), 1)
    targets[:, CLS] = 0  # as the host does
    assert targets[0].nonzero().flatten().tolist() == [CLS + i for i in (1, 2, 4, 5)]


def test_masking_from_outside_is_what_simla_does_itself() -> None:
    torch.manual_seed(0)
    encoder = children.real_masked_images(SIZE)
    encoder.mask_token.data.normal_()
    pixels, mask = torch.randn(PAIRS, 3, SIZE.image, SIZE.image), torch.rand(PAIRS, 4) < 0.5
    own = loss_and_grads(encoder(pixels, mask).square().mean(), encoder)
    with masked_image(encoder, mask, encoder.mask_token[0, 0]):
        loss = encoder(pixels).square().mean()
    torch.testing.assert_close(loss_and_grads(loss, encoder), own)
    assert not torch.allclose(encoder(pixels), encoder(pixels, mask))


class PatchedImages(nn.Module):
    """A ViT as far as its first layers go."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Linear(5, 3)

    def forward(self, patches: Tensor) -> Tensor:
        return 2 * self.patch_embed(patches)


def test_masked_patches_are_the_token_and_its_gradient_their_sum() -> None:
    encoder, token = PatchedImages(), torch.randn(3, requires_grad=True)
    patches, mask = torch.randn(2, 4, 5), torch.rand(2, 4) < 0.5
    plain = encoder(patches)
    with masked_image(encoder, mask, token):
        masked = encoder(patches)
    assert torch.equal(masked, torch.where(mask.unsqueeze(2), 2 * token, plain))
    masked.sum().backward()
    assert torch.equal(token.grad, torch.full((3,), 2.0 * int(mask.sum())))
    assert torch.equal(encoder(patches), plain)


def test_an_encoder_without_patches_is_refused() -> None:
    nothing = masked_image(nn.Linear(1, 1), torch.ones(1, 1, dtype=torch.bool), torch.zeros(1))
    with pytest.raises(TypeError, match="a module patch_embed, got Linear"), nothing:
        pass
    encoder, three = PatchedImages(), torch.ones(2, 3, dtype=torch.bool)
    masked = masked_image(encoder, three, torch.zeros(3))
    with masked, pytest.raises(ValueError, match="patch_mask must be"):
        encoder(torch.randn(2, 4, 5))
    assert not encoder.patch_embed._forward_hooks
