"""The competitors of the linear benchmarks, one file each.

A provider makes, from the parts of some quantized weights of equal shape and rows x, a function of the round's number
that multiplies x with the weight whose turn it is.
"""
