"""ALBEF: seeds, its parts one after the other, and momentum distillation under caption noise."""

from dataclasses import replace

from minivlp.objectives.momentum import MomentumConfig
from tables.measures import fusion
from tables.variants import Table, Variant

# The image tower, trained on scenes and frozen, stands for DeiT; everything else is new.
IMAGE_TOWER_ONLY = {"steps": 400, "negative_captions": False, "init_parts": ("image.",)}
NOISY = {"steps": 150, "batch_size": 32, "negative_captions": False}
# The momentum is scaled to the run: .98 averages over 50 of 400 steps, .97 over 33 of 150 (the paper's .995 over 200).
MOMENTUM = MomentumConfig(momentum=0.98, alpha_steps=100, queue_size=960)
MOMENTUM_BRIEF = replace(MOMENTUM, momentum=0.97, alpha_steps=50)

TABLES = {
    "albef_seeds": Table("ALBEF nano as lesson 03 trains it, three seeds", {"ALBEF nano": Variant("albef")}, fusion),
    "albef_ablation": Table(
        "ALBEF's parts, one after the other, from the image tower alone (400 steps)",
        {
            "MLM + ITM": Variant("albef", {"losses": ("itm", "mlm")}, IMAGE_TOWER_ONLY),
            "+ ITC": Variant("albef", {"hard_negatives": False}, IMAGE_TOWER_ONLY),
            "+ hard negatives": Variant("albef", recipe=IMAGE_TOWER_ONLY),
            "+ momentum model on ITC": Variant(
                "albef", {"momentum": replace(MOMENTUM, distill=("itc",))}, IMAGE_TOWER_ONLY
            ),
            "+ momentum model on MLM": Variant("albef", {"momentum": MOMENTUM}, IMAGE_TOWER_ONLY),
            "+ queue, targets not softened": Variant(
                "albef", {"momentum": replace(MOMENTUM, distill=())}, IMAGE_TOWER_ONLY
            ),
            "negative captions instead": Variant("albef", recipe=IMAGE_TOWER_ONLY | {"negative_captions": True}),
        },
        fusion,
    ),
    "albef_noise": Table(
        "momentum distillation under caption noise, from the trained towers (150 steps of 32)",
        {
            f"{noise:.0%} noise, {name}": Variant("albef", config, NOISY | {"noise": noise})
            for noise in (0.0, 0.2, 0.4, 0.6)
            for name, config in {"no momentum model": {}, "momentum model": {"momentum": MOMENTUM_BRIEF}}.items()
        }
        # the momentum model's features as negatives, and none of its predictions in the targets
        | {
            f"{noise:.0%} noise, queue alone": Variant(
                "albef", {"momentum": replace(MOMENTUM_BRIEF, alpha=0.0)}, NOISY | {"noise": noise}
            )
            for noise in (0.0, 0.4)
        },
        fusion,
    ),
}
