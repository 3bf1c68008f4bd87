"""Package metadata. Imports no torch and compiles nothing."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
README = (HERE / "README.md").read_text(encoding="utf-8")
# On a package's page there are no files to show or to link to: what is linked is named.
PICTURES, LINKS = r"!\[[^\]]*\]\([^)]*\)\n+", r"\[([^\]]+)\]\((?!https://)[^)]+\)"
DESCRIPTION = re.sub(LINKS, r"\1", re.sub(PICTURES, "", README))
PACKAGE = (HERE / "efficient_densenet" / "__init__.py").read_text(encoding="utf-8")

setup(
    name="efficient_densenet",
    version=re.search(r'^__version__ = "(.+)"$', PACKAGE, re.MULTILINE)[1],
    description="DenseNets trained in O(kL) memory: only the features themselves are kept",
    author="efficient_densenet contributors",
    keywords="densenet, pytorch, deep learning, memory, recomputation, activation checkpointing",
    long_description=DESCRIPTION,
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    packages=find_packages(include=["efficient_densenet", "efficient_densenet.*"]),
    package_data={"efficient_densenet": ["py.typed"]},
    install_requires=["torch>=2.11", "torchvision"],
    extras_require={
        "train": ["lightning>=2.6", "matplotlib", "rich"],
        "dev": [
            *("pytest", "pytest-benchmark", "pytest-xdist", "hypothesis", "ruff", "mypy"),
            *("onnx", "onnxscript", "onnxruntime"),
        ],
        "docs": ["sphinx>=8", "myst-parser>=4", "furo", "sphinx-copybutton"],
        "compat": [
            "timm>=1.0.31",
            "monai>=1.6.1",
            "torchxrayvision>=1.5.7",
            "torchreid>=0.2.5",
            "segmentation-models-pytorch>=0.6.0",
            "pytorchcv>=0.0.74",
            "grad-cam>=1.5.7",
        ],
    },
    entry_points={"console_scripts": ["efficient-densenet = efficient_densenet.cli:main"]},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "License :: OSI Approved :: MIT License",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
