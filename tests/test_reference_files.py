"""Data that outgrows the memory: FashionGen's files and streams of shards."""

import io
import itertools
import json
import tarfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

from reference import evaluate as evaluation
from reference import pretrain as pretraining
from reference.config import PretrainConfig
from reference.data import TooManyBroken, kind_of, load_data, train_tokenizer
from reference.data.fashiongen import load_fashiongen
from reference.data.shards import ShardStream, item_id, read_samples, shards_of
from reference.run_files import load_json, load_metrics

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


def grey(level: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (level, level, level)).save(file, "PNG")
    return file.getvalue()


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
                image = b"no image" if number in torn else grey(number)
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
    in_order = [sample.name for sample in read_samples(shards_of(shards, "train"))]
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


@pytest.mark.filterwarnings("ignore:.*pairs read are broken")
@pytest.mark.parametrize("buffer", [1, 100])
def test_every_broken_sample_is_met_once(tmp_path, buffer):
    """However many are read ahead to be shuffled, and read again to resume."""
    write_shards(tmp_path, "train", [20, 20, 20], torn=(30,), bare=(0, 4, 9, 21, 22, 41, 58, 59))
    whole, cut, resumed = (stream_of(tmp_path, buffer=buffer) for _ in range(3))
    broken = []
    for _ in range(13):  # 52 usable samples make a pass
        next(whole)
        broken.append(whole.broken)
    assert len(set(broken)) > 4
    assert 7 <= broken[-1] <= 9  # the last ones of a pass are met as the next one begins
    assert whole._broken.read == 52 + broken[-1] - 1  # the torn one is among the 52
    for _ in range(7):
        next(cut)
    resumed.load_state_dict(cut.state_dict())
    assert [next(resumed) and resumed.broken for _ in range(6)] == [
        count - cut.broken for count in broken[7:]
    ]


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
    *_, problem = read_samples(["pipe:exit 3"])
    assert "exit 3" in problem
    (tmp_path / "train.shards").write_text(str(tmp_path / "lost.tar"))
    with pytest.raises(ValueError, match=r"1 shards hold no pair: .*lost\.tar: .*No such file"):
        next(stream_of(tmp_path))
    with pytest.raises(ValueError, match="batches is 'hardest', but shards are a stream"):
        PretrainConfig(data=str(tmp_path), batches="hardest").load_data()
