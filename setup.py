"""Package and, on request, the ahead-of-time C++ ops (SLTRAIN_BUILD_OPS=1 with --no-build-isolation)."""

import os
import sysconfig
from pathlib import Path

from setuptools import find_packages, setup

LIBRARY = "sltrain_ds/ops/libsltrain_cuda.so"  # launch/build_cuda.sh

ext_modules, cmdclass = [], {}
if os.environ.get("SLTRAIN_BUILD_OPS") == "1":
    import torch
    from torch.utils import cpp_extension

    from sltrain_ds.ops import cuda_build
    from sltrain_ds.ops.builder import CXX_FLAGS, LINK_FLAGS

    if torch.version.cuda and cuda_build.nvcc():
        cuda_build.build(cuda_build.prebuilt())

    ext_modules = [
        cpp_extension.CppExtension(
            "sltrain_ds.ops._C",
            sources=sorted(f"csrc/{name}" for name in os.listdir("csrc") if name.endswith(".cpp")),
            extra_compile_args=CXX_FLAGS,
            extra_link_args=LINK_FLAGS,
        )
    ]
    cmdclass = {"build_ext": cpp_extension.BuildExtension}

setup(
    name="sltrain_ds",
    version="0.1.0",
    description="SLTrain (sparse plus low-rank pretraining) as a DeepSpeed training stack",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.14",
    packages=[*find_packages(include=["sltrain_ds", "sltrain_ds.*"]), "sltrain_ds.csrc"],
    # the C++ sources travel inside the wheel, so that a node can build them at first use
    package_dir={"sltrain_ds.csrc": "csrc"},
    package_data={
        "sltrain_ds.csrc": ["*.cpp", "*.h", "cuda/*"],
        "sltrain_ds": ["data/*.xz", "config/*.json", "ops/libsltrain_cuda.so"],
    },
    # the CUDA library fits every Python and torch, but one kind of machine
    options={"bdist_wheel": {"plat_name": sysconfig.get_platform()}} if os.path.exists(LIBRARY) else {},
    install_requires=[
        "torch>=2.11,<2.16",
        "deepspeed>=0.19.8,<0.20",
        "transformers>=5.17,<6",
        "datasets>=5.2,<6",
        "bitsandbytes>=0.50.2,<0.51",
        "sentencepiece>=0.2.1",
        "protobuf",  # transformers needs it for sentencepiece models without declaring it
        "pydantic>=2.10,<3",
        "safetensors>=0.5",
        "numpy>=1.26",
        "matplotlib>=3.9",
        "tqdm",
        "ninja",
    ],
    extras_require={
        # the formatters' versions are fixed: another one would lay out the same code otherwise
        "dev": ["pytest>=8", "pytest-timeout", "ruff==0.17.6", "clang-format==23.1.5", "jsonschema>=4.20"],
        "gpu": ["liger-kernel>=0.8.5"],
        "tensorboard": ["tensorboard"],
    },
    entry_points={"console_scripts": ["sltrain-ds=sltrain_ds.cli:main"]},
    ext_modules=ext_modules,
    cmdclass=cmdclass,
)
