#!/bin/bash
# Builds the CPU image from Dockerfile.cuda, twice, and once more with a change in edge_phi3/, compares their layers, and runs it as
# a cluster would: as an ordinary user, on a root file system that cannot be written, without capabilities. Needs root, and
# Debian's packages buildah, debootstrap and runc; no registry of images: a Debian made by debootstrap stands in for every base
# image. Takes some minutes, for llama.cpp is compiled.
#
#   tests/image/build_and_run.sh            # prints what it checks, the layers, and the image's size by part
#
#   SUITE=bookworm         the Debian that stands in
#   GCC_VERSION=12         that Debian's compiler
#   DEBIAN_MIRROR=URL      where its packages come from
#   CA_BUNDLE=FILE         certificates to trust instead, for sites whose proxy has its own
#   WORK=DIR               where to work; kept, so that a second run makes no Debian anew
#   BUILD=no               check the image that an earlier run left in WORK
#   COMPILE_TWICE=yes      compile llama.cpp for the second image too, which otherwise has its objects from ccache
#   WHEEL=FILE             take this wheel of llama-cpp-python and compile nothing: all but llama.cpp's own build is tried, in minutes
#   BUILD_ARGUMENTS=...    further arguments of `buildah build`
#   STORAGE_DRIVER=overlay how Buildah keeps layers: vfs where the kernel mounts no overlay, at the price of a copy for each layer
set -euo pipefail

repository="$(cd "$(dirname "$0")/../.." && pwd)"
SUITE="${SUITE:-bookworm}"
GCC_VERSION="${GCC_VERSION:-12}"
DEBIAN_MIRROR="${DEBIAN_MIRROR:-http://deb.debian.org/debian}"
if [ -z "${WORK:-}" ]; then
    WORK="$(mktemp -d)"
    trap 'stop_container; rm -rf "$WORK"' EXIT
else
    mkdir -p "$WORK"
    trap 'stop_container' EXIT
fi
export BUILDAH_ISOLATION=chroot
export TMPDIR="$WORK/tmp" # where Buildah keeps what RUN --mount=type=cache asks for
mkdir -p "$TMPDIR"
# Beside --root Buildah does not look at the variable.
storage=(--root "$WORK/storage" --runroot "$WORK/run" --storage-driver "${STORAGE_DRIVER:-overlay}")
container="edge-phi3-test-$$"

say() { printf '== %s\n' "$*"; }
fail() { printf 'FAILED: %s\n' "$*" >&2; exit 1; }
image() { buildah "${storage[@]}" "$@"; }
stop_container() {
    runc --root "$WORK/runc" delete --force "$container" 2> /dev/null || true
    if [ -n "${from:-}" ]; then image rm "$from" > /dev/null 2>&1 || true; fi
}

[ "$(id -u)" = 0 ] || fail "this builds images and mounts; run it as root"
for program in buildah debootstrap runc; do
    command -v "$program" > /dev/null || fail "$program is missing: apt-get install buildah debootstrap runc"
done

say "a Debian to stand in for the base images"
base="$WORK/base-$SUITE"
if [ ! -e "$base.done" ]; then
    rm -rf "$base"
    debootstrap --variant=minbase --include=ca-certificates "$SUITE" "$base" "$DEBIAN_MIRROR" > "$WORK/debootstrap.log"
    rm -rf "$base"/var/cache/apt/* "$base"/var/lib/apt/lists/* "$base"/usr/share/{doc,man,locale}/*
    if [ -n "${CA_BUNDLE:-}" ]; then
        cp "$CA_BUNDLE" "$base/etc/ssl/certs/ca-certificates.crt"
        printf '[global]\ncert = /etc/ssl/certs/ca-certificates.crt\n' > "$base/etc/pip.conf"
    fi
    from="$(image from scratch)"
    image copy --quiet "$from" "$base" / > /dev/null
    image commit --quiet --rm --format docker "$from" localhost/debian-stand-in > /dev/null
    touch "$base.done"
fi

# build TAG FOLDER ARGUMENT...: the image from the files in a folder. No file has a time, so that layers can be compared.
build() {
    local started wheel=() recipe=""; started=$(date +%s)
    if [ -n "${WHEEL:-}" ]; then
        wheel=(--volume "$(dirname "$WHEEL"):/wheel:ro")
        recipe="/^    sed -n '.^llama-cpp-python==/,/^    rm -rf .src.build/c\\    mkdir /opt/wheels; cp /wheel/llama_cpp_python-*.whl /opt/wheels/"
    fi
    sed "$recipe" "$2/Dockerfile.cuda" > "$WORK/Dockerfile"
    # shellcheck disable=SC2086 - BUILD_ARGUMENTS holds several
    image build --quiet --format docker --layers --timestamp 0 --file "$WORK/Dockerfile" --tag "localhost/edge-phi3:$1" \
        --build-arg FLAVOUR=cpu \
        --build-arg GCC_VERSION="$GCC_VERSION" \
        --build-arg CPU_IMAGE=localhost/debian-stand-in \
        --build-arg CUDA_BUILD_IMAGE=localhost/debian-stand-in \
        --build-arg CUDA_RUNTIME_IMAGE=localhost/debian-stand-in \
        --build-arg REVISION="$(git -C "$repository" rev-parse HEAD)" \
        "${wheel[@]}" "${@:3}" ${BUILD_ARGUMENTS:-} "$2" > "$WORK/image-id" 2> "$WORK/build-$1.log" \
        || { tail -n 60 "$WORK/build-$1.log" >&2; fail "the build; its log is above"; }
    image push --quiet "localhost/edge-phi3:$1" "oci:$WORK/layers:$1" > /dev/null
    say "built in $(($(date +%s) - started)) s"
}

if [ "${BUILD:-yes}" = yes ]; then
    rm -rf "$WORK/layers" "$WORK/copy"
    say "the image, with llama.cpp compiled for any x86-64 or arm64 CPU"
    build cpu "$repository"
    say "the image from another copy of the same files, every step anew"
    if [ "${COMPILE_TWICE:-no}" = yes ]; then rm -rf "$TMPDIR"/buildah-cache*; fi
    mkdir "$WORK/copy"
    # shellcheck disable=SC2046 - the names in .dockerignore have no spaces
    tar -C "$repository" -c Dockerfile.cuda .dockerignore $(sed -n 's/^!//p' "$repository/.dockerignore") | (umask 002 && tar -C "$WORK/copy" -xm --no-same-permissions)
    build again "$WORK/copy" --no-cache
    say "the image with a change in edge_phi3/"
    echo "# A change." >> "$WORK/copy/edge_phi3/api/app.py"
    build changed "$WORK/copy"
fi

say "the layers: size as it is pulled, and what is in it"
python3 - "$WORK/layers" << 'PYTHON' || fail "the layers are not as they should be"
import hashlib, json, pathlib, sys, tarfile

folder = pathlib.Path(sys.argv[1])
blob = lambda digest: json.loads((folder / "blobs" / digest.replace(":", "/")).read_text())
manifests = json.loads((folder / "index.json").read_text())["manifests"]
named = {each["annotations"]["org.opencontainers.image.ref.name"]: blob(each["digest"]) for each in manifests}

def layers(name):
    """Return the digest without compression, the compressed size and blob, and the instruction of each layer."""
    about = blob(named[name]["config"]["digest"])
    made = [step.get("created_by", "") for step in about["history"] if not step.get("empty_layer")]
    return [(digest, layer["size"], layer["digest"], step)
            for digest, layer, step in zip(about["rootfs"]["diff_ids"], named[name]["layers"], made, strict=True)]

def files(layer):
    with tarfile.open(folder / "blobs" / layer[2].replace(":", "/")) as archive:
        return {(each.name, each.mode, each.uid, each.gid, each.type, each.linkname,
                 hashlib.sha256(archive.extractfile(each).read()).hexdigest() if each.isreg() else "") for each in archive}

def differences(one, other):
    """Return the layers of `other` that are not those of `one`, after printing which files of them differ."""
    found = [(a, b) for a, b in zip(one, other, strict=True) if a[0] != b[0]]
    for a, b in found:
        names = sorted({each[0] for each in files(a) ^ files(b)})
        print(f"  {b[0][7:19]} {b[1] / 1e6:.2f} MB, files that differ: {len(names)}", *names[:8])
    return [b for _, b in found]

first, again, changed = map(layers, ("cpu", "again", "changed"))
for digest, size, _, made in first:
    print(f"{digest[7:19]} {size / 1e6:8.2f} MB  {made.removeprefix('/bin/sh -c ')[:70]}")
if differences(first, again):
    sys.exit("a second build has other files")
print("a second build: the same layers, by their digests. A change in edge_phi3/:")
differ = differences(first, changed)
if len(differ) != 1 or differ[0][1] > 5e6:
    sys.exit("a change of our code is not one layer of at most 5 MB")
PYTHON

say "what the image says of itself"
image inspect --type image localhost/edge-phi3:cpu > "$WORK/image.json"
config() { python3 -c "import json, sys; c = json.load(open('$WORK/image.json'))['Docker']['config']; print(json.dumps($1))"; }
[ "$(config 'c["User"]')" = '"10001:10001"' ] || fail "the image does not run as user 10001"
[ "$(config 'c["Entrypoint"]')" = '["edge-phi3"]' ] || fail "the entry point is not the program itself"
[ "$(config 'list(c["Volumes"])')" = '["/models"]' ] || fail "the models' folder is not a volume"
[ "$(config 'c["Healthcheck"]["Test"][0]')" = '"CMD"' ] || fail "there is no health check"
[ "$(config 'c["Labels"]["org.opencontainers.image.title"]')" = '"edge-phi3"' ] || fail "the labels are missing"

from="$(image from localhost/edge-phi3:cpu)"
rootfs="$(image mount "$from")"
for compiler in cc gcc g++ cmake make nvcc; do
    if chroot "$rootfs" sh -c "command -v $compiler" > /dev/null; then fail "$compiler is in the image"; fi
done
# With these `kubectl cp` brings a model, and the chart's preStop waits.
for program in tar sleep; do chroot "$rootfs" sh -c "command -v $program" > /dev/null || fail "$program is not in the image"; done

say "the size, by part (MiB)"
part() { printf '%7.1f  %s\n' "$(du -sb "${@:2}" 2> /dev/null | awk '{s += $1} END {print s / 1048576}')" "$1"; }
site="$(echo "$rootfs"/opt/edge-phi3/lib/python3*/site-packages)"
part "all" "$rootfs"
part "  edge-phi3 and its Python packages, of them:" "$rootfs/opt/edge-phi3"
part "    llama.cpp" "$site/llama_cpp/lib"
part "    llama.cpp's backends" "$rootfs/opt/edge-phi3/lib/ggml"
part "    NumPy with OpenBLAS" "$site/numpy" "$site/numpy.libs"
part "    edge-phi3 with the demo model" "$rootfs/opt/edge-phi3/app"
part "    OpenTelemetry, protobuf and requests" "$site"/{opentelemetry,google,requests,urllib3,charset_normalizer}
part "  the distribution and its Python" "$rootfs"/{bin,etc,lib,lib64,sbin,usr,var}
backends="$rootfs/opt/edge-phi3/lib/ggml"
if [ -d "$backends" ]; then echo "backends: $(cd "$backends" && echo libggml-*.so)"; fi

bundle="$WORK/bundle"
models="$WORK/models"
rm -rf "$bundle"
mkdir -p "$bundle" "$WORK/runc"
# A new volume is a copy of the image's folder, with its owner.
new_volume() { rm -rf "$models" && cp --archive --no-target-directory "$rootfs/models" "$models"; }
inside() { runc --root "$WORK/runc" exec "$container" "$@"; }
log() { cat "$WORK/container.log" >&2; fail "$@"; }

# serve_and_ask VOLUME USER GROUP: starts a container with the models' volume rw or ro, asks it, and stops it.
serve_and_ask() {
    local volume="$1" user="${2:-10001}" group="${3:-10001}" started status=0 answer check port running
    port="$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')"
    ROOTFS="$rootfs" MODELS="$models" VOLUME="$volume" PORT="$port" ID="$user $group" python3 - "$WORK/image.json" > "$bundle/config.json" << 'PYTHON'
import json, os, sys

config = json.load(open(sys.argv[1]))["Docker"]["config"]
environment = [item for item in config["Env"] if not item.startswith("EDGE_PHI3_PORT=")]
temporary = ["nosuid", "noexec", "nodev", "mode=1777"]
print(json.dumps({
    "ociVersion": "1.0.2",
    "process": {
        "user": dict(zip(("uid", "gid"), map(int, os.environ["ID"].split()))),
        "args": config["Entrypoint"] + ["serve", "demo", "--log-format", "json"],
        "env": environment + [f"EDGE_PHI3_PORT={os.environ['PORT']}"],
        "cwd": config["WorkingDir"],
        "noNewPrivileges": True,
        "capabilities": {},
    },
    "root": {"path": os.environ["ROOTFS"], "readonly": True},
    "mounts": [
        {"destination": "/proc", "type": "proc", "source": "proc"},
        {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
        {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": temporary},
        {"destination": "/models", "type": "bind", "source": os.environ["MODELS"], "options": ["bind", os.environ["VOLUME"]]},
    ],
    "linux": {"namespaces": [{"type": "pid"}, {"type": "mount"}, {"type": "ipc"}, {"type": "uts"}]},
}))
PYTHON
    runc --root "$WORK/runc" run --bundle "$bundle" "$container" > "$WORK/container.out" 2> "$WORK/container.log" &
    running=$!

    started=$(date +%s%N)
    until curl --silent --fail "http://127.0.0.1:$port/healthz" > /dev/null; do
        kill -0 "$running" 2> /dev/null || log "the container ended"
        [ $(($(date +%s%N) - started)) -lt 300000000000 ] || log "it was not healthy in 300 s"
        sleep 0.2
    done
    say "healthy after $((($(date +%s%N) - started) / 1000000)) ms"

    [ "$(inside id -u):$(inside id -g)" = "$user:$group" ] || fail "it does not run as user $user"
    if inside touch /opt/edge-phi3/x 2> /dev/null; then fail "the root file system can be written"; fi
    if [ "$volume" = ro ] && inside touch /models/x 2> /dev/null; then fail "the models can be written"; fi
    inside sh -c 'grep -q "CapEff:.0000000000000000" /proc/1/status' || fail "it has capabilities"
    mapfile -t check < <(python3 -c "import json; print(*json.load(open('$WORK/image.json'))['Docker']['config']['Healthcheck']['Test'][1:], sep='\n')")
    inside env "EDGE_PHI3_PORT=$port" "${check[@]}" || fail "the health check fails"
    grep -q "all layers on the CPU" "$WORK/container.log" || log "it does not say where the model runs"
    say "the CPU backend is $(inside sh -c 'grep -o "libggml-cpu[a-z0-9_.-]*\.so" /proc/1/maps | sort -u')"

    answer="$(curl --silent --show-error --fail --max-time 120 "http://127.0.0.1:$port/chat" -H 'Content-Type: application/json' \
        -d '{"prompt": "<|user|>\nWhat does json.dumps do?<|end|>\n<|assistant|>\n", "return_full_text": false, "generate_kwargs": {"do_sample": false}}')"
    say "POST /chat: $answer"
    python3 -c 'import json, sys; sys.exit(not json.loads(sys.argv[1])["Result"].strip())' "$answer" || fail "the answer is empty"
    for path in / /docs /openapi.json /version /metrics /metrics/prometheus /readyz; do
        curl --silent --show-error --fail --output /dev/null "http://127.0.0.1:$port$path" || fail "$path is not answered"
    done

    say "memory so far: $(inside sh -c 'grep -E "VmHWM|RssAnon" /proc/1/status' | tr -s '\t\n ' ' ')"

    started=$(date +%s%N)
    runc --root "$WORK/runc" kill "$container" TERM
    wait "$running" || status=$?
    [ "$status" = 0 ] || log "it ended with $status after SIGTERM"
    say "ended with 0, $((($(date +%s%N) - started) / 1000000)) ms after SIGTERM"
}

say "a container as OpenShift has it: any user, group 0, root read-only, no capabilities; it converts and quantises the demo model"
new_volume
serve_and_ask rw 1000680000 0
say "a container: user 10001, root read-only, no capabilities; it converts and quantises the demo model"
new_volume
serve_and_ask rw
say "another on the same volume, read-only now, as the chart mounts it"
serve_and_ask ro
# What the CUDA image is on a machine without NVIDIA's driver: it has a backend that asks for a libcuda.so.1 which is not there.
if [ ! -d "$backends" ]; then
    say "all is well; the wheel has no backends of its own, so that none for CUDA was tried"
    exit
fi
say "another with a CUDA backend, and no driver"
sed 's/libgomp\.so\.1/libcuda.so.1/g' "$(find "$backends" -name 'libggml-cpu-*.so' -print -quit)" > "$backends/libggml-cuda.so"
if chroot "$rootfs" env LD_LIBRARY_PATH="${site#"$rootfs"}/llama_cpp/lib" python3 -c 'import ctypes; ctypes.CDLL("/opt/edge-phi3/lib/ggml/libggml-cuda.so")' 2> "$WORK/cuda.log"; then
    fail "the CUDA backend that stands in can be loaded"
fi
grep -q libcuda.so.1 "$WORK/cuda.log" || fail "the CUDA backend that stands in fails for another reason: $(tail -n 1 "$WORK/cuda.log")"
serve_and_ask ro
say "all is well"
