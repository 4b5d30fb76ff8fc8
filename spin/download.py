"""One public file by its address, kept in the cache: what a model hub does for its files, for all others."""

import os
from pathlib import Path
from urllib.parse import unquote, urlsplit

import urllib3

from spin.errors import SpinError, cause
from spin.store import digest_of, digest_of_file, kept

MOST_BYTES = 64 * 2**20


def download(url: str, digest: str = "") -> Path:
    """Return the local copy of ``url``; the second time it is not fetched again.

    Args:
        digest: SHA-256 that it must have; empty: whatever is there, so the address should name a commit.

    Raises:
        SpinError: it is out of reach, too large, or another file than it should be.
    """

    def fetch(target: Path) -> None:
        pool = urllib3.PoolManager(cert_reqs="CERT_REQUIRED", ca_certs=os.environ.get("SSL_CERT_FILE"), retries=2)
        try:
            answer = pool.request("GET", url, preload_content=False, timeout=urllib3.Timeout(connect=10, read=60))
            if answer.status != 200:
                raise SpinError(f"expected a file, got status {answer.status} ({url}); check the network and try again")
            with target.open("wb") as stream:
                for block in answer.stream(2**20):
                    stream.write(block)
                    if stream.tell() > MOST_BYTES:
                        raise SpinError(f"expected at most {MOST_BYTES} bytes, got more ({url}); it is another file")
        except urllib3.exceptions.HTTPError as error:
            raise SpinError(
                f"expected a file, got {cause(error)} ({url}); check the network, or fetch it by hand and give its path"
            ) from None
        if digest and (got := digest_of_file(target)) != digest:
            raise SpinError(f"expected {url} with digest {digest[:12]}, got {got[:12]}; it has changed")

    return kept(f"{digest or digest_of([url])}/{unquote(urlsplit(url).path).rsplit('/', 1)[-1]}", fetch)
