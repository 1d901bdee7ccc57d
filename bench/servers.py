"""What bench/run measures: the SFTP servers, and the S3 server behind them. All on loopback and free ports."""
import contextlib
import ctypes
import os
import pwd
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import boto3
import botocore.client
import botocore.exceptions

HERE = Path(__file__).resolve().parent
BUCKET = "bench"
REGION = "us-east-1"
TICKS = os.sysconf("SC_CLK_TCK")
MIB = 1024 * 1024


class Failed(Exception):
    """What went wrong, for people."""


def free_ports(count):
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def wait_until(what, holds, log=None, seconds=60):
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            text = log.read_text(errors="replace")[-2000:] if log else ""
            raise Failed(f"in {seconds} s this did not happen: {what}\n{text}")
        time.sleep(0.02)


# ---- processes

_libc = ctypes.CDLL(None)
_running = []


def _die_with_parent():
    _libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def start(command, log, env=None, **options):
    """Runs a command in the background: a process group that ends with this program, whatever happens to that."""
    with open(log, "ab") as output:
        options = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": output, **options}
        process = subprocess.Popen(
            command, env=env, start_new_session=True, preexec_fn=_die_with_parent, **options
        )
    _running.append(process)
    return process


def stop(process):
    """Nothing that runs here is worth a shutdown in order."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process in _running:
        _running.remove(process)


def stop_all():
    for process in list(_running):
        stop(process)


def run(command, seconds=120, env=None, text=None, cwd=None):
    """Runs a command that must succeed; what it printed."""
    process = subprocess.Popen(
        command, env=env, cwd=cwd, text=True, start_new_session=True, preexec_fn=_die_with_parent,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )
    _running.append(process)
    try:
        output, _ = process.communicate(text, timeout=seconds)
    except subprocess.TimeoutExpired:
        raise Failed(f"{command} took more than {seconds} s") from None
    finally:
        stop(process)
    if process.returncode:
        raise Failed(f"{command} failed:\n{output[-2000:]}")
    return output


def descendants(pid):
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [every for child in children for every in [int(child), *descendants(child)]]


def cpu_seconds(pid):
    """Of the process, the children that it has waited for, and those that are still there."""
    total = 0
    for every in [pid, *descendants(pid)]:
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{every}/stat").read_text().rpartition(")")[2].split()
            total += sum(int(field) for field in (fields[11:15] if every == pid else fields[11:13]))
    return total / TICKS


def memory(pid, field="VmHWM"):
    """In MiB."""
    with contextlib.suppress(OSError):
        found = re.search(rf"{field}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
        return int(found[1]) / 1024 if found else 0
    return 0


# ---- S3 servers


class S3Server:
    """A bucket on a server of its own, whose data lie in `folder`."""

    def __init__(self, folder):
        self.folder, self.log = folder, folder / "log"
        folder.mkdir()
        self.access_key, self.secret_key = "GK" + secrets.token_hex(12), secrets.token_hex(32)
        self.start()
        self.tls = Tls(folder, self.port)
        self.client = boto3.client(
            "s3", endpoint_url=self.endpoint(), region_name=REGION,
            aws_access_key_id=self.access_key, aws_secret_access_key=self.secret_key,
            config=botocore.client.Config(
                retries={"total_max_attempts": 1}, max_pool_connections=16, s3={"addressing_style": "path"},
                request_checksum_calculation="when_required", response_checksum_validation="when_required",
            ),
        )  # fmt: skip
        wait_until(f"{self.name} stores an object", self.is_ready, self.log, 90)

    def endpoint(self):
        return f"http://127.0.0.1:{self.port}"

    def environment(self, endpoint=None):
        """As every gateway gets it."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "SFTPD_", "RCLONE_"))}
        return {
            **kept,
            "AWS_ENDPOINT_URL": endpoint or self.endpoint(),
            "AWS_REGION": REGION,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def is_ready(self):
        try:
            self.client.put_object(Bucket=BUCKET, Key="ready", Body=b"ready")
            return True
        except (botocore.exceptions.ClientError, botocore.exceptions.BotoCoreError):
            return False

    def tidy(self):
        """Gives back the memory of deleted objects."""

    def stop(self):
        self.tls.stop()
        stop(self.process)


class Tls:
    """A TLS terminator in front of an S3 server, with a certificate of its own authority."""

    def __init__(self, folder, port):
        self.authority, self.log = folder / "authority.pem", folder / "haproxy.log"
        certificate = self.make_certificate(folder)
        (own_port,) = free_ports(1)
        self.endpoint = f"https://127.0.0.1:{own_port}"
        settings = folder / "haproxy.cfg"
        # Sessions are resumed by tickets, which haproxy gives unless it is told not to.
        settings.write_text(
            "global\n  maxconn 4000\n"
            "defaults\n  mode tcp\n  timeout connect 10s\n  timeout client 1h\n  timeout server 1h\n"
            f"listen s3\n  bind 127.0.0.1:{own_port} ssl crt {certificate} ssl-min-ver TLSv1.3\n"
            f"  server s3 127.0.0.1:{port}\n"
        )
        self.process = start([find_daemon("haproxy"), "-db", "-f", settings], self.log)

        def listens():
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", own_port), 5):
                return True

        wait_until("haproxy listens", listens, self.log)

    def make_certificate(self, folder):
        """A file with the certificate for 127.0.0.1 and its key, as haproxy wants them."""
        key, request, extensions = folder / "tls.key", folder / "tls.csr", folder / "tls.ext"
        authority_key, certificate = folder / "authority.key", folder / "tls.pem"
        new = ["openssl", "req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
        run([*new, "-x509", "-subj", "/CN=sftpd bench", "-days", "2", "-keyout", authority_key, "-out", self.authority])
        run([*new, "-subj", "/CN=127.0.0.1", "-keyout", key, "-out", request])
        extensions.write_text("basicConstraints=CA:FALSE\nsubjectAltName=IP:127.0.0.1\n")
        signed = ["-CA", self.authority, "-CAkey", authority_key, "-set_serial", "1", "-days", "2"]
        run(["openssl", "x509", "-req", "-in", request, *signed, "-extfile", extensions, "-out", certificate])
        with open(certificate, "a") as file:
            file.write(key.read_text())
        return certificate

    def stop(self):
        stop(self.process)


class Garage(S3Server):
    name = "Garage"

    def __init__(self, folder, program, nodelay):
        self.program, self.nodelay = program, nodelay
        super().__init__(folder)

    def start(self):
        self.port, rpc = free_ports(2)
        settings = self.folder / "garage.toml"
        settings.write_text(
            f'metadata_dir = "{self.folder}/meta"\ndata_dir = "{self.folder}/data"\ndb_engine = "lmdb"\n'
            f'replication_factor = 1\ncompression_level = "none"\n'
            f'rpc_bind_addr = "127.0.0.1:{rpc}"\nrpc_public_addr = "127.0.0.1:{rpc}"\n'
            f'rpc_secret = "{secrets.token_hex(32)}"\n'
            f'[s3_api]\napi_bind_addr = "127.0.0.1:{self.port}"\ns3_region = "{REGION}"\nroot_domain = ".s3"\n'
        )
        # Garage leaves Nagle's algorithm on: small answers would take 44 ms.
        environment = {**os.environ, "LD_PRELOAD": str(self.nodelay)}
        self.process = start([self.program, "-c", settings, "server"], self.log, environment)

        def garage(*words):
            return run([self.program, "-c", settings, *words])

        def node():
            with contextlib.suppress(Failed):
                self.node = garage("node", "id", "-q").split("@")[0].split()[-1]
                return "HEALTHY" in garage("status")

        wait_until("Garage starts", node, self.log)
        garage("layout", "assign", "-z", "here", "-c", "100G", self.node)
        garage("layout", "apply", "--version", "1")
        garage("key", "import", "--yes", "-n", "bench", self.access_key, self.secret_key)
        garage("bucket", "create", BUCKET)
        garage("bucket", "allow", "--read", "--write", "--owner", BUCKET, "--key", self.access_key)

    def version_command(self):
        return [self.program, "--version"]

    def requests(self):
        """Garage logs a line for each, and another one if it failed."""
        with open(self.log) as log:
            return sum(f" /{BUCKET}" in line and " in response to " not in line for line in log)


class SeaweedFs(S3Server):
    name = "SeaweedFS"

    def start(self):
        identities = self.folder / "identities.json"
        identities.write_text(
            '{"identities": [{"name": "bench", "actions": ["Admin", "Read", "Write", "List"], "credentials": '
            f'[{{"accessKey": "{self.access_key}", "secretKey": "{self.secret_key}"}}]}}]}}'
        )
        data = self.folder / "data"
        data.mkdir()
        self.ports = free_ports(9)
        master, master_grpc, volume, volume_grpc, filer, filer_grpc, self.port, s3_grpc, metrics = self.ports
        self.master, self.metrics = master, metrics
        # Each bucket takes volumes of its own.
        command = f"""
            weed server -dir={data} -ip=127.0.0.1 -ip.bind=127.0.0.1 -metricsPort={metrics} -metricsIp=127.0.0.1
            -master.port={master} -master.port.grpc={master_grpc} -master.telemetry=false
            -master.volumeSizeLimitMB=1024 -volume.max=100 -volume.port={volume} -volume.port.grpc={volume_grpc}
            -filer -filer.port={filer} -filer.port.grpc={filer_grpc} -filer.localSocket={self.folder}/filer.sock
            -s3 -s3.port={self.port} -s3.port.grpc={s3_grpc} -s3.localSocket={self.folder}/s3.sock
            -s3.port.iceberg=0 -s3.port.lance=0 -s3.config={identities} -s3.iam=false
        """
        self.process = start(command.split(), self.log, cwd=self.folder)

    def is_ready(self):
        with contextlib.suppress(botocore.exceptions.ClientError, botocore.exceptions.BotoCoreError):
            self.client.create_bucket(Bucket=BUCKET)
        return super().is_ready()

    def version_command(self):
        return ["weed", "version"]

    def requests(self):
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics}/metrics") as answer:
            lines = answer.read().decode().splitlines()
        return sum(int(float(line.split()[-1])) for line in lines if line.startswith("SeaweedFS_s3_request_total{"))

    def stop(self):
        super().stop()
        # SeaweedFS has no option to put these elsewhere.
        for port in self.ports:
            for left in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                left.unlink(missing_ok=True)

    def tidy(self):
        urllib.request.urlopen(f"http://127.0.0.1:{self.master}/vol/vacuum?garbageThreshold=0.01").read()


# ---- SFTP servers


class Server:
    """One SFTP server for the user of `place`, a folder with keys and files; `endpoint` is where it finds S3."""

    user = "bench"
    uses_s3 = True

    def __init__(self, place, s3, endpoint=None):
        self.place, self.s3 = place, s3
        self.folder = place / self.key
        self.folder.mkdir(exist_ok=True)
        (self.port,) = free_ports(1)
        self.log = self.folder / "log"
        self.config = self.folder / "ssh_config"
        self.write_config(self.port)
        self.link = None
        self.environment = self.s3_environment(endpoint) if s3 else None
        self.process = None
        self.restart()

    def write_config(self, port):
        self.config.write_text(
            f"Host server\nHostName 127.0.0.1\nPort {port}\nUser {self.user}\nIdentityFile {self.place}/key\n"
            "IdentitiesOnly yes\nIdentityAgent none\nStrictHostKeyChecking no\nUserKnownHostsFile /dev/null\n"
            "GlobalKnownHostsFile /dev/null\nLogLevel ERROR\n"
        )

    def move_away(self, delay_ms):
        """Makes OpenSSH's client a distant one."""
        self.link = Link(self.place, self.port, delay_ms)
        self.write_config(self.link.port)

    def move_back(self):
        self.link.stop()
        self.link = None
        self.write_config(self.port)

    def s3_environment(self, endpoint):
        return self.s3.environment(endpoint)

    def restart(self):
        if self.process:
            stop(self.process)
        self.process = self.start(self.environment)
        wait_until(f"{self.name} listens", self.greets, self.log)

    def greets(self):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 5) as connection:
            return connection.recv(4) == b"SSH-"

    def stop(self):
        if self.link:
            self.link.stop()
        stop(self.process)

    def cpu(self):
        """CPU-seconds so far. Waits until the sessions have ended, so that theirs are in."""
        return cpu_seconds(self.process.pid)

    def peak(self):
        """Peak resident memory in MiB."""
        return memory(self.process.pid)

    def load(self, name):
        """Makes a file or folder of `place/files` known under the same name."""

    def sftp(self, commands, *options, seconds=300):
        """Runs OpenSSH's client."""
        command = ["sftp", "-q", "-F", self.config, *options, "-b", "-", "server"]
        run(command, seconds, text=commands + "\n", cwd=self.place)


def find_daemon(name):
    """The full path of a program that may be where only root looks; sshd refuses to run without it."""
    return shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin:/usr/local/sbin")


class OpenSsh(Server):
    key, name, uses_s3 = "openssh", "OpenSSH sftp-server on tmpfs", False
    user = pwd.getpwuid(os.getuid()).pw_name

    def start(self, _):
        subsystem = shutil.which("sftp-server", path="/usr/lib/openssh:/usr/libexec/openssh:/usr/lib/ssh:/usr/libexec")
        (self.folder / "sshd_config").write_text(
            f"Port {self.port}\nListenAddress 127.0.0.1\nHostKey {self.place}/host_key\nPidFile none\nUsePAM no\n"
            f"AuthorizedKeysFile {self.place}/key.pub\nStrictModes no\nPermitRootLogin yes\nMaxStartups 1000\n"
            f"Subsystem sftp {subsystem} -d {self.place}/files\n"
        )
        if os.getuid() == 0:
            os.makedirs("/run/sshd", mode=0o755, exist_ok=True)
        process = start([find_daemon("sshd"), "-D", "-e", "-f", self.folder / "sshd_config"], self.log)
        self.most = 0
        threading.Thread(target=self.watch, args=(process,), daemon=True).start()
        return process

    def watch(self, process):
        """Its sessions are processes that end."""
        while process.poll() is None:
            self.most = max(self.most, sum(memory(every) for every in descendants(process.pid)))
            time.sleep(0.1)

    def cpu(self):
        wait_until("sshd's sessions end", lambda: not descendants(self.process.pid))
        return super().cpu()

    def peak(self):
        return self.most + super().peak()


class Sftpd(Server):
    program = None

    def start(self, environment):
        keys = (self.place / "key.pub").read_text()
        (self.folder / "users.json").unlink(missing_ok=True)
        run([self.program, "users", "add", "bench", keys, "--home", ""], cwd=self.folder)
        command = [self.program, "serve", "--listen", f"127.0.0.1:{self.port}", "--store", self.store, *self.options]
        return start(command, self.log, environment, cwd=self.folder)

    options = ()


class SftpdMemory(Sftpd):
    key, name, store, uses_s3 = "memory", "sftpd, memory store", "memory:", False

    def load(self, name):
        is_folder = (self.place / "files" / name).is_dir()
        self.sftp(f"put {'-r' if is_folder else ''} files/{name} {name}")


class SftpdS3(Sftpd):
    key, name, store = "s3", "sftpd, S3", f"s3://{BUCKET}"


class SftpdS3Tls(SftpdS3):
    """As with any S3 of a provider: bodies aren't signed, as TLS protects them."""

    key, name = "s3tls", "sftpd, S3 over TLS"

    def s3_environment(self, _):
        tls = self.s3.tls
        return self.s3.environment(tls.endpoint) | {"AWS_CA_BUNDLE": str(tls.authority)}


class SftpdS3Small(SftpdS3):
    key, name, options = "s3small", "sftpd, S3, --buffer-memory 32MiB", ("--buffer-memory", "32MiB")


class Rclone(Server):
    key, name = "rclone", "rclone serve sftp, S3"

    def start(self, environment):
        settings = {"TYPE": "s3", "PROVIDER": "Other", "ENV_AUTH": "true", "NO_CHECK_BUCKET": "true",
                    "ENDPOINT": environment["AWS_ENDPOINT_URL"], "REGION": REGION}  # fmt: skip
        environment = environment | {f"RCLONE_CONFIG_STORE_{name}": value for name, value in settings.items()}
        address, place = f"127.0.0.1:{self.port}", self.place
        command = ["rclone", "serve", "sftp", f"store:{BUCKET}", "--config", "/dev/null", "--addr", address,
                   "--user", "bench", "--authorized-keys", place / "key.pub", "--key", place / "host_key"]  # fmt: skip
        return start(command, self.log, environment)


class Asyncssh(Server):
    key, name = "asyncssh", "asyncssh + boto3, S3"

    def start(self, environment):
        words = [str(self.port), self.place / "host_key", self.place / "key.pub", BUCKET]
        return start([sys.executable, HERE / "asyncssh_gateway.py", *words], self.log, environment)


class Link:
    """The way to a distant server at `port`: bench/link.py."""

    def __init__(self, place, port, delay_ms, mb_per_second=None):
        command = [sys.executable, HERE / "link.py", str(port), str(delay_ms)]
        command += [str(mb_per_second)] if mb_per_second else []
        self.process = start(command, place / "link.log", stdout=subprocess.PIPE)
        self.port = int(self.process.stdout.readline())
        self.endpoint = f"http://127.0.0.1:{self.port}"

    def stop(self):
        stop(self.process)
