"""Calibration: from a model and its data to codes, block by block (`calibrate`), and what schemes cost (`allocate`)."""
