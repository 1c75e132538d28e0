"""The adapter of ALBEF: on a stand-in always, on the host itself where SYNCMASK_ALBEF names it."""

from __future__ import annotations

import ast
import copy
import os
import pickle
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor, distributed, nn

import syncmask_kernels as smk
from syncmask_kernels.integrations import albef
from syncmask_kernels.integrations.albef import functions, patching
from tests.accuracy import assert_as_accurate
from tests.hosts.albef import (
    CLS,
    MASK,
    PAD,
    SEP,
    Batch,
    Size,
    drawing,
    make_batch,
    make_draws,
    negatives_of,
    real_albef,
)
from tests.hosts.albef_standin import standin
from tests.hosts.attributes import all_of, same

ALPHA, PAIRS, WORDS = 0.4, 8, 12
TINY = Size(
    width=16, heads=2, text_layers=3, fusion_layer=1, vocabulary=120, image=32, embed=8, queue=32
)


class Maker(NamedTuple):
    """`make()` -> a model with the same weights each time, in training mode."""

    size: Size
    build: Callable[[Size], nn.Module]
    steps: int

    def __call__(self, **given: Any) -> nn.Module:
        torch.manual_seed(0)
        return self.build(self.size._replace(**given)).train()

    def batch(self, seed: int, pairs: int = PAIRS) -> Batch:
        return make_batch(self.size, pairs, WORDS, generator(seed))


@pytest.fixture
def group() -> Iterator[None]:
    """One process, which the host does not work without."""
    store = distributed.HashStore()
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.fixture(params=["stand-in", "ALBEF"])
def make(request, tmp_path) -> Maker:
    if request.param == "stand-in":
        return Maker(TINY, standin, steps=12)
    return Maker(Size(), partial(real_albef, tmp_path), steps=50)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def host_step(model, batch, draws):
    torch.set_default_dtype(batch.image.dtype)  # the host adds one-hot targets of that type
    with drawing(model, draws):
        losses = model(batch.image, batch.text, alpha=ALPHA)
    torch.set_default_dtype(torch.float32)
    return losses


def patched_step(model, batch, draws):
    negatives, words = negatives_of(draws), draws.words
    return model(batch.image, batch.text, alpha=ALPHA, negatives=negatives, words=words)


def run_step(make: Maker, model: nn.Module, step: Any, i: int) -> dict[str, Tensor]:
    """The i-th step of training: its losses and gradients, and all that it leaves in the model."""
    batch = make.batch(i)
    draws = make_draws(batch, make.size, generator(1000 + i))
    losses = step(model, batch._replace(image=batch.image.to(model.temp.dtype)), draws)
    model.zero_grad()
    sum(losses).backward()
    learned = [p for p in model.parameters() if p.requires_grad]
    torch.optim.SGD(learned, lr=0.05).step()
    left = {f"loss {i}": loss.detach() for i, loss in enumerate(losses)}
    grads = ((f"grad {name}", p.grad) for name, p in model.named_parameters())
    left |= {name: grad for name, grad in grads if grad is not None}
    return left | {name: t.clone() for name, t in model.state_dict().items()}


@pytest.mark.usefixtures("group")
def test_steps_are_those_of_the_host(make):
    host, ours = make().double(), make().double()
    albef.patch(ours)
    start = {name: t.clone() for name, t in ours.state_dict().items()}
    for i in range(make.steps):
        wanted, got = run_step(make, host, host_step, i), run_step(make, ours, patched_step, i)
        assert wanted.keys() == got.keys()
        differ = [n for n in wanted if not torch.allclose(got[n], wanted[n], rtol=1e-9, atol=1e-12)]
        assert not differ, f"step {i}"
    learned = {n for n, t in ours.state_dict().items() if not torch.equal(t, start[n])}
    assert {"temp", "image_queue", "text_encoder_m.cls.predictions.decoder.bias"} <= learned
    assert ours.queue_ptr == make.steps * PAIRS % make.size.queue


@pytest.mark.usefixtures("group")
def test_single_precision_is_as_accurate_as_that_of_the_host(make):
    """From the same state in each step, because differences grow as training goes on."""
    truth, host, ours = make().double(), make(), make()
    albef.patch(ours)
    errors = [[], [], []]
    for i in range(4):
        for model in (host, ours):
            model.load_state_dict(truth.state_dict())
        steps = (ours, patched_step), (host, host_step), (truth, host_step)
        for into, (model, step) in zip(errors, steps, strict=True):
            into.append(run_step(make, model, step, i))
    for kind in ("loss", "grad", "image_queue", "text_queue", "text_encoder_m"):
        flat = (
            torch.cat([t.flatten() for left in run for n, t in left.items() if n.startswith(kind)])
            for run in errors
        )
        assert_as_accurate(*flat)


def run_clean(model: nn.Module, teacher: albef.Encoded, text: Any, layers: list[int]) -> list[Any]:
    """The probabilities that the host itself saves, which it does only where there are gradients"""
    bert = model.text_encoder_m.bert
    modules = [bert.encoder.layer[i].crossattention.self for i in layers]
    for module in modules:
        module.save_attention = True
    bert(
        encoder_embeds=teacher.text.requires_grad_(),
        attention_mask=text.attention_mask,
        encoder_hidden_states=teacher.image,
        return_dict=True,
        mode="fusion",
    )
    for module in modules:
        module.save_attention = False
    return [module.get_attention_map().detach() for module in modules]


def captured_by_the_host(model, module, batch, draws) -> Tensor:
    """The probabilities ``[B, H, T, S]`` of `module` as the teacher reads masked words."""
    image = albef.encode(model, *batch, momentum=True).image.requires_grad_()
    module.save_attention = True
    model.text_encoder_m.bert(
        draws.words.input_ids,
        attention_mask=batch.text.attention_mask,
        encoder_hidden_states=image,
        return_dict=True,
    )
    module.save_attention = False
    return module.get_attention_map().detach()


@pytest.mark.parametrize("layers", [[-1], [2], [-2, -1]])
def test_masks_follow_the_teacher(make, layers):
    model, batch = make(), make.batch(0)
    model.momentum = 1.0
    ids = batch.text.input_ids
    teacher = albef.encode(model, *batch, momentum=True)
    probs = run_clean(model, teacher, batch.text, layers)
    valid = (ids != PAD) & (ids != CLS) & (ids != SEP)
    wanted = smk.sync_topk_mask(probs, valid, token_ratio=0.3)
    albef.patch(model, syncmask=True, layers=layers, token_ratio=0.3)
    with mock.patch.object(functions, "masked_lm_loss", wraps=albef.masked_lm_loss) as loss:
        model(*batch, alpha=ALPHA)
    labels = loss.call_args.args[2]
    assert torch.equal(labels, ids.where(wanted.token_mask, -100))
    assert torch.equal(loss.call_args.kwargs["ids"], wanted.token_ids)


@pytest.mark.usefixtures("group")
def test_by_hand_in_the_forward_of_the_host(make):
    """Attention of the host's own pass through the teacher, and masks in its own `mask`."""
    model, batch = make(), make.batch(0)
    model.momentum = 1.0
    ids = batch.text.input_ids
    draws = make_draws(batch, make.size, generator(0))
    modules = albef.cross_attention(model.text_encoder_m.bert, [2])
    with albef.capture_attention(modules) as captured, drawing(model, draws):
        model(*batch, alpha=ALPHA)
    wanted = smk.head_average(captured_by_the_host(model, modules[0], batch, draws))
    torch.testing.assert_close(captured.map(), wanted)
    chosen = captured.sync_masks(smk.token_valid(ids, [PAD, CLS, SEP]), token_k=2)
    vocabulary = model.text_encoder.config.vocab_size
    _, labels = model.mask(
        ids.clone(),
        vocabulary,
        ids.device,
        targets=ids.clone(),
        masked_indices=chosen.token_mask.clone(),
    )
    assert torch.equal(labels, ids.where(chosen.token_mask, -100))


PAGE = Path(__file__).parents[1] / "docs/integrations/albef.md"
CHOICE, CHOSEN = "after 110", "192-193"  # SyncMask's


def rows_by_hand() -> dict[str, list[str]]:
    """Lines of the host -> the statements that the page's table has instead."""
    table = PAGE.read_text().split("## By hand")[1].split("\n\n")[2]
    cells = [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
    return {lines: re.findall("`(.+?)`", instead.split(";")[0]) for lines, _, instead in cells}


def edited(source: str, rows: dict[str, list[str]]) -> str:
    """The host's code with these rows followed to the letter."""
    lines = dict(enumerate(source.splitlines(), start=1))
    for where, statements in rows.items():
        ranges = [[int(n) for n in part.split("-")] for part in re.findall("[0-9-]+", where)]
        at = [n for ends in ranges for n in range(ends[0], ends[-1] + 1)]
        indent = min(len(s) - len(s.lstrip()) for s in map(lines.get, at) if s.strip())
        kept = [lines[at[-1]]] if "after" in where else []
        lines |= dict.fromkeys(at, "")
        lines[at[-1]] = "\n".join([*kept, *(" " * indent + text for text in statements)])
    return "\n".join(lines.values())


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("where", [*rows_by_hand(), "all"])
def test_each_row_of_the_page_serves_the_host_by_itself(tmp_path, where):
    make = Maker(Size(), partial(real_albef, tmp_path), steps=1)
    host, ours, batch = make(), make(), make.batch(0)
    table = rows_by_hand()
    table[CHOICE] = [text.replace("[8]", "[-1]") for text in table[CHOICE]]  # it has four layers
    if where != "all":
        table = {n: table[n] for n in ([CHOICE, CHOSEN] if where == CHOSEN else [where])}
    code = Path(os.environ["SYNCMASK_ALBEF"], "models/model_pretrain.py").read_text()
    parsed = ast.parse(edited(code, table))
    parsed.body = [node for node in parsed.body if isinstance(node, ast.ClassDef)]
    names = {**type(ours).forward.__globals__, "albef": albef, "smk": smk}
    exec(compile(parsed, "model_pretrain.py", "exec"), names)
    ours.__class__ = names["ALBEF"]
    draws = make_draws(batch, make.size, generator(0))
    wanted, got = (host_step(model, batch, draws) for model in (host, ours))
    drawn = {0: {CHOSEN, "all"}, 2: {"143-164", "all"}}  # of the words, of the negatives
    for i, loss in enumerate(got):
        assert loss.isfinite()
        if where not in drawn.get(i, ()):
            torch.testing.assert_close(loss, wanted[i])
    for name in ("image_queue", "queue_ptr", "text_encoder_m.bert.embeddings.LayerNorm.weight"):
        torch.testing.assert_close(ours.state_dict()[name], host.state_dict()[name])


def test_options_of_masks_reach_the_selection(make):
    model, batch = make(), make.batch(0)
    albef.patch(model, syncmask=True, token_score="dual")
    with mock.patch.object(functions, "masked_lm_loss", wraps=albef.masked_lm_loss) as loss:
        model(*batch, alpha=ALPHA)
    chosen = albef.sync_masks(
        model,
        albef.encode(model, *batch, momentum=True),
        batch.text,
        token_score="dual",
        token_ratio=model.mlm_probability,
        weigh_by_value=True,
    )
    assert torch.equal(loss.call_args.kwargs["ids"], chosen.token_ids)
    assert chosen.patch_mask.sum(dim=1).tolist() == [chosen.patch_mask.shape[1] // 2] * PAIRS


def test_random_words_are_those_the_host_may_mask(make):
    model, text = make(), make.batch(0, pairs=600).text
    words = albef.random_words(model, text)
    ids, chosen = text.input_ids, words.labels != -100
    may = (ids != PAD) & (ids != CLS)
    assert not chosen[~may].any()
    assert chosen[ids == SEP].any()
    assert chosen[may].float().mean() == pytest.approx(model.mlm_probability, abs=0.03)
    assert torch.equal(words.input_ids[~chosen], ids[~chosen])
    replaced = words.input_ids[chosen]
    assert (replaced == MASK).float().mean() == pytest.approx(0.8, abs=0.05)
    drawn = replaced[(replaced != MASK) & (replaced != ids[chosen])]
    assert not torch.isin(drawn, torch.tensor([PAD, CLS, SEP])).any()


def align(model: nn.Module, batch: Batch) -> None:
    """What a model that knows these pairs by heart ends in: cosines 1 and 0, at the least heat."""
    encoded = albef.encode(model, *batch)
    for name, x in (("vision_proj", encoded.image), ("text_proj", encoded.text)):
        directions = torch.eye(len(x), model.image_queue.shape[0], dtype=torch.float64)
        weight = torch.linalg.pinv(x[:, 0].detach().double()) @ directions
        for projection in (getattr(model, name), getattr(model, f"{name}_m")):
            projection.load_state_dict(
                {"weight": weight.T.float(), "bias": torch.zeros_like(projection.bias)}
            )
    with torch.no_grad():
        model.temp.fill_(0.001)


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("pairs", [4, 1])
def test_negatives_of_certain_pairs(make, pairs):
    """The softmax of all wrong pairs underflows to zero, where the host's draw fails."""
    model, batch = make(), make.batch(0, pairs)
    align(model, batch)
    with pytest.raises(RuntimeError, match="multinomial"):
        model(*batch, alpha=ALPHA)
    albef.patch(model)
    with mock.patch.object(patching, "matching_loss", wraps=albef.matching_loss) as loss:
        losses = model(*batch, alpha=ALPHA)
    sum(losses).backward()
    assert all(loss.isfinite() for loss in losses)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    for ids, found in loss.call_args.args[3]:
        assert found.tolist() == [pairs > 1] * pairs
        assert not (found & (ids == torch.arange(pairs))).any()


def test_pairs_of_one_item_are_no_hard_negatives(make):
    model, batch = make(), make.batch(0)
    items = torch.arange(PAIRS) // 4
    albef.patch(model, negatives="hardest")
    _, wanted, _ = copy.deepcopy(model)(*batch, alpha=ALPHA)
    with mock.patch.object(patching, "matching_loss", wraps=albef.matching_loss) as loss:
        _, itc, _ = model(*batch, alpha=ALPHA, item_ids=items)
    assert itc == wanted
    for ids, found in loss.call_args.args[3]:
        assert found.all()
        assert torch.equal(items[ids], 1 - items)


def test_a_queue_of_ids_is_not_left_behind():
    model = standin(TINY)
    model.register_buffer("idx_queue", torch.full((1, TINY.queue), -100))
    keys, ids = torch.randn(2, PAIRS, TINY.embed), torch.arange(PAIRS)
    with pytest.raises(ValueError, match="item_ids must be given"):
        albef.enqueue_keys_(model, *keys)
    albef.enqueue_keys_(model, *keys, ids)
    assert torch.equal(model.idx_queue[0, :PAIRS], ids)
    assert (model.idx_queue[0, PAIRS:] == -100).all()
    assert model.queue_ptr == PAIRS


def test_uncounted_rows_of_matching(make):
    """The loss over the pairs and what was found is that of these rows alone."""
    model, batch = make().double(), make.batch(0)
    encoded = albef.encode(model, batch.image.double(), batch.text)
    found = torch.arange(PAIRS) % 2 == 0
    none, wrong = torch.zeros_like(found), (torch.arange(PAIRS) + 1) % PAIRS
    logits = []
    model.itm_head.register_forward_hook(lambda *call: logits.append(call[2]))
    negatives = smk.Negatives(wrong, found), smk.Negatives(wrong, none)
    got = albef.matching_loss(
        model, encoded, batch.text.attention_mask, albef.HardNegatives(*negatives)
    )
    right, _, wrong_texts = logits[0].log_softmax(dim=1).chunk(3)
    wanted = -(right[:, 1].sum() + wrong_texts[found][:, 0].sum()) / (PAIRS + PAIRS // 2)
    torch.testing.assert_close(got, wanted)


def test_no_masked_word_is_no_loss(make):
    model, batch = make(), make.batch(0)
    albef.patch(model)
    ids = batch.text.input_ids
    words = albef.MaskedWords(ids, torch.full_like(ids, -100))
    mlm, _, _ = model(*batch, alpha=ALPHA, words=words)
    mlm.backward()
    assert mlm == 0
    assert not model.text_encoder.cls.predictions.decoder.weight.grad.any()


@pytest.mark.usefixtures("group")
def test_without_distillation_the_teacher_reads_once(make):
    model, batch = make().double(), make.batch(0)
    batch = batch._replace(image=batch.image.double())
    draws = make_draws(batch, make.size, generator(0))
    wanted = copy.deepcopy(model)
    torch.set_default_dtype(torch.float64)
    with drawing(wanted, draws):
        wanted = wanted(*batch, alpha=0)
    torch.set_default_dtype(torch.float32)
    albef.patch(model)
    calls = []
    model.text_encoder_m.bert.register_forward_hook(lambda *call: calls.append(call))
    got = model(*batch, alpha=0, negatives=negatives_of(draws), words=draws.words)
    assert len(calls) == 1
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=0)


def test_unpatch_leaves_the_model_as_it_was(make):
    model = make()
    before, names = all_of(model), list(model.state_dict())
    patched = albef.patch(model, syncmask=True)
    assert list(model.state_dict()) == names
    assert not same(before, all_of(model))
    losses = model(*make.batch(0), alpha=ALPHA)
    sum(losses).backward()
    patched.unpatch()
    assert same(before, all_of(model))
    assert model.forward.__func__ is type(model).forward
    with pytest.raises(ValueError, match="must be patched"):
        albef.unpatch(model)


def test_checkpoints_go_either_way(make):
    host, ours = make(), make()
    albef.patch(ours)
    sum(ours(*make.batch(0), alpha=ALPHA)).backward()
    host.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(make().state_dict(), strict=True)
    assert host.queue_ptr == PAIRS
    assert ours.queue_ptr == 0


def test_copies_are_patched_for_themselves(make):
    model, batch = make(), make.batch(0)
    albef.patch(model)
    copies = [copy.deepcopy(model)]
    if make.build is standin:  # the host's module is not there to be found again
        copies.append(pickle.loads(pickle.dumps(model)))
    for other in copies:
        other(*batch, alpha=ALPHA)
        assert other.queue_ptr == PAIRS
        assert model.queue_ptr == 0
        albef.unpatch(other)
        assert "forward" not in vars(other)
    model(*batch, alpha=ALPHA)
    assert model.queue_ptr == PAIRS


@pytest.mark.usefixtures("group")
def test_distributed_data_parallel_wraps_a_patched_model(make):
    model, batch = make(), make.batch(0)
    draws = make_draws(batch, make.size, generator(0))
    albef.patch(model)
    alone = patched_step(copy.deepcopy(model), batch, draws)
    wrapped = nn.parallel.DistributedDataParallel(model)
    losses = patched_step(wrapped, batch, draws)
    sum(losses).backward()
    assert losses == alone
    assert model.itm_head.weight.grad is not None


def test_says_what_was_replaced(make):
    model = make()
    report = str(albef.patch(model, syncmask=True, layers=[2], negatives="semi_hard"))
    for part in ("ALBEF", "forward", "_momentum_update", "semi_hard", "teacher", "(2,)"):
        assert part in report
    albef.unpatch(model)
    assert "at random" in str(albef.patch(model))


def add_module(model):
    model.mim_head = nn.Linear(2, 2)


def add_buffer(model):
    model.register_buffer("idx_queue", torch.zeros(1, 4))


def lose_head(model):
    del model.itm_head


def lose_transform(model):
    del model.text_encoder.cls.predictions.transform


def own_forward(model):
    model.forward = lambda *args: None


def lose_tokenizer(model):
    model.tokenizer = None


def other_arguments(model):
    class Retrieval(type(model)):
        def forward(self, image, text, alpha, idx):
            return 0

    model.__class__ = Retrieval


def relative(model):
    layer = model.text_encoder_m.bert.encoder.layer[-1]
    layer.crossattention.self.position_embedding_type = "relative_key"


@pytest.mark.parametrize(
    ("change", "options", "error", "words"),
    [
        (add_module, {}, TypeError, "mim_head too, which the patched forward would leave out"),
        (add_buffer, {}, TypeError, "idx_queue"),
        (lose_head, {}, TypeError, "lacks the modules itm_head"),
        (lose_transform, {}, TypeError, "ALBEF lacks text_encoder.cls.predictions.transform"),
        (lose_tokenizer, {}, TypeError, "ALBEF lacks tokenizer.pad_token_id"),
        (other_arguments, {}, TypeError, "takes image, text, alpha, idx"),
        (own_forward, {}, ValueError, "one of its own"),
        (relative, {"syncmask": True}, ValueError, "relative_key"),
        (albef.patch, {}, ValueError, "patched already"),
        (None, {"layers": [-1]}, ValueError, "need syncmask=True"),
        (None, {"syncmask": True, "layers": [0]}, ValueError, "those with cross-attention"),
        (None, {"syncmask": True, "layers": [9]}, ValueError, "those with cross-attention"),
        (None, {"syncmask": True, "layers": []}, ValueError, "at least one"),
        (None, {"syncmask": True, "token_ratio": 1.5}, ValueError, "token_ratio must be in"),
        (None, {"syncmask": True, "token_score": "sum"}, ValueError, "token_score must be one of"),
        (None, {"negatives": "softest"}, ValueError, "negatives must be one of"),
    ],
)
def test_refuses_and_replaces_nothing(make, change, options, error, words):
    model = make()
    if change is not None:
        change(model)
    before = all_of(model)
    with pytest.raises(error, match=words):
        albef.patch(model, **options)
    assert same(before, all_of(model))


@pytest.mark.usefixtures("group")
def test_refuses_what_is_no_albef():
    with pytest.raises(TypeError, match="Module, got str"):
        albef.patch("albef")
    with pytest.raises(TypeError, match="got it wrapped"):
        albef.patch(nn.parallel.DistributedDataParallel(standin(TINY)))
    with pytest.raises(TypeError, match="Linear lacks the modules itm_head"):
        albef.patch(nn.Linear(2, 2))
