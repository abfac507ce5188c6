"""How long `lilliput --help` and `import lilliput` take, in fresh interpreters. The aim is below 300 ms."""

import subprocess
import sys

import numpy as np

from harness import emit, time_ns

COMMANDS = {
    "python": ["-c", "pass"],
    "import lilliput": ["-c", "import lilliput"],
    "lilliput --help": ["-m", "lilliput", "--help"],
    "lilliput recipes": ["-m", "lilliput", "recipes"],
}

for name, arguments in COMMANDS.items():
    spent = time_ns(subprocess.run, [sys.executable, *arguments], rounds=20, stdout=subprocess.DEVNULL, check=True)
    q25, median, q75 = np.percentile(spent, [25, 50, 75])
    emit("startup", command=name, median_ms=median / 1e6, iqr_ms=(q75 - q25) / 1e6)
