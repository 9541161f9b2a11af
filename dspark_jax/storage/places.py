"""Places in object stores, and the paths on this machine that stand for them.

    s3://BUCKET/A/B   <->   STORES/work/s3/BUCKET/A/B   where a program writes it
                      <->   STORES/read/s3/BUCKET/A/B   where programs read it

The mapping goes both ways and needs no table, so code that works on paths stays as it is: it gets `local_path(...)`,
and the few functions that move bytes ask `place_of(path)` whether there is anything to move. Readers have folders of
their own, so that fetching a newer content never touches the files of a program that is writing.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from dspark_jax.errors import UserError
from dspark_jax.files import user_cache

SCHEMES = ("s3", "gs")
STORES = "DSPARK_STORES"
# One slash as well: pathlib makes s3:/bucket of s3://bucket.
_URL = re.compile(r"(?P<scheme>[a-z0-9]+):/{1,2}(?P<bucket>[^/]+)/*(?P<key>.*)", re.DOTALL)
Location = str | os.PathLike[str]


@dataclass(frozen=True)
class Place:
    """An object, or the common beginning of several: a bucket, and a key without slashes at its ends."""

    scheme: str
    bucket: str
    key: str = ""

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}" + (f"/{self.key}" if self.key else "")

    def __truediv__(self, name: str) -> "Place":
        return Place(self.scheme, self.bucket, f"{self.key}/{name}" if self.key else name)

    @property
    def name(self) -> str:
        """The last part of the key, "" of a whole bucket."""
        return PurePosixPath(self.key).name

    @property
    def parent(self) -> "Place":
        """The place that this one lies in; a bucket lies in itself."""
        return Place(self.scheme, self.bucket, self.key.rpartition("/")[0])


def stores_folder() -> Path:
    """Where copies of objects lie on this machine: $DSPARK_STORES, else `stores` in the user's cache folder."""
    named = os.environ.get(STORES)
    return (Path(named) if named else user_cache() / "stores").absolute()


def place_of(location: Location) -> Place | None:
    """The place that a URL names or a path stands for; None for every other path.

    Raises:
        UserError: a URL without a bucket, or whose key has empty or dotted parts, which no path can stand for.
    """
    text = os.fspath(location)
    found = _URL.fullmatch(text)
    if found is not None and found["scheme"] in SCHEMES:
        # A store takes such keys, and a path of this machine would be another one.
        key = found["key"].rstrip("/")
        if any(part in ("", ".", "..") for part in key.split("/")) and key:
            raise UserError(f"{text} has an empty or dotted part; expected {found['scheme']}://BUCKET/A/B.")
        return Place(found["scheme"], found["bucket"], key)

    # The way back from a path. Lexical: a link inside the folder would lead out of it.
    root = os.path.join(stores_folder(), "")
    path = os.path.abspath(text)
    parts = path.removeprefix(root).split(os.sep) if path.startswith(root) else []
    return Place(parts[1], parts[2], "/".join(parts[3:])) if len(parts) > 2 and parts[1] in SCHEMES else None


def local_path(location: Location) -> Path:
    """The path under which a program writes a place; a path that names none is returned as it is."""
    return _below("work", location)


def copy_path(location: Location) -> Path:
    """The path under which a place's files are copied for reading; a path that names none is returned as it is."""
    return _below("read", location)


def _below(use: str, location: Location) -> Path:
    # A path stays the path that it is, relative ones too.
    place = place_of(location)
    if place is None:
        return Path(location)

    return stores_folder().joinpath(use, place.scheme, place.bucket, *filter(None, place.key.split("/")))


def seconds_of(variable: str, default: int, least: int = 1) -> float:
    """The whole seconds that an environment variable holds; UserError for another text."""
    text = os.environ.get(variable) or str(default)
    if not text.isdecimal() or int(text) < least:
        raise UserError(f"{variable} is {text!r}; a whole number of seconds was expected.")
    return float(text)


def shown(location: Location) -> str:
    """A location as sentences name it: the URL, where it stands for one."""
    return str(place_of(location) or location)
