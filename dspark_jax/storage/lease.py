"""The right to write a place: one object, created and renewed by conditional writes.

A disk's lock ends with its process; an object has to be renewed instead. Its holder writes it anew every few seconds,
on the condition that it is still the one that it wrote last. A process that finds it watches: while it changes, the
place has a writer; when it has stood still for `lease_seconds()`, its writer is gone. Taking it over is a write on the
condition that it still stands as it was watched, so of several processes one gets it. No clocks are compared.
"""

import json
import os
import socket
import sys
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path

from dspark_jax.errors import UserError
from dspark_jax.readers import parse_json
from dspark_jax.storage import objects
from dspark_jax.storage.objects import Found, Unconditional
from dspark_jax.storage.places import Place, seconds_of

SECONDS = "DSPARK_LEASE_SECONDS"
FILE = ".writer.json"
_POLLS = 12


class Lease:
    """The exclusive right to write a place, until `release` or the end of `with`; a thread renews it.

    Args:
        place: an object that stands for the right, as PLACE/.writer.json.
        folder: of this process for this place, which it has locked: the same folder of the same machine in the object
            means that its holder is gone, without waiting.
        what: the place's role in a sentence, as in "the run".
        seconds: for which an object must stand still before it is taken over; None: `lease_seconds()`.
    Raises:
        UserError: another process writes there.
    """

    def __init__(self, place: Place, folder: Path, what: str, seconds: float | None = None):
        self.place, self.what = place, what
        self._seconds = lease_seconds() if seconds is None else seconds
        self._held: Found | None = None
        self._lost = False
        self._count, self._host = 0, socket.gethostname()
        self._token, self._here = uuid.uuid4().hex, _identity(folder)
        self._ended = threading.Event()
        # Taken before the thread is begun, so that a refusal leaves none behind.
        try:
            self._held = self._take()
        except Unconditional:
            print(
                f"{place} is in a store without conditional writes: see that one process writes there.", file=sys.stderr
            )
            return

        # A daemon: a program that ends without releasing must not be kept alive by it.
        self._thread = threading.Thread(target=self._renew, daemon=True)
        self._thread.start()

    def check(self) -> None:
        """UserError where another process has taken the place over, as it may after a long outage."""
        if self._lost:
            raise UserError(
                f"Another process has taken over {self.what} {self.place.parent}, after this one could not renew its "
                "right to write there; what it had written is whole. Run one of them."
            )

    def release(self) -> None:
        """Gives the right up; nothing where it was given up or lost before."""
        self._ended.set()
        if self._held is None:
            return

        self._thread.join()
        held, self._held = self._held, None
        # Removing has no condition, so the last look comes right before it.
        with suppress(UserError):
            now = objects.find(self.place)
            if not self._lost and now is not None and now.tag == held.tag:
                objects.remove([self.place])

    def __enter__(self) -> "Lease":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _take(self) -> Found:
        if (mine := objects.create(self.place, self._bytes())) is not None:
            return mine

        before, theirs = objects.find(self.place), self._holder()
        # This process holds the folder's lock, so no other process of this machine holds the place for that folder.
        if before is not None and theirs.get("here") != self._here:
            self._watch(before, str(theirs.get("host")))

        # None before: it was released between the two looks.
        # On the condition of what was seen: of several that take it over, one succeeds.
        mine = (
            objects.create(self.place, self._bytes())
            if before is None
            else objects.replace(self.place, self._bytes(), before)
        )
        if mine is None:
            raise self._refusal(str(theirs.get("host")))
        return mine

    def _watch(self, before: Found, host: str) -> None:
        """Returns when the object has stood still for long enough; UserError when it changes."""
        # Said, since the program seems to hang meanwhile.
        print(f"Waiting {self._seconds:g} s to see whether {host} still writes {self.place.parent}.", file=sys.stderr)
        for _ in range(_POLLS):
            time.sleep(self._seconds / _POLLS)
            now = objects.find(self.place)
            if now is not None and now.tag != before.tag:
                raise self._refusal(host)

    def _refusal(self, host: str) -> UserError:
        return UserError(
            f"Another process, on {host}, is writing {self.what} {self.place.parent}; wait for it or give another "
            "output."
        )

    def _renew(self) -> None:
        # Four times in the time that others wait: one lost request is not the end.
        while self._held is not None and not self._ended.wait(self._seconds / 4):
            self._count += 1
            # An outage is no loss: the right is lost when another process has written.
            with suppress(UserError):
                renewed = objects.replace(self.place, self._bytes(), self._held)
                if renewed is None:
                    self._lost = True
                    return
                self._held = renewed

    def _holder(self) -> dict[str, object]:
        with suppress(UserError):
            value = parse_json(objects.read(self.place), str(self.place))
            return value if isinstance(value, dict) else {}
        return {}

    def _bytes(self) -> bytes:
        # The count makes every renewal another content, and so another tag.
        content = {"token": self._token, "host": self._host, "here": self._here, "count": self._count}
        return json.dumps(content).encode()


def lease_seconds() -> float:
    """Seconds after which a writer that gives no sign of life is taken for dead: $DSPARK_LEASE_SECONDS, else 60."""
    return seconds_of(SECONDS, 60)


def _identity(folder: Path) -> str:
    """A folder of a machine since its start: two containers of one machine have different ones."""
    stat, boot = os.stat(folder), Path("/proc/sys/kernel/random/boot_id")
    return f"{boot.read_text().strip() if boot.exists() else socket.gethostname()}:{stat.st_dev}:{stat.st_ino}"
