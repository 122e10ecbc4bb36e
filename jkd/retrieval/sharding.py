"""How the two encoders are laid out on a mesh."""

from jkd.train.mesh import fsdp, shard

# The projections are most of the weights (10 heads of 2,400 numbers to 2,400: 57.6 million each): the joined heads are
# split over the axis "tensor", and their partial products added. All else is as by default.
MODEL_RULES = ((r"head/projection/kernel$", shard(-2)), (".*", fsdp()))
