"""Make the keys of an install: random ones, in files that only you may read and that git ignores.

    python manifests/secrets/generate.py [FOLDER]

Files that are there are kept, so that running it again changes no key; delete one to rotate it (docs/operations.md).
Needs nothing but Python.
"""

import json
import os
import secrets
import sys
from pathlib import Path

ROLES = {
    "pipeline": ["Read:spin", "List:spin", "Write:spin"],
    # Scores and images, whole and in parts, but no models: those are folders.
    "scorer": ["Read:spin", "List:spin", *(f"Write:spin/{prefix}/*" for prefix in ("objects", "parts", "runs"))],
    "mlflow": ["Read:mlflow", "List:mlflow", "Write:mlflow"],
}
"""What each user of the object store may do, in SeaweedFS's words; components/minio/policies says the same in S3's."""


def write(path: Path, lines: dict[str, str]) -> None:
    """Write NAME=value lines that only the user may read, unless the file is there."""
    if not path.exists():
        path.touch(mode=0o600)
        path.write_text("".join(f"{name}={value}\n" for name, value in lines.items()))


def read(path: Path) -> dict[str, str]:
    """Return what ``write`` wrote."""
    return dict(line.split("=", 1) for line in path.read_text().splitlines() if line)


def key_pair() -> dict[str, str]:
    """Return a new access key and secret key, by the names that every S3 client knows."""
    return {"AWS_ACCESS_KEY_ID": secrets.token_hex(10), "AWS_SECRET_ACCESS_KEY": secrets.token_hex(20)}


def users(root: dict[str, str], keys: dict[str, dict[str, str]]) -> dict[str, object]:
    """Return SeaweedFS's list of users."""

    def user(name: str, pair: dict[str, str], actions: list[str]) -> dict[str, object]:
        credentials = [{"accessKey": pair["AWS_ACCESS_KEY_ID"], "secretKey": pair["AWS_SECRET_ACCESS_KEY"]}]
        return {"name": name, "credentials": credentials, "actions": actions}

    roles = [user(role, keys[role], actions) for role, actions in ROLES.items()]
    return {"identities": [user("root", root, ["Admin", "Read", "List", "Tagging", "Write"]), *roles]}


def main(folder: Path) -> None:
    """Write all files below ``folder``."""
    platform, workspace = folder / "platform", folder / "workspace"
    platform.mkdir(parents=True, exist_ok=True)
    workspace.mkdir(exist_ok=True)
    write(platform / "postgres.env", {"PGPASSWORD": secrets.token_hex(20)})
    password = read(platform / "postgres.env")["PGPASSWORD"]
    uri = f"postgresql://mlflow:{password}@postgres:5432/mlflow"
    write(platform / "mlflow-database.env", {"MLFLOW_BACKEND_STORE_URI": uri})
    places = {
        "mlflow": platform / "mlflow-s3.env",
        "pipeline": workspace / "spin-s3.env",
        "scorer": workspace / "spin-s3-scorer.env",
    }
    for path in (platform / "s3-root.env", *places.values()):
        write(path, key_pair())
    keys = {role: read(path) for role, path in places.items()}
    # Both follow from the keys: written anew each time.
    for path in (platform / "s3-users.env", platform / "s3.json"):
        path.unlink(missing_ok=True)
    parts = {"access": "AWS_ACCESS_KEY_ID", "secret": "AWS_SECRET_ACCESS_KEY"}
    write(
        platform / "s3-users.env",
        {f"{role}.{part}": pair[name] for role, pair in keys.items() for part, name in parts.items()},
    )
    os.close(os.open(platform / "s3.json", os.O_CREAT | os.O_WRONLY, 0o600))
    (platform / "s3.json").write_text(json.dumps(users(read(platform / "s3-root.env"), keys), indent=2) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
