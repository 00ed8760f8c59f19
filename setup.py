"""Install the root folders as `neural_layers.*`; everything else stands in pyproject.toml."""

from setuptools import find_namespace_packages, setup

LAYERS = ("kernels", "models", "distill", "benchmarks")
roots = {"neural_layers": "neural_layers", **{f"neural_layers.{layer}": layer for layer in LAYERS}}
packages = list(roots)
for name, folder in roots.items():
    packages += [f"{name}.{sub}" for sub in find_namespace_packages(folder) if not sub.startswith("results")]
setup(packages=packages, package_dir=roots)
