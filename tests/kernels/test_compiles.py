"""Kernels whose GPU tests run rarely are compiled for Hopper here: the interpreter takes what the compiler refuses.

Compiling needs no GPU. A gather that returned memory of two types passed the interpreter, and every router that used it
closed its links.
"""

import re
import subprocess
import sys

CHECK = """
import re, sys
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import kernels.block_gemm, kernels.combine, kernels.pack

def compiled(kernel, pointers, numbers, constants, **options):
    names = kernel.arg_names
    given = dict(zip(names, pointers + numbers))
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if given.get(name, "")[:1] in ("*", "i")}
    places = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, {name: given.get(name, "constexpr") for name in names}, places, aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]

for unit in (8, 4, 2, 1):
    ptx = compiled(kernels.pack._copy_pieces, ["*u8"] * 3, ["i32"] * 6,
                   {"UNIT": unit, "SCALED": True, "C": 1024, "CS": 32}, num_warps=4)
    print("gather", unit, len(re.findall(r"ld[.]global[.]v", ptx)))
compiled(kernels.combine._combine, ["*bf16", "*i32", "*fp32", "*bf16"], ["i32"],
         {"K": 8, "WEIGHTED": True, "WIDE": tl.float32, "C": 1024}, num_warps=8, enable_fp_fusion=False)
print("combine")
compiled(kernels.block_gemm._tile_gemm,
         ["tensordesc<fp8e4nv[64,128]>", "*fp32", "tensordesc<fp8e4nv[128,128]>", "*fp32", "*fp32", "*i32"],
         ["i32"] * 7, {"BM": 64, "GROUPED": True, "STAGES": 4}, num_warps=4, num_stages=4)
print("grouped experts")
"""


def test_kernels_compile_for_hopper(tmp_path):
    environment = {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_DEFAULT_FP_FUSION": "1"}
    done = subprocess.run(
        [sys.executable, "-c", CHECK], capture_output=True, text=True, timeout=110, check=False,
        env=environment | {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-2:] == ["combine", "grouped experts"]
    wide = re.search(r"gather 8 (\d+)", done.stdout)
    assert wide is not None
    assert int(wide[1]) > 0, "rows are read in pieces of less than 16 bytes"
