"""FFCV: the pipeline that loads .beton files, and their writer. Importing this package does not import FFCV."""

from engine.pipelines.ffcv.pipeline import FFCVPipeline, check_installed

__all__ = ["FFCVPipeline", "check_installed"]
