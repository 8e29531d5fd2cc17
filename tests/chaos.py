"""What training promises, put to the test: every row of the table, or one. Status 1 if a promise is broken.

python tests/chaos.py                               # all, as `make chaos`
python tests/chaos.py kill --times 100 --seed 1     # one row
python tests/chaos.py --short                       # all, a few times each, as `make test`
"""

from __future__ import annotations

import argparse
import importlib
import shutil
import sys
import tempfile
import time
from pathlib import Path

import chaos_preempt
import chaos_run
from chaos_table import table

# What is done how often, and how often in the short form. chaos_<row>.py measures it.
ROWS = {
    "kill": ("kills", 100, 8),
    "corrupt": ("corruptions", 10_000, 250),
    "data": ("samples", 4_000, 400),
    "numbers": ("cases", 36, 6),
    "preempt": ("signals", 50, 2),
    "leak": ("steps", 10_000, 800),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="row", help=f"of {', '.join(ROWS)}; all by default")
    parser.add_argument("--times", type=int, help="instead of each row's own number")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short", action="store_true")
    options = parser.parse_args()
    unknown = sorted(set(options.rows) - set(ROWS))
    if unknown:
        parser.error(f"rows must be of {', '.join(ROWS)}, got {', '.join(unknown)}")
    if options.times is not None and options.times < 1:
        parser.error(f"--times must be at least 1, got {options.times}")
    broken = []
    with tempfile.TemporaryDirectory(prefix="chaos-") as name:
        place = Path(name)
        chaos_run.prepare(place / "begun")
        for row in options.rows or ROWS:
            unit, times, few = ROWS[row]
            times = options.times or (few if options.short else times)
            start = time.monotonic()
            (place / row).mkdir()
            # torchrun imports torch three times: for a few signals its agent is forked.
            more = {"start": chaos_preempt.Forked} if row == "preempt" and options.short else {}
            lines = importlib.import_module(f"chaos_{row}").measure(times, options.seed, place / row, **more)
            shutil.rmtree(place / row)
            print(
                table(f"{row}: {times:,} {unit}, seed {options.seed}, {time.monotonic() - start:.1f} s", lines),
                flush=True,
            )
            broken += [row] * (not all(line.kept for line in lines))
    print(f"\n{'broken: ' + ', '.join(broken) if broken else 'every promise kept'}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
