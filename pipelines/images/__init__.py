"""Pipeline of a plain install, and the augmentation that no other does. Importing it imports torchvision."""

from engine.pipelines.images.pipeline import ImagePipeline

__all__ = ["ImagePipeline"]
