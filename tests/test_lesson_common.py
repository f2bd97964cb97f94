"""What the lessons share: costs of code, and the words that name objects."""

import torch

from minivlp.data.scenes import Scenes
from minivlp.data.text import load_tokenizer
from minivlp.lessons.common import milliseconds, multiplications, object_words, phrases, show


def test_a_matrix_product_is_counted_in_multiplications():
    assert multiplications(lambda: torch.ones(2, 3) @ torch.ones(3, 5)) == 2 * 3 * 5


def test_the_shortest_of_several_runs_counts():
    calls = []
    assert milliseconds(lambda: calls.append(0), times=3) >= 0 and len(calls) == 3


def test_object_words_point_at_the_noun_of_each_object():
    tokenizer, scenes = load_tokenizer(), Scenes(12, split="test", seed=7, objects=(2, 2))
    words, number = object_words(scenes, tokenizer), 0
    for row in range(len(scenes)):
        for region in (region for region in scenes.regions(row) if region.kind == "object"):
            token = words.text.ids[number, words.places[number]]
            assert tokenizer.decode([int(token)]).strip() == region.phrase.split()[-1]
            assert words.rows[number] == row and torch.allclose(words.boxes[number], torch.tensor(region.box))
            number += 1
    assert number == len(words) and words.images.shape == (number, 3, 64, 64)


def test_parts_hold_all_rows_with_texts_of_one_length():
    words = object_words(Scenes(5, split="test", seed=7, objects=(2, 2)), load_tokenizer())
    parts = list(words.parts(4))
    assert [len(part) for part in parts] == [4, 4, len(words) - 8]
    assert {part.text.length for part in parts} == {words.text.length}
    assert torch.equal(torch.cat([part.boxes for part in parts]), words.boxes)


def test_phrases_come_with_their_scene_and_box():
    tokenizer, scenes = load_tokenizer(), Scenes(5, objects=(2, 2))
    rows, texts, boxes = phrases(scenes, tokenizer)
    assert len(rows) == len(texts) == len(boxes) and rows == sorted(rows)
    for row, ids, box in zip(rows, texts.ids, boxes, strict=True):
        said = tokenizer.decode(ids, skip_special_tokens=True)
        boxes_said = [region.box for region in scenes.regions(row) if region.phrase == said]
        assert any(torch.allclose(box, torch.tensor(right)) for right in boxes_said)


def test_small_tensors_are_printed_with_their_shape(capsys):
    show(one=torch.tensor([1.0, -2.5]), two=torch.eye(2))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "one (2,)" and lines[1].split() == ["1.00", "-2.50"]
    assert lines[2] == "two (2, 2)" and lines[4].split() == ["0.00", "1.00"]
