"""Measure a program's own kernels on this GPU, and write the best tiles down in the language."""
