"""Cross-fitting: models that are fitted out of fold on the training log.

Source: Chernozhukov et al. 2018, "Double/debiased machine learning".
"""
