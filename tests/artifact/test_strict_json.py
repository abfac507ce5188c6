import json

import pytest

from lilliput.artifact.strict_json import canonical
from lilliput.core.errors import InputCorrupt


def test_the_fast_writer_says_what_json_says() -> None:
    data = {
        "a": {},
        "b": [],
        "c": [1, [2.5, -0.0, 1e-30], {"d": None}],
        'é\n"': ["\u2028", True, False],
        "": {"x": [{}]},
    }
    assert canonical(data, "", "") == (json.dumps(data, indent=2) + "\n").encode()
    with pytest.raises(InputCorrupt, match="not finite"):
        canonical({"a": [float("nan")]}, "here", "Mend it")
