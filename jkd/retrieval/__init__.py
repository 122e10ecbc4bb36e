"""Visual-semantic embedding: images and texts in one space, by several attention heads each."""

from jkd.retrieval.attention import Pooled, attention_diversity, head_overlap, masked_softmax, multi_head_pool
from jkd.retrieval.models import (
    MHSAN,
    Embedded,
    ImageEncoder,
    MatchedPairs,
    MultiHeadAttentionPool,
    TextEncoder,
)
from jkd.retrieval.ranking import RankingTerms, vse_hard_negative_loss, vse_ranking_loss, vse_ranking_terms
from jkd.retrieval.sharding import MODEL_RULES
from jkd.retrieval.sru import GRU, SRU, SRULayer
from jkd.retrieval.staging import Gates, epoch_gates, part_of, rate_factors, staged

__all__ = [
    "GRU",
    "MHSAN",
    "MODEL_RULES",
    "SRU",
    "Embedded",
    "Gates",
    "ImageEncoder",
    "MatchedPairs",
    "MultiHeadAttentionPool",
    "Pooled",
    "RankingTerms",
    "SRULayer",
    "TextEncoder",
    "attention_diversity",
    "epoch_gates",
    "head_overlap",
    "masked_softmax",
    "multi_head_pool",
    "part_of",
    "rate_factors",
    "staged",
    "vse_hard_negative_loss",
    "vse_ranking_loss",
    "vse_ranking_terms",
]
