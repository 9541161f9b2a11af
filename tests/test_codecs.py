"""8-bit states: what they lose, what they weigh, and that records, views and the device agree on them."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.data.cache_writer import CacheWriter
from dspark_jax.data.codecs import CODECS, decode_states, encode_states
from dspark_jax.data.pipeline import pad_batch
from dspark_jax.data.records import CacheSpec, Sample, decode_record, encode_record
from dspark_jax.data.target_cache import TargetCache
from dspark_jax.data.views import Tapped
from dspark_jax.training.states import StoredStates
from tests.kill_cache import SPEC, make_sample

SCALED = ("float8_e4m3", "int8")


def states(tokens: int = 12, taps: int = 3, size: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Layers and tokens of very different sizes; one token is all zero."""
    rng = np.random.default_rng(0)
    features = rng.standard_normal((tokens, taps, size)) * 10.0 ** rng.integers(-3, 4, (tokens, taps, 1))
    features[5] = 0
    return features.reshape(tokens, -1).astype(np.float32), rng.standard_normal((tokens, size)).astype(np.float32)


@pytest.mark.parametrize("name", SCALED)
def test_every_layer_of_every_token_keeps_its_own_precision(name: str):
    features, hidden = states()
    stored = encode_states(features, hidden, CODECS[name])
    assert stored["features"].dtype == CODECS[name].dtype and stored["scales"].shape == (12, 4)
    back = decode_states(stored, np.float32)
    wide, found = (x.reshape(12, 3, 40) for x in (features, back["features"]))
    top = np.abs(wide).max(axis=-1, keepdims=True)
    # Half a step: of 1/127 of the largest, or of 2^-3 of a value's own power of two (2^-9 scales below the smallest).
    bound = top / 254 if name == "int8" else np.maximum(np.abs(wide) * 2.0**-4, top / 448 * 2.0**-10)
    assert np.all(np.abs(wide - found) <= bound * 1.001)
    assert not found[5].any() and np.abs(found - wide).max() > 0
    np.testing.assert_allclose(np.abs(found).max(axis=-1), top[..., 0], rtol=1e-6)


@pytest.mark.parametrize("name", CODECS)
def test_the_device_encodes_and_decodes_as_the_host_does(name: str):
    features, hidden = states()
    host, device = (
        encode_states(features, hidden, CODECS[name]),
        encode_states(*map(jnp.asarray, states()), CODECS[name], jnp),
    )
    for key, value in host.items():
        np.testing.assert_array_equal(np.asarray(device[key]).view(np.uint8), value.view(np.uint8))
    batch = {"input_ids": jnp.zeros((1, 12), jnp.int32), **{k: v[None] for k, v in device.items()}}
    source = StoredStates(jnp.float32)
    read = source.read(source.stored(None, batch), batch)
    assert set(read) == {"input_ids", "features", "last_hidden"}
    np.testing.assert_array_equal(read["features"][0], decode_states(host, np.float32)["features"])


def spec(name: str, size: int = 2560, taps: int = 5) -> CacheSpec:
    return dataclasses.replace(SPEC, dtype=name, hidden_size=size, layer_ids=tuple(range(taps)))


def test_bytes_a_token():
    sizes = {name: spec(name).token_bytes for name in CODECS}
    assert sizes["bfloat16"] == 6 * 2560 * 2 + 5  # DeepSpec's format keeps an attention mask of one byte besides
    assert sizes["int8"] == sizes["float8_e4m3"] == 6 * 2560 + 6 * 4 + 5
    assert sizes["int8"] / sizes["bfloat16"] < 0.502


@pytest.mark.parametrize("name", SCALED)
def test_records_views_and_batches_carry_scales(name: str, tmp_path: Path):
    made = dataclasses.replace(SPEC, dtype=name)
    sample = make_sample(3)
    record = encode_record(sample, made)
    assert len(record) == len(encode_record(dataclasses.replace(sample.cut(0)), made)) + made.token_bytes * len(
        sample.input_ids
    )
    found = decode_record(record, made)
    assert found.scales is not None
    np.testing.assert_array_equal(encode_record(found, made), record)  # codes are taken as they are
    with pytest.raises(ValueError, match="has codes of"):
        encode_record(found, SPEC)
    with CacheWriter(tmp_path, made) as writer:
        for index in range(made.num_sources):
            writer.add(index, make_sample(index))
        writer.finish()
    cache = TargetCache(tmp_path)
    last = Tapped(cache, made.layer_ids[-1:])[0].decoded()
    np.testing.assert_array_equal(last.features, cache[0].decoded().features[:, -made.hidden_size :])
    np.testing.assert_array_equal(last.last_hidden, cache[0].decoded().last_hidden)
    batch = pad_batch([cache[0], cache[1]], 40)
    assert batch["scales"].shape == (2, 40, 3) and batch["features"].dtype == made.numpy_dtype
    assert isinstance(cache[0], Sample) and np.abs(last.features - make_sample(0).features[:, -16:]).max() < 0.2
