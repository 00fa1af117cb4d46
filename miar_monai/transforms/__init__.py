"""Transforms of volumes and slices: array versions, and dictionary versions (``...d``) of the same operations.

Images are channel-first: volumes (1, X, Y, Z), slices (1, X, Y). X and Y are the in-plane axes.
"""

from miar_monai.data.outputs import check_results, result_path
from miar_monai.transforms.dictionary import (
    CentralSlicesd,
    LoadVolumed,
    RandSimulateLowResolutiond,
    SaveVolumed,
    ScaleIntensityHUd,
    ScaleIntensityRobustd,
    SimulateLowResolutiond,
)
from miar_monai.transforms.files import LoadVolume, SaveVolume
from miar_monai.transforms.guide import ResampleGuided, prepare_guide
from miar_monai.transforms.intensity import ScaleIntensityHU, ScaleIntensityRobust, limits_in_units
from miar_monai.transforms.invert import InvertSuperResolutiond, SplitUncertaintyd
from miar_monai.transforms.labels import SaveLabelsd, carry_labels
from miar_monai.transforms.planes import DetailedPlanesd
from miar_monai.transforms.simulate import CentralSlices, SimulateLowResolution

__all__ = [
    "CentralSlices",
    "CentralSlicesd",
    "DetailedPlanesd",
    "InvertSuperResolutiond",
    "LoadVolume",
    "LoadVolumed",
    "RandSimulateLowResolutiond",
    "ResampleGuided",
    "SaveLabelsd",
    "SaveVolume",
    "SaveVolumed",
    "ScaleIntensityHU",
    "ScaleIntensityHUd",
    "ScaleIntensityRobust",
    "ScaleIntensityRobustd",
    "SimulateLowResolution",
    "SimulateLowResolutiond",
    "SplitUncertaintyd",
    "carry_labels",
    "check_results",
    "limits_in_units",
    "prepare_guide",
    "result_path",
]
