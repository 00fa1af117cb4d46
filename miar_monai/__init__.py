"""MIAR: fourfold super-resolution of MRI and CT slices by next-scale prediction, for MONAI."""

__all__ = ["__version__"]

__version__ = "0.1.0"
