#!/usr/bin/env python3
"""The gateway that people write today: asyncssh for SFTP, boto3 for S3, parts of 5 MiB. For bench/run to compare with.

usage: asyncssh_gateway.py PORT HOST_KEY AUTHORIZED_KEYS BUCKET     (S3 settings: the AWS_* variables)

Kept as plain as such programs are: each part is sent when it is full, each READ is a ranged GET. It is no worse than
it must be either: boto3 runs in threads, so that requests overlap, and no request is sent that could be saved.
It is not fit for use: like most of its kind it publishes what a cut connection left.
"""
import asyncio
import posixpath
import stat
import sys

import asyncssh
import boto3
import botocore.config
import botocore.exceptions

PART = 5 * 1024 * 1024
PORT, HOST_KEY, AUTHORIZED_KEYS, BUCKET = sys.argv[1:]
SETTINGS = botocore.config.Config(
    max_pool_connections=32,
    request_checksum_calculation="when_required",
    response_checksum_validation="when_required",
    s3={"addressing_style": "path"},
)
S3 = boto3.client("s3", config=SETTINGS)


async def s3(operation, **arguments):
    """One S3 request, in a thread."""
    try:
        return await asyncio.to_thread(getattr(S3, operation), Bucket=BUCKET, **arguments)
    except botocore.exceptions.ClientError as error:
        if error.response["ResponseMetadata"]["HTTPStatusCode"] == 404:
            raise asyncssh.SFTPNoSuchFile("not found") from None
        raise asyncssh.SFTPFailure(str(error)) from None


def file_attributes(size, modified):
    time = int(modified.timestamp())
    return asyncssh.SFTPAttrs(size=size, uid=0, gid=0, permissions=stat.S_IFREG | 0o644, atime=time, mtime=time)


def directory_attributes():
    return asyncssh.SFTPAttrs(size=0, uid=0, gid=0, permissions=stat.S_IFDIR | 0o755, atime=0, mtime=0)


class Reader:
    def __init__(self, key, head):
        self.key, self.size, self.modified = key, head["ContentLength"], head["LastModified"]

    async def read(self, offset, size):
        if offset >= self.size:
            return b""
        last = min(offset + size, self.size) - 1
        answer = await s3("get_object", Key=self.key, Range=f"bytes={offset}-{last}")
        return await asyncio.to_thread(answer["Body"].read)

    async def close(self):
        pass


class Writer:
    def __init__(self, key):
        self.key, self.buffer, self.size, self.upload, self.parts = key, bytearray(), 0, None, []
        self.lock = asyncio.Lock()

    async def write(self, offset, data):
        async with self.lock:
            if offset != self.size:
                raise asyncssh.SFTPFailure("writes must be in order")
            self.buffer += data
            self.size += len(data)
            while len(self.buffer) >= PART:
                await self.send(bytes(self.buffer[:PART]))
                del self.buffer[:PART]
        return len(data)

    async def send(self, part):
        if self.upload is None:
            self.upload = (await s3("create_multipart_upload", Key=self.key))["UploadId"]
        number = len(self.parts) + 1
        answer = await s3("upload_part", Key=self.key, UploadId=self.upload, PartNumber=number, Body=part)
        self.parts.append({"PartNumber": number, "ETag": answer["ETag"]})

    async def close(self):
        async with self.lock:
            if self.upload is None:
                await s3("put_object", Key=self.key, Body=bytes(self.buffer))
                return
            if self.buffer:
                await self.send(bytes(self.buffer))
            parts = {"Parts": self.parts}
            await s3("complete_multipart_upload", Key=self.key, UploadId=self.upload, MultipartUpload=parts)


class Gateway(asyncssh.SFTPServer):
    directories = {""}

    @staticmethod
    def key(path):
        return posixpath.normpath("/" + path.decode()).strip("/")

    def realpath(self, path):
        return b"/" + self.key(path).encode()

    async def open(self, path, pflags, attrs):
        key = self.key(path)
        if pflags & asyncssh.FXF_WRITE:
            return Writer(key)
        return Reader(key, await s3("head_object", Key=key))

    async def read(self, file, offset, size):
        return await file.read(offset, size)

    async def write(self, file, offset, data):
        return await file.write(offset, data)

    async def close(self, file):
        await file.close()

    async def stat(self, path):
        key = self.key(path)
        if key in self.directories:
            return directory_attributes()
        try:
            head = await s3("head_object", Key=key)
            return file_attributes(head["ContentLength"], head["LastModified"])
        except asyncssh.SFTPNoSuchFile:
            if (await s3("list_objects_v2", Prefix=key + "/", MaxKeys=1)).get("KeyCount"):
                return directory_attributes()
            raise

    lstat = stat

    def fstat(self, file):
        return file_attributes(file.size, file.modified)

    def setstat(self, path, attrs):
        pass

    def fsetstat(self, file, attrs):
        pass

    async def scandir(self, path):
        prefix = self.key(path) + "/" if self.key(path) else ""
        page = {"NextContinuationToken": None}
        while "NextContinuationToken" in page:
            token = page["NextContinuationToken"]
            more = {"ContinuationToken": token} if token else {}
            page = await s3("list_objects_v2", Prefix=prefix, Delimiter="/", **more)
            for found in page.get("CommonPrefixes", []):
                name = found["Prefix"][len(prefix) : -1].encode()
                yield asyncssh.SFTPName(name, attrs=directory_attributes())
            for found in page.get("Contents", []):
                name = found["Key"][len(prefix) :].encode()
                yield asyncssh.SFTPName(name, attrs=file_attributes(found["Size"], found["LastModified"]))

    def mkdir(self, path, attrs):
        self.directories.add(self.key(path))

    async def remove(self, path):
        await s3("delete_object", Key=self.key(path))


async def main():
    await asyncssh.listen(
        "127.0.0.1",
        int(PORT),
        server_host_keys=[HOST_KEY],
        authorized_client_keys=AUTHORIZED_KEYS,
        sftp_factory=Gateway,
    )
    await asyncio.Event().wait()


asyncio.run(main())
