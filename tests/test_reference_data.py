"""The data of the reference model: drawn catalogue, photos, tokenizer, dataset."""

import io
import itertools
import json
import random
import tarfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from reference import evaluate as evaluation
from reference import pretrain as pretraining
from reference.config import PretrainConfig
from reference.data import PairDataset, TooManyBroken, kind_of, load_data, train_tokenizer
from reference.data.broken import Broken
from reference.data.catalogue import VIEW_OF, Detail, Garment, draw, draw_catalogue
from reference.data.dataset import Pairs
from reference.data.drawing import GARMENTS, SHAPES
from reference.data.fashiongen import load_fashiongen
from reference.data.photos import load_photos
from reference.data.shards import ShardStream, item_id, read_samples, shards_of
from reference.data.tokenizer import tokenize
from reference.run_files import load_json, load_metrics


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
    with pytest.raises(FileNotFoundError, match=r"neither images\.tar nor a folder images"):
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


COLOURS = np.array([[250, 0, 0], [0, 250, 0], [0, 0, 250], [250, 250, 0], [0, 250, 250]], np.uint8)
NAMES = [b"Red Shirt", b"Green Bag", b"Blue Caf\xe9 Hat", b"Yellow Hat", b"Cyan Hat"]


def write_fashiongen(path: Path, products: list[int], torn: tuple[int, ...] = ()) -> None:
    """A file in FashionGen's layout: plain images of 32 pixels, whose chunks `torn` are damaged."""
    n = len(products)
    pixels = np.broadcast_to(COLOURS[:n, None, None], (n, 32, 32, 3))
    columns = {
        "description": [b"a " + name.lower() + b" of silk" for name in NAMES[:n]],
        "name": NAMES[:n],
        "category": [b"TOPS", b"BAGS", b"HATS", b"HATS", b"HATS"][:n],
        "pose": [b"id_gridfs_%d" % (i + 1) for i in range(n)],
    }
    with h5py.File(path, "w") as file:
        images = file.create_dataset(
            "input_image", data=pixels, chunks=(1, 32, 32, 3), fletcher32=True
        )
        for name, values in columns.items():
            file[f"input_{name}"] = np.array(values, "S40").reshape(n, 1)
        file["input_productID"] = np.array(products, np.int32).reshape(n, 1)
        file["index"] = np.arange(n).reshape(n, 1)
        places = [images.id.get_chunk_info(row).byte_offset for row in torn]
    with open(path, "r+b") as file:
        for place in places:
            file.seek(place)
            file.write(b"torn")


def fashiongen_files(folder: Path) -> list[Path]:
    return [folder / f"fashiongen_256_256_{split}.h5" for split in ("train", "validation")]


def test_fashiongen_is_read_when_asked(tmp_path, monkeypatch):
    train, val = fashiongen_files(tmp_path)
    write_fashiongen(train, [7, 7, 3, 9, 3])
    write_fashiongen(val, [9, 4])
    reads = []
    whole = h5py.Dataset.__getitem__
    monkeypatch.setattr(
        h5py.Dataset, "__getitem__", lambda *call: reads.append(call[1]) or whole(*call)
    )
    data = load_data(tmp_path, image_size=16)
    columns = [read for read in reads if read == ()]
    assert [read for read in reads if read != ()] == [0, 1]  # the validation images are checked
    assert len(columns) == 2 * 5
    assert kind_of(tmp_path) == "fashiongen"
    assert data.train.item_ids.tolist() == [0, 0, 1, 2, 1]
    assert data.val.item_ids.tolist() == [2, 3]
    assert data.train.captions[2] == "a blue café hat of silk"
    assert data.train.records[2] == {
        "image": "fashiongen_256_256_train.h5:2", "product_id": "3", "name": "Blue Café Hat",
        "category": "HATS", "pose": "id_gridfs_3",
    }  # fmt: skip
    rows = torch.tensor([[4, 0], [0, 1]])
    images = data.train.images[rows]
    assert images.shape == (2, 2, 3, 16, 16)
    assert images.dtype == torch.uint8
    assert (images == torch.from_numpy(COLOURS)[rows][..., None, None]).all()
    assert torch.equal(data.train[4]["image"], images[0, 0])
    assert torch.equal(data.train[[4, 0]]["image"], images[0])
    assert reads[12:] == [4, 0, 0, 1, 4, 4, 0]


def test_a_broken_image_of_fashiongen_gives_its_place_to_another(tmp_path):
    train, val = fashiongen_files(tmp_path)
    write_fashiongen(train, [7, 7, 3, 9, 3], torn=(1, 4))
    write_fashiongen(val, [9, 4, 5], torn=(1,))
    with pytest.warns(UserWarning, match=r"validation\.h5: 1 of 3 pairs .*\n  row 1: OSError"):
        data = load_data(tmp_path, image_size=16, max_broken=0.4)
    assert data.val.captions == ["a red shirt of silk", "a blue café hat of silk"]
    with pytest.warns(UserWarning, match=r"train\.h5: 1 of 4 pairs .*\n  row 1: OSError"):
        batch = data.train[[0, 1, 2, 3]]
    whole = data.train[[0, 2, 2, 3]]
    assert batch.pop("index").tolist() == [0, 1, 2, 3]
    whole.pop("index")
    for name, values in batch.items():
        assert torch.equal(values, whole[name])
    with pytest.warns(UserWarning, match="2 of 10 pairs .*\n  row 4: OSError"):
        assert data.train[[3, 4]]["item_id"].tolist() == [2, 2]
    with pytest.raises(ValueError, match="no image of a batch can be read: row 4: OSError"):
        data.train[[4]]
    with pytest.raises(TooManyBroken, match=r"validation\.h5: 1 of 3"):
        load_fashiongen(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda file: file.move("input_name", "name") or file.move("input_image", "image"),
         "no input_image; there are image, index, input_category"),
        (lambda file: file.move("input_pose", "p") or file.__setitem__("input_pose", [b"a"]),
         r"input_pose must be \[2, 1\], one for each image, got \[1\]"),
        (lambda file: file.move("input_image", "i") or file.__setitem__("input_image", [1.0]),
         r"input_image must be uint8 \[N, height, width, 3\], got float64 \[1\]"),
    ],
)  # fmt: skip
def test_files_of_another_layout(tmp_path, change, message):
    for path in fashiongen_files(tmp_path):
        write_fashiongen(path, [1, 2])
    with h5py.File(path, "r+") as file:
        change(file)
    with pytest.raises(ValueError, match=message):
        load_fashiongen(tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"0 files \*_validation\.h5 instead of one"):
        load_fashiongen(tmp_path)


def write_shards(
    folder: Path, split: str, sizes: list[int], torn: tuple[int, ...] = (), bare: tuple = ()
) -> None:
    """Shards of pairs numbered through, some with a broken image, some without a caption."""
    folder.mkdir(exist_ok=True)
    numbers = iter(range(sum(sizes)))
    for shard, size in enumerate(sizes):
        with tarfile.open(folder / f"{split}-{shard:03d}.tar", "w") as archive:
            for number in itertools.islice(numbers, size):
                record = {"product_id": number // 2, "colour": "grey"}
                record |= {} if number in bare else {"caption": f"item {number}"}
                image = b"no image" if number in torn else encoded((number, number, number))
                for kind, content in (("png", image), ("json", json.dumps(record).encode())):
                    member = tarfile.TarInfo(f"{number:05d}.{kind}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))


def numbers_of(stream: ShardStream, batches: int) -> list[int]:
    """What the images of batches say that they are, checked against texts and items."""
    found: list[int] = []
    for _ in range(batches):
        batch = next(stream)
        numbers = batch["image"][:, 0, 0, 0].tolist()
        words = stream.tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)
        assert words == [f"item {number}" for number in numbers]
        assert batch["item_id"].tolist() == [item_id({"product_id": n // 2}) for n in numbers]
        found += numbers
    return found


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder, "train", [9, 7, 8, 8])
    write_shards(folder, "val", [3])
    return folder


def stream_of(folder: Path, **options) -> ShardStream:
    tokenizer = train_tokenizer([f"item {number}" for number in range(100)])
    values = {"batch_size": 4, "image_size": 8, "workers": 0, "buffer": 6}
    return ShardStream(shards_of(folder, "train"), tokenizer, 8, **values | options)


def test_a_pass_over_shards_has_every_pair_once(shards):
    stream = stream_of(shards)
    first, second = (numbers_of(stream, 8) for _ in range(2))
    assert sorted(first) == sorted(second) == list(range(32))
    assert first != second
    assert numbers_of(stream_of(shards), 8) == first
    assert numbers_of(stream_of(shards, seed=1), 8) != first
    in_order = [sample.name for sample in read_samples(shards_of(shards, "train"), [])]
    assert in_order[8:10] == ["train-000.tar:00008", "train-001.tar:00009"]


def test_ranks_and_workers_share_a_pass(shards, monkeypatch):
    monkeypatch.setattr("reference.ranks.size", lambda: 2)
    seen = []
    for rank in (0, 1):
        monkeypatch.setattr("reference.ranks.rank", lambda rank=rank: rank)
        stream = stream_of(shards, workers=2, batch_size=1)
        seen += numbers_of(stream, 14)  # no worker has less than 7 pairs
    assert len(set(seen)) == 28
    with pytest.raises(ValueError, match="4 shards are too few for 2 processes of 3 workers"):
        stream_of(shards, workers=3)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_goes_on_where_it_was_saved(shards, workers):
    stream = stream_of(shards, workers=workers, batch_size=3)
    for batches in (5, 14):  # in the middle of the first pass, and of the second or third
        before = stream.state_dict()
        numbers_of(stream, batches)
        state = json.loads(json.dumps(stream.state_dict()))
        after = numbers_of(stream, 7)
        resumed = stream_of(shards, workers=workers, batch_size=3)
        resumed.load_state_dict(state)
        assert numbers_of(resumed, 7) == after
        assert state["batches"] == before["batches"] + batches
        before = state
    with pytest.raises(ValueError, match=r"state must be of a stream of .* got \(4, 1"):
        stream_of(shards, batch_size=5).load_state_dict(state)


def test_a_run_on_shards_goes_on_where_it_was_cut(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(pretraining, "write_report", lambda run: run)
    options = {
        "data": str(shards), "workers": 2, "shuffle_buffer": 6, "image_size": 16, "width": 16,
        "heads": 2, "image_layers": 1, "fusion_layers": 1, "projection": 8, "batch_size": 3,
        "steps": 8, "random_mask_steps": 2, "log_every": 1, "save_every": 5, "accumulate": 2,
    }  # fmt: skip
    whole, run = tmp_path / "whole", tmp_path / "run"
    pretraining.pretrain(PretrainConfig(**options, output=str(whole)))
    with monkeypatch.context() as patch:
        patch.setattr(pretraining, "_log", lambda *call: call[3] == 7 and 1 / 0)
        with pytest.raises(ZeroDivisionError):
            pretraining.pretrain(PretrainConfig(**options, output=str(run)))
    pretraining.pretrain(PretrainConfig(**options, output=str(run), resume=True))
    first, second = (
        [{k: v for k, v in row.items() if k != "seconds"} for row in load_metrics(folder)]
        for folder in (whole, run)
    )
    assert first == second
    assert len(first) == 9
    monkeypatch.setattr(evaluation, "write_report", lambda run: run)
    evaluation.main([str(run), "--task", "recognition"])
    skipped = load_json(run / "evaluation.json")["skipped"]
    assert skipped["recognition"] == "the training split is a stream of shards"


def test_broken_samples_of_shards(tmp_path):
    write_shards(tmp_path, "train", [4, 4, 4], torn=(2, 5), bare=(9,))
    tar = tmp_path / "train-002.tar"
    tar.write_bytes(tar.read_bytes()[: 512 * 13 + 20])  # in the image of its fourth pair
    stream = stream_of(tmp_path, batch_size=2, buffer=1)
    with pytest.warns(UserWarning, match="pairs read are broken") as caught:
        seen = numbers_of(stream, 5)
    message = "\n".join(str(warning.message) for warning in caught)
    for name in ("000.tar:00002: ValueError: no image of", "001.tar:00005: ValueError: no image of",
                 "002.tar:00009: no caption", "002.tar: ReadError: unexpected end"):  # fmt: skip
        assert name in message
    assert set(seen) == {0, 1, 3, 4, 6, 7, 8, 10}
    assert len(seen) == 10  # a broken pair's place was taken by another of its batch
    (tmp_path / "val.shards").write_text(f"{tmp_path}/train-00{{0..1}}.tar\n\n")
    with pytest.warns(UserWarning, match="2 of 8 pairs read are broken"):
        data = load_data(tmp_path, image_size=8, max_broken=0.25)
    assert data.val.captions == [f"item {number}" for number in (0, 1, 3, 4, 6, 7)]
    assert data.val.records[0] == {
        "image": "train-000.tar:00000", "product_id": 0, "colour": "grey",
    }  # fmt: skip
    with pytest.raises(TooManyBroken, match="val: 2 of 8"):
        load_data(tmp_path, image_size=8)


def test_unusable_shards(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"neither train-\*\.tar nor train\.shards"):
        shards_of(tmp_path, "train")
    problems = []
    assert not list(read_samples(["pipe:exit 3"], problems))
    assert "exit 3" in problems[-1]
    (tmp_path / "train.shards").write_text(str(tmp_path / "lost.tar"))
    with pytest.raises(ValueError, match=r"1 shards hold no pair: .*lost\.tar: .*No such file"):
        next(stream_of(tmp_path))
    with pytest.raises(ValueError, match="batches is 'hardest', but shards are a stream"):
        PretrainConfig(data=str(tmp_path), batches="hardest").load_data()
