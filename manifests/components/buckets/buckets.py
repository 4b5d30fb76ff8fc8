"""Make the buckets that are missing; the server may still be starting."""

import os
import sys
import time

import boto3
import botocore.exceptions

SECONDS = float(os.environ.get("WAIT_SECONDS", "300"))

s3 = boto3.client("s3")
deadline = time.monotonic() + SECONDS
for bucket in sys.argv[1:]:
    while True:
        try:
            present = {entry["Name"] for entry in s3.list_buckets()["Buckets"]}
            if bucket not in present:
                s3.create_bucket(Bucket=bucket)
            print(f"{bucket}: {'was there' if bucket in present else 'made'}")
            break
        except (botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError) as error:
            if time.monotonic() > deadline:
                sys.exit(f"expected the bucket {bucket}, got {error}; see the object store's log")
            time.sleep(2)
