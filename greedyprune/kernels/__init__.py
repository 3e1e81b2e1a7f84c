"""Tensors in, greedy path out: on processors, on a GPU, and in the float64 reference for both."""
