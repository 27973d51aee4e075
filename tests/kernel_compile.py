"""Compile the fused kernel for GPUs that need not be there, and print as JSON what became of it. A program of its own,
because Triton either compiles or interprets in one process, never both."""

import json
import re
import subprocess
import tempfile

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ldrld.losses.ldrld import triton_kernel

NUMBERS = {"stride_s": "i32", "stride_t": "i32", "classes": "i32", "size": "i64", "target": "*i64"}
NAMES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def usage(kernel, types, constants, aligned, warps, capability):
    """Registers per thread, bytes of local memory per thread, and 16-byte loads of the compiled kernel."""
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, NUMBERS.get(n, "fp32")) for n in names}
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in names if n in aligned or signature[n][0] == "*"}
    source = ASTSource(kernel, signature, {(names.index(n),): v for n, v in constants.items()}, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        told = subprocess.run(
            [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    registers, stack = (int(re.search(rf"{name}:(\d+)", told)[1]) for name in ("REG", "STACK"))
    return {
        "registers": registers,
        "local": stack,
        "wide_loads": len(re.findall(r"ld\.global\S*\.v4", compiled.asm["ptx"])),
    }


def loss(dtype, classes, depth, capability=90, temperature=4.0, rank_by="student", target=True, grad=True):
    options = triton_kernel.options(classes, depth, temperature, rank_by, target, grad)
    warps = options.pop("num_warps")
    pointers = dict.fromkeys(("row_weights", "weights", "terms"), "*fp32") | dict.fromkeys(
        ("student", "teacher", "grad"), f"*{NAMES[dtype]}"
    )
    aligned = ("stride_s", "stride_t", "classes") if classes % 16 == 0 else ()
    return {
        "dtype": dtype,
        "classes": classes,
        "depth": depth,
        "capability": capability,
        "warps": warps,
        **usage(triton_kernel._kernel, pointers, options, aligned, warps, capability),
    }


if __name__ == "__main__":
    found = [
        loss(dtype, classes, depth)
        for dtype in ("bfloat16", "float32")
        for classes, depth in ((100, 7), (100, 64), (131072, 7), (131072, 64))
    ]
    found += [
        loss("bfloat16", 128256, 20),
        loss("float16", 50257, 7),
        loss("bfloat16", 131072, 7, capability=80),
        loss("bfloat16", 1000, 20, temperature=3.0, rank_by="teacher", target=False),
        loss("float32", 7, 7, grad=False),
    ]
    scale = usage(triton_kernel._scale, {"x": "*bf16", "factor": "*fp32"}, {"BLOCK": 4096}, (), 4, 90)
    print(json.dumps({"loss": found, "scale": scale}))
