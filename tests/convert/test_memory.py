"""A conversion holds no copy of the weights beside the model that it returns."""

import subprocess
import sys

import pytest

MEASURE = """
import resource, torch, slimmable

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

layers = [torch.nn.Linear(4096, 4096) for _ in range({layers})]
model = torch.nn.Sequential(torch.nn.Linear(8, 4096), *layers, torch.nn.BatchNorm1d(4096), torch.nn.Linear(4096, 8))
weights = sum(p.nbytes for p in model.parameters())
slimmable.slimify(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)), example_inputs=torch.zeros(2, 8))
before = peak()
slim = slimmable.slimify(model, example_inputs=torch.zeros(2, 8), inplace={inplace})
print((peak() - before) / weights)
"""


@pytest.mark.parametrize(("inplace", "copies"), [(True, 0), (False, 1)])
def test_the_peak_is_the_model_that_comes_back(inplace, copies):
    pytest.importorskip("resource")
    code = MEASURE.format(layers=6, inplace=inplace)
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert float(found) < copies + 0.2
