"""Download a file once, check its SHA-256, and give it its name only when it is whole.

Several of these may run at once on one volume: one downloads, the others wait for it. A download that was cut off
goes on where it stopped, when the server can do that.
"""

import argparse
import fcntl
import hashlib
import os
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

BLOCK = 1 << 20
ATTEMPTS = 5


def digest_of(path):
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def append_rest(url, partial):
    """Add to `partial` what is missing of the file behind `url`."""
    done = partial.stat().st_size if partial.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
    try:
        response = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # There is nothing after what we have.
            return
        raise
    with response, partial.open("ab" if response.status == 206 else "wb") as file:
        total = int(response.headers.get("Content-Length") or 0) + (done if response.status == 206 else 0)
        said = time.monotonic()
        while block := response.read(BLOCK):
            file.write(block)
            if time.monotonic() - said > 5:
                said = time.monotonic()
                print(f"{file.tell():,} of {total:,} bytes", file=sys.stderr, flush=True)
        if total and file.tell() < total:
            raise OSError(f"the connection ended at {file.tell():,} of {total:,} bytes")
        os.fsync(file.fileno())


def fetch(url, target, sha256):
    """Make `target`, unless it is there; a file under its name has been checked."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".partial")
    with target.with_name(target.name + ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.exists():
            return "is there already"
        for attempt in range(1, ATTEMPTS + 1):
            try:
                append_rest(url, partial)
                break
            except OSError as error:
                if attempt == ATTEMPTS:
                    raise SystemExit(f"{url} cannot be downloaded: {error}.") from error
                print(f"Attempt {attempt} of {ATTEMPTS} failed: {error}.", file=sys.stderr, flush=True)
                time.sleep(2**attempt * float(os.environ.get("FETCH_PATIENCE", "1")))
        found = digest_of(partial)
        if found != sha256:
            partial.unlink()
            raise SystemExit(f"{url} has the SHA-256 {found}, not {sha256}; check model.url and model.sha256.")
        partial.rename(target)
        folder = os.open(target.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    return "was downloaded and checked"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sha256", required=True)
    parser.add_argument("url")
    parser.add_argument("target", type=Path)
    given = parser.parse_args()
    print(f"{given.target} {fetch(given.url, given.target, given.sha256)}.", file=sys.stderr)
