"""CUDA through cuda-python or PyCUDA, behind one interface."""
