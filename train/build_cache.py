"""Runs the target over conversations and stores its hidden states, the training data of a drafter: the target cache.

    python -m train.build_cache --target assets/embedded_target --conversations runs/x/conversations.jsonl \\
        --layers 1 3 5 7 --output runs/x/cache --max-length 512
    python -m train.build_cache --config qwen3_4b_dspark --conversations runs/x/conversations.jsonl
                        target, layers, lengths, dtypes and folder as that experiment reads them
    ... --estimate      prints the bytes that it would write and what chips compute at most, and writes nothing

The same command continues a killed run, which ends with the same bytes.

Several processes are one job where dspark_jax/distributed.py's variables say so: the target runs on all of their
devices, and the first process writes. The output must be a folder that all of them see.
"""

from dspark_jax.config.cli import load_config, parse, program, take_option
from dspark_jax.datagen.cache_builder import CacheSettings, make
from dspark_jax.distributed import barrier, bounded_by_peers, initialize_from_environment, require_same
from dspark_jax.report import listing


@program
def main(argv: list[str]) -> None:
    experiment, options = take_option(argv, "--config")
    # An experiment fixes what its cache must have; options may still override it.
    defaults = CacheSettings if experiment is None else CacheSettings.of_experiment(load_config(experiment))
    settings = parse(defaults, options, description=__doc__)
    settings.check()

    # After the checks that need no other process, before anything touches a device.
    initialize_from_environment()
    require_same({"they were given different options": settings})
    with bounded_by_peers():
        figures = make(settings)
        barrier("the end of the cache")

    if figures:
        print(listing(figures))


if __name__ == "__main__":
    main()
