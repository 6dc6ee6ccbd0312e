"""Random numbers that are looked up, not drawn: each is a pure function of a key (numpy only, no state).

Crops and colours then do not depend on who computes them (rank, worker, process that was restarted) and nothing has to
be saved. The generator is the finaliser of splitmix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number
generators") applied to a counter, in bulk: a generator object for each image would cost more than all its numbers.
"""

import hashlib

import numpy as np
from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_SHIFTS = np.uint64(30), np.uint64(27), np.uint64(31)


def splitmix64(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64: a bijection of uint64 that scatters neighbouring inputs."""
    # In place: for the few numbers of a rank's part of a batch, making arrays takes as long as the arithmetic.
    mixed = values >> _SHIFTS[0]
    mixed ^= values
    mixed *= _MIX_1
    mixed ^= mixed >> _SHIFTS[1]
    mixed *= _MIX_2
    mixed ^= mixed >> _SHIFTS[2]
    return mixed


def key(*parts: int | str) -> np.uint64:
    """A 64-bit key of some integers and words: the same on every machine and version of Python (hash() is not)."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return np.uint64(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little"))


def uniforms(
    seed: int, purpose: str, batch_index: int, slots: NDArray[np.int64], crops: int, draws: int
) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1) for places of a global batch.

    Args:
        seed: the run's seed.
        purpose: what the numbers are for; other purposes get independent numbers.
        batch_index: the global batch.
        slots: (S,) int64, places in the global batch, in [0, 2^32).
        crops: crops of each image, fewer than 2^16.
        draws: numbers for each crop, fewer than 2^16.

    Returns:
        (S, crops, draws) float64; entry [i, c, d] depends on (seed, purpose, batch_index, slots[i], c, d) alone.
    """
    counter = (
        (np.asarray(slots).astype(np.uint64)[:, None, None] << np.uint64(32))
        | (np.arange(crops, dtype=np.uint64)[None, :, None] << np.uint64(16))
        | np.arange(draws, dtype=np.uint64)[None, None, :]
    )
    bits = splitmix64(splitmix64((counter + np.uint64(1)) * _GOLDEN + key(seed, purpose, batch_index)))
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
