"""Limits of the Triton kernels, for modules that must not import Triton."""

MAX_ROW_VALUES = 16384  # columns of a row that one program of `quantize_row_kernel` holds
