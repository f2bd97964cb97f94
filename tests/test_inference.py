"""Using a model by its verbs: its mode comes back, texts arrive as it reads them, images are encoded once."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from minivlp.data.text import load_tokenizer
from minivlp.inference import device_of, evaluating, share_image_encoding, tokenize_for


def test_every_module_gets_its_own_mode_back():
    model = nn.Sequential(nn.Dropout(0.5), nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)))
    model.train()
    model[1].eval()
    before = {name: module.training for name, module in model.named_modules()}
    with pytest.raises(ZeroDivisionError), evaluating(model) as same:
        assert same is model and not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
        raise ZeroDivisionError
    assert {name: module.training for name, module in model.named_modules()} == before and torch.is_grad_enabled()


def test_texts_are_cut_to_the_context_of_the_model():
    model = nn.Linear(2, 2)
    model.config = SimpleNamespace(text=SimpleNamespace(context_length=5))
    text = tokenize_for(model, load_tokenizer(), ("a dog", "a red heart left of a dog"))
    assert text.ids.shape == (2, 5) and text.mask.sum(dim=1).tolist() == [4, 5]
    assert device_of(model) == device_of(nn.Dropout()) == text.ids.device == torch.device("cpu")


def test_images_are_encoded_once_where_the_model_can():
    images, rows, text = torch.arange(2.0), torch.tensor([1, 0, 1]), torch.tensor([10.0, 20.0, 30.0])

    class Plain:
        def match(self, images, text):
            return images + text

    class Shared(Plain):
        def match_many(self, images, image_rows, text):
            assert len(images) == 2
            return images[image_rows] + text

    for model in (Plain(), Shared()):
        assert share_image_encoding(model, "match", images, rows, text).tolist() == [11.0, 20.0, 31.0]
