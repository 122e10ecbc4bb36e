"""Data sets, sources whose batches are a pure function of (seed, step), and batch augmentations."""

from jkd.data.augment import CutmixDraw as CutmixDraw
from jkd.data.augment import MixupDraw as MixupDraw
from jkd.data.augment import compose as compose
from jkd.data.augment import cutmix as cutmix
from jkd.data.augment import cutmix_share as cutmix_share
from jkd.data.augment import cutout as cutout
from jkd.data.augment import draw_cutmix as draw_cutmix
from jkd.data.augment import draw_mixup as draw_mixup
from jkd.data.augment import flip as flip
from jkd.data.augment import mixup as mixup
from jkd.data.augment import normalize as normalize
from jkd.data.augment import pad_crop as pad_crop
from jkd.data.augment import rotate as rotate
from jkd.data.augment import rotation_bank as rotation_bank
from jkd.data.augment import shift as shift
from jkd.data.dataset import Dataset as Dataset
from jkd.data.dataset import blank as blank
from jkd.data.dataset import concat as concat
from jkd.data.dataset import from_arrays as from_arrays
from jkd.data.idx import read_idx as read_idx
from jkd.data.registry import load as load
from jkd.data.seeding import epoch_order as epoch_order
from jkd.data.source import MemorySource as MemorySource
from jkd.data.source import Source as Source
from jkd.data.source import StreamSource as StreamSource
from jkd.data.source import source as source
