"""Instructions of inner loops, by kind."""

import csv
import re

import pytest

from gpu import compilation, compile_gpu, inner_loops, loops, sass
from gpu.compilation import Usage
from gpu.loops import Loop

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
        /*00a0*/               @P0 BRA `(.L_x_2) ;
        /*00b0*/                   EXIT ;
.L_x_3:
        /*00c0*/                   BRA `(.L_x_3);
"""

# As compilers write loops that wait, or in which lanes have to meet again: both lie behind the end of the kernel.
OUT_OF_LINE = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   SYNCS.PHASECHK P0, [R2] ;
        /*0020*/              @!P0 BRA `(.L_x_5) ;
.L_x_1:
        /*0030*/                   HMMA.16816.F32 R4, R8, R10, R4 ;
        /*0040*/                   BRA.DIV UR4, `(.L_x_6) ;
        /*0050*/                   REDUX.MIN UR4, R2 ;
.L_x_2:
        /*0060*/                   BRA.U UP0, `(.L_x_0) ;
        /*0070*/                   STG.E [R4.64], R5 ;
        /*0080*/                   STG.E [R4.64+0x10], R6 ;
        /*0090*/                   EXIT ;
.L_x_5:
        /*00a0*/                   NANOSLEEP 0x10 ;
        /*00b0*/                   BRA `(.L_x_1) ;
.L_x_6:
        /*00c0*/                   WARPSYNC.COLLECTIVE R38, `(.L_x_7) ;
        /*00d0*/                   REDUX.MIN UR4, R2 ;
.L_x_7:
        /*00e0*/                   BRA `(.L_x_2) ;
"""

SOURCE = """
template <typename T>
__device__ __forceinline__ T halved(T value) {
  return value / 2;
}

struct Search {
  __device__ __forceinline__ void scan() const {
    for (int i = 0; i < 8; ++i) halved(i);
  }

  __device__ __forceinline__ void relax() {
    for (int i = 0; i < 8; ++i) halved(i);
  }
};

__global__ void __launch_bounds__(32, 1)
    search(int count) {
  Search().scan();
  Search().relax();
}
"""


def kernel_of(assembly):
    (kernel,) = sass.read(assembly).values()
    return kernel


def inner(assembly, around=0):
    kernel = kernel_of(assembly)
    return [instruction.opcode for instruction in sass.of(kernel, sass.inner_loop(kernel, around))]


def instruction(text):
    return kernel_of(f"        /*0000*/                   {text} ;").instructions[0]


def loop_row(**values):
    return Loop(*([0] * len(Loop._fields)))._replace(**{"kernel": "op/kernel", "architecture": 90, **values})


def test_the_inner_loop_is_the_one_that_multiplies():
    assert inner(ASSEMBLY) == ["MUFU", "HGMMA", "FSEL", "R2UR", "BRA"]
    assert inner(ASSEMBLY, around=1) == ["LDG", "MUFU", "HGMMA", "FSEL", "R2UR", "BRA", "STG", "BRA"]


def test_without_products_it_is_the_longest_and_without_loops_nothing():
    assert inner(ASSEMBLY.replace("HGMMA", "MOV"))[1] == "MOV"
    assert inner("        /*0000*/                   EXIT ;") == []


def test_what_lies_out_of_line_counts_where_a_turn_may_take_it():
    found = inner(OUT_OF_LINE)
    assert found == ["SYNCS", "BRA", "HMMA", "BRA", "REDUX", "BRA", "NANOSLEEP", "BRA"]


def test_a_jump_back_that_is_no_loop_is_none():
    """A cold branch behind the end that jumps back to where the kernel goes on."""
    assert inner(OUT_OF_LINE.replace("BRA.U UP0, `(.L_x_0)", "NOP")) == []


def test_calls_may_be_jumps_and_what_lanes_at_one_place_jump_over_does_not_count():
    """As compilers write loops for sm_80."""
    assembly = """
.L_x_0:
        /*0000*/                   FFMA R2, R4, R5, R2 ;
.L_x_1:
        /*0010*/                   IADD3 R6, R6, 0x1, RZ ;
        /*0020*/               @P1 CALL.REL.NOINC `(.L_x_2) ;
        /*0030*/                   BRA `(.L_x_1) ;
.L_x_2:
        /*0040*/                   BRA.CONV ~URZ, `(.L_x_3) ;
        /*0050*/                   CALL.REL.NOINC `($__internal_9_$__cuda_sm70_warpsync) ;
.L_x_3:
        /*0060*/               @P2 CALL.REL.NOINC `(.L_x_4) ;
        /*0070*/                   BRA `(.L_x_0) ;
.L_x_4:
        /*0080*/                   EXIT ;
"""
    assert inner(assembly) == ["FFMA", "IADD3", "CALL", "BRA", "BRA", "CALL", "BRA"]


@pytest.mark.parametrize(
    ("text", "kind", "reduced"),
    [
        ("HMMA.16816.F32 R4, R8, R10, R4", "tensor", 0),
        ("LDGSTS.E.BYPASS.128 [R2], [R4.64]", "memory", 0),
        ("IMAD.MOV.U32 R2, RZ, RZ, R4", "integer", 0),
        ("FFMA R2, R4, R5, R2", "float", 0),
        ("FFMA2 R2, R4, R6, R2", "float", 0),
        ("F2F.BF16.F32 R2, R4", "float", 0),
        ("F2F.F64.F32 R2, R4", "double", 0),
        ("I2F.F64.S32 R2, R4", "double", 0),
        ("DADD R2, R4, R6", "double", 0),
        ("DSETP.GEU.AND P0, PT, R2, R4, PT", "double", 0),
        ("REDUX.MIN UR4, R2", "exchange", 0),
        ("VOTEU.ANY UR4, UPT, PT", "exchange", 0),
        ("ATOMS.OR RZ, [R2], R4", "shared", 0),
        ("LDC.64 R2, c[0x0][0x298]", "uniform", 0),
        ("REDG.E.ADD.F32.FTZ.RN.STRONG.GPU desc[UR4][R2.64], R5", "reductions", 4),
        ("REDG.E.ADD.F32x4.FTZ.RN.STRONG.GPU desc[UR4][R2.64], R4", "reductions", 16),
        ("REDG.E.ADD.F64.RN.STRONG.GPU desc[UR4][R2.64], R4", "reductions", 8),
        ("RED.E.ADD.F16x2.RN.STRONG.GPU [R2.64], R4", "reductions", 4),
        ("ATOMG.E.ADD.STRONG.GPU PT, R2, desc[UR4][R2.64], R5", "reductions", 4),
        ("ATOM.E.ADD.64.STRONG.GPU PT, R2, [R2.64], R4", "reductions", 8),
        ("WHAT R2", "other", 0),
    ],
)
def test_kinds_and_bytes_of_reductions(text, kind, reduced):
    assert instruction(text).kind == kind
    assert instruction(text).reduced == reduced


def test_bytes_of_reductions_are_those_of_the_way_that_has_most():
    kernel = kernel_of("""
.L_x_0:
        /*0000*/                   FFMA R2, R4, R5, R2 ;
        /*0010*/               @P0 BRA `(.L_x_1) ;
        /*0020*/                   REDG.E.ADD.F32.FTZ.RN.STRONG.GPU desc[UR4][R2.64], R5 ;
        /*0030*/                   BRA `(.L_x_2) ;
.L_x_1:
        /*0040*/                   REDG.E.ADD.F32.FTZ.RN.STRONG.GPU desc[UR4][R2.64], R5 ;
        /*0050*/                   REDG.E.ADD.F64.RN.STRONG.GPU desc[UR4][R2.64], R6 ;
.L_x_2:
        /*0060*/                   SHFL.BFLY PT, R5, R4, R3, 0x1f ;
        /*0070*/               @P1 BRA `(.L_x_2) ;
        /*0080*/               @P2 REDG.E.ADD.F32x4.FTZ.RN.STRONG.GPU desc[UR4][R2.64], R8 ;
        /*0090*/               @P3 BRA `(.L_x_0) ;
        /*00a0*/                   REDG.E.ADD.F64.RN.STRONG.GPU desc[UR4][R2.64], R6 ;
        /*00b0*/                   EXIT ;
""")
    loop = sass.inner_loop(kernel)
    assert sass.count_kinds(sass.of(kernel, loop))["reductions"] == 4
    assert sass.reduced_in_a_turn(kernel, loop) == 4 + 8 + 16
    assert sass.reduced_in_a_turn(kernel, None) == 0


def test_loops_are_looked_up_by_function(tmp_path):
    file = tmp_path / "search.cuh"
    file.write_text(SOURCE)

    def line(text):
        return SOURCE[: SOURCE.index(text)].count("\n") + 1

    def comments(*places):
        """As nvdisasm -gi writes them: the innermost line first, each with the line that it is inlined at."""
        ends = [f' inlined at "{file}", line {place}' for place in places[1:]] + [""]
        return "\n".join(f'\t//## File "{file}", line {place}{end}' for place, end in zip(places, ends, strict=True))

    halved, in_scan, in_relax = line("return value"), line("const {") + 1, line("void relax") + 1
    scan, relax = line("Search().scan"), line("Search().relax")
    kernel = kernel_of(f"""
{comments(in_scan, scan)}
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
{comments(halved, in_scan, scan)}
        /*0010*/                   SHF.R.S32.HI R2, RZ, 0x1, R2 ;
{comments(in_scan, scan)}
        /*0020*/              @!P0 BRA `(.L_x_0) ;
.L_x_1:
{comments(halved, in_relax, relax)}
        /*0030*/                   LEA.HI R2, R2, R2, RZ, 0x1 ;
        /*0040*/                   SHF.R.S32.HI R2, RZ, 0x1, R2 ;
{comments(in_relax, relax)}
        /*0050*/              @!P0 BRA `(.L_x_1) ;
        /*0060*/                   EXIT ;
""")

    def found(*functions):
        loop = sass.longest(kernel, functions, loops.function_at)
        return [instruction.opcode for instruction in sass.of(kernel, loop)]

    assert found("relax") == found("search", "relax") == ["LEA", "SHF", "BRA"]
    assert found("scan") == ["SHF", "BRA"]
    assert found("search") == found("halved") == found("scan", "relax") == []


def test_what_is_said_of_some_kernels_is_about_kernels_that_there_are():
    kernels = {kernel for source in compilation.cuda_sources() for kernel in compilation.cuda_kernels(source)}
    assert {"deform_forward", "deform_scan", "solve_assignments"} <= kernels
    assert loops.NAMED.keys() | loops.AROUND.keys() | loops.SAMPLES.keys() <= kernels
    text = "".join(file.read_text() for file in compilation.ROOT.glob("csrc/cuda/*.cuh"))
    for name in {name for named in loops.NAMED.values() for functions in named.values() for name in functions}:
        assert re.search(rf"__forceinline__ [\w<>]+ {name}\(", text), f"csrc/cuda has no function {name}"


def test_bytes_of_reductions_a_sample():
    """At most four corners of 32 channels in float32, by however many lanes, and an atomic that counts."""
    four_corners = 4 * 32 * 4
    assert loops.reduced_a_sample("ms_deform_attn/deform_backward<bfloat16, 8>", 8 * 16) == four_corners
    assert loops.reduced_a_sample("ms_deform_attn/deform_backward<float, 1>", 4 * 4) == four_corners
    assert loops.reduced_a_sample("ms_deform_attn/deform_backward_sorted<bfloat16, 8>", 4 * 8 * 16) == four_corners
    assert loops.reduced_a_sample("ms_deform_attn/deform_count<float>", 4 * 4) == 4
    assert loops.reduced_a_sample("ms_deform_attn/deform_scan", 0) is None
    assert loops.reduced_a_sample("cross_attention/fwd/half-32-64x64", 0) is None
    with pytest.raises(ValueError, match="has no constant kNone"):
        loops.constant("kNoneSuch")


@pytest.mark.parametrize(
    ("architecture", "warps", "registers", "shared_memory", "blocks"),
    [
        (90, 4, 32, 0, 16),
        (90, 4, 128, 0, 4),
        (90, 4, 121, 0, 4),
        (90, 4, 168, 0, 3),
        (90, 4, 32, 100 << 10, 2),
        (90, 1, 16, 0, 32),
        (90, 1, 74, 0, 24),  # 6 warps a quarter, though 25 would fit the registers of all
        (80, 4, 32, 9 << 10, 16),
        (80, 4, 32, 15 << 10, 10),
        (120, 4, 32, 15 << 10, 6),
        (75, 4, 32, 0, 8),
        (75, 4, 32, (16 << 10) + 1, 3),
    ],
)
def test_blocks_at_a_time(architecture, warps, registers, shared_memory, blocks):
    assert loops.blocks_at_a_time(architecture, warps, registers, shared_memory) == blocks


def test_a_kernel_of_attention_multiplies_on_tensor_cores():
    pytest.importorskip("triton")
    (case,) = (
        case for case in compilation.triton_cases() if case.name == "cross_attention/fwd/half-64+32-64x64-dropout"
    )
    (loop,) = loops.loops_of(compilation.compile_triton(case, 90))
    assert loop.tensor > 0
    assert loop.exponential >= 64 * 64 // 128  # a score is one, and a thread has so many
    assert loop.blocks >= 2
    assert loop.instructions == sum(getattr(loop, kind) for kind in loops.COUNTS)
    assert loop.other == loop.double == loop.reductions == 0
    assert loop.reduced_a_sample is None


def test_a_kernel_in_cuda(tmp_path):
    pytest.importorskip("triton")
    if compilation.find_nvcc() is None:
        pytest.skip("nvcc was not found (set CUDA_HOME)")
    source = tmp_path / "small.cu"
    source.write_text("""
#include <cuda_bf16.h>
template <typename T, int kStep>
__global__ void __launch_bounds__(96) add_products(const T* factors, const double* others, double* sums, int count) {
  static __shared__ double kept[96];
  double sum = kept[threadIdx.x];
#pragma unroll 1
  for (int i = threadIdx.x; i < count; i += kStep) {
    sum += __bfloat162float(factors[i]) * others[i];
    atomicAdd(sums + i, sum);
  }
  sums[-1] = kept[0] + sum;
}
template __global__ void add_products<__nv_bfloat16, 4>(const __nv_bfloat16*, const double*, double*, int);
""")
    compiled = compilation.compile_cuda(source, 90)
    (usage,) = compiled.usages.values()
    assert usage.kernel == "small/add_products<bfloat16, 4>"
    (loop,) = loops.loops_of(compiled)
    assert (loop.kernel, loop.registers, loop.shared_memory) == (usage.kernel, usage.registers, 96 * 8)
    assert (loop.threads, loop.blocks) == (96, 2048 // 96)
    assert (loop.memory, loop.reductions, loop.reduced) == (2, 1, 8)
    assert loop.double >= 2  # the factor is made a double, and multiplied and added
    assert loop.float == loop.other == 0
    assert loop.instructions == sum(getattr(loop, kind) for kind in loops.COUNTS)


def test_comparison_with_an_earlier_table():
    same, new = loop_row(instructions=7), loop_row(kernel="op/new")
    halved = loop_row(kernel="op/b", instructions=10, memory=3, reductions=1, reduced_a_sample=8)
    before = [dict(zip(Loop._fields, map(str, loop), strict=True)) for loop in (same, halved)]
    before[1] |= {"instructions": "20", "memory": "3", "reductions": "0", "reduced_a_sample": ""}
    before.append(before[0] | {"kernel": "op/gone"})
    text = inner_loops.compare(before, [same, halved, new])
    header, *rows = (line.split() for line in text.splitlines()[:4])
    assert header == ["kernel", "architecture", "instructions", "memory", "reductions", "reduced_a_sample"]
    for row, what, numbers in zip(
        rows, ("before", "after", "ratio"), (("20", "0"), ("10", "1"), ("0.50", "-")), strict=True
    ):
        assert row[:3] == ["op/b", "90", what]
        assert tuple(row[header.index(kind) + 1] for kind in ("instructions", "reductions")) == numbers
    assert len(rows[0]) == len(rows[2]) == len(rows[1]) - 1  # what one of them does not have is left empty
    assert "2 kernels are in both, 1 of them with the same numbers" in text
    assert "before alone:\n  op/gone, 90" in text
    assert "after alone:\n  op/new, 90" in text


def test_kinds_that_an_earlier_table_counted_among_others():
    after = loop_row(instructions=9, memory=3, reductions=1, float=2, double=3)
    before = {"kernel": "op/kernel", "architecture": "90", "instructions": "9", "memory": "4", "float": "5"}
    assert "1 of them with the same numbers" in inner_loops.compare([before], [after])
    before["memory"] = "8"
    text = inner_loops.compare([before], [after])
    assert [line.split()[2:] for line in text.splitlines()[1:4]] == [
        ["before", "9", "8", "5"],
        ["after", "9", "4", "5"],
        ["ratio", "1.00", "0.50", "1.00"],
    ]


def test_earlier_tables_are_files_or_commits(tmp_path):
    file = tmp_path / "loops.csv"
    with file.open("w", newline="") as opened:
        csv.writer(opened).writerows([Loop._fields, loop_row()])
    assert [row["kernel"] for row in inner_loops.read_earlier(str(file))] == ["op/kernel"]
    file.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="has no table of inner loops"):
        inner_loops.read_earlier(str(file))
    with pytest.raises(ValueError, match="nowhere is neither a csv file nor a commit that has benchmarks/results"):
        inner_loops.read_earlier("nowhere")


def test_a_commit_that_is_none_ends_the_command_before_anything_is_compiled(monkeypatch):
    monkeypatch.setattr(inner_loops, "find_work", lambda *_: pytest.fail("it went on"))
    monkeypatch.setattr("sys.argv", ["benchmarks inner_loops", "--against", "nowhere"])
    with pytest.raises(SystemExit, match="--against: nowhere is neither"):
        inner_loops.main()


def test_the_command_prints_both_tables_and_keeps_one(tmp_path, monkeypatch, capsys):
    pytest.importorskip("triton")
    case = next(case.name for case in compilation.triton_cases() if case.name.startswith("sigmoid_focal_loss/"))
    now = loop_row(instructions=10)._replace(kernel=case)
    measured = compile_gpu.Measured([Usage(case, 90, 128, 64, 0, 0, 0)], [now])
    monkeypatch.setattr(inner_loops, "find_work", lambda *_: [compilation.Task(90, case=case)])
    monkeypatch.setattr(inner_loops, "measure_all", lambda *_: [measured])
    table, earlier = tmp_path / "now.csv", tmp_path / "earlier.csv"
    with earlier.open("w", newline="") as file:
        csv.writer(file).writerows([Loop._fields, now._replace(instructions=20), now._replace(architecture=80)])
    arguments = ["--only", "focal", "--against", str(earlier), "--csv", str(table)]
    monkeypatch.setattr("sys.argv", ["benchmarks inner_loops", *arguments])
    inner_loops.main()
    printed = capsys.readouterr().out
    assert "0.50" in printed
    assert "before alone" not in printed  # the other row is of an architecture that was not asked for
    with table.open() as file:
        (row,) = csv.DictReader(file)
    assert (row["kernel"], row["instructions"]) == (case, "10")
