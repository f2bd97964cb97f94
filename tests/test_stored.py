"""Pictures inside tar shards, Parquet and Arrow tables, written by the libraries that people write them with."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import tarfile
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from minivlp.__main__ import main
from minivlp.data.folders import Folder, open_folder
from minivlp.data.loading import Loader
from minivlp.data.scenes import Scenes
from minivlp.data.stored import shard_index
from minivlp.data.text import load_tokenizer
from minivlp.data.validation import DataError
from minivlp.models.clip import CLIP, CLIPConfig
from minivlp.training.loop import Settings, fit
from minivlp.training.run import run_identity

datasets = pytest.importorskip("datasets")
wds = pytest.importorskip("webdataset")
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
datasets.disable_progress_bars()

COUNT = 64
SCENES = Scenes(COUNT, split="all", size=48)
SAID = [SCENES.captions(row)[:2] for row in range(COUNT)]


@pytest.fixture(autouse=True)
def own_caches(tmp_path, monkeypatch):
    """Indexes of shards and converted tables stay in the test's folder, and the hub is never asked."""
    monkeypatch.setenv("MINIVLP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def jpeg(row: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(SCENES[row].image).save(file, "JPEG", quality=95)
    return file.getvalue()


def facts(row: int, **changes) -> dict:
    """What img2dataset writes into the JSON of a sample."""
    return {
        "caption": SAID[row][0], "url": f"https://example.org/{row}.jpg", "key": f"{row:09}", "status": "success",
        "error_message": None, "width": 48, "height": 48, "original_width": 48, "original_height": 48,
        "exif": "{}", "sha256": f"{row:064x}", **changes,
    }  # fmt: skip


def sample(row: int, **changes) -> dict:
    """A sample as img2dataset hands it to webdataset's writer; None leaves a file out."""
    found = {"__key__": f"{row:09}", "jpg": jpeg(row), "txt": SAID[row][0], "json": facts(row), **changes}
    return {name: value for name, value in found.items() if value is not None}


def write_shards(folder, rows=range(COUNT), per_shard: int = 25, changes=None, name: str = "{:05}.tar"):
    folder.mkdir(parents=True, exist_ok=True)
    rows = list(rows)
    for number in range(-(-len(rows) // per_shard)):
        with wds.TarWriter(str(folder / name.format(number))) as writer:
            for row in rows[number * per_shard : (number + 1) * per_shard]:
                writer.write(sample(row, **(changes or {}).get(row, {})))
    (folder / "00000_stats.json").write_text("{}")
    return f"wds:{folder}"


def table_of_images(rows=range(COUNT), **columns):
    """A table of `datasets` with an image column and a list of captions."""
    rows = list(rows)
    features = {"image": datasets.Image(), "caption": datasets.List(datasets.Value("string"))}
    values = {
        "image": [{"bytes": jpeg(row), "path": f"{row:05}.jpg"} for row in rows],
        "caption": [SAID[r] for r in rows],
    }
    made = datasets.Dataset.from_dict(values, features=datasets.Features(features))
    for name, column in columns.items():
        made = made.add_column(name, column)
    return made


def write_disk(folder):
    table_of_images().save_to_disk(folder)
    return f"hf:{folder}"


def write_splits(folder):
    parts = {"train": range(40), "validation": range(40, 50), "test": range(50, COUNT)}
    datasets.DatasetDict({name: table_of_images(rows) for name, rows in parts.items()}).save_to_disk(folder)
    return f"hf:{folder}"


def write_hub_folder(folder):
    """A folder as the hub has it: Parquet with image columns, by split."""
    (folder / "data").mkdir(parents=True)
    for name, rows in {"train": range(50), "test": range(50, COUNT)}.items():
        table_of_images(rows).to_parquet(folder / "data" / f"{name}-00000-of-00001.parquet")
    return f"hf:{folder}"


def write_parquet(folder, changes=None):
    """As img2dataset writes with output_format="parquet": bytes in a column that is called like the format."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, rows in enumerate((range(32), range(32, COUNT))):
        items = [{**facts(row), "jpg": jpeg(row), **(changes or {}).get(row, {})} for row in rows]
        pq.write_table(pa.Table.from_pylist(items), folder / f"{number:05}.parquet")
    (folder / "00000_stats.json").write_text("{}")
    return f"parquet:{folder}"


WRITERS = {
    "wds": write_shards,
    "hf": write_disk,
    "splits": write_splits,
    "hub": write_hub_folder,
    "parquet": write_parquet,
}


@pytest.mark.parametrize("kind", WRITERS)
def test_what_the_libraries_wrote_is_read(tmp_path, kind, capsys):
    spec = WRITERS[kind](tmp_path / "data")
    folder = open_folder(spec)
    assert len(folder) == COUNT and "skipped" not in capsys.readouterr().out
    for row in (0, 30, COUNT - 1):
        assert np.array_equal(folder[row].image, np.asarray(Image.open(io.BytesIO(jpeg(row)))))
        assert folder.captions(row) == (SAID[row] if kind in ("hf", "splits", "hub") else SAID[row][:1])
    assert folder.pixels([5, 3], (16, 32)).shape == (2, 16, 32, 3) and folder.regions(0) == []
    assert len({folder.image_id(row) for row in range(COUNT)}) == COUNT
    again = pickle.loads(pickle.dumps(folder))  # as another process gets it
    assert np.array_equal(again.pixels([7], 16), folder.pixels([7], 16))
    parts = [open_folder(spec, split) for split in ("train", "test")]
    ids = [{part.image_id(row) for row in range(len(part))} for part in parts]
    assert ids[0] and ids[1] and not ids[0] & ids[1]
    assert {"splits": [40, 14], "hub": [50, 14]}.get(kind, [len(ids[0]), len(ids[1])]) == [len(ids[0]), len(ids[1])]
    some = open_folder(spec, subset=10, seed=3)
    assert [some.image_id(row) for row in range(10)] == sorted(some.image_id(row) for row in range(10))
    assert some.captions(4) == folder.captions(some.image_id(4))


@pytest.mark.parametrize("kind", ["wds", "hf", "parquet"])
def test_clip_trains_for_20_steps_and_a_resumed_run_is_equal_bit_for_bit(tmp_path, kind):
    spec, tokenizer = WRITERS[kind](tmp_path / "data"), load_tokenizer()
    settings = Settings(steps=20, warmup=2, save_every=4)

    def train(out, stop: int | None = None):
        """Everything is opened anew, as in a new process."""
        dataset = open_folder(spec)
        config = CLIPConfig.nano(len(tokenizer))
        image, text = replace(config.image, image_size=32, layers=1), replace(config.text, layers=1)
        loader = Loader(dataset, tokenizer, 8, 32, seed=1, max_tokens=20)
        torch.manual_seed(0)
        model = CLIP(replace(config, image=image, text=text))

        def interrupt(row):
            if row["step"] == stop:
                raise KeyboardInterrupt

        identity = run_identity(dataset, tokenizer, 1)
        history = fit(
            model, loader.batch, settings, run_dir=out, identity=identity, on_step=[interrupt], bar=False, device="cpu"
        )
        return model, history

    whole, history = train(tmp_path / "whole")
    assert len(history.steps) == 20 and history.steps[-1]["loss"] < history.steps[0]["loss"]
    assert train(tmp_path / "parts", stop=10)[1].interrupted
    resumed, history = train(tmp_path / "parts")
    assert len(history.steps) == 20
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


@pytest.mark.parametrize("kind", ["wds", "hf", "parquet"])
def test_a_batch_is_a_function_of_seed_and_step_and_is_divided_by_rows(tmp_path, kind):
    spec, tokenizer = WRITERS[kind](tmp_path / "data"), load_tokenizer()
    one, two = (Loader(open_folder(spec), tokenizer, 8, 16, seed=5) for _ in range(2))
    epoch = [one.batch(step) for step in range(one.steps_per_epoch)]
    assert sorted(torch.cat([batch.image_ids for batch in epoch]).tolist()) == list(range(COUNT))  # each once
    assert torch.cat([batch.image_ids for batch in epoch]).tolist() != list(range(COUNT))
    for step in (6, 1):  # in any order
        assert torch.equal(two.batch(step).images, epoch[step].images) and torch.equal(
            two.batch(step).text.ids, epoch[step].text.ids
        )
    rows = np.array([3, 40, 41, 9])
    dataset = one.dataset
    parts = [dataset.pixels(rows[part], 16) for part in (slice(0, 2), slice(2, 4))]  # two processes
    assert np.array_equal(np.concatenate(parts), dataset.pixels(rows, 16))


def test_the_command_line_reads_shards(tmp_path, capsys):
    spec = write_shards(tmp_path / "data")
    assert main(["data", spec, "--split", "train"]) == 0
    assert "00000.tar key 00000000" in capsys.readouterr().out
    assert main(["data", f"wds:{tmp_path / 'nowhere'}"]) == 1
    assert "no such shard" in capsys.readouterr().err


def test_memory_does_not_grow_with_the_pictures(tmp_path):
    spec = write_shards(tmp_path / "data")
    open_folder(spec)
    tracemalloc.start()
    folder = open_folder(spec)
    used = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(folder) == COUNT and used < 60_000 < (tmp_path / "data" / "00000.tar").stat().st_size


# -------------------------------------------------------------------------------------------------------------- shards


def test_the_index_is_made_once_and_again_when_the_shard_changes(tmp_path, monkeypatch):
    spec, made = write_shards(tmp_path / "data"), []
    real = shard_index.make_index
    monkeypatch.setattr(shard_index, "make_index", lambda *given: made.append(given[0].name) or real(*given))
    first = open_folder(spec)
    assert made == ["00000.tar", "00001.tar", "00002.tar"]
    second = open_folder(spec)
    assert len(made) == 3 and [*second.rows] == [*first.rows]
    write_shards(tmp_path / "data", range(30))
    assert len(open_folder(spec)) == 30 + 14 and made[3:] == ["00000.tar", "00001.tar"]
    for kept in (tmp_path / "cache" / "shards").iterdir():
        kept.write_text("{damaged")
    assert len(open_folder(spec)) == 44
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").write_text("no folder can be made here")
    assert len(open_folder(spec)) == 44


@pytest.mark.parametrize(
    ("txt", "facts_of", "captions"),
    [
        ("a cat\nasleep", {"caption": "a cat\nasleep"}, ["a cat asleep"]),  # as img2dataset: one alt text
        ("a cat\na pet\n\n", None, ["a cat", "a pet"]),  # as CLIP's benchmarks: a caption to a line
        (None, {"captions": ["a cat", "a pet", "a cat"]}, ["a cat", "a pet"]),
        ("a cat", {"caption": "a small cat"}, ["a cat", "a small cat"]),
        ("a cat", {"caption": None}, ["a cat"]),
        (None, {"text": " a  cat "}, ["a cat"]),
    ],
)
def test_captions_of_a_sample(tmp_path, txt, facts_of, captions):
    spec = write_shards(tmp_path / "data", [0], changes={0: {"txt": txt, "json": facts_of}})
    assert open_folder(spec).captions(0) == captions


def test_captions_in_another_language(tmp_path):
    changes = {0: {"json": facts(0, caption_zh="一只狗")}}
    spec = write_shards(tmp_path / "data", [0], changes=changes)
    assert open_folder(spec, language="zh").captions(0) == ["一只狗"]
    assert open_folder(spec).captions(0) == SAID[0][:1]
    with pytest.raises(DataError, match="key 000000000: no caption.*caption_fr"):
        open_folder(spec, language="fr")


def test_splits_by_folders_names_and_json(tmp_path):
    write_shards(tmp_path / "a" / "train", range(20))
    write_shards(tmp_path / "a" / "val", range(20, 30))
    assert [len(open_folder(f"wds:{tmp_path / 'a'}", split)) for split in ("train", "validation")] == [20, 10]
    with pytest.raises(DataError, match="'test'.*train, validation"):
        open_folder(f"wds:{tmp_path / 'a'}", "test")
    for split, rows in (("train", range(20)), ("test", range(20, 30))):
        write_shards(tmp_path / "b", rows, name=f"cc3m-{split}-{{:04}}.tar")
    assert [len(open_folder(f"wds:{tmp_path / 'b'}", split)) for split in ("train", "test")] == [20, 10]
    changes = {row: {"json": facts(row, split="test" if row < 5 else "train")} for row in range(20)}
    spec = write_shards(tmp_path / "c", range(20), changes=changes)
    assert [len(open_folder(spec, split)) for split in ("train", "test")] == [15, 5]
    one = write_shards(tmp_path / "d", name="laion-train-{:04}.tar")  # a single name says nothing: 80/10/10
    assert 0 < len(open_folder(one, "test")) < 20


def test_pictures_of_one_hash_are_one_picture(tmp_path):
    changes = {3: {"json": facts(3, sha256=facts(1)["sha256"])}}
    folder = open_folder(write_shards(tmp_path / "data", range(5), changes=changes))
    assert [folder.image_id(row) for row in range(5)] == [0, 1, 2, 1, 4]


def test_some_shards_by_a_pattern_or_by_name(tmp_path):
    write_shards(tmp_path / "data")
    assert len(open_folder(f"wds:{tmp_path / 'data'}/{{00001..00002}}.tar")) == COUNT - 25
    assert len(open_folder(f"wds:{tmp_path / 'data'}/0000[01].tar")) == 50
    assert len(open_folder(f"wds:{tmp_path / 'data' / '00002.tar'}")) == COUNT - 50
    with pytest.raises(DataError, match="00003.tar: no such shard"):
        open_folder(f"wds:{tmp_path / 'data'}/{{00002..00003}}.tar")


def test_what_is_elsewhere_is_fetched_once_by_webdataset(tmp_path, capsys):
    write_shards(tmp_path / "data")
    spec = f"wds:pipe:cat {tmp_path / 'data'}/{{00000..00001}}.tar"
    assert len(open_folder(spec)) == 50 and capsys.readouterr().out.count("fetching") == 2
    assert len(open_folder(spec)) == 50 and "fetching" not in capsys.readouterr().out
    with pytest.raises(DataError, match="cannot be fetched"):
        open_folder("wds:pipe:cat /no/such/shard.tar")
    assert len(list((tmp_path / "cache" / "fetched").iterdir())) == 2  # nothing is left of what failed


BROKEN = {  # what is wrong with the sample of row 3, and what the message says
    "failed download": ({"jpg": None, "txt": None, "json": facts(3, status="failed_to_download",
                        error_message="HTTP Error 404", caption=None)}, "download failed.*404"),
    "failed to resize": ({"json": facts(3, status="failed_to_resize", error_message=None)}, "failed_to_resize"),
    "no picture": ({"jpg": None}, "no picture.*jpg"),
    "two pictures": ({"png": jpeg(3)}, "several pictures.*jpg"),
    "no caption": ({"txt": None, "json": facts(3, caption=None)}, "caption"),
    "a JSON without caption": ({"txt": None, "json": {"url": "x"}}, "no caption"),
    "neither text nor JSON": ({"txt": None, "json": None}, "no caption"),
    "an empty text": ({"txt": "", "json": None}, "empty caption"),
    "a number": ({"txt": None, "json": {"caption": 7}}, "not text"),
    "broken JSON": ({"json": b'{"caption": "cut'}, "broken JSON"),
    "a list": ({"json": b"[1, 2]"}, "not an object"),
    "latin-1": ({"txt": "caf\u00e9".encode("latin-1"), "json": None}, "not UTF-8"),
    "an unknown split": ({"json": facts(3, split="dve")}, "unknown split.*dve"),
    "a mistyped field": ({"json": {"captoin": "a cat"}, "txt": None}, "captoin.*caption"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_sample_is_named_or_skipped(tmp_path, kind, capsys):
    changes, message = BROKEN[kind]
    spec = write_shards(tmp_path / "data", range(10), changes={3: changes}, per_shard=5)
    with pytest.raises(DataError, match=rf"00000\.tar key 000000003: .*{message}"):
        open_folder(spec)
    folder = open_folder(spec, on_error="skip")
    assert [folder.captions(row) for row in range(9)] == [SAID[row][:1] for row in range(10) if row != 3]
    assert "skipped 1 of 10 rows" in capsys.readouterr().out
    assert folder.rows_skipped[0][0] == "00000.tar key 000000003"


@pytest.mark.parametrize("picture", [b"", b"<html>404</html>", jpeg(3)[:500], b"\x89PNG\r\n\x1a\n" + bytes(99)])
@pytest.mark.parametrize("kind", ["wds", "parquet"])
def test_a_picture_that_cannot_be_decoded_is_named_when_used_or_skipped(tmp_path, kind, picture, capsys):
    spec = WRITERS[kind](tmp_path / "data", changes={3: {"jpg": picture}})
    where = {"wds": r"00000\.tar key 000000003", "parquet": r"files row 3 \(000000003\)"}[kind]
    folder = open_folder(spec)
    with pytest.raises(DataError, match=rf"{where}\).*image"):
        folder.pixels([2, 3], 16)
    folder = open_folder(spec, on_error="skip")
    assert len(folder) == COUNT - 1 and folder.captions(3) == SAID[4][:1]
    assert f"skipped 1 of {COUNT} rows" in capsys.readouterr().out
    assert len(open_folder(spec, subset=COUNT, on_error="skip")) == COUNT - 1


def test_a_shard_that_changes_under_a_run_is_named(tmp_path):
    folder = open_folder(write_shards(tmp_path / "data"))
    (tmp_path / "data" / "00001.tar").write_bytes(b"short")
    with pytest.raises(DataError, match=r"00001\.tar.*shorter"):
        folder.pixels([30], 16)
    (tmp_path / "data" / "00000.tar").unlink()
    with pytest.raises(DataError, match=r"00000\.tar.*restore"):
        folder[0]


def damaged(content: bytes, kind: str) -> bytes:
    if kind == "cut inside a picture":
        return content[: len(content) // 2 + 700]
    if kind == "a header is overwritten":
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            start = tar.getmembers()[20].offset
        return content[:start] + b"x" * 512 + content[start + 512 :]
    return {"html": b"<html>404</html>" * 99, "nothing": b"", "gzip": __import__("gzip").compress(content)}[kind]


@pytest.mark.parametrize("kind", ["cut inside a picture", "a header is overwritten", "html", "nothing", "gzip"])
def test_a_damaged_shard_is_named_and_what_is_sound_can_be_read(tmp_path, kind, capsys):
    spec = write_shards(tmp_path / "data", per_shard=32)
    file = tmp_path / "data" / "00001.tar"
    file.write_bytes(damaged(file.read_bytes(), kind))
    with pytest.raises(DataError, match=r"00001\.tar: shard (damaged|cannot be read)"):
        open_folder(spec)
    folder = open_folder(spec, on_error="skip")
    assert 32 <= len(folder) < COUNT and folder.captions(31) == SAID[31][:1]
    assert "skipped" in capsys.readouterr().out
    folder.pixels(range(len(folder)), 8)


def test_a_shard_without_its_end_is_counted(tmp_path, capsys):
    spec = write_shards(tmp_path / "data", per_shard=32)
    file = tmp_path / "data" / "00001.tar"
    with tarfile.open(file) as tar:
        last = tar.getmembers()[-1]
    file.write_bytes(file.read_bytes()[: -(-(last.offset_data + last.size) // 512) * 512])
    assert len(open_folder(spec)) == COUNT and "shard without end" in capsys.readouterr().out


def test_what_is_not_read_is_told(tmp_path, capsys):
    changes = {row: {"cls": "3", "json": facts(row, mood="blue", regions=[{"box": [0, 0, 9, 9]}])} for row in range(4)}
    open_folder(write_shards(tmp_path / "data", range(4), changes=changes))
    printed = capsys.readouterr().out
    for what in ("files .cls of shards are not read", "column 'mood' is not read", "boxes of shards are not read"):
        assert f"{what}" in printed and "(4 rows" in printed
    assert "url" not in printed and "sha256" not in printed


@pytest.mark.parametrize(
    ("files", "message"),
    [({}, "no .tar file"), ({"a.tar.gz": b"x"}, "Decompress"), ({"a.jpg": b"x"}, "wds:DIR")],
)
def test_a_folder_without_shards(tmp_path, files, message):
    (tmp_path / "data").mkdir()
    for name, content in files.items():
        (tmp_path / "data" / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        open_folder(f"wds:{tmp_path / 'data'}")


# -------------------------------------------------------------------------------------------------------------- tables

CAPTIONS = {  # columns of published data sets, and the captions of row 0
    "a text": ({"text": ["a cat", "a dog"]}, ["a cat"]),
    "numbered": ({"caption_0": ["a cat", "a dog"], "caption_1": ["a pet", "a wolf"]}, ["a cat", "a pet"]),
    "objects": ({"sentences": [{"raw": "a cat", "tokens": ["a", "cat"]}, {"raw": "a dog", "tokens": []}]}, ["a cat"]),
    "lists of objects": ({"sentences": [[{"raw": "a cat"}, {"raw": "a pet"}], [{"raw": "a dog"}]]}, ["a cat", "a pet"]),
    "capitals": ({"TEXT": ["a cat", "a dog"], "LICENSE": ["?", "?"]}, ["a cat"]),
    "a prompt": ({"prompt": ["a cat", "a dog"], "seed": [1, 2]}, ["a cat"]),
    "two names": ({"caption": ["a cat", "a dog"], "description": ["long", "longer"]}, ["a cat"]),
}


@pytest.mark.parametrize("kind", CAPTIONS)
def test_columns_of_captions(tmp_path, kind):
    columns, captions = CAPTIONS[kind]
    table = table_of_images(range(2)).remove_columns("caption")
    for name, values in columns.items():
        table = table.add_column(name, values)
    table.save_to_disk(tmp_path / "data")
    assert open_folder(f"hf:{tmp_path / 'data'}").captions(0) == captions


def test_one_file_of_each_kind(tmp_path):
    table_of_images().to_parquet(tmp_path / "a.parquet")
    table_of_images().save_to_disk(tmp_path / "data")
    [arrow] = (tmp_path / "data").glob("*.arrow")
    for spec in (f"parquet:{tmp_path / 'a.parquet'}", f"hf:{arrow}"):
        folder = open_folder(spec)
        assert len(folder) == COUNT and folder.captions(9) == SAID[9]
        assert np.array_equal(folder[9].image, np.asarray(Image.open(io.BytesIO(jpeg(9)))))


def test_a_column_of_splits_comes_before_the_names_of_files(tmp_path):
    told = ["train"] * 40 + ["val"] * 10 + ["test"] * 14
    datasets.DatasetDict({"test": table_of_images(split=told)}).save_to_disk(tmp_path / "data")  # as Flickr30k's
    assert [len(open_folder(f"hf:{tmp_path / 'data'}", s)) for s in ("train", "validation", "test")] == [40, 10, 14]


def test_splits_by_names_of_pictures_are_those_of_a_folder(tmp_path):
    write_disk(tmp_path / "data")
    (tmp_path / "folder").mkdir()
    lines = [json.dumps({"file": f"{row:05}.jpg", "captions": SAID[row]}) + "\n" for row in range(COUNT)]
    for row in range(COUNT):
        (tmp_path / "folder" / f"{row:05}.jpg").write_bytes(jpeg(row))
    (tmp_path / "folder" / "captions.jsonl").write_text("".join(lines), encoding="utf-8")
    for split in ("train", "test"):
        one, two = open_folder(f"hf:{tmp_path / 'data'}", split), open_folder(tmp_path / "folder", split)
        assert [one.captions(row) for row in range(len(one))] == [two.captions(row) for row in range(len(two))]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"jpg": None, "status": "failed_to_download", "error_message": "HTTP Error 403"}, "download failed.*403"),
        ({"jpg": None}, "no picture.*'jpg'"),
        ({"caption": None}, "no caption.*caption"),
        ({"caption": "  "}, "empty caption"),
    ],
)
def test_a_broken_row_is_named_or_skipped(tmp_path, changes, message, capsys):
    spec = write_parquet(tmp_path / "data", changes={3: changes})
    with pytest.raises(DataError, match=rf"files row 3 \(000000003\): {message}"):
        open_folder(spec)
    folder = open_folder(spec, on_error="skip")
    assert len(folder) == COUNT - 1 and folder.captions(3) == SAID[4][:1]
    assert f"skipped 1 of {COUNT} rows" in capsys.readouterr().out


def addresses(folder):
    pq.write_table(pa.table({"URL": ["https://example.org/a.jpg"], "TEXT": ["a cat"]}), folder / "a.parquet")


def names(folder):
    pq.write_table(pa.table({"image": ["a.jpg"], "caption": ["a cat"]}), folder / "a.parquet")


def two_columns(folder):
    table = table_of_images(range(2)).rename_column("image", "left")
    other = table_of_images(range(2)).rename_column("image", "right").remove_columns("caption")
    datasets.concatenate_datasets([table, other], axis=1).to_parquet(folder / "a.parquet")


def no_captions(folder):
    table_of_images(range(2)).rename_column("caption", "words").to_parquet(folder / "a.parquet")


def junk(folder):
    (folder / "a.parquet").write_bytes(b"PAR1 and then nothing")


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (addresses, "no column holds pictures.*URL.*img2dataset"),
        (names, "no column holds pictures.*image.*folder:DIR"),
        (two_columns, "several columns.*left, right.*rename_column"),
        (no_captions, "no column of captions.*words.*rename_column"),
        (junk, "cannot read it"),
        (lambda folder: None, "no .parquet file"),
    ],
)
def test_a_table_that_cannot_be_used_says_why(tmp_path, write, message):
    (tmp_path / "data").mkdir()
    write(tmp_path / "data")
    with pytest.raises(DataError, match=f"(?s){message}"):
        open_folder(f"parquet:{tmp_path / 'data'}")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("hf:nobody/nothing", "HF_HUB_OFFLINE"),
        ("hf:nobody/nothing:config", "HF_HUB_OFFLINE"),
        ("hf:./no/such/folder", "no such file or folder.*hf:OWNER/NAME"),
        ("hf:~/nowhere", "no such file or folder"),
        ("parquet:nobody/nothing", "no such file or folder. Write parquet:DIR"),
    ],
)
def test_the_hub_is_asked_for_ids_only_and_not_offline(spec, message, monkeypatch):
    if "HF_HUB" not in message:
        monkeypatch.setattr(datasets, "load_dataset", lambda *given, **more: pytest.fail("the hub was asked"))
    with pytest.raises(DataError, match=message):
        open_folder(spec)


def test_columns_that_are_not_read_are_told(tmp_path, capsys):
    table = table_of_images(range(2), mood=["blue", "red"], url=["a", "b"], text=["x", "y"])
    table.save_to_disk(tmp_path / "data")
    assert open_folder(f"hf:{tmp_path / 'data'}").captions(0) == SAID[0]
    printed = capsys.readouterr().out
    assert "'mood' is not read" in printed and "'text' is not read where there is 'caption'" in printed
    assert "url" not in printed


@pytest.mark.parametrize(("kind", "package"), [("hf", "datasets"), ("parquet", "datasets"), ("wds", "braceexpand")])
def test_a_missing_library_is_named_with_how_to_install_it(tmp_path, monkeypatch, kind, package):
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(DataError, match=rf"{package}.*pip install 'minivlp\[stored\]'"):
        open_folder(f"{kind}:{tmp_path}" + ("/{a,b}.tar" if kind == "wds" else ""))


def test_an_opened_store_is_a_folder(tmp_path):
    folder = open_folder(write_shards(tmp_path / "data"))
    assert isinstance(folder, Folder) and repr(folder) == "Folder(64 images, 64 captions, 0 regions)"
    row = folder.rows[2]
    assert row.source == "00000.tar key 000000002" and str(row.file).endswith("00000.tar/000000002.jpg")
    assert row.file.stat().st_size == (tmp_path / "data" / "00000.tar").stat().st_size
    row = open_folder(write_disk(tmp_path / "table")).rows[2]
    assert row.source == "train row 2 (00002.jpg)" and row.file.name == "train row 2"
    assert str(row.file) == f"{tmp_path / 'table'} train row 2" and row.file.stat().st_size > len(jpeg(2))
