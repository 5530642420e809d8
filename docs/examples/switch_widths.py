"""Run an ONNX file of `slimmable.export` at all widths in turn, and print the latencies.

Its path is the argument.
"""

import json
import sys
import time

import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
widths = json.loads(session.get_modelmeta().custom_metadata_map["slimmable.widths"])
images, _ = session.get_inputs()
shape = [size if isinstance(size, int) else 1 for size in images.shape]  # one image
batch = np.random.default_rng(0).random(shape, np.float32)

times = {width: [] for width in widths}
for _ in range(10):
    for position, width in enumerate(widths):  # the next call may have another width
        start = time.perf_counter()
        session.run(None, {images.name: batch, "width": np.array(position)})
        times[width].append(time.perf_counter() - start)
for width, seconds in times.items():
    print(f"width {width:g}: {1000 * min(seconds):.2f} ms")
