"""A frozen image tower's tokens: computed once per picture, the same in whatever order pictures are asked for."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from minivlp.data.batch import to_tensor
from minivlp.data.loading import Loader
from minivlp.data.scenes import Scenes
from minivlp.data.text import load_tokenizer
from minivlp.layers.timm_tower import timm_tower
from minivlp.models.blip import BLIP
from minivlp.models.clip import CLIP
from minivlp.models.xvlm import XVLM
from minivlp.objectives.momentum import MomentumConfig
from minivlp.training import cached
from minivlp.training.cached import GROUP, token_cache
from minivlp.training.loop import Settings, fit

SIZE, PICTURES = 16, 41


class Tower(nn.Module):
    """Patches, BatchNorm (which must not learn here), attention: (B, 3, 16, 16) -> (B, 1+4, 24)."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.norm = nn.Conv2d(3, 24, 8, 8), nn.BatchNorm2d(24)
        self.first = nn.Parameter(torch.randn(24))
        self.mix = nn.TransformerEncoderLayer(24, 3, 48, dropout=0.5, batch_first=True)
        self.seen: list[int] = []

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(len(images))
        patches = self.norm(self.patches(images)).flatten(2).mT
        return self.mix(torch.cat([self.first.expand(len(images), 1, -1), patches], dim=1))


class Dual(nn.Module):
    """A model that reads only the first image token."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(image=SimpleNamespace(image_size=SIZE))
        self.image = Tower().requires_grad_(False)

    def encode_image(self, images: Tensor) -> Tensor:
        return self.image(images)


class Fusion(Dual):
    def match(self, images, text):
        raise NotImplementedError


class Pooling(Fusion):
    """A model that changes what the tower says."""

    def encode_image(self, images: Tensor) -> Tensor:
        tokens = self.image(images)
        return torch.cat([tokens[:, 1:].mean(dim=1, keepdim=True), tokens[:, 1:]], dim=1)


class Pictures:
    """A dataset without files; it counts what is decoded."""

    def __init__(self, count: int = PICTURES, seed: int = 0) -> None:
        self.images = np.random.default_rng(seed).integers(0, 256, (count, SIZE, SIZE, 3), dtype=np.uint8)
        self.decoded = np.zeros(count, int)

    def __len__(self) -> int:
        return len(self.images)

    def image_id(self, row: int) -> int:
        return row

    def pixels(self, rows, size) -> np.ndarray:
        rows = np.asarray(rows)
        np.add.at(self.decoded, rows, 1)
        return self.images[rows]


def model(kind=Fusion, seed: int = 0) -> Dual:
    torch.manual_seed(seed)
    made = kind().train()
    made.image.norm.running_mean.normal_()
    return made


def expected(made: Dual, rows) -> Tensor:
    made.eval()
    with torch.no_grad():
        tokens = made.encode_image(to_tensor(Pictures().images[rows]))
    made.train()
    return tokens


# --------------------------------------------------------------------------------------------------------- the cache


@pytest.mark.parametrize("kind", [Fusion, Pooling])
@pytest.mark.parametrize("in_file", [False, True])
def test_the_tokens_are_those_of_encode_image(tmp_path, in_file, kind):
    made, rows = model(kind), [40, 3, 3, 17]
    cache = token_cache(made, Pictures(), tmp_path if in_file else None)
    tokens = cache(rows)
    assert tokens.dtype == torch.float32 and tokens.shape == (4, 5, 24)
    assert torch.allclose(tokens, expected(made, rows), atol=3e-3)
    assert torch.equal(cache(torch.tensor(rows).numpy()), tokens)
    assert cache([]).shape == (0, 5, 24)


def test_only_the_first_token_is_kept_for_models_that_read_no_other(tmp_path):
    made = model(Dual)
    for folder in (None, tmp_path):
        tokens = token_cache(made, Pictures(), folder)([5, 6])
        assert torch.allclose(tokens, expected(made, [5, 6])[:, :1], atol=3e-3)
    (file,) = tmp_path.glob("*.f16")
    assert file.stat().st_size == PICTURES * 24 * 2


def test_in_memory_a_picture_is_encoded_when_it_is_first_asked_for():
    made, pictures = model(), Pictures()
    cache = token_cache(made, pictures)
    made.image.seen.clear()
    pictures.decoded[:] = 0
    for rows in ([1, 2, 3], [3, 2], range(20), [40, 40]):
        cache(rows)
    asked = np.zeros(PICTURES, int)
    asked[[*range(20), 40]] = 1
    assert pictures.decoded.tolist() == asked.tolist()
    assert made.image.seen == [GROUP] * 4, "3, 17 (two groups) and 1 pictures"


def test_the_tokens_do_not_depend_on_what_is_asked_for_together(tmp_path):
    """A resumed run asks for other pictures together, and must still be the same run."""
    made = model()
    caches = [token_cache(made, Pictures()) for _ in range(3)]
    orders = [list(range(PICTURES)), list(np.random.default_rng(1).permutation(PICTURES)), [30, 2, 7]]
    for cache, order in zip(caches, orders, strict=True):
        for row in order if cache is caches[2] else [order]:
            cache(row if isinstance(row, list) else [row])
    everything = caches[0](range(PICTURES))
    assert torch.equal(caches[1](range(PICTURES)), everything)
    assert torch.equal(caches[2](range(PICTURES)), everything)
    assert torch.equal(token_cache(made, Pictures(), tmp_path)(range(PICTURES)), everything)


def test_the_tower_stays_as_it_is():
    made = model()
    before = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    token_cache(made, Pictures())(range(PICTURES))
    assert all(torch.equal(tensor, before[name]) for name, tensor in made.state_dict().items())
    assert all(module.training for module in made.modules())


def test_a_file_that_was_cut_off_is_completed(tmp_path):
    made, pictures = model(), Pictures()
    pictures.fingerprint = lambda: "mine"  # otherwise some pictures are decoded to know them by
    token_cache(made, pictures, tmp_path)
    (file,) = tmp_path.glob("*.f16")
    whole, one = file.read_bytes(), file.stat().st_size // PICTURES
    assert made.image.seen == [1, 1] + [GROUP] * 4  # for the name of the file, for the shape, then 41 pictures
    file.write_bytes(whole[: 20 * one + 11])  # within the 21st picture, of the second group
    made.image.seen.clear()
    pictures.decoded[:] = 0
    token_cache(made, pictures, tmp_path)
    assert file.read_bytes() == whole
    assert pictures.decoded[1:GROUP].max() == 0 and pictures.decoded[GROUP:].tolist() == [1] * (PICTURES - GROUP)
    made.image.seen.clear()
    token_cache(made, pictures, tmp_path)
    assert made.image.seen == [1, 1, GROUP], "nothing is left to do"


def test_another_tower_or_other_pictures_have_another_file(tmp_path):
    def files(made, pictures):
        token_cache(made, pictures, tmp_path)
        return len(list(tmp_path.glob("*.f16")))

    assert files(model(), Pictures()) == files(model(), Pictures()) == 1
    assert files(model(seed=1), Pictures()) == 2
    assert files(model(), Pictures(seed=1)) == 3
    assert files(model(), Pictures(count=PICTURES - 1)) == 4
    named = Pictures()
    named.fingerprint = lambda: "holiday, version 1"
    assert files(model(), named) == 5
    other = Pictures(seed=2)
    other.fingerprint = named.fingerprint
    assert files(model(), other) == 5, "a dataset's own fingerprint is believed"
    assert files(model(Pooling), other) == 6, "the same tower, but other tokens"


@dataclass
class Row:
    file: object


def test_pictures_in_files_are_known_by_their_files(tmp_path):
    pictures = Pictures()
    pictures.rows = []
    for row in range(PICTURES):
        file = tmp_path / f"{row}.jpg"
        file.touch()
        pictures.rows.append(Row(file))

    def files():
        token_cache(model(), pictures, tmp_path)
        return len(list(tmp_path.glob("*.f16")))

    assert files() == files() == 1
    os.utime(pictures.rows[5].file, (1, 1))  # written anew, if with as many bytes
    assert files() == 2


def test_a_tower_that_is_trained_is_refused(tmp_path):
    made = model()
    made.image.first.requires_grad_(True)
    with pytest.raises(ValueError, match="freeze it"):
        token_cache(made, Pictures(), tmp_path)
    with pytest.raises(ValueError, match="Linear has no image tower"):
        token_cache(nn.Linear(2, 2), Pictures())
    assert not list(tmp_path.iterdir())


def test_tokens_beyond_half_precision_are_refused():
    made = model()
    made.image.mix.norm2.weight.data.mul_(1e6)
    with pytest.raises(FloatingPointError, match="half precision"):
        token_cache(made, Pictures())


def test_a_cache_too_large_for_memory_asks_for_a_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(cached, "MEMORY_BUDGET", PICTURES * 5 * 24 * 2 - 1)
    with pytest.raises(ValueError, match="`folder`"):
        token_cache(model(), Pictures())
    token_cache(model(), Pictures(), tmp_path)
    token_cache(model(Dual), Pictures())


def test_the_file_is_filled_on_the_best_device_and_the_tower_returns(tmp_path, monkeypatch):
    moved = []
    made = model()
    monkeypatch.setattr(cached, "best_device", lambda: torch.device("cpu", 0))
    plain = made.image.to
    made.image.to = lambda device: moved.append(device) or plain(device)
    token_cache(made, Pictures(), tmp_path)
    assert moved == [torch.device("cpu", 0), torch.device("cpu")]


def test_a_failing_picture_is_told_and_what_was_done_is_kept(tmp_path):
    pictures, plain = Pictures(), Pictures.pixels

    def pixels(rows, size):
        if 33 in rows:
            raise OSError("33.jpg is damaged")
        return plain(pictures, rows, size)

    pictures.pixels = pixels
    pictures.fingerprint = lambda: "mine"
    with pytest.raises(OSError, match="33.jpg"):
        token_cache(model(), pictures, tmp_path)
    (file,) = tmp_path.glob("*.f16")
    assert file.stat().st_size == 2 * GROUP * 5 * 24 * 2


# ------------------------------------------------------------------------------------------------- in training, whole


def with_tower(kind, name: str, **changes):
    """A nano model whose frozen image tower is ours ("") or one of timm's."""
    config = kind.Config.nano()
    if name:
        tower = timm_tower(name)
        config = replace(config, image=tower.config)
    made = kind(replace(config, **changes)).train()
    if name:
        made.image.load_state_dict(tower.state_dict())
        if getattr(made, "momentum_model", None) is not None:
            made.momentum_model.copy_from(made)
    made.image.requires_grad_(False)
    return made


MOMENTUM = MomentumConfig(0.9, alpha_steps=0, queue_size=64)


@pytest.mark.parametrize("name", ["", "test_resnet"])
@pytest.mark.parametrize(
    "kind, changes, regions",
    [(CLIP, {}, False), (XVLM, {}, True), (XVLM, {}, False), (BLIP, {"momentum": MOMENTUM}, False)],
    ids=["first token only", "regions", "images of X-VLM", "momentum model"],
)
def test_losses_and_gradients_are_those_of_the_tower_itself(kind, changes, regions, name):
    made, scenes = with_tower(kind, name, **changes), Scenes(24)
    made.image.eval()  # as the cache runs it: BatchNorm would otherwise learn from these very pictures
    start = {key: tensor.clone() for key, tensor in made.state_dict().items()}
    size = made.config.image.image_size

    def learned(image_tokens):
        made.load_state_dict(start)
        made.zero_grad()
        torch.manual_seed(0)
        options = {"regions_per_image": 2 * regions, "image_tokens": image_tokens}
        batch = Loader(scenes, load_tokenizer(), 8, size, **options).batch(1)
        assert (batch.images is None) == (image_tokens is not None)
        terms = made.losses(batch)
        sum(terms.values()).backward()
        gradients = [weight.grad.flatten() for weight in made.parameters() if weight.grad is not None]
        return torch.stack(list(terms.values())).detach(), torch.cat(gradients)

    losses, gradients = learned(None)
    cached_losses, cached_gradients = learned(token_cache(made, scenes))
    assert torch.allclose(losses, cached_losses, atol=5e-3)
    assert torch.nn.functional.cosine_similarity(gradients, cached_gradients, dim=0) > 0.999


def test_a_resumed_run_with_a_new_cache_is_the_same_run(tmp_path):
    """The second process asks the cache for other pictures together than the first did."""
    settings = Settings(steps=6, warmup=1, save_every=2)

    def train(folder, stop=None):
        torch.manual_seed(3)
        made, scenes = with_tower(CLIP, ""), Scenes(40)
        batches = Loader(scenes, load_tokenizer(), 8, 64, image_tokens=token_cache(made, scenes)).batch

        def interrupt(row):
            if row["step"] == stop:
                raise KeyboardInterrupt

        return made, fit(made, batches, settings, run_dir=folder, on_step=[interrupt], bar=False, device="cpu")

    whole, history = train(None)
    train(tmp_path, stop=3)
    resumed, again = train(tmp_path)
    assert [row["loss"] for row in again.steps] == [row["loss"] for row in history.steps]
    assert all(torch.equal(tensor, whole.state_dict()[name]) for name, tensor in resumed.state_dict().items())
