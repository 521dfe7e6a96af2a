"""Whole models: converting Hugging Face checkpoints, and activation norms for Wanda."""

from .calibrate import CalibrationReport, calibrate
from .checkpoint import Checkpoint
from .config import ModelConfig
from .layers import Settings
from .report import ConvertReport, LayerReport
from .run import convert_checkpoint

__all__ = [
    "CalibrationReport",
    "Checkpoint",
    "ConvertReport",
    "LayerReport",
    "ModelConfig",
    "Settings",
    "calibrate",
    "convert_checkpoint",
]
