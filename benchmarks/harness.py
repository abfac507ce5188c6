"""Records of benchmarks: append what came out with the conditions it came under."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from lilliput.measure.environment import ForeignLoad, describe

RESULTS = Path(__file__).parent / "results"

_load = ForeignLoad()


def emit(name: str, **fields: Any) -> dict[str, Any]:
    """Append one line to results/NAME.jsonl and print it: `fields`, then date, machine, versions, commit, load.

    foreign_cores: cores other processes kept busy since the last `emit`, or since the start.
    """
    global _load
    line = {"name": name, **{k: _plain(v) for k, v in fields.items()}}
    print(json.dumps(line))
    line |= {"date": datetime.now(UTC).isoformat(timespec="seconds"), "foreign_cores": _load.cores()} | describe()
    _load = ForeignLoad()
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{name}.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    return line


def _plain(value: Any) -> Any:
    """NumPy's numbers and arrays as JSON has them, floats to 6 digits."""
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    return float(f"{value:.6g}") if isinstance(value, float) else value
