"""Findings of the GPU check: one JSON line each, and the table at the end.

    python experiments/gpu/findings.py <folder>

A finding has a name, a value with its unit, what was expected, and whether the value is as expected (`ok`): true,
false, or null if the check does not apply to this device. `item` says which suspected fault it decides.
"""

import json
import math
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

NAME = "findings.jsonl"


class Findings:
    """Write findings to a file as they are made. A check that fails is a finding too, and the next one runs."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / NAME

    def add(self, item: str, name: str, value: Any, unit: str, expected: str, ok: bool | None) -> None:
        """Write one finding. A value that is not a finite number is written as a text."""
        if isinstance(value, float):
            value = float(f"{value:.4g}") if math.isfinite(value) else str(value)
        finding = {"name": name, "value": value, "unit": unit, "expected": expected, "ok": ok, "item": item}
        with self.path.open("a") as file:
            file.write(json.dumps(finding, ensure_ascii=False) + "\n")
        print(f"{MARKS[ok]} {name}: {value} {unit}".rstrip(), f"(expected: {expected})", flush=True)

    def run(self, check: Callable[..., None], item: str, *arguments: Any) -> None:
        """Run check(self, item, *arguments). If it raises an error, add that as a finding."""
        try:
            check(self, item, *arguments)
        except Exception as error:
            message = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            self.add(item, f"{check.__name__} raised an error", message, "", "no error", False)
            traceback.print_exc()


MARKS = {True: "ok  ", False: "NOT ", None: "skip"}


def main(folder: Path) -> int:
    """Print the findings by item, those with an unexpected value first. Return 1 if there is one, else 0."""
    found = []
    with suppress(FileNotFoundError):
        found = [json.loads(line) for line in (folder / NAME).read_text().splitlines()]
    found.sort(key=lambda finding: (finding["ok"] is not False, finding["ok"] is None))
    print(f"\n{folder / NAME}: {len(found)} findings")
    for item in dict.fromkeys(finding["item"] for finding in found):
        print(f"\n{item}")
        for finding in (finding for finding in found if finding["item"] == item):
            value = f"{finding['value']} {finding['unit']}".strip()
            print(f"  {MARKS[finding['ok']]} {finding['name']}: {value} (expected: {finding['expected']})")
    wrong = sum(finding["ok"] is False for finding in found)
    print(f"\n{wrong} of {len(found)} are not as expected, {sum(f['ok'] is None for f in found)} do not apply here.")
    return int(wrong > 0 or not found)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
