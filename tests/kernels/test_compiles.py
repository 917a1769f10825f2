"""Kernels whose GPU tests run rarely are compiled for Hopper here: the interpreter takes what the compiler refuses.

Compiling needs no GPU. A gather that returned memory of two types passed the interpreter, and every router that used it
closed its links.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

CHECK = """
import re, subprocess, sys, tempfile
from pathlib import Path
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import kernels.block_gemm, kernels.combine, kernels.gate, kernels.pack, kernels.stage

def compiled(kernel, pointers, numbers, constants, **options):
    names = kernel.arg_names
    given = dict(zip(names, pointers + numbers))
    alike = {p.name for p in kernel.params if p.do_not_specialize}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names)
               if given.get(name, "")[:1] in ("*", "i") and name not in alike}
    places = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, {name: given.get(name, "constexpr") for name in names}, places, aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)

for unit in (8, 4, 2, 1):
    ptx = compiled(kernels.pack._copy_pieces, ["*u8"] * 4, ["i32"] * 9,
                   {"UNIT": unit, "SCALED": True, "C": 1024, "CS": 32}, num_warps=4).asm["ptx"]
    print("gather", unit, len(re.findall(r"ld[.]global[.]v", ptx)))
for two in (False, True):
    compiled(kernels.combine._combine, ["*bf16", "*i32", "*fp32", "*fp32", "*bf16"], ["i32"],
             {"K": 8, "WEIGHTED": not two, "TWO": two, "WIDE": tl.float32, "C": 1024}, num_warps=8,
             enable_fp_fusion=False)
tools = Path(triton.__file__).parent / "backends/nvidia/bin"
kernel = compiled(kernels.combine._combine, ["*bf16", "*i32", "*fp32", "*bf16", "*bf16"], ["i32"],
                  {"K": 8, "WEIGHTED": True, "TWO": False, "WIDE": tl.float32, "C": 1024}, num_warps=8,
                  enable_fp_fusion=False, maxnreg=40)
with tempfile.NamedTemporaryFile() as file:
    Path(file.name).write_bytes(kernel.asm["cubin"])
    sass = subprocess.check_output([tools / "cuobjdump", "-sass", file.name], text=True)
print("rows", len(re.findall("LDG.E.64", sass[:sass.index("FMUL")])))
ptx = compiled(kernels.stage._publish, ["*i32", "*fp32"] * 2 + ["*i64"] * 2, ["i32"], {"C": 1024},
               num_warps=8).asm["ptx"]
print("publish", *re.findall(r"st[.]global[.]v4|bar[.]sync|st[.]release[.]sys", ptx))
for unit in (8, 4):
    ptx = compiled(kernels.stage._stage, ["*u8", "*fp32", "*i64", "*i64", "*i64"], ["i32"] * 4,
                   {"TURNS": 4, "MOST": 128, "UNIT": unit, "SCALE_UNIT": unit, "C": 1024, "CS": 32},
                   num_warps=4).asm["ptx"]
    print("stage", unit, len(re.findall(r"(?:ld|st)[.]global[.]v", ptx)))
ptx = compiled(kernels.stage._deliver, ["*bf16", "*i64"], ["i32"], {"C": 2048}, num_warps=4,
               launch_pdl=True).asm["ptx"]
print("deliver", len(re.findall(r"(?:ld|st)[.]global[.]v", ptx)))
for shared in (False, True):
    compiled(kernels.stage._add_placed, ["*bf16", "*i64", "*bf16"], ["i32"], {"HAS_SHARED": shared, "C": 1024},
             num_warps=4)
print("combine")
compiled(kernels.block_gemm._tile_gemm,
         ["tensordesc<fp8e4nv[64,128]>", "*fp32", "tensordesc<fp8e4nv[128,128]>", "*fp32", "*fp32", "*i32"],
         ["i32"] * 7, {"BM": 64, "GROUPED": True, "STAGES": 4}, num_warps=4, num_stages=4)
print("grouped experts")
"""


# Gluon kernels: a driver that has no device, and launches that only compile.
NO_DEVICE = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

class Driver:
    get_current_device = lambda self: 0
    get_current_stream = lambda self, device=None: 0
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)

driver.set_active(Driver())
run = jit.JITFunction.run
"""

# Launches that print what they compile to: products, waits for them, spilled registers, shared memory.
COMPILED = (
    NO_DEVICE
    + """
import re, subprocess, tempfile
from pathlib import Path
import triton

tools = Path(triton.__file__).parent / "backends/nvidia/bin"

def compiled(self, *given, grid, warmup=False, **options):
    kernel = run(self, *given, grid=grid, warmup=True, **options)
    with tempfile.NamedTemporaryFile() as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        sass = subprocess.check_output([tools / "cuobjdump", "-sass", file.name], text=True)
    count = [len(re.findall(name, sass)) for name in ("[HQ]GMMA", "DEPBAR[.]LE gsb0", "STL|LDL")]
    print(self.fn.__name__, *count, kernel.metadata.shared)
    return kernel

jit.JITFunction.run = compiled
"""
)

DECODE = (
    COMPILED
    + """
from kernels.mla_decode import mla_decode_paged

for rope, kind, width in ((64, torch.bfloat16, 576), (64, torch.uint8, 656), (16, torch.bfloat16, 528)):
    mla_decode_paged(
        torch.empty(2, 128, 512 + rope, dtype=torch.bfloat16), torch.empty(4, 64, width, dtype=kind),
        torch.zeros(2, 2, dtype=torch.int32), torch.ones(2, dtype=torch.int32), scale=1.0, latent=512,
        max_context=128,
    )
"""
)

PREFILL = (
    COMPILED
    + """
from kernels.mla_prefill import mla_prefill_rows

for width, value in ((192, 128), (56, 56)):
    rows = [torch.empty(300, 4, w, dtype=torch.bfloat16) for w in (width, width, value)]
    starts = torch.zeros(2, dtype=torch.int32)
    mla_prefill_rows(*rows, starts, starts, scale=1.0, max_rows=300)
"""
)

STREAM = (
    COMPILED
    + """
from kernels import stream

def e4m3(*shape):
    return torch.zeros(shape, dtype=torch.float8_e4m3fn)

def multiply(m, rows, placed=False):
    places = torch.zeros(1 + m, dtype=torch.int64) if placed else None
    stream._multiply(e4m3(m, 512), torch.ones(m, 4), e4m3(rows, 512), torch.ones(rows // 128, 4),
                     torch.empty(m, rows).bfloat16(), places)

def hidden(m, columns):
    stream._hidden(e4m3(m, 512), torch.ones(m, 4), e4m3(2 * columns, 512), torch.ones(columns // 64, 4),
                   e4m3(m, columns), torch.ones(m, columns // 128))

"""
)

TILES = (
    COMPILED
    + """
from kernels import tile

def e4m3(*shape):
    return torch.zeros(shape, dtype=torch.float8_e4m3fn)

m, scales = 300, torch.ones(5, 512)
tile.multiply(e4m3(m, 640), scales, e4m3(512, 640), torch.ones(4, 5), e4m3(m, 256), torch.ones(2, 512))
tile.multiply(e4m3(m, 640), scales, e4m3(512, 640), torch.ones(4, 5), torch.empty(m, 512, dtype=torch.bfloat16))
"""
)

# How many kernels come of many numbers of rows?
COUNT = (
    NO_DEVICE
    + """
seen = set()

def compiled(self, *given, grid, warmup=False, **options):
    seen.add((self.fn.__name__, run(self, *given, grid=grid, warmup=True, **options).hash))

jit.JITFunction.run = compiled
from kernels import gate, quant, stage, stream, swiglu, tile

def e4m3(*shape):
    return torch.zeros(shape, dtype=torch.float8_e4m3fn)

from kernels.ops import KINDS_OF_ROWS

def few(numbers):
    for m in numbers:
        stream.stream_linear(e4m3(m, 640), torch.ones(m, 5), e4m3(384, 640), torch.ones(3, 5))
    return len(seen)

warmed = few(m for m in KINDS_OF_ROWS if m <= stream.STREAM_ROWS)
print("unwarmed", few((1, 2, 16, 17, 32, 33, 63, 64, 65, 96, 127, 128)) - warmed)
for m in (129, 160, 256, 300, 1000, 1024, 2048, 20000):
    q, scales = e4m3(m, 512), tile.turned(torch.ones(m, 5))
    tile.multiply(e4m3(m, 640), scales, e4m3(1024, 640), torch.ones(8, 5), q, torch.ones(4, scales.shape[1]))
    tile.multiply(q, torch.ones(4, scales.shape[1]), e4m3(640, 512), torch.ones(5, 4), torch.ones(m, 640).bfloat16())
for m in (1, 2, 3, 16, 128, 129, 160):
    swiglu.swiglu_dense(torch.zeros(m, 256), scales_by_block=True)
    quant.quantise(torch.zeros(m, 128))
for m in (1, 16, 17):
    for softmax, bias in ((False, torch.zeros(256)), (True, None), (True, torch.zeros(256))):
        gate.choose(torch.zeros(m, 256), bias, softmax=softmax, top_k=8, num_groups=8, top_k_groups=4,
                    norm_topk_prob=not softmax, routed_scaling_factor=2.5)
    ids, number = torch.zeros(m, 8, dtype=torch.int32), torch.zeros(1, dtype=torch.int64)
    stage.publish(ids, ids.float(), ids, ids.float(), number, number)
for name in sorted({name for name, _ in seen}):
    print(name, sum(name == other for other, _ in seen))
"""
)


def run_apart(script: str, directory: Path) -> list[str]:
    """Lines that a script prints which compiles, in a process of its own with no cache."""
    environment = {"TRITON_CACHE_DIR": str(directory), "TRITON_DEFAULT_FP_FUSION": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=110, check=False,
        env=environment | {"PATH": "/usr/bin:/bin", "HOME": str(directory)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


def products_and_waits(script: str, directory: Path, kernels: list[str]) -> list[tuple[int, int]]:
    """Of launches of these kernels, none of which spills or takes more shared memory than there is."""
    lines = [line.split() for line in run_apart(script, directory)]
    assert [line[0] for line in lines] == kernels
    for _, _, _, spills, shared in lines:
        assert int(spills) == 0
        assert int(shared) <= 227 << 10
    return [(int(products), int(waits)) for _, products, waits, _, _ in lines]


def test_decode_for_hopper_spills_nothing_and_does_not_serialise_its_products(tmp_path):
    for products, waits in products_and_waits(DECODE, tmp_path, ["decode_blocks"] * 3):
        assert products > 100
        assert waits < products / 8, "the compiler waits for every product"


def test_prefill_for_hopper_spills_nothing_and_does_not_serialise_its_products(tmp_path):
    for products, waits in products_and_waits(PREFILL, tmp_path, ["attend_rows"] * 2):
        assert products >= 32
        assert waits == 6  # of each warpgroup: the first scores, a step, the last values


@pytest.mark.parametrize(
    ("calls", "kernels"),
    [
        ("multiply(16, 7168, True); multiply(32, 7168)", ["stream_rows"] * 2),
        ("multiply(64, 7168, True); multiply(128, 7168, True)", ["stream_rows", "stream_units"]),
        ("hidden(16, 2048); hidden(128, 2048)", ["stream_rows", "_quantise"] * 2),
        ("hidden(64, 18432); hidden(128, 18432)", ["stream_rows", "stream_hidden"] * 2),
        ("hidden(128, 16896)", ["stream_hidden"]),
    ],
)
def test_few_row_products_for_hopper_spill_nothing_and_run_while_others_are_scaled(
    calls, kernels, tmp_path
):
    for products, waits in products_and_waits(STREAM + calls, tmp_path, kernels):
        assert waits <= products / 4  # four to a block of columns


def test_many_row_products_for_hopper_spill_nothing_and_are_not_serialised(tmp_path):
    for products, waits in products_and_waits(TILES, tmp_path, ["tile_units"] * 2):
        # big units and small ones, for each warpgroup: a product is four instructions and is waited for once
        assert products in (32, 48)
        assert waits == products / 4


def test_kernels_compile_for_hopper(tmp_path):
    lines = run_apart(CHECK, tmp_path)
    assert lines[-2:] == ["combine", "grouped experts"]
    wide = re.search(r"gather 8 (\d+)", "\n".join(lines))
    assert wide is not None
    assert int(wide[1]) > 0, "rows are read in pieces of less than 16 bytes"
    # what it has copied, then the barrier, then the number, for whoever reads it on any processor
    assert "publish st.global.v4 st.global.v4 bar.sync st.release.sys" in lines
    staged = dict(re.findall(r"(stage 8|stage 4|deliver) (\d+)", "\n".join(lines)))
    assert all(int(count) > 1 for count in staged.values()), staged
    assert len(staged) == 3
    assert "rows 8" in lines, "combine begins to add before it has asked for all rows"


def test_a_number_of_rows_does_not_ask_for_a_kernel_of_its_own(tmp_path):
    """Each costs half a second when a request first brings that number."""
    counts = {name: int(n) for name, n in (line.split() for line in run_apart(COUNT, tmp_path))}
    assert counts.pop("unwarmed") == 0, (
        "whoever warms up (ops.KINDS_OF_ROWS) misses a kernel for few rows"
    )
    # up to 16, 32, 64 rows and up to 128; gates of V3, of V2, of V2 balanced; a multiple of 16 ids and not
    wanted = {
        "stream_rows": 3,
        "stream_units": 1,
        "tile_units": 2,
        "_swiglu_dense": 1,
        "_quantise": 1,
        "_gate": 3,
        "_publish": 2,
    }
    wanted["_turn"] = 1
    assert counts == wanted
