"""Converts models of other libraries in place: their dense blocks recompute, all else stays."""

from efficient_densenet.convert.conversion import convert_, explain, revert_
from efficient_densenet.convert.report import Finding, Report

__all__ = ["Finding", "Report", "convert_", "explain", "revert_"]
