"""The data of the reference model: drawn catalogue, photos, tokenizer, dataset."""

import io
import json
import random
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from reference.data import PairDataset, TooManyBroken, load_data, train_tokenizer
from reference.data.broken import Broken
from reference.data.catalogue import VIEW_OF, Detail, Garment, draw, draw_catalogue
from reference.data.dataset import Pairs
from reference.data.drawing import GARMENTS, SHAPES
from reference.data.photos import load_photos
from reference.data.tokenizer import tokenize


@pytest.fixture(scope="module")
def catalogue() -> tuple[Pairs, Pairs]:
    return draw_catalogue(40, val_items=20, seed=3)


def garment(*details: Detail, kind: str = "shirt") -> Garment:
    return Garment(kind, "blue", "striped", "cotton", "summer", "new", details)


BADGE = Detail("badge", "star", "red")
PRINT = Detail("print", "heart", "white")
POCKET = Detail("pocket", "pocket", "orange")


def test_catalogue_repeats_with_its_seed(catalogue):
    train, val = catalogue
    again, val_again = draw_catalogue(40, val_items=20, seed=3)
    assert torch.equal(train.images, again.images)
    assert train.captions == again.captions
    assert torch.equal(val.patch_detail, val_again.patch_detail)
    other, _ = draw_catalogue(40, val_items=20, seed=4)
    assert train.captions != other.captions


def test_validation_items_do_not_depend_on_the_number_of_training_items(catalogue):
    _, val = draw_catalogue(5, val_items=20, seed=3)
    assert torch.equal(val.images, catalogue[1].images)
    assert val.captions == catalogue[1].captions


def test_items_are_disjoint_and_their_views_share_one_caption(catalogue):
    train, val = catalogue
    assert not set(train.captions) & set(val.captions)
    assert not set(train.item_ids.tolist()) & set(val.item_ids.tolist())
    for pairs in catalogue:
        assert pairs.captions[::2] == pairs.captions[1::2]
        assert torch.equal(pairs.item_ids[::2], pairs.item_ids[1::2])
        assert [record["view"] for record in pairs.records[:2]] == ["front", "back"]


def test_no_caption_describes_two_items():
    for pairs in draw_catalogue(3000, val_items=300, image_size=8):
        assert len(set(pairs.captions)) == len(pairs.captions) // 2


def test_words_name_what_is_visible_in_the_view(catalogue):
    pairs = catalogue[0]
    for caption, words, record in zip(
        pairs.captions, pairs.words_visible, pairs.records, strict=True
    ):
        names = caption.split()
        assert len(names) == len(words)
        visible = dict(zip(names, words, strict=True))
        assert visible[record["type"]] == visible[record["pattern"]] == 1
        assert visible[record["colour"]] == 1
        for kind, view in VIEW_OF.items():
            assert visible.get(kind, -1) == (int(record["view"] == view) if kind in record else -1)
            if kind in record:
                assert visible[record[kind].split()[0]] == visible[kind]
        plain = {"new", "classic", "summer", "winter", "cotton", "linen", "leather", "silk",
                 "with", "and", "a", "an", "on", "the"}  # fmt: skip
        assert all(visible[name] == -1 for name in plain & set(names))


@pytest.mark.parametrize("kind", GARMENTS)
@pytest.mark.parametrize("part", [BADGE, PRINT, POCKET], ids=lambda part: part.kind)
def test_a_detail_changes_its_own_pixels_in_its_own_view_only(kind, part):
    for view in ("front", "back"):
        without, body, none = draw(garment(kind=kind), view, 64, random.Random(1))
        image, same_body, detail = draw(garment(part, kind=kind), view, 64, random.Random(1))
        changed = (np.asarray(image) != np.asarray(without)).any(-1)
        covered = np.asarray(detail) > 0
        assert np.array_equal(body, same_body)
        assert not np.asarray(none).any()
        assert covered.any() == (VIEW_OF[part.kind] == view)
        assert not (changed & ~covered).any()
        assert changed.sum() >= 0.9 * covered.sum()
        if VIEW_OF[part.kind] == view:
            assert covered.sum() > 48
            assert (np.asarray(body)[covered] > 0).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_differ(shape):
    others = [other for other in SHAPES if other != shape]
    image = draw(garment(Detail("print", shape, "red")), "back", 64, random.Random(0))[2]
    for other in others:
        mask = draw(garment(Detail("print", other, "red")), "back", 64, random.Random(0))[2]
        assert np.abs(np.asarray(image, int) - np.asarray(mask, int)).sum() > 255 * 20


def test_patches_are_row_major_shares(catalogue):
    pairs = catalogue[0]
    rows = torch.arange(0, 80, 2)
    # Saturated pixels are cloth: white, black and the pale backdrops have none.
    colourful = [record["colour"] not in ("white", "black") for record in pairs.records]
    rows = rows[torch.tensor(colourful)[rows]]
    image = pairs.images[rows].float()
    saturated = (image.amax(1) - image.amin(1) > 60).float()
    share = torch.nn.functional.avg_pool2d(saturated, 8).flatten(1)
    described = pairs.patch_described[rows]
    agreement = torch.corrcoef(torch.stack([share.flatten(), described.flatten()]))[0, 1]
    transposed = described.view(-1, 8, 8).transpose(1, 2).flatten()
    wrong = torch.corrcoef(torch.stack([share.flatten(), transposed]))[0, 1]
    assert agreement > 0.9 > wrong + 0.1
    assert (pairs.patch_detail <= pairs.patch_described + 1e-6).all()
    assert described.min() == 0
    assert described.max() == 1


def test_other_sizes(catalogue):
    train, _ = draw_catalogue(2, val_items=1, image_size=96, patch_size=16)
    assert train.images.shape == (4, 3, 96, 96)
    assert train.patch_detail.shape == (4, 36)


@pytest.fixture(scope="module")
def data():
    return load_data(items=30, seed=3)


def test_dataset_fields(data):
    dataset = data.train
    assert len(dataset) == 60
    sample = dataset[3]
    assert {key: (value.dtype, tuple(value.shape)) for key, value in sample.items()} == {
        "image": (torch.uint8, (3, 64, 64)),
        "input_ids": (torch.int64, (dataset.input_ids.shape[1],)),
        "word_ids": (torch.int64, (dataset.input_ids.shape[1],)),
        "item_id": (torch.int64, ()),
        "index": (torch.int64, ()),
    }
    assert sample["index"] == 3
    assert torch.equal(sample["image"], dataset.images[3])


def test_dataset_batches_are_equal_by_every_road(data):
    rows = [5, 0, 17]
    loader = DataLoader(data.val, batch_sampler=[rows])
    (loaded,) = loader
    one_by_one = [data.val[i] for i in rows]
    for key, value in data.val[rows].items():
        assert torch.equal(value, data.val[torch.tensor(rows)][key])
        assert torch.equal(value, loaded[key])
        assert torch.equal(value, torch.stack([sample[key] for sample in one_by_one]))


def test_truth_follows_the_tokens(data):
    for dataset in (data.train, data.val):
        truth = dataset.truth
        assert truth.word_visible.dtype == torch.int8
        assert truth.word_visible.shape == dataset.input_ids.shape
        assert (truth.word_visible[dataset.word_ids < 0] == -1).all()
        front = [record["view"] == "front" for record in dataset.records]
        for name, seen_in_front in (("pocket", 1), ("print", 0), ("badge", 1), ("back", 0)):
            here = dataset.input_ids == data.tokenizer.convert_tokens_to_ids(name)
            assert here.any()
            wanted = torch.tensor(front)[:, None].expand_as(here)[here] == bool(seen_in_front)
            assert torch.equal(truth.word_visible[here], wanted.to(torch.int8))


def test_truth_of_words_in_several_pieces():
    pairs = Pairs(
        images=torch.zeros(1, 3, 8, 8, dtype=torch.uint8),
        captions=["red trousers plain"],
        item_ids=torch.zeros(1, dtype=torch.int64),
        records=[{}],
        words_visible=[[1, 0, -1]],
        patch_described=torch.zeros(1, 1),
        patch_detail=torch.zeros(1, 1),
    )
    tokenizer = train_tokenizer(["red plain t r o u s e", "xt xr xo xu xs xe"], vocab_size=60)
    dataset = PairDataset(pairs, tokenizer, 12)
    pieces = len(tokenizer.tokenize("trousers"))
    assert pieces > 1
    assert dataset.word_ids[0].tolist() == [-1, 0, *[1] * pieces, 2, *[-1] * (9 - pieces)]
    expected = [-1, 1, *[0] * pieces, *[-1] * (10 - pieces)]
    assert dataset.truth.word_visible[0].tolist() == expected


def test_length_is_the_longest_training_caption_cut_at_max_tokens(data):
    valid = data.train.input_ids != data.tokenizer.pad_token_id
    assert valid[:, -1].any()
    assert not valid[:, -1].all()
    short = load_data(items=30, seed=3, max_tokens=7)
    assert short.val.input_ids.shape[1] == 7
    assert (short.val.input_ids[:, -1] == short.tokenizer.sep_token_id).all()


def test_tokenizer_vocabulary_is_reproducible():
    rng = random.Random(0)
    captions = [
        " ".join("".join(rng.choices("abcdefgh", k=rng.randint(1, 9))) for _ in range(6))
        for _ in range(300)
    ]
    vocabularies = [train_tokenizer(captions, vocab_size=400).get_vocab() for _ in range(4)]
    assert all(vocabulary == vocabularies[0] for vocabulary in vocabularies)


def test_tokenizer_ids_and_words():
    tokenizer = train_tokenizer(["a red T-shirt", "a blue shirt"])
    assert tokenizer.convert_ids_to_tokens(range(5)) == [
        "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]",
    ]  # fmt: skip
    assert tokenizer.tokenize("A BLUE T-Shirt") == ["a", "blue", "t", "-", "shirt"]
    ids, words = tokenize(tokenizer, ["a red shirt", "a blue T-shirt a"], 6)
    assert tokenizer.convert_ids_to_tokens(ids[0].tolist()) == [
        "[CLS]", "a", "red", "shirt", "[SEP]", "[PAD]",
    ]  # fmt: skip
    assert words.tolist() == [[-1, 0, 1, 2, -1, -1], [-1, 0, 1, 2, 3, -1]]
    assert ids.dtype == words.dtype == torch.int64


def test_tokenizer_survives_a_checkpoint_folder(tmp_path, data):
    data.tokenizer.save_pretrained(tmp_path)
    restored = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    again = load_data(items=30, seed=3, tokenizer=restored)
    assert again.tokenizer is restored
    assert torch.equal(again.val.input_ids, data.val.input_ids)
    assert torch.equal(again.val.word_ids, data.val.word_ids)


def test_bad_sizes():
    with pytest.raises(ValueError, match="image_size 64 is not a multiple of patch_size 7"):
        load_data(patch_size=7)
    with pytest.raises(ValueError, match="items is 0"):
        load_data(items=0)
    with pytest.raises(ValueError, match="max_tokens is 2"):
        load_data(max_tokens=2)


RED, GREEN = (255, 0, 0), (0, 128, 0)


def encoded(colour, size=(40, 40), kind="PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, kind)
    return file.getvalue()


def write_photos(
    folder: Path, train: list[str], val: list[str], images: dict[str, bytes], tar=True
):
    (folder / "train.jsonl").write_text("\n".join(train) + "\n")
    (folder / "val.jsonl").write_text("\n".join(val) + "\n")
    if tar:
        with tarfile.open(folder / "images.tar", "w") as archive:
            for name, content in images.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    else:
        for name, content in images.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)


def line(image: str, caption: str, **more) -> str:
    return json.dumps({"image": image, "caption": caption, **more})


IMAGES = {"images/red.png": encoded(RED), "images/green.jpg": encoded(GREEN, (200, 100), "JPEG")}
TRAIN = [line("images/red.png", "red shirt", colour="Red"), line("images/green.jpg", "green bag")]


@pytest.mark.parametrize("tar", [True, False])
def test_photos_from_tar_and_folder(tmp_path, tar):
    write_photos(tmp_path, TRAIN, TRAIN[:1], IMAGES, tar)
    train, val = load_photos(tmp_path, image_size=16)
    assert train.images.shape == (2, 3, 16, 16)
    assert train.images.dtype == torch.uint8
    assert (train.images[0] == torch.tensor(RED)[:, None, None]).all()
    # The wide photo keeps its proportions between white bars.
    assert (train.images[1][:, [0, -1]] == 255).all()
    middle = train.images[1][:, 6:10].int() - torch.tensor(GREEN)[:, None, None]
    assert middle.abs().max() <= 2
    assert train.captions == ["red shirt", "green bag"]
    assert train.records[0] == {"image": "images/red.png", "colour": "Red"}
    assert len(val.images) == 1


def test_photos_lie_where_their_names_say_upright_and_on_white(tmp_path):
    sideways, logo, palette = io.BytesIO(), io.BytesIO(), io.BytesIO()
    exif = Image.Exif()
    exif[274] = 6  # orientation: to be turned clockwise, so that its left side is on top
    photo = Image.new("RGB", (32, 32), "white")
    photo.paste(RED, (0, 0, 16, 32))
    photo.save(sideways, "JPEG", exif=exif, subsampling=0)
    clear = Image.new("RGBA", (32, 32))
    clear.paste((*RED, 255), (0, 0, 32, 16))
    clear.save(logo, "PNG")
    clear.quantize().save(palette, "PNG")
    images = {"sideways.jpg": sideways, "img/logo.png": logo, "img/palette.png": palette}
    lines = [line(name, "red shirt") for name in images]
    contents = {name: file.getvalue() for name, file in images.items()}
    write_photos(tmp_path, lines, lines[:1], contents, tar=False)
    pairs, _ = load_photos(tmp_path, image_size=32)
    expected = torch.full((3, 32, 32), 255)
    expected[1:, :16] = 0
    for image in pairs.images:
        assert (image - expected).abs().max() <= 2


def test_items_by_product_or_by_caption(tmp_path):
    photo = "images/red.png"
    train = [
        line(photo, "a", product_id=7), line(photo, "b", product_id=7), line(photo, "a"),
        line(photo, "a", product_id=None), line(photo, "b"), line(photo, "a", product_id="x"),
    ]  # fmt: skip
    write_photos(tmp_path, train, [line(photo, "c", product_id=7), line(photo, "b")], IMAGES)
    pairs, val = load_photos(tmp_path, image_size=8)
    assert pairs.item_ids.tolist() == [0, 0, 1, 1, 2, 3]
    assert val.item_ids.tolist() == [0, 2]


def test_broken_lines_and_images_are_named_counted_and_skipped(tmp_path):
    images = {**IMAGES, "images/broken.jpg": IMAGES["images/green.jpg"][:200]}
    train = [
        TRAIN[0], "{not json", '["a list"]', line("images/broken.jpg", "torn"),
        line("images/lost.jpg", "lost"), line("images/red.png", ""), "", TRAIN[1],
        json.dumps({"image": "images/red.png", "text": "x"}),
    ]  # fmt: skip
    write_photos(tmp_path, train, TRAIN, images)
    with pytest.warns(UserWarning, match="6 of 8 pairs read are broken and left out") as caught:
        pairs, _ = load_photos(tmp_path, image_size=8, max_broken=0.75)
    (message,) = [str(warning.message) for warning in caught]
    for place in ("train.jsonl:2", "train.jsonl:3", "train.jsonl:4", "train.jsonl:5",
                  "train.jsonl:6", "images/broken.jpg", "images/lost.jpg",
                  "train.jsonl:9: no key 'caption'; the keys are ['image', 'text']"):  # fmt: skip
        assert place in message
    assert pairs.captions == ["red shirt", "green bag"]
    assert (pairs.images[0] == torch.tensor(RED)[:, None, None]).all()
    assert (pairs.images[1][:, 4, 4].int() - torch.tensor(GREEN)).abs().max() <= 2


def test_too_many_broken_lines_raise(tmp_path):
    write_photos(tmp_path, TRAIN, [*TRAIN, "{"], IMAGES)
    with pytest.raises(TooManyBroken, match=r"val\.jsonl: 1 of 3 pairs .* 30%.*\n.*val\.jsonl:3"):
        load_photos(tmp_path, max_broken=0.3)
    with pytest.warns(UserWarning, match="1 of 3"):
        load_photos(tmp_path, max_broken=0.34)


def test_a_tar_that_is_cut_off_is_used_as_far_as_it_goes(tmp_path):
    write_photos(tmp_path, TRAIN, TRAIN[:1], IMAGES)
    archive = tmp_path / "images.tar"
    archive.write_bytes(archive.read_bytes()[: 512 * 4])
    with pytest.warns(UserWarning, match="1 of 2 pairs .*\n.*train.jsonl:2: images/green.jpg"):
        train, _ = load_photos(tmp_path, max_broken=0.5)
    assert train.captions == ["red shirt"]


def test_unusable_folders_raise(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no data: neither train\.jsonl"):
        load_data(tmp_path)
    write_photos(tmp_path, TRAIN, [""], IMAGES)
    with pytest.raises(ValueError, match=r"val\.jsonl holds no image-caption pair"):
        load_data(tmp_path)
    (tmp_path / "val.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"val\.jsonl"):
        load_data(tmp_path)
    (tmp_path / "images.tar").write_bytes(b"no tar" * 1000)
    with pytest.raises(ValueError, match="no uncompressed tar"):
        load_data(tmp_path)
    (tmp_path / "images.tar").unlink()
    (tmp_path / "val.jsonl").write_text(TRAIN[0])
    with pytest.raises(TooManyBroken, match=r"(?s)2 of 2 pairs .*train\.jsonl:1: images/red\.png"):
        load_data(tmp_path)


def test_photos_train_and_validate_with_one_vocabulary(tmp_path):
    write_photos(tmp_path, TRAIN, [line("images/red.png", "red velvet bag of wool")], IMAGES)
    data = load_data(tmp_path, image_size=16, patch_size=4)
    assert data.train.truth is None
    assert data.val.input_ids.shape == (1, 4)
    assert data.tokenizer.convert_ids_to_tokens(data.val.input_ids[0].tolist())[1] == "red"
    assert data.tokenizer.unk_token_id in data.val.input_ids


def test_broken_pairs_are_named_once_and_counted_always():
    broken = Broken("shards", most=0.1, grace=100)
    with pytest.warns(UserWarning, match="shards: 2 of 8 pairs read are broken"):
        broken.note(8, ["a: torn", "b: torn"])
    broken.note(8, ["a: torn"])  # a warning would be an error
    assert (broken.count, broken.read) == (3, 16)
    broken.note(0, ["b: torn"] * 7)
    with pytest.raises(TooManyBroken, match="11 of 17 pairs read are broken, over the 10%"):
        broken.note(1, ["a: torn"])
