"""Binary codes: how scores become bits, linear hash functions, and exact search."""

from jkd.hashing.baselines import (
    Projection,
    cca_projections,
    fix_signs,
    itq_projection,
    itq_rotation,
    lsh_projection,
    pca_projection,
    project,
)
from jkd.hashing.bernoulli import (
    bernoulli_kl,
    bit_information,
    bit_probabilities,
    concrete_temperature,
    modality_gap,
    sample_bits,
    sample_bits_relaxed,
    sample_bits_st,
)
from jkd.hashing.codes import (
    to_bits,
    to_signs,
)
from jkd.hashing.models import (
    CodeCritic,
    HashEncoder,
    pool_tokens,
)
from jkd.hashing.mutual_information import (
    CmimhTerms,
    bernoulli_loglik_matrix,
    cmimh_loss,
    cmimh_terms,
    cross_mi_lower_bound,
    mi_lower_bound,
)
from jkd.hashing.search import (
    Neighbors,
    hamming_search,
    sharded_hamming_search,
)

__all__ = [
    "CmimhTerms",
    "CodeCritic",
    "HashEncoder",
    "Neighbors",
    "Projection",
    "bernoulli_kl",
    "bernoulli_loglik_matrix",
    "bit_information",
    "bit_probabilities",
    "cca_projections",
    "cmimh_loss",
    "cmimh_terms",
    "concrete_temperature",
    "cross_mi_lower_bound",
    "fix_signs",
    "hamming_search",
    "itq_projection",
    "itq_rotation",
    "lsh_projection",
    "mi_lower_bound",
    "modality_gap",
    "pca_projection",
    "pool_tokens",
    "project",
    "sample_bits",
    "sample_bits_relaxed",
    "sample_bits_st",
    "sharded_hamming_search",
    "to_bits",
    "to_signs",
]
