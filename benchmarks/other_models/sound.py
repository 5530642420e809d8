"""Networks of torchaudio."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from importlib import metadata

import torch
from torchaudio import models

import slimmable
from benchmarks.other_models.entry import FULL, Entry, noise


def entries() -> Iterator[Entry]:
    letters = partial(models.Wav2Letter, num_classes=10, input_type="mfcc", num_features=13)
    yield Entry("torchaudio", "Wav2Letter", "Wav2Letter", letters, partial(noise, 2, 13, 400), FULL)
    speech = partial(models.DeepSpeech, 26, n_hidden=64, n_class=10)
    yield Entry("torchaudio", "DeepSpeech", "DeepSpeech", speech, partial(noise, 2, 1, 30, 26), FULL)
    conformer = partial(models.Conformer, 32, 4, 64, 2, depthwise_conv_kernel_size=7)
    yield Entry("torchaudio", "Conformer", "Conformer", conformer, sequences, FULL)
    sizes = {"enc_num_feats": 32, "msk_num_feats": 16, "msk_num_hidden_feats": 32, "msk_num_layers": 2}
    parted = partial(models.ConvTasNet, enc_kernel_size=16, msk_num_stacks=1, **sizes)
    yield Entry("torchaudio", "ConvTasNet", "ConvTasNet", parted, partial(noise, 2, 1, 800), FULL)
    mixed = partial(models.HDemucs, ["a", "b"], audio_channels=1, channels=8, depth=3, nfft=256)
    yield Entry("torchaudio", "HDemucs", "HDemucs", mixed, partial(noise, 1, 1, 4096), FULL)


def sequences() -> slimmable.Inputs:
    return slimmable.Inputs(noise(2, 20, 32), torch.tensor([20, 18]))


def version() -> tuple[str, str]:
    return "torchaudio", metadata.version("torchaudio")
