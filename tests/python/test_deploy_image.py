"""The image without a container engine: its root file system, built as the Dockerfile does, and the
service in it."""

import json
import os
import re
import shlex
import shutil
import subprocess

import httpx
import machine
import pytest
from conftest import assert_healthy, client
from running_service import BINARY, ROOT, THROTTLES_OFF, Service, wait_until

DOCKERFILE = (ROOT / "Dockerfile").read_text()
# The variables of the image, except the address: a free port here.
IMAGE_ENVIRONMENT = dict(re.findall(r"\b([A-Z_]+)=(\S+)", re.search(r"^ENV ((?:.*\\\n)*.*)$", DOCKERFILE, re.MULTILINE)[1]))
USER = re.search(r"^USER (\d+:\d+)$", DOCKERFILE, re.MULTILINE)[1]

# In new namespaces: the root is read-only and /data on it writable; then the program runs as the
# image's user. Root can become that user; another user is root in a user namespace, and stays root.
AS_ROOT = ("unshare", "--mount")
AS_ANYBODY = ("unshare", "--user", "--map-root-user", "--mount")
CONTAIN = (
    'mount --bind "$ROOT_FOLDER" "$ROOT_FOLDER" && mkdir -p "$ROOT_FOLDER/data" && mount -o remount,bind,ro "$ROOT_FOLDER"'
    ' && mount --bind "$DATA_FOLDER" "$ROOT_FOLDER/data" && exec chroot $AS_USER "$ROOT_FOLDER" "$@"'
)


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    folder = tmp_path_factory.mktemp("image")
    made = subprocess.run([ROOT / "deploy/image/make_root.sh", BINARY, folder], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    (folder / "root" / "data").mkdir()
    return folder


def needed(path):
    """The libraries that a file needs, as its linker recorded them."""
    listed = subprocess.run(["readelf", "--dynamic", path], capture_output=True, text=True, check=True).stdout
    return set(re.findall(r"\(NEEDED\).*\[(.+)\]", listed))


def contained(image, *command):
    """The arguments for subprocess that run a command in the image; skips if the system does not
    allow namespaces."""
    root = os.geteuid() == 0
    prefix = [*(AS_ROOT if root else AS_ANYBODY), "sh", "-c", CONTAIN, "sh"]
    if root:
        for folder in [image / "data", *(image / "data").iterdir()]:
            os.chown(folder, *map(int, USER.split(":")))
    environment = {
        **IMAGE_ENVIRONMENT, "PATH": os.environ["PATH"], "ROOT_FOLDER": str(image / "root"), "DATA_FOLDER": str(image / "data"),
        "AS_USER": f"--userspec={USER}" if root else "",
    }
    tried = subprocess.run([*prefix, "/prompt-service", "--version"], env=environment, capture_output=True, text=True)
    if tried.returncode != 0 and re.match(r"(unshare|mount):", tried.stderr):
        machine.missing("namespaces", tried.stderr.strip())
    assert tried.returncode == 0, tried.stderr
    return {"args": [*prefix, *command], "env": environment}


def test_the_image_holds_the_libraries_that_the_binary_names_and_no_other_program(image):
    files = [path for path in (image / "root").rglob("*") if path.is_file()]
    assert needed(BINARY) <= {path.name for path in files}
    for library in (path for path in files if ".so" in path.name):
        assert needed(library) <= {path.name for path in files}, library
    interpreter = re.search(
        r"interpreter: (\S+)\]", subprocess.run(["readelf", "--program-headers", BINARY], capture_output=True, text=True).stdout
    )[1]
    assert (image / "root" / interpreter.lstrip("/")).is_file()
    programs = [path for path in files if os.access(path, os.X_OK) and ".so" not in path.name]
    assert [path.name for path in programs] == ["prompt-service"]


def test_the_image_says_which_packages_its_files_are_of_so_that_it_can_be_scanned(image):
    if not shutil.which("dpkg-query"):
        machine.missing("dpkg", "this is no Debian, which the builder is")
    told = {path.name: path.read_text() for path in (image / "root/var/lib/dpkg/status.d").iterdir()}
    assert {"libc6", "libgcc-s1", "ca-certificates"} <= set(told)
    assert all(re.search(r"^Version: \S+$", text, re.MULTILINE) for text in told.values())
    assert "ID=" in (image / "root/etc/os-release").read_text()


def test_the_image_is_small(image):
    size = sum(path.stat().st_size for path in (image / "root").rglob("*") if path.is_file())
    # The binary, of which the model is 23 MB, and a few megabytes of C library.
    assert size < BINARY.stat().st_size + 10_000_000


def test_the_service_runs_in_the_image_on_a_read_only_root_as_its_own_user(image):
    command = contained(image, "/prompt-service")
    command["env"] |= {"BIND_ADDR": "127.0.0.1:0", "SHUTDOWN_DELAY": "0s", **THROTTLES_OFF}
    log = image / "log"
    with open(log, "wb") as out:
        process = subprocess.Popen(**command, stdout=out, stderr=out)
    try:
        def listening():
            assert process.poll() is None, log.read_text()
            lines = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{") and line.endswith("}")]
            return next((line for line in lines if line["message"] == "listening"), None)

        address = wait_until(listening, 60, "the service in the image listens")["addr"]
        with httpx.Client(base_url=f"http://{address}", timeout=60) as http:
            assert_healthy(http)
        if os.geteuid() == 0:
            with open(f"/proc/{process.pid}/status") as status:
                assert re.search(r"^Uid:\s+" + USER.split(":")[0], status.read(), re.MULTILINE)
        health = contained(image, "/prompt-service", "health")
        health["env"] |= {"BIND_ADDR": address}
        checked = subprocess.run(**health, capture_output=True, text=True)
        assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")
    finally:
        process.terminate()
        assert process.wait(60) == 0, log.read_text()
    # Its data are in the volume, and readable for its owner only.
    assert (image / "data" / "prompt-service.sqlite3").stat().st_mode & 0o077 == 0


def test_the_health_check_of_the_dockerfile_succeeds_only_with_a_running_service():
    [words] = re.findall(r"^HEALTHCHECK .*CMD (\[.*\])$", DOCKERFILE, re.MULTILINE)
    command = [str(BINARY), *json.loads(words)[1:]]
    with Service() as service:
        environment = {"BIND_ADDR": f"0.0.0.0:{service.host_and_port[1]}"}
        for arguments in ([], ["--ready"]):
            checked = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True)
            assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", ""), shlex.join(command)
        assert service.stop() == 0
        checked = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert checked.returncode != 0 and checked.stderr.startswith("error: no answer from ") and checked.stderr.count("\n") == 1


def test_a_stopping_service_is_alive_and_not_ready():
    with Service(SHUTDOWN_DELAY="30s") as service, client(service) as http:
        environment = {"BIND_ADDR": service.address}
        service.process.terminate()
        wait_until(lambda: http.get("/readyz").status_code == 503, 20, "/readyz answers 503")
        assert subprocess.run([BINARY, "health"], env=environment).returncode == 0
        refused = subprocess.run([BINARY, "health", "--ready"], env=environment, capture_output=True, text=True)
        assert refused.returncode != 0 and "/readyz answered 503" in refused.stderr
        service.kill()
