"""The long runs behind the tables of lessons and README: several variants, several seeds, one JSON each in `records/`.

    python tools/experiments.py clip_seeds            all runs of one table; recorded runs are kept
    python tools/experiments.py family --only ViLT --seeds 0     a part of a table, beside other parts of it
    python tools/experiments.py --list                the tables, and which are recorded

The tables are in `tools/tables/`, one module per paper or method.
"""

from tables.running import main

from minivlp.console import print_in_any_encoding

if __name__ == "__main__":
    print_in_any_encoding()
    main(__doc__)
