"""Tables of experiments: `TABLES` has them all by name. `tools/experiments.py` runs them."""

from tables import albef, blip, capfilt, clip, family, questions, scratch, vilt, vlmo, xvlm

TABLES = {
    name: table
    for module in (clip, xvlm, albef, scratch, vilt, vlmo, blip, capfilt, questions, family)
    for name, table in module.TABLES.items()
}
