"""What grouped attention's backward pass executes, in one kernel and in two."""

import pytest

pytest.importorskip("triton")

from gpu import attention_backward, sass

TWO_WALKS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   LDG.E R2, [R4.64] ;
        /*0020*/                   HMMA.16816.F32.BF16 R4, R8, R10, R4 ;
        /*0030*/                   MUFU.EX2 R3, R2 ;
        /*0040*/                   MUFU.RCP R3, R2 ;
        /*0050*/               @P2 BRA `(.L_x_0) ;
.L_x_1:
        /*0060*/                   HGMMA.64x32x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0070*/                   FADD R5, R3, R2 ;
        /*0080*/               @P2 BRA `(.L_x_1) ;
.L_x_2:
        /*0090*/                   STG.E [R4.64], R5 ;
        /*00a0*/               @P3 BRA `(.L_x_2) ;
        /*00b0*/                   EXIT ;
"""


def test_each_walk_that_multiplies_is_counted():
    (kernel,) = sass.read(TWO_WALKS).values()
    first, second = map(attention_backward.in_a_turn, attention_backward.multiplying_loops(kernel))
    assert (first["instructions"], second["instructions"]) == (5, 3)
    assert (first["multiply_adds"], second["multiply_adds"]) == (16 * 8 * 16, 64 * 32 * 16 // 4)
    assert (first["exponentials"], second["exponentials"]) == (32, 0)
    assert (first["memory"], second["memory"], second["float"]) == (1, 0, 1)


def test_a_product_of_unknown_shape_is_no_number():
    (kernel,) = sass.read(TWO_WALKS.replace("HMMA.16816.F32.BF16", "QMMA.F32")).values()
    (loop, _) = attention_backward.multiplying_loops(kernel)
    with pytest.raises(ValueError, match="the size of QMMA"):
        attention_backward.in_a_turn(loop)


def test_rows_of_other_sizes_stay(tmp_path):
    path = tmp_path / "counts.csv"
    counts = [
        attention_backward.Count(architecture, 300, False, way, 1, 255, 8, *[number] * 9)
        for number, (architecture, way) in enumerate([(80, "two kernels"), (80, "one kernel"), (90, "one kernel")])
    ]
    attention_backward.update(path, counts)
    attention_backward.update(path, [counts[1]._replace(instructions=77)])
    rows = attention_backward.read(path)
    assert [(row["architecture"], row["way"]) for row in rows] == [
        ("80", "two kernels"),
        ("80", "one kernel"),
        ("90", "one kernel"),
    ]
    assert [row["instructions"] for row in rows] == ["0", "77", "2"]


@pytest.mark.slow
def test_one_kernel_takes_five_products_and_one_exponential(capsys):
    two, one = attention_backward.counts(80, 100, False)
    rows, keys, walked = 128, 128, 128  # what 100 of them fill up to
    assert two.multiply_adds == 7 * rows * keys * attention_backward.CHANNELS
    assert one.multiply_adds == 5 * walked * keys * attention_backward.CHANNELS
    assert (two.exponentials - 2 * rows * keys, one.exponentials - walked * keys) == (0, 0)
    assert one.instructions < two.instructions
    assert capsys.readouterr().out == ""  # no problems


def test_a_tile_that_cannot_be_ends_the_command(monkeypatch):
    for tile in (["100", "16", "1"], ["128", "8", "1"], ["128", "48", "1"], ["128", "16", "0"]):
        monkeypatch.setattr("sys.argv", ["attention_backward", "--tile", *tile])
        with pytest.raises(SystemExit, match="--tile: BLOCK must be a multiple of 64"):
            attention_backward.main()
