"""Install the root folders as `neural_layers.*`, and build the C kernels; everything else stands in pyproject.toml."""

import os
import platform
import runpy
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

from setuptools import Extension, find_namespace_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

LAYERS = ("kernels", "models", "distill", "benchmarks")
# Every C kernel is compiled for each instruction set and each type of arithmetic; see kernels/native.h.
X86_VARIANTS = {
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"],
    "avx2": ["-mavx2", "-mfma"],
    "baseline": [],
}
VARIANTS = X86_VARIANTS if platform.machine() in ("x86_64", "AMD64") else {"baseline": []}
REALS: dict[str, list[tuple[str, str | None]]] = {"float": [], "double": [("REAL_DOUBLE", None)]}
# Of -ffast-math only what keeps NaN, infinity and the order of sums; -fopenmp-simd needs no OpenMP at run time.
FLAGS = [
    "-std=gnu11",
    "-O3",
    "-g0",
    "-fopenmp-simd",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-Wall",
    "-Werror=implicit-function-declaration",
    "-Wno-psabi",
]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g1"]
DIGEST = runpy.run_path("kernels/c_sources.py")["digest"](Path("kernels"))
SANITIZED = bool(os.environ.get("NEURAL_LAYERS_SANITIZE"))


class BuildKernels(build_ext):
    """One shared object without Python or torch in it, holding every kernel in every variant."""

    def finalize_options(self) -> None:
        super().finalize_options()
        # One place for every kind of build, so that a later one compiles only what has changed.
        self.build_temp = "build/sanitize" if SANITIZED else "build/kernels"

    def build_extension(self, ext: Extension) -> None:
        if self.compiler.compiler_type != "unix":
            raise CompileError("the C kernels need gcc or clang; without them the ops run on torch")
        extra = SANITIZE if SANITIZED else []
        cpu, *kernels = ext.sources
        jobs = [(cpu, "", "", [*FLAGS, *extra])]
        for (variant, flags), real, source in product(VARIANTS.items(), REALS, kernels):
            jobs.append((source, variant, real, [*FLAGS, *flags, *extra]))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(lambda job: self.build_object(*job, ext.depends), jobs))
        self.compiler.link_shared_object(
            objects, self.get_ext_fullpath(ext.name), extra_postargs=["-pthread", *extra[:1]], libraries=["m"]
        )

    def build_object(self, source: str, variant: str, real: str, flags: list[str], headers: list[str]) -> str:
        """Compile one source for one instruction set and one type of arithmetic, unless that is up to date."""
        folder = str(Path(self.build_temp, variant, real))
        (path,) = self.compiler.object_filenames([source], output_dir=folder)
        inputs = [source, "setup.py", *headers]
        current = os.path.exists(path) and os.path.getmtime(path) > max(map(os.path.getmtime, inputs))
        if variant and current and not self.force:
            return path
        macros = [("VARIANT", variant), *REALS[real]] if variant else [("SOURCES", f'"{DIGEST}"')]
        options = {"macros": macros, "include_dirs": ["kernels"], "extra_postargs": flags}
        self.compiler.compile([source], output_dir=folder, **options)
        return path


roots = {"neural_layers": "neural_layers", **{f"neural_layers.{layer}": layer for layer in LAYERS}}
packages = list(roots)
for name, folder in roots.items():
    packages += [f"{name}.{sub}" for sub in find_namespace_packages(folder) if not sub.startswith("results")]
native = Extension(
    "neural_layers.kernels._native",
    sources=["kernels/cpu.c", *sorted(map(str, Path("kernels").glob("*/native*.c")))],
    depends=sorted(map(str, [*Path("kernels").glob("*.h"), *Path("kernels").glob("*/*.h")])),
    optional=True,  # without a compiler the install succeeds, and the backend `torch` serves
)
setup(packages=packages, package_dir=roots, ext_modules=[native], cmdclass={"build_ext": BuildKernels})
