"""Package metadata. Imports no torch and compiles nothing."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="efficient_densenet",
    version="0.1.0",
    description="DenseNets trained in O(kL) memory: only the features themselves are kept",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
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
        "License :: OSI Approved :: MIT License",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
