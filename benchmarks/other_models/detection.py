"""Networks of Ultralytics: their maps of features get thinner, boxes, scores and classes do not."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from importlib import metadata

from ultralytics.nn import tasks

from benchmarks.other_models.entry import FULL, SLIM, Entry, noise

DETECTORS = ("yolov5n", "yolov8n", "yolov10n", "yolo11n", "yolo12n", "yolo26n")


def entries() -> Iterator[Entry]:
    image = partial(noise, 1, 3, 64, 64)
    for name in DETECTORS:
        make = partial(tasks.DetectionModel, f"{name}.yaml", verbose=False)
        yield Entry("ultralytics", "detection", name, make, image, {"*feats*": SLIM, "*": FULL})
    masks = partial(tasks.SegmentationModel, "yolov8n-seg.yaml", verbose=False)  # coefficients belong to prototypes
    options = {"outputs": {"*proto*": "full"}}
    yield Entry("ultralytics", "segmentation", "yolov8n-seg", masks, image, {"*feats*": SLIM, "*": FULL}, options)
    pose = partial(tasks.PoseModel, "yolo11n-pose.yaml", verbose=False)
    yield Entry("ultralytics", "pose", "yolo11n-pose", pose, image, {"*feats*": SLIM, "*": FULL})
    classes = partial(tasks.ClassificationModel, "yolov8n-cls.yaml", verbose=False)
    yield Entry("ultralytics", "classification", "yolov8n-cls", classes, image, FULL)


def version() -> tuple[str, str]:
    return "ultralytics", metadata.version("ultralytics")
