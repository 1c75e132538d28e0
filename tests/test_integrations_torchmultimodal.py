"""`integrations.torchmultimodal` in a stand-in, and in the host where there is a clone of it."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import syncmask_kernels as smk
from syncmask_kernels.integrations import torchmultimodal as adapter
from syncmask_kernels.negatives import Negatives
from tests.accuracy import assert_as_accurate
from tests.hosts.attributes import all_of, same
from tests.hosts.torchmultimodal import (
    Batch,
    Draws,
    Size,
    build,
    drawing,
    make_batch,
    make_draws,
    real_host,
    standin_host,
)
from tests.hosts.torchmultimodal_standin import TextOutput

SIZE = Size()
PAIRS, WORDS = 6, 7


@pytest.fixture(params=[standin_host, real_host], ids=["stand-in", "real"])
def host(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    return request.param()


def batch_of(seed: int = 0, pairs: int = PAIRS) -> Batch:
    return make_batch(SIZE, pairs, WORDS, torch.Generator().manual_seed(seed))


def handed(draws: Draws) -> adapter.HardNegatives:
    texts, images = (
        Negatives(ids, torch.ones_like(ids, dtype=torch.bool))
        for ids in (draws.texts, draws.images)
    )
    return adapter.HardNegatives(texts, images)


def wide(batch: Batch) -> Batch:
    return batch._replace(image=batch.image.double())


def flat(tensors: Iterable[Tensor | None]) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors if t is not None])


def test_fifty_steps_are_those_of_the_host(host: Any) -> None:
    """With its draws: losses, gradients, both models, and queues, within rounding."""
    ours = build(host, SIZE)
    plain, exact = copy.deepcopy(ours), copy.deepcopy(ours).double()
    adapter.patch(ours)
    models, losses = (ours, plain, exact), []
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.02, momentum=0.9) for m in models]
    for step in range(50):
        batch, alpha = batch_of(seed=step % 4), 0.4 * step / 50
        draws = make_draws(PAIRS, torch.Generator().manual_seed(step))
        found = [ours._train_forward(*batch, alpha, negatives=handed(draws))]
        for model, given in ((plain, batch), (exact, wide(batch))):
            with drawing(draws):
                found.append(model(*given, alpha))
        for loss, optimizer in zip(found, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append([loss.detach() for loss in found])
    curves = [torch.stack(curve) for curve in zip(*losses, strict=True)]
    assert curves[2][-4:].mean() < curves[2][:4].mean()
    assert_as_accurate(*curves)
    assert_as_accurate(*(flat(m.parameters()) for m in models))
    assert_as_accurate(*(flat(p.grad for p in m.parameters()) for m in models))
    for name, queue in ours.named_buffers():
        others = [m.get_buffer(name) for m in models[1:]]
        if queue.is_floating_point():
            assert_as_accurate(queue, *others)
        else:
            assert torch.equal(queue, others[0])


class Lookup(nn.Module):
    """A text encoder whose features are one-hot, like those of images handed over as features."""

    def forward(self, text: Tensor, text_atts: Tensor) -> TextOutput:
        return TextOutput(nn.functional.one_hot(text, SIZE.width).float())


def test_the_crash_of_confident_similarities_is_gone(host: Any) -> None:
    """Each pair is alike and all others are not: their probabilities underflow to 0."""
    size = SIZE._replace(embed=SIZE.width)
    model = build(host, size, nn.Identity(), Lookup())
    similarity = model.model_with_similarity
    with torch.no_grad():
        similarity.temp.fill_(0.005)
        for name in ("vision_proj", "text_proj", "vision_proj_m", "text_proj_m"):
            nn.init.eye_(getattr(similarity, name).weight)
            nn.init.zeros_(getattr(similarity, name).bias)
    text = torch.arange(PAIRS).unsqueeze(1).expand(PAIRS, WORDS)
    batch = Batch(
        Lookup()(text, text).last_hidden_state, text, torch.ones_like(text), torch.arange(PAIRS)
    )
    with pytest.raises(RuntimeError, match="invalid multinomial distribution"):
        model(*batch, 0.4)
    adapter.patch(model)
    loss = model(*batch, 0.4)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_a_pair_alone_has_no_negative(host: Any) -> None:
    model = build(host, SIZE)
    adapter.patch(model)
    assert model(*batch_of(pairs=1), 0.4).isfinite()
    assert int(model.model_with_similarity.queue_ptr) == 1


def test_the_queue_need_not_be_a_multiple_of_the_batch(host: Any) -> None:
    model = build(host, SIZE)
    adapter.patch(model)
    for _ in range(5):
        model(*batch_of(), 0.4)
    for _ in range(2):
        model(*batch_of(pairs=5), 0.4)
    assert int(model.model_with_similarity.queue_ptr) == (5 * PAIRS + 2 * 5) % SIZE.queue


def test_other_captions_of_an_item_can_be_left_out(host: Any) -> None:
    model = build(host, SIZE)
    adapter.patch(model, same_item=False)
    batch = batch_of()._replace(idx=torch.tensor([0, 0, 0, 0, 1, 1]))
    wrong: list[adapter.HardNegatives] = []
    original = adapter.matching_loss

    def seeing(*given: Any) -> Tensor:
        wrong.append(given[-1])
        return original(*given)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(adapter, "matching_loss", seeing)
        model(*batch, 0.4)
    for negatives in wrong[0]:
        assert negatives.found.all()
        assert (batch.idx[negatives.ids] != batch.idx).all()


def test_what_was_not_found_is_not_counted(host: Any) -> None:
    model, batch = build(host, SIZE), batch_of()
    student = adapter.encode(model.model_with_similarity, *batch[:3])

    def loss(image_id: int, text_id: int) -> Tensor:
        texts, images = handed(make_draws(PAIRS, torch.Generator().manual_seed(0)))
        images.ids[0], texts.ids[0], images.found[0] = image_id, text_id, False
        given = adapter.HardNegatives(texts, images)
        return adapter.matching_loss(model, student, batch.text_atts, given)

    assert loss(1, 3) == loss(2, 3)
    assert loss(1, 3) != loss(1, 4)


def test_patch_and_unpatch_leave_the_model_as_it_was(host: Any) -> None:
    model = build(host, SIZE)
    before, keys = all_of(model), list(model.state_dict())
    patched = adapter.patch(model)
    assert list(model.state_dict()) == keys
    assert "_train_forward  EMA in place" in str(patched)
    with pytest.raises(ValueError, match="patched already"):
        adapter.patch(model)
    model(*batch_of(), 0.4).backward()
    model.zero_grad()
    patched.unpatch()
    assert same(before, all_of(model))


def test_a_copy_is_patched_itself_and_checkpoints_go_either_way(host: Any) -> None:
    plain = build(host, SIZE)
    ours = copy.deepcopy(plain)
    adapter.patch(ours)
    other = copy.deepcopy(ours)
    other(*batch_of(), 0.4)
    assert int(ours.model_with_similarity.queue_ptr) == 0
    plain.load_state_dict(other.state_dict())
    ours.load_state_dict(plain.state_dict())


def test_refuses_what_it_does_not_know(host: Any) -> None:
    model = build(host, SIZE)
    for part, message in (
        (model.model_with_similarity, "model_with_similarity"),
        (model, "lacks the modules itm_head"),
    ):
        if part is model:
            del model.itm_head
        with pytest.raises(TypeError, match=message):
            adapter.patch(part)
    model = build(host, SIZE)
    model.itc_loss = nn.Identity()
    with pytest.raises(TypeError, match="ImageTextContrastiveLoss"):
        adapter.patch(model)
    del model.model_with_similarity.temp
    with pytest.raises(TypeError, match=r"lacks model_with_similarity\.temp"):
        adapter.patch(model)
    with pytest.raises(TypeError, match="Module, got str"):
        adapter.patch("albef")
    with pytest.raises(ValueError, match="negatives must be one of"):
        adapter.patch(build(host, SIZE), negatives="hard")
    with pytest.raises(TypeError, match=r"no layer\[i\]"), adapter.capture_attention(model):
        pass
    encoder = model.model_with_similarity.albef_model.multimodal_encoder
    with (
        pytest.raises(ValueError, match="layers must be in"),
        adapter.capture_attention(encoder, [2]),
    ):
        pass


def test_attention_of_the_teacher_is_that_of_the_host(host: Any) -> None:
    model = build(host, SIZE).model_with_similarity
    batch = batch_of()
    teacher = adapter.encode(model, *batch[:3], momentum=True)
    seen = []
    attention = model.albef_model.multimodal_encoder_m.layer[1].cross_attention
    attention.attn.register_forward_hook(lambda _m, _i, out: seen.append(out[1]))
    projected = {}
    for name in ("query", "key", "value"):
        getattr(attention, name).register_forward_hook(
            lambda _m, _i, out, name=name: projected.update(
                {name: out.detach().unflatten(-1, (SIZE.heads, -1)).transpose(1, 2)}
            )
        )
    captured = adapter.teacher_attention(model, teacher, batch.text_atts, [1])
    wanted = seen[0].mean(dim=1)[..., 1:]
    torch.testing.assert_close(captured.map(), wanted, rtol=1e-5, atol=1e-7)
    valid = batch.text_atts.bool()
    q, k, v = projected.values()
    for weights in (None, v):
        got = captured.sync_masks(valid, token_ratio=0.5, weigh_by_value=weights is not None)
        expected = smk.sync_topk_mask_qk(q, k, valid, v=weights, token_ratio=0.5)
        torch.testing.assert_close(got._asdict(), expected._asdict())


def test_attention_heeds_a_mask_of_keys(host: Any) -> None:
    encoder = build(host, SIZE).model_with_similarity.albef_model.multimodal_encoder
    words, patches = torch.randn(2, 3, SIZE.width), torch.randn(2, 5, SIZE.width)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    with adapter.capture_attention(encoder, [0]) as captured:
        encoder(words, torch.ones(2, 3), patches, mask)
    assert (captured.map()[0, :, 2:] == 0).all()
    assert (captured.map()[1] > 0).all()
