"""Everything that an accelerator is asked once: `python -m infer.accelerator`, in parts that can be cut."""
