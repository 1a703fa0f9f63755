"""What cnnops is called, what it needs and what it ships. Tools are configured in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
DEMO = ["scikit-learn>=1.3", "matplotlib>=3.8", "pillow>=10.1"]
BENCH = ["pytest>=8", "pytest-benchmark>=4", "matplotlib>=3.8"]
DOCS = ["sphinx>=8", "myst-parser>=4", "furo>=2024.8.6"]
TEST = [
    *DEMO,
    *BENCH,
    "pytest-xdist>=3.5",
    "hypothesis>=6.100",
    "setuptools>=70",  # a test builds the wheel
    "pyyaml>=6",  # tests read the workflow, the issue forms and the citation
    "transformers>=5",  # networks that others wrote, built from configurations: nothing is downloaded
    # NVRTC compiles every kernel in the tests; neither a GPU nor a driver is needed for that.
    "cuda-bindings>=12.8; sys_platform == 'linux'",
    "nvidia-cuda-nvrtc; sys_platform == 'linux'",
    "nvidia-cuda-nvdisasm; sys_platform == 'linux'",  # and what it makes of the main loops is read
]

setup(
    name="cnnops",
    version=re.search(r'__version__ = "(.+)"', (HERE / "cnnops/__init__.py").read_text())[1],
    description="Hand-written CUDA kernels for convolutional networks, as drop-in ops for PyTorch",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="cnnops contributors",
    license="BSD-3-Clause",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Environment :: GPU :: NVIDIA CUDA",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=">=3.11",
    # kernels/ stands beside the package in a checkout and inside of it in a wheel;
    # cnnops.cuda.kernel.kernels_dir looks in both places.
    packages=[
        *find_packages(include=["cnnops", "cnnops.*"]),
        "cnnops.kernels",
        "cnnops.kernels.emulator",
    ],
    package_dir={"cnnops.kernels": "kernels"},
    package_data={
        "cnnops": ["py.typed", "tables/*.json"],
        "cnnops.kernels": ["*.cu", "*.cuh", "*.json", "README.md"],
        "cnnops.kernels.emulator": ["*"],
    },
    install_requires=[
        "torch>=2.11,<2.14",
        "numpy>=1.26",
        "numba>=0.61",
        "platformdirs>=4",
        "rich>=13",
    ],
    extras_require={
        "cuda12": ["cupy-cuda12x[ctk]>=14", "cuda-core[cu12]>=1"],
        "cuda13": ["cupy-cuda13x[ctk]>=14", "cuda-core[cu13]>=1"],
        "demo": DEMO,
        "bench": BENCH,
        "docs": DOCS,
        "test": TEST,
        "dev": [*TEST, *DOCS, "ruff>=0.9", "mypy>=1.11", "pre-commit>=3", "build>=1.2", "twine>=6"],
    },
    entry_points={"console_scripts": ["cnnops = cnnops.__main__:main"]},
    zip_safe=False,
)
