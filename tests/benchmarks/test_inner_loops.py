"""Instructions of inner loops, by kind."""

import pytest

from gpu import inner_loops
from gpu.compilation import triton_cases

ASSEMBLY = """
.text._kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   LDG.E R2, [R4.64] ;
.L_x_1:
        /*0020*/              @!P0 MUFU.EX2 R3, R2 ;
        /*0030*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0040*/                   FSEL R5, R3, -INF , P1 ;
        /*0050*/                   R2UR UR4, R7 ;
        /*0060*/               @P2 BRA `(.L_x_1) ;
        /*0070*/                   STG.E [R4.64], R5 ;
        /*0080*/               @P3 BRA `(.L_x_0) ;
.L_x_2:
        /*0090*/                   SYNCS.PHASECHK R2 ;
        /*00a0*/                   BRA `(.L_x_2) ;
.L_x_3:
        /*00b0*/                   BRA `(.L_x_3);
"""


def test_the_inner_loop_is_the_one_that_multiplies():
    opcodes = inner_loops.inner_loop(ASSEMBLY)
    assert opcodes == ["MUFU", "HGMMA", "FSEL", "R2UR", "BRA"]
    kinds = inner_loops.count_kinds([*opcodes, "LDGSTS", "IMAD", "WHAT"])
    names = ("exponential", "tensor", "float", "uniform", "control", "memory", "integer", "other")
    assert kinds == dict.fromkeys(names, 1)


def test_without_products_it_is_the_longest_and_without_loops_nothing():
    plain = ASSEMBLY.replace("HGMMA", "MOV")
    assert inner_loops.inner_loop(plain)[1] == "MOV"
    assert inner_loops.inner_loop("        /*0000*/                   EXIT ;") == []


@pytest.mark.parametrize(
    ("warps", "registers", "shared_memory", "blocks"),
    [(4, 32, 0, 16), (4, 128, 0, 4), (4, 121, 0, 4), (4, 168, 0, 3), (4, 32, 100 << 10, 2), (1, 16, 0, 32)],
)
def test_blocks_at_a_time(warps, registers, shared_memory, blocks):
    assert inner_loops.blocks_at_a_time(90, warps, registers, shared_memory) == blocks


def test_a_kernel_of_attention_multiplies_on_tensor_cores():
    pytest.importorskip("triton")
    (case,) = (case for case in triton_cases() if case.name == "cross_attention/fwd/half-64+32-64x64-dropout")
    loop = inner_loops.measure(case, 90)
    assert loop.tensor > 0
    assert loop.exponential >= 64 * 64 // 128  # a score is one, and a thread has so many
    assert loop.blocks >= 2
    assert loop.instructions == sum(loop[4:])
    assert loop.other == 0
