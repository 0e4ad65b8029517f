"""What the table says in numbers of its own."""

from rotatek_compile.kernels import table


def test_own_bases_mirror_offsets():
    assert [table.own_basis(place) for place in (0, 8, 4096)] == [-8, -16, -4104]
    assert all(table.own_basis(table.own_basis(place)) == place for place in range(0, 80, 8))
