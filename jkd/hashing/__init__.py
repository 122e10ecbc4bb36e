"""Binary codes: how scores become bits, linear hash functions, codes of anchor graphs, networks, and exact search."""

from jkd.hashing.anchors import SparseRows, anchor_graph, graph_factor, kmeans, sparse_anchor_graph
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
from jkd.hashing.code_losses import hash_agreement, hash_bce, hash_regression
from jkd.hashing.codes import to_bits, to_signs
from jkd.hashing.dcsh import (
    BinaryCodes,
    DCSHState,
    dcsh_objective,
    fit_binary_codes,
    initial_codes,
    max_bit_correlation,
    objective_of,
    refine_codes,
    update_b,
    update_v,
    update_y,
)
from jkd.hashing.search import Neighbors, hamming_search, sharded_hamming_search
from jkd.hashing.spectral import Embedding, centered_gram, spectral_embedding
from jkd.hashing.text import ImageHashNet, TextCNNHash

__all__ = [
    "BinaryCodes",
    "DCSHState",
    "Embedding",
    "ImageHashNet",
    "Neighbors",
    "Projection",
    "SparseRows",
    "TextCNNHash",
    "anchor_graph",
    "cca_projections",
    "centered_gram",
    "dcsh_objective",
    "fit_binary_codes",
    "fix_signs",
    "graph_factor",
    "hamming_search",
    "hash_agreement",
    "hash_bce",
    "hash_regression",
    "initial_codes",
    "itq_projection",
    "itq_rotation",
    "kmeans",
    "lsh_projection",
    "max_bit_correlation",
    "objective_of",
    "pca_projection",
    "project",
    "refine_codes",
    "sharded_hamming_search",
    "sparse_anchor_graph",
    "spectral_embedding",
    "to_bits",
    "to_signs",
    "update_b",
    "update_v",
    "update_y",
]
