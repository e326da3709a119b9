"""Runs one of the kernels that leave their memory; AddressSanitizer ends the process. Arguments: library, which."""

import ctypes
import sys

import numpy as np
from cuda_on_cpu.build import Library

memory = np.zeros(32, np.int32)
Library(sys.argv[1]).call("run_out_of_bounds", int(sys.argv[2]), memory.ctypes.data_as(ctypes.c_void_p))
