"""The triplet objective: distance, mining, and the objective."""

from tla_service.triplets.distance import angular_distance, cosine_similarity
from tla_service.triplets.loss import norm_penalty, triplet_hinge
from tla_service.triplets.mining import Negatives, mine_hardest, mine_random, pick_positives

__all__ = [
    "Negatives",
    "angular_distance",
    "cosine_similarity",
    "mine_hardest",
    "mine_random",
    "norm_penalty",
    "pick_positives",
    "triplet_hinge",
]
