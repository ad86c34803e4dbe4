"""Write tests/slow.txt, the tests that `make quick` leaves out because they take long: `make test` runs them all.

    python -m pytest -n auto --durations=0 -vv > durations.txt; python tools/slow_tests.py durations.txt

A test is slow from `SECONDS` on, set-up included, all its cases together.
"""

import re
import sys
from collections import Counter
from pathlib import Path

SECONDS = 0.6


def main() -> None:
    taken: Counter[str] = Counter()
    for line in Path(sys.argv[1]).read_text(encoding="utf-8").splitlines():
        found = re.match(r"\s*([\d.]+)s (?:call|setup|teardown)\s+([^\s\[]+)", line)
        if found:
            taken[found[2]] += float(found[1])
    slow = sorted(name for name, seconds in taken.items() if seconds >= SECONDS)
    (Path(__file__).parents[1] / "tests" / "slow.txt").write_text("\n".join(slow) + "\n", encoding="utf-8")
    print(f"{len(slow)} slow tests; the others take {sum(taken.values()) - sum(taken[name] for name in slow):.0f} s")


if __name__ == "__main__":
    main()
