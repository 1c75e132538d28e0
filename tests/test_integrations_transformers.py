"""`integrations.transformers` inside the models of the installed `transformers`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import syncmask_kernels as smk
from tests.accuracy import assert_as_accurate
from tests.hosts.attributes import all_of, same

pytest.importorskip("transformers", minversion="5")

from transformers import (
    BertConfig,
    BertForMaskedLM,
    GitConfig,
    GitModel,
    LxmertConfig,
    T5Config,
    T5Model,
    ViTConfig,
    ViTModel,
)
from transformers.models.lxmert.modeling_lxmert import LxmertLMPredictionHead

from syncmask_kernels.integrations.transformers import (
    capture_attention,
    collect_maps,
    masked_lm_loss,
)

WIDTH, WORDS, CLS, SEP, MASK = 32, 97, 1, 2, 3


def bert(**options: Any) -> BertForMaskedLM:
    """A small BERT whose words see each other both ways, and an image."""
    sizes = {
        "vocab_size": WORDS,
        "hidden_size": WIDTH,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "initializer_range": 0.1,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    torch.manual_seed(0)
    crossed = {"is_decoder": True, "add_cross_attention": True, "is_causal": False}
    return BertForMaskedLM(BertConfig(**sizes | crossed | options))


def inputs(seed: int = 0, batch: int = 3) -> dict[str, Any]:
    """Captions and images of several lengths, for `bert`."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, WORDS, (batch, 9), generator=generator)
    words = torch.arange(9) < torch.randint(4, 10, (batch, 1), generator=generator)
    ids[:, 0] = CLS
    patches = torch.arange(11) < torch.randint(6, 12, (batch, 1), generator=generator)
    return {
        "input_ids": ids.masked_fill(~words, 0),
        "attention_mask": words.long(),
        "encoder_hidden_states": torch.randn(batch, 11, WIDTH, generator=generator),
        "encoder_attention_mask": patches.long(),
    }


def head_means(layers: tuple[Tensor, ...], skip_keys: int = 1) -> list[Tensor]:
    return [layer.mean(dim=1)[..., skip_keys:] for layer in layers]


def eager_attentions(model: nn.Module, **given: Any) -> Any:
    model.set_attn_implementation("eager")
    return model(**given, output_attentions=True)


def assert_maps(got: dict[int, Tensor], wanted: list[Tensor]) -> None:
    for layer, found in got.items():
        torch.testing.assert_close(found, wanted[layer], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("kind", "skip_keys"), [("cross_attentions", 1), ("attentions", 0)])
def test_maps_are_the_head_means_of_eager_attentions(kind: str, skip_keys: int) -> None:
    model = bert().bert.eval()
    with torch.no_grad():
        hidden = eager_attentions(model, **inputs())
        model.set_attn_implementation("syncmask")
        with collect_maps(model, [0, 2], kind=kind, skip_keys=skip_keys) as maps:
            output = model(**inputs())
    assert sorted(maps) == [0, 2]
    assert_maps(maps, head_means(hidden[kind], skip_keys))
    words = inputs()["attention_mask"].bool()
    torch.testing.assert_close(
        output.last_hidden_state[words], hidden.last_hidden_state[words], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("graded", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_maps_are_those_before_dropout(dtype: torch.dtype, graded: bool) -> None:
    model = bert(attention_probs_dropout_prob=0.5).bert.to(dtype).train()
    model.set_attn_implementation("syncmask")
    attention = model.encoder.layer[1].crossattention.self
    seen = []
    for part in (attention.query, attention.key):
        part.register_forward_hook(
            lambda _m, _i, out: seen.append(out.unflatten(-1, (4, -1)).transpose(1, 2))
        )
    given = inputs() | {"encoder_hidden_states": inputs()["encoder_hidden_states"].to(dtype)}
    torch.manual_seed(1)
    with torch.set_grad_enabled(graded), collect_maps(model, [1]) as maps:
        output = model(**given).last_hidden_state
    assert maps[1].dtype == torch.float32
    valid = given["encoder_attention_mask"].bool()
    torch.testing.assert_close(maps[1], smk.attention_map(*seen, key_valid=valid), rtol=0, atol=0)
    model.set_attn_implementation("sdpa")
    torch.manual_seed(1)
    assert torch.equal(output, model(**given).last_hidden_state)


def test_without_a_collector_it_is_sdpa_to_the_bit() -> None:
    model = bert().train()
    outputs = []
    for implementation in ("sdpa", "syncmask", "sdpa"):
        model.set_attn_implementation(implementation)
        outputs.append(model(**inputs()).logits)
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


def test_gradients_flow_through_maps() -> None:
    model = bert().bert
    weight = torch.randn(3, 9, 10)
    wanted = eager_attentions(model, **inputs())
    (head_means(wanted.cross_attentions)[1] * weight).sum().backward()
    query = model.encoder.layer[1].crossattention.self.query.weight
    expected, query.grad = query.grad, None
    model.set_attn_implementation("syncmask")
    with collect_maps(model, [1]) as maps:
        output = model(**inputs()).last_hidden_state
    (maps[1] * weight).sum().backward()
    torch.testing.assert_close(query.grad, expected, rtol=1e-4, atol=1e-6)
    model.set_attn_implementation("sdpa")
    assert torch.equal(output, model(**inputs()).last_hidden_state)


def test_of_a_vit_the_cls_row_alone() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 32}
    config = ViTConfig(**sizes, num_hidden_layers=2, image_size=12, patch_size=4)
    config.attn_implementation = "syncmask"
    model = ViTModel(config).eval()
    pixels = torch.randn(2, 3, 12, 12)
    with torch.no_grad():
        wanted = head_means(eager_attentions(model, pixel_values=pixels).attentions)
        model.set_attn_implementation("syncmask")
        with collect_maps(model, kind="attentions", queries=slice(0, 1)) as maps:
            model(pixels)
    assert maps[0].shape == (2, 1, 9)
    assert_maps(maps, [layer[:, :1] for layer in wanted])


@pytest.mark.parametrize("excluded", [-1e4, torch.finfo(torch.float32).min, False])
def test_prepared_masks_count_as_padding(excluded: float) -> None:
    model = bert().bert.eval()
    given = inputs()
    padding = given["encoder_attention_mask"].bool()[:, None, None, :]
    model.set_attn_implementation("syncmask")
    with torch.no_grad(), collect_maps(model) as wanted:
        model(**given)
    given["encoder_attention_mask"] = (
        padding if excluded is False else torch.zeros(padding.shape).masked_fill(~padding, excluded)
    )
    with torch.no_grad(), collect_maps(model) as maps:
        model(**given)
    assert_maps(maps, [wanted[layer] for layer in range(3)])


def causal(given: dict[str, Any]) -> None:
    given.update(attention_mask=None, is_causal=True)


def triangle(given: dict[str, Any]) -> None:
    given.update(attention_mask=torch.ones(1, 1, 9, 9).tril().bool())


def bias(given: dict[str, Any]) -> None:
    given.update(attention_mask=torch.linspace(-1, 0, 9).expand(1, 1, 1, 9))


def mask_of_heads(given: dict[str, Any]) -> None:
    given.update(attention_mask=torch.ones(1, 4, 1, 9).bool())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (causal, "causal"),
        (triangle, "padding alone"),
        (bias, "padding alone"),
        (mask_of_heads, "the same for every head"),
    ],
)
def test_refuses_masks_that_are_more_than_padding(
    change: Callable[[dict[str, Any]], None], reason: str
) -> None:
    model = bert().bert.eval()
    model.set_attn_implementation("syncmask")
    given = inputs()
    change(given)
    with (
        pytest.raises(ValueError, match=reason),
        torch.no_grad(),
        collect_maps(model, kind="attentions"),
    ):
        model(**given)
    assert not any("syncmask" in name for m in model.modules() for name in vars(m))


def test_where_the_host_cannot_look_such_a_map_is_nan() -> None:
    """As on a GPU: the output stays right."""
    model = bert().bert.eval()
    given = inputs()
    with (
        torch.no_grad(),
        mock.patch.object(torch.compiler, "is_compiling", return_value=True),
    ):
        model.set_attn_implementation("syncmask")
        with collect_maps(model, [1], kind="attentions") as padded:
            model(**given)
        triangle(given)
        with (
            collect_maps(model, [1], kind="attentions") as maps,
            capture_attention(model, [2], kind="attentions") as captured,
        ):
            output = model(**given).last_hidden_state
        model.set_attn_implementation("sdpa")
        assert torch.equal(output, model(**given).last_hidden_state)
    assert padded[1].isfinite().all()
    assert maps[1].isnan().all()
    assert captured.map().isnan().all()


def test_a_causal_row_is_no_matter_where_it_is_alone() -> None:
    model = bert().bert.eval()
    lowest = torch.finfo(torch.float32).min
    later = torch.full((1, 1, 9, 9), lowest).triu(1)
    given = inputs() | {"attention_mask": later}
    with torch.no_grad():
        wanted = head_means(eager_attentions(model, **given).attentions)
        model.set_attn_implementation("syncmask")
        with collect_maps(model, kind="attentions", queries=slice(4, 5)) as maps:
            model(**given)
    assert_maps(maps, [layer[:, 4:5] for layer in wanted])


def test_refuses_what_it_cannot_collect() -> None:
    model, vit = bert(), ViTModel(ViTConfig(hidden_size=12, num_hidden_layers=1, image_size=16))
    for message, block in (
        ("call model.set_attn_implementation", collect_maps(model)),
        ("must have cross_attentions", collect_maps(vit)),
        ("layers must be in", collect_maps(model, [3])),
        ("kind must be one of", collect_maps(model, kind="weights")),
    ):
        with pytest.raises(ValueError, match=message), block:
            pass
    model.set_attn_implementation("syncmask")
    with (
        pytest.raises(ValueError, match="twice at a time"),
        collect_maps(model, [1]),
        collect_maps(model),
    ):
        pass


def small(kind: str) -> Any:
    if kind == "git":
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        image = sizes | {"image_size": 16, "patch_size": 8, "intermediate_size": 16}
        return GitModel(GitConfig(vision_config=image, vocab_size=WORDS, **sizes))
    return T5Model(T5Config(vocab_size=WORDS, d_model=16, d_ff=16, num_layers=1, num_heads=2))


@pytest.mark.parametrize("kind", ["git", "t5"])
def test_refuses_models_that_do_not_heed_the_registry(kind: str) -> None:
    model = small(kind)
    model.set_attn_implementation("syncmask")
    for collecting in (collect_maps, capture_attention):
        with (
            pytest.raises(ValueError, match=r"registry of attention functions, (Git|T5)"),
            collecting(model, kind="attentions"),
        ):
            pass


def test_nothing_of_the_model_changes() -> None:
    model = bert()
    before = all_of(model)
    implementation = model.config._attn_implementation
    model.set_attn_implementation("syncmask")
    with torch.no_grad(), collect_maps(model):
        model(**inputs())
    model.set_attn_implementation(implementation)
    assert same(before, all_of(model))
    assert "syncmask" not in str(model.config.to_dict())


def test_compiles_in_one_graph() -> None:
    model = bert(num_hidden_layers=2).bert.eval()
    model.set_attn_implementation("syncmask")
    compiled = torch.compile(model.encoder, fullgraph=True, backend="eager")
    words, given = torch.randn(3, 9, WIDTH), inputs()
    given = {"encoder_hidden_states": given["encoder_hidden_states"], "is_causal": False}
    with torch.no_grad():
        for layer in (0, 1):
            with collect_maps(model, [layer]) as wanted:
                model.encoder(words, **given)
            with collect_maps(model, [layer]) as maps:
                compiled(words, **given)
            torch.testing.assert_close(maps, wanted, rtol=0, atol=0)


def heads_and_labels(
    share: float, seed: int = 0
) -> tuple[BertForMaskedLM, BertForMaskedLM, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = bert(), bert()
    for p in teacher.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=generator)
    hidden, hidden_t = torch.randn(2, 4, 9, WIDTH, generator=generator).unbind()
    labels = torch.randint(WORDS, (4, 9), generator=generator)
    chosen = torch.rand(4, 9, generator=generator) < share
    return student, teacher, hidden, hidden_t, labels.masked_fill(~chosen, -100)


def plain_loss(model: Any, hidden: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model.cls(hidden).flatten(0, 1), labels.flatten())


def rows_of(labels: Tensor, how: str) -> dict[str, Any]:
    if how == "ids":
        return {"ids": smk.topk_mask(torch.rand(labels.shape), k=9, valid=labels != -100).ids}
    return {"capacity": 30} if how == "capacity" else {}


@pytest.mark.parametrize("how", ["ids", "capacity", "looked up"])
def test_masked_lm_loss_is_the_loss_of_the_model(how: str) -> None:
    model, _, hidden, _, labels = heads_and_labels(0.3)
    parameters = list(model.cls.parameters())
    results = []
    for loss_of, dtype in (
        (lambda x: masked_lm_loss(model.cls.predictions, x, labels, **rows_of(labels, how)), None),
        (lambda x: plain_loss(model, x, labels), None),
        (lambda x: plain_loss(model, x, labels), torch.float64),
    ):
        model.to(dtype or torch.float32)
        x = hidden.to(dtype or torch.float32).requires_grad_()
        loss = loss_of(x)
        results.append([loss, *torch.autograd.grad(loss, [x, *parameters])])
    for got, plain, truth in zip(*results, strict=True):
        assert_as_accurate(got, plain, truth, factor=2)


def test_masked_lm_loss_distils() -> None:
    model, teacher, hidden, hidden_t, labels = heads_and_labels(0.3)
    found = masked_lm_loss(
        model.cls.predictions,
        hidden,
        labels,
        teacher=(teacher.cls.predictions, hidden_t),
        alpha=0.4,
    )

    def plain(dtype: torch.dtype) -> Tensor:
        logits, logits_t = (
            m.to(dtype).cls(x.to(dtype))[labels != -100]
            for m, x in ((model, hidden), (teacher, hidden_t))
        )
        soft = -(logits.log_softmax(-1) * logits_t.softmax(-1)).sum(-1).mean()
        return 0.6 * F.cross_entropy(logits, labels[labels != -100]) + 0.4 * soft

    assert_as_accurate(found, plain(torch.float32), plain(torch.float64), factor=2)


def test_masked_lm_loss_adds_the_bias_of_heads_that_add_it_themselves() -> None:
    torch.manual_seed(0)
    config = LxmertConfig(vocab_size=WORDS, hidden_size=WIDTH)
    head, teacher = (LxmertLMPredictionHead(config) for _ in range(2))
    for each in (head, teacher):
        nn.init.normal_(each.bias)
    _, _, hidden, hidden_t, labels = heads_and_labels(0.3)
    masked = labels != -100
    soft = teacher(hidden_t[masked]).softmax(-1)
    logits = head(hidden[masked])
    loss = masked_lm_loss(head, hidden, labels, teacher=(teacher, hidden_t), alpha=0.4)
    wanted = 0.6 * F.cross_entropy(logits, labels[masked]) + 0.4 * F.cross_entropy(logits, soft)
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=0)
    grads = (torch.autograd.grad(value, head.bias)[0] for value in (loss, wanted))
    torch.testing.assert_close(*grads)


def test_masked_lm_loss_smooths_labels() -> None:
    model, _, hidden, _, labels = heads_and_labels(0.3)
    found = masked_lm_loss(model.cls.predictions, hidden, labels, label_smoothing=0.1)
    logits = model.cls(hidden)[labels != -100]
    wanted = F.cross_entropy(logits, labels[labels != -100], label_smoothing=0.1)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)


def test_masked_lm_loss_at_its_limits() -> None:
    model, _, hidden, _, labels = heads_and_labels(0.3)
    head = model.cls.predictions
    assert masked_lm_loss(head, hidden, labels, capacity=3).isnan()
    empty = masked_lm_loss(head, hidden, torch.full_like(labels, -100))
    empty.backward()
    assert empty == 0
    assert all(p.grad is not None and not p.grad.any() for p in head.parameters())
    with pytest.raises(TypeError, match="has no transform"):
        masked_lm_loss(model.cls, hidden, labels)
    with pytest.raises(ValueError, match="hidden must be"):
        masked_lm_loss(head, hidden[:, 1:], labels)


def host_step(model: Any, given: dict[str, Any], labels: Tensor, optimizer: Any) -> Tensor:
    """One step by the model's own loss."""
    optimizer.zero_grad()
    loss = model(**given, labels=labels).loss
    loss.backward()
    optimizer.step()
    return loss.detach()


def our_step(model: Any, given: dict[str, Any], labels: Tensor, optimizer: Any) -> Tensor:
    optimizer.zero_grad()
    hidden = model.bert(**given).last_hidden_state
    loss = masked_lm_loss(model.cls.predictions, hidden, labels)
    loss.backward()
    optimizer.step()
    return loss.detach()


def synchronized(teacher: Any, given: dict[str, Any]) -> tuple[dict[str, Any], Tensor]:
    """The same inputs with the words masked that the teacher's layers choose."""
    with torch.no_grad(), collect_maps(teacher.bert, [0, 1]) as maps:
        teacher.bert(**given)
    valid = smk.token_valid(given["input_ids"], [0, CLS, SEP])
    layers = [maps[layer].unsqueeze(1) for layer in (0, 1)]
    chosen = smk.sync_topk_mask(layers, valid, token_ratio=0.3, skip_keys=0)
    masked, labels = smk.mask_tokens(
        given["input_ids"], chosen.token_mask, mask_id=MASK, vocab_size=WORDS
    )
    return given | {"input_ids": masked}, labels


def flat(tensors: Iterable[Tensor | None]) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors if t is not None])


def test_fifty_steps_are_those_of_the_model() -> None:
    """With the same masks: losses, parameters and the last gradients, within rounding."""
    torch.manual_seed(3)
    ours = bert(num_hidden_layers=2)
    plain, exact = copy.deepcopy(ours), copy.deepcopy(ours).double()
    teacher = copy.deepcopy(ours).eval()
    for model in (plain, exact):
        model.set_attn_implementation("eager")
    for model in (ours, teacher):
        model.set_attn_implementation("syncmask")
    models, losses = (ours, plain, exact), []
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9) for m in models]
    for step in range(50):
        given, labels = synchronized(teacher, inputs(seed=step % 5))
        wide = given | {"encoder_hidden_states": given["encoder_hidden_states"].double()}
        losses.append(
            [
                our_step(ours, given, labels, optimizers[0]),
                host_step(plain, given, labels, optimizers[1]),
                host_step(exact, wide, labels, optimizers[2]),
            ]
        )
        smk.ema_update_(teacher, ours, 0.9)
    curves = [torch.stack(curve) for curve in zip(*losses, strict=True)]
    assert curves[2][-5:].mean() < curves[2][:5].mean() - 1
    assert_as_accurate(*curves)
    assert_as_accurate(*(flat(m.parameters()) for m in models))
    assert_as_accurate(*(flat(p.grad for p in m.parameters()) for m in models))


def test_the_maps_choose_what_eager_attentions_choose() -> None:
    teacher = bert().eval()
    given = inputs(batch=16)
    with torch.no_grad():
        attn = eager_attentions(teacher.bert, **given).cross_attentions[2]
        teacher.set_attn_implementation("syncmask")
        with collect_maps(teacher.bert, [2]) as maps:
            teacher.bert(**given)
    valid = smk.token_valid(given["input_ids"], [0, CLS, SEP])
    patches = given["encoder_attention_mask"][:, 1:].bool()
    wanted = smk.sync_topk_mask(attn, valid, patch_valid=patches)
    chosen = smk.sync_topk_mask(maps[2].unsqueeze(1), valid, patch_valid=patches, skip_keys=0)
    assert torch.equal(chosen.token_mask, wanted.token_mask)
    assert torch.equal(chosen.patch_mask, wanted.patch_mask)


def test_captured_inputs_choose_by_every_rule() -> None:
    """From q, k and v, which are those that the layers project."""
    teacher, given = bert().bert.eval(), inputs(batch=16)
    teacher.set_attn_implementation("syncmask")
    for module in teacher.modules():
        if hasattr(module, "scaling"):
            module.scaling *= 1.5
    projected: dict[str, list[Tensor]] = {"query": [], "key": [], "value": []}
    hooks = [
        getattr(teacher.encoder.layer[i].crossattention.self, name).register_forward_hook(
            lambda _m, _i, out, into=into: into.append(out.unflatten(-1, (4, -1)).transpose(1, 2))
        )
        for i in (0, 2)
        for name, into in projected.items()
    ]
    with torch.no_grad():
        with capture_attention(teacher, [0, 2]) as captured:
            teacher(**given)
        for hook in hooks:
            hook.remove()
        with collect_maps(teacher, [0, 2]) as maps:
            teacher(**given)
        attn = eager_attentions(teacher, **given).cross_attentions
    assert_maps(maps, head_means(attn))
    wanted = (head_means(attn)[0] + head_means(attn)[2]) / 2
    torch.testing.assert_close(captured.map(), wanted, rtol=1e-5, atol=1e-6)
    valid = smk.token_valid(given["input_ids"], [0, CLS, SEP])
    for rules in ({}, {"token_score": "dual"}):
        got = captured.sync_masks(valid, weigh_by_value=True, **rules)
        expected = smk.sync_topk_mask_qk(
            [1.5 * q for q in projected["query"]],
            projected["key"],
            valid,
            v=projected["value"],
            key_valid=given["encoder_attention_mask"].bool(),
            **rules,
        )
        torch.testing.assert_close(got._asdict(), expected._asdict())
