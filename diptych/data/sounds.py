"""Sound in and out: PCM WAV with the standard library alone."""
import io
import wave

import numpy as np

from diptych.document import Audio


def encode_wav(audio: Audio) -> bytes:
    """16-bit mono WAV."""
    if audio.samples is None:
        raise ValueError("expected audio with samples, got one still to be made; fix: generate it first")
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(audio.sample_rate)
        file.writeframes(np.clip(np.rint(audio.samples * 32768.0), -32768, 32767).astype("<i2").tobytes())
    return buffer.getvalue()


def decode_wav(data: bytes) -> Audio:
    """PCM WAV of 8, 16 or 32 bits; several channels are averaged."""
    try:
        with wave.open(io.BytesIO(data)) as file:
            width, channels, rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
            raw = file.readframes(file.getnframes())
        if width not in (1, 2, 4):
            raise wave.Error(f"{8 * width} bits per sample; fix: convert it to 16 bits")
        raw = raw[:len(raw) // (width * channels) * width * channels]
    except (wave.Error, EOFError) as error:
        raise ValueError(f"expected PCM WAV audio, got {error or 'a truncated file'}") from error
    samples = np.frombuffer(raw, {1: "u1", 2: "<i2", 4: "<i4"}[width]).astype(np.float64)
    samples = (samples - 128) / 128 if width == 1 else samples / 2.0 ** (8 * width - 1)
    return Audio(samples=samples.reshape(-1, channels).mean(axis=1), sample_rate=rate)
