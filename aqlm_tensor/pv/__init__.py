"""PV-tuning: the whole model end to end, codes included (`tune_pv`)."""
