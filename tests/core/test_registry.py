import pytest

from lilliput.core.registry import Registry


def test_a_name_is_imported_only_when_asked_for() -> None:
    table = Registry("sort", path="os.path:join", broken="no_such_module:x")
    assert table.load("path")("a", "b").startswith("a")
    with pytest.raises(ModuleNotFoundError):
        table.load("broken")


def test_an_unknown_name_is_answered_with_near_ones_or_all() -> None:
    table = Registry("sort", gptq="a:b", rtn="c:d")
    with pytest.raises(LookupError, match=r"^sort: 'gtpq' is not known\. Try gptq\.$"):
        table.load("gtpq")
    with pytest.raises(LookupError, match=r"Try gptq, rtn\.$"):
        table.load("zzzz")
