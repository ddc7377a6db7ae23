"""Distributions over tasks, one file a domain.

A distribution is added by writing its file and naming its class here.
"""

from collections.abc import Callable
from typing import Any

from distmeta.tasks.cifar import FC100, CifarFS
from distmeta.tasks.cldr import CLDRNames
from distmeta.tasks.folders import ImageFolder
from distmeta.tasks.functions import SimpleFunction
from distmeta.tasks.glyphs import Glyphs
from distmeta.tasks.locomotion import Ant, Gym, HalfCheetahDirection, HalfCheetahVelocity
from distmeta.tasks.metaworld import MetaWorld
from distmeta.tasks.mixture import Mixture
from distmeta.tasks.navigation import Navigation
from distmeta.tasks.omniglot import Omniglot
from distmeta.tasks.photographs import CUB, MiniImageNet, TieredImageNet
from distmeta.tasks.sinusoid import Sinusoid
from distmeta.tasks.tabular import Tabular
from distmeta.tasks.text import Clinc150, OwnText
from distmeta.tasks.translation import ParallelText

TASKS: dict[str, Callable[..., Any]] = {
    "ant": Ant,
    "cifar_fs": CifarFS,
    "cldr": CLDRNames,
    "clinc150": Clinc150,
    "cub": CUB,
    "fc100": FC100,
    "function": SimpleFunction,
    "glyphs": Glyphs,
    "gym": Gym,
    "half_cheetah_dir": HalfCheetahDirection,
    "half_cheetah_vel": HalfCheetahVelocity,
    "image_folder": ImageFolder,
    "metaworld": MetaWorld,
    "mini_imagenet": MiniImageNet,
    "mixture": Mixture,
    "navigation": Navigation,
    "omniglot": Omniglot,
    "parallel": ParallelText,
    "sinusoid": Sinusoid,
    "tabular": Tabular,
    "text": OwnText,
    "tiered_imagenet": TieredImageNet,
}
