"""Writes the audio goldens: what librosa and scipy make of one synthetic second.

    python3 -m venv venv && venv/bin/pip install -r requirements.txt && venv/bin/python make_goldens.py
"""

import pathlib

import librosa
import numpy as np
import scipy.signal
from safetensors.numpy import save_file

RATE, ORDER, FRAME, BANDS = 16_000, 16, 160, 40


def clip():
    """A vowel-like second: pulses through three resonances, with a little noise."""
    rng = np.random.default_rng(7)
    pulses = np.zeros(RATE)
    pulses[:: RATE // 120] = 1.0
    sound = pulses + 0.01 * rng.standard_normal(RATE)
    for hz, width in [(600, 80), (1200, 100), (2500, 120)]:
        radius, angle = np.exp(-np.pi * width / RATE), 2 * np.pi * hz / RATE
        sound = scipy.signal.lfilter([1.0], [1, -2 * radius * np.cos(angle), radius**2], sound)
    return (0.5 * sound / np.abs(sound).max()).astype(np.float32)


def log_mel(sound):
    power = librosa.feature.melspectrogram(
        y=sound,
        sr=RATE,
        n_fft=512,
        win_length=480,
        hop_length=160,
        n_mels=BANDS,
        center=True,
        # As torchaudio's defaults.
        pad_mode="reflect",
        htk=True,
        norm=None,
    )
    return np.log(power + 1e-6).astype(np.float32)


def lpc(sound):
    padded = np.concatenate([np.zeros(ORDER), sound.astype(np.float64)])
    residual, formants = [], []
    for start in range(0, RATE, FRAME):
        window = padded[start : start + ORDER + FRAME]
        a = librosa.lpc(window, order=ORDER)
        residual.append(scipy.signal.lfilter(a, [1.0], window)[ORDER:])
        _, response = scipy.signal.freqz([1.0], a, worN=BANDS)
        formants.append(np.log(np.abs(response)))
    formants = np.stack(formants, 1)
    formants = np.concatenate([formants, formants[:, -1:]], 1)  # 101 frames
    return np.concatenate(residual).astype(np.float32), formants.astype(np.float32)


if __name__ == "__main__":
    sound = clip()
    residual, formants = lpc(sound)
    tensors = dict(
        clip=sound, log_mel=log_mel(sound), residual=residual, formants=formants, residual_log_mel=log_mel(residual)
    )
    save_file(tensors, pathlib.Path(__file__).parent / "audio.safetensors")
    print({name: tensor.shape for name, tensor in tensors.items()})
