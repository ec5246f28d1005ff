"""The served policy: the trained one with the temperature, uniform share and limit of `serving`.

    pi_served(a|x) = (1 - uniform) softmax(s / temperature)_a + uniform / |eligible items|

Validation, evaluation, export and draws all take it from here. Of a slate this is the distribution
of its first item; the others follow by sampling without replacement (Plackett and Luce).
"""

from offtower.serving.dense import served_probabilities
from offtower.serving.limits import LimitedPolicy, served_policy
from offtower.serving.mixture import mix_uniform
from offtower.serving.policy import ServedPolicy
from offtower.serving.shared_terms import SharedTerms

__all__ = [
    "LimitedPolicy",
    "ServedPolicy",
    "SharedTerms",
    "mix_uniform",
    "served_policy",
    "served_probabilities",
]
