"""The compiled draft-verify-accept loop: state, one round, dispatches of many, prefill, acceptance, sampling."""
