import pytest

from lilliput.artifact.entries import QuantEntry, plain_name


def test_a_slash_in_a_file_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'\.\./x' is not a plain file name"):
        plain_name("../x")


@pytest.mark.parametrize(
    ("bits", "asked", "width", "fields"),
    [((2, 3, 4, 8), 3, 3, 2), ((4, 8), 2, 4, 1), ((8,), 2, 8, 2), ((2, 4), 8, 4, 2), ((3,), 4, 3, 2)],
)
def test_a_matrix_serves_its_narrowest_width_that_is_enough(
    bits: tuple[int, ...], asked: int, width: int, fields: int
) -> None:
    entry = QuantEntry(out=4, columns=70, bits=bits, group_size=32, sym=True)
    assert (entry.width_at(asked), entry.fields_at(asked), entry.groups) == (width, fields, 3)


def test_a_shared_grid_belongs_to_several_even_widths() -> None:
    given = {"out": 4, "columns": 70, "group_size": 32, "sym": False, "shared": True}
    entry = QuantEntry(bits=(2, 4), **given)
    assert (entry.grids(2), entry.grids(4)) == (("scale", "zero", "ratio"), ("ratio",))
    assert entry.parts(2) == ("scale.2", "zero.2", "ratio.2")
    assert entry.parts(4) == ("scale.2", "zero.2", "ratio.4")
    for wrong in ({"bits": (4,)}, {"bits": (2, 4), "tables": (2,)}):
        with pytest.raises(ValueError, match="a shared grid is one of several widths, none of them with a table"):
            QuantEntry(**given, **wrong)


def test_outliers_are_read_at_every_width_and_fit_their_matrix() -> None:
    given = {"out": 4, "bits": (2, 4), "group_size": 32, "sym": True}
    entry = QuantEntry(columns=70, outliers=9, **given)
    beside = ("outlier.counts", "outlier.columns", "outlier.values")
    assert (entry.parts(2), entry.parts(4)) == (("scale.2", *beside), ("scale.4", *beside))
    assert QuantEntry(columns=70, **given).parts(2) == ("scale.2",)
    for columns, outliers in ((70, 36), (1 << 16, 1)):
        with pytest.raises(ValueError, match=f"{outliers} outliers do not fit"):
            QuantEntry(columns=columns, outliers=outliers, **given)
