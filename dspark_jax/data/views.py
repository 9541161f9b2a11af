"""Views of a feature source that read like one themselves."""

from dataclasses import dataclass

import numpy as np

from dspark_jax.data.records import CacheSpec, FeatureSource, Sample


@dataclass(frozen=True)
class Truncated:
    """`source` with every sample cut at its end to `max_length` tokens; no shorter one is touched."""

    source: FeatureSource
    max_length: int

    @property
    def spec(self) -> CacheSpec:
        return self.source.spec

    @property
    def lengths(self) -> np.ndarray:
        return np.minimum(self.source.lengths, self.max_length)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        sample, end = self.source[index], self.max_length
        return Sample(
            sample.sample_id,
            sample.input_ids[:end],
            sample.loss_mask[:end],
            sample.features[:end],
            sample.last_hidden[:end],
        )
